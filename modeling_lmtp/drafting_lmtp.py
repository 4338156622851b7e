"""Drafters: where candidates come from.

Shapes: `B` batch, `L` known tokens, `S` last states known, `H` hidden size, `N` candidates, `D` draft
vocabulary size, `c` context width.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .context_lmtp import embed_context
from .heads_lmtp import LeapHead
from .leaps_lmtp import Draft, draftable, drafts, num_draft_states
from .tree_lmtp import DraftTree


class Drafter(ABC):
    """Proposes candidates for the tokens after the last one emitted.

    Attributes:
        num_states: how many of the last hidden states `draft` wants to see.
    """

    num_states: int = 1

    @abstractmethod
    def draft(
        self, input_ids: torch.Tensor, hidden_states: torch.Tensor, max_depth: int
    ) -> tuple[DraftTree, torch.Tensor]:
        """Propose a tree of candidates.

        Args:
            input_ids: `(B, L)`, all tokens known; the last one is the root of the tree.
            hidden_states: `(B, S, H)`, states of the tokens before the root, the latest last;
                `S` is at most `num_states`, fewer right after a short prompt.
            max_depth: no candidate may lie deeper, because no token may follow there.

        Returns:
            The tree and its candidates' token ids, `(B, N)`; `N = 0` drafts nothing.
        """


class _HeadInputs(NamedTuple):
    """What one head reads to draft: states and following tokens, counted from the end."""

    states: torch.Tensor  # (n,), one for each distance that the head serves
    tokens: torch.Tensor  # (n, c)
    visible: torch.Tensor  # (n, c): which of the tokens are known


class _Plan(NamedTuple):
    """What drafting with one tree needs."""

    tree: DraftTree
    inputs: tuple[_HeadInputs, ...]  # per head
    rows: torch.Tensor  # (N,): a candidate's row among the heads' outputs
    ranks: torch.Tensor  # (N,)


class LeapHeadDrafter(Drafter):
    """Drafts with leap heads, looking backward (arXiv 2505.17505).

    Each draft distance is served by one head and one earlier state, see `leaps_lmtp.drafts`, so a
    draft needs no backbone pass of its own.

    Args:
        leap_heads: one head per offset.
        offsets: their offsets.
        context_widths: how many following tokens each head sees, see `context_lmtp`.
        embeddings: the backbone's input embeddings.
        unembeddings: one per head, often the same.
        draft_token_ids: `(D,)`, the token of each row of the logits; None for the whole vocabulary.
        tree: the tree to fill; it may not be deeper than the heads can draft.
    """

    def __init__(
        self,
        leap_heads: Sequence[LeapHead],
        offsets: Sequence[int],
        context_widths: Sequence[int],
        embeddings: nn.Module,
        unembeddings: Sequence[Any],
        draft_token_ids: torch.Tensor | None,
        tree: DraftTree,
    ) -> None:
        self.leap_heads = leap_heads
        self.context_widths = context_widths
        self.embeddings = embeddings
        self.unembeddings = unembeddings
        self.draft_token_ids = draft_token_ids
        self.tree = tree
        self.schedule = drafts(offsets)[: tree.depth]
        self.num_states = max(1, num_draft_states(self.schedule))
        self._plans: dict[int, _Plan] = {}

    def draft(
        self, input_ids: torch.Tensor, hidden_states: torch.Tensor, max_depth: int
    ) -> tuple[DraftTree, torch.Tensor]:
        """Fill the tree, cut to the positions that have a state and may be emitted."""
        schedule = draftable(self.schedule, hidden_states.shape[1])[: max(max_depth, 0)]
        plan = self._plans.get(len(schedule))
        if plan is None:
            plan = self._plans[len(schedule)] = self._plan(schedule, hidden_states.device)
        if plan.tree.num_nodes == 0:
            return plan.tree, input_ids[:, :0]
        logits = self._logits(input_ids, hidden_states, plan.inputs)
        ranked = logits.topk(int(plan.ranks.max()) + 1, dim=-1).indices
        candidates = ranked[:, plan.rows, plan.ranks]
        if self.draft_token_ids is not None:
            candidates = self.draft_token_ids[candidates]
        return plan.tree, candidates

    def _plan(self, schedule: Sequence[Draft], device: torch.device) -> _Plan:
        by_head: list[list[Draft]] = [[] for _ in self.leap_heads]
        for draft in schedule:
            by_head[draft.head].append(draft)
        distances = [draft.distance for drafts_of_head in by_head for draft in drafts_of_head]
        row_of = {distance: row for row, distance in enumerate(distances)}
        tree = self.tree.truncate(len(schedule))
        return _Plan(
            tree,
            tuple(
                _head_inputs([draft.look_back for draft in drafts_of_head], width, device)
                for drafts_of_head, width in zip(by_head, self.context_widths, strict=True)
            ),
            torch.tensor([row_of[depth] for depth in tree.depths[1:]], device=device),
            torch.tensor(tree.ranks, device=device),
        )

    def _logits(
        self, input_ids: torch.Tensor, hidden_states: torch.Tensor, inputs: Sequence[_HeadInputs]
    ) -> torch.Tensor:
        """Return `(B, distances, D)`; the rows follow the heads, then each head's look-backs."""
        features, unembeddings = [], []
        for head, unembedding, read in zip(self.leap_heads, self.unembeddings, inputs, strict=True):
            if not len(read.states):
                continue
            context = None
            if head.context is not None:
                context = embed_context(self.embeddings, input_ids[:, read.tokens], read.visible)
            features.append(head(hidden_states[:, read.states], context))
            unembeddings.append(unembedding)
        if all(unembedding is unembeddings[0] for unembedding in unembeddings):
            return unembeddings[0](torch.cat(features, dim=1))
        logits = [unembed(part) for unembed, part in zip(unembeddings, features, strict=True)]
        return torch.cat(logits, dim=1)


def _head_inputs(look_backs: Sequence[int], width: int, device: torch.device) -> _HeadInputs:
    """From the state `s = t - j` the known tokens are `x_{s+1} … x_{t+1}`, the last one the root."""
    tokens = [[-1 - look_back + g for g in range(width)] for look_back in look_backs]
    shape = (len(look_backs), width)
    indices = torch.tensor(tokens, dtype=torch.long, device=device).reshape(shape)
    return _HeadInputs(
        states=torch.tensor([-1 - j for j in look_backs], dtype=torch.long, device=device),
        tokens=indices.clamp(max=-1),
        visible=indices < 0,
    )
