"""Drafters: where candidates come from.

Shapes: `B` batch, `L` known tokens, `S` last states known, `H` hidden size, `N` candidates.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

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


class _Plan(NamedTuple):
    """What drafting with one tree needs: which states each head reads, and where candidates lie."""

    tree: DraftTree
    look_backs: tuple[torch.Tensor, ...]  # per head, indices from the end of the states
    rows: torch.Tensor  # (N,): a candidate's row among the heads' outputs
    ranks: torch.Tensor  # (N,)


class LeapHeadDrafter(Drafter):
    """Drafts with leap heads, looking backward (arXiv 2505.17505).

    Each draft distance is served by one head and one earlier state, see `leaps_lmtp.drafts`, so a
    draft needs no backbone pass of its own.

    Args:
        leap_heads: one head per offset.
        offsets: their offsets.
        unembedding: the backbone's, for heads that have none of their own.
        tree: the tree to fill; it may not be deeper than the heads can draft.
    """

    def __init__(
        self,
        leap_heads: Sequence[LeapHead],
        offsets: Sequence[int],
        unembedding: nn.Module,
        tree: DraftTree,
    ) -> None:
        self.leap_heads = leap_heads
        self.unembedding = unembedding
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
        logits = self._logits(hidden_states, plan.look_backs)
        ranked = logits.topk(int(plan.ranks.max()) + 1, dim=-1).indices
        return plan.tree, ranked[:, plan.rows, plan.ranks]

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
                torch.tensor([-1 - draft.look_back for draft in drafts_of_head], device=device)
                for drafts_of_head in by_head
            ),
            torch.tensor([row_of[depth] for depth in tree.depths[1:]], device=device),
            torch.tensor(tree.ranks, device=device),
        )

    def _logits(
        self, hidden_states: torch.Tensor, look_backs: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Return `(B, distances, V)`; the rows follow the heads, then each head's look-backs."""
        used = [(h, i) for h, i in zip(self.leap_heads, look_backs, strict=True) if len(i)]
        features = [head(hidden_states[:, index]) for head, index in used]
        if used[0][0].lm_head is None:
            return self.unembedding(torch.cat(features, dim=1))
        unembeddings = [head.lm_head or self.unembedding for head, _ in used]
        logits = [u(x) for u, x in zip(unembeddings, features, strict=True)]
        return torch.cat(logits, dim=1)
