"""Drafting with leap heads, looking backward (arXiv 2505.17505).

Shapes: `B` batch, `L` known tokens, `S` last states known, `H` hidden size, `N` candidates, `D` draft
vocabulary size, `c` context width.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import nn

from .context_lmtp import embed_context
from .drafting_lmtp import Candidates, Drafter
from .heads_lmtp import LeapHeads
from .leaps_lmtp import draftable, drafts, num_draft_states
from .tree_lmtp import MAX_CHILDREN, DraftTree, grow_tree
from .unembeddings_lmtp import HeadUnembedding, unembed


class _HeadInputs(NamedTuple):
    """What one head reads to draft: states and following tokens, counted from the end."""

    head: int
    states: torch.Tensor  # (n,), one for each distance that the head serves
    tokens: torch.Tensor  # (n, c)
    visible: torch.Tensor  # (n, c): which of the tokens are known


class LeapHeadDrafter(Drafter):
    """Fills a static tree with what leap heads hold most likely.

    Each draft distance is served by one head and one earlier state, see `leaps_lmtp.drafts`, so a
    draft needs no backbone pass of its own.

    Args:
        leap_heads: one head per offset, PEFT's wrapper around them or not.
        offsets: their offsets.
        context_widths: how many following tokens each head sees, see `context_lmtp`.
        embeddings: the backbone's input embeddings.
        unembeddings: one per head, often sharing a matrix.
        draft_token_ids: `(D,)`, the token of each row of the logits; None for the whole vocabulary.
        tree: the tree to fill; it may not be deeper than the heads can draft.
    """

    def __init__(
        self,
        leap_heads: LeapHeads | nn.Module,
        offsets: Sequence[int],
        context_widths: Sequence[int],
        embeddings: nn.Module,
        unembeddings: Sequence[HeadUnembedding],
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
        self.max_nodes = tree.num_nodes
        self._plans: dict[int, list[_HeadInputs]] = {}
        self._trees: dict[int, tuple[DraftTree, torch.Tensor, torch.Tensor]] = {}

    def draft(
        self, input_ids: torch.Tensor, hidden_states: torch.Tensor, max_depth: int
    ) -> Candidates:
        """Fill the tree, cut to the positions that have a state and may be emitted."""
        depth = self._depth(hidden_states, max_depth)
        tree, distances, ranks = self._cut(depth, hidden_states.device)
        if tree.num_nodes == 0:
            return Candidates.none(input_ids)
        logits = self._logits(input_ids, hidden_states, depth)
        ranked = logits.topk(1 + max(tree.ranks), dim=-1).indices
        token_ids = self._token_ids(ranked[:, distances, ranks])
        return Candidates((tree,) * input_ids.shape[0], token_ids)

    def _depth(self, hidden_states: torch.Tensor, max_depth: int) -> int:
        """How deep can be drafted: each distance needs a state, and a token there needs room."""
        return min(len(draftable(self.schedule, hidden_states.shape[1])), max_depth)

    def _cut(
        self, depth: int, device: torch.device
    ) -> tuple[DraftTree, torch.Tensor, torch.Tensor]:
        """The tree cut to a depth, and for each node its distance, from 0, and its rank, `(N,)`."""
        if depth not in self._trees:
            tree = self.tree.truncate(depth)
            distances = torch.tensor(tree.depths[1:], dtype=torch.long, device=device) - 1
            ranks = torch.tensor(tree.ranks, dtype=torch.long, device=device)
            self._trees[depth] = tree, distances, ranks
        return self._trees[depth]

    def _token_ids(self, indices: torch.Tensor) -> torch.Tensor:
        if self.draft_token_ids is None:
            return indices
        return self.draft_token_ids.to(indices.device)[indices]

    def _plan(self, depth: int, device: torch.device) -> list[_HeadInputs]:
        """What the heads read that serve the distances `1 … depth`: each some that follow each other."""
        by_head = groupby(self.schedule[:depth], key=lambda draft: draft.head)
        return [
            _head_inputs(
                head, [draft.look_back for draft in served], self.context_widths[head], device
            )
            for head, served in by_head
        ]

    def _logits(
        self, input_ids: torch.Tensor, hidden_states: torch.Tensor, depth: int
    ) -> torch.Tensor:
        """Return what the heads hold of the distances `1 … depth`, `(B, depth, D)`."""
        if depth not in self._plans:
            self._plans[depth] = self._plan(depth, hidden_states.device)
        plan = self._plans[depth]
        features = []
        for read in plan:
            context = None
            if self.context_widths[read.head]:
                context = embed_context(self.embeddings, input_ids[:, read.tokens], read.visible)
            features.append(self.leap_heads(read.head, hidden_states[:, read.states], context))
        return unembed([self.unembeddings[read.head] for read in plan], features)


class DynamicLeapHeadDrafter(LeapHeadDrafter):
    """Grows a tree of its own for every state, of the paths that the heads hold most likely there.

    A path is worth the product of its tokens' probabilities, as if the heads were independent.

    Args:
        num_nodes: candidates per row and step, at most.
        threshold: no path less probable is drafted.
        heads: as for `LeapHeadDrafter`; its tree says how deep.
    """

    def __init__(self, num_nodes: int, threshold: float, *heads: Any) -> None:
        super().__init__(*heads)
        self.num_nodes = self.max_nodes = num_nodes
        self.threshold = threshold

    def draft(
        self, input_ids: torch.Tensor, hidden_states: torch.Tensor, max_depth: int
    ) -> Candidates:
        """Grow a tree per row."""
        depth = self._depth(hidden_states, max_depth)
        if depth == 0 or self.num_nodes == 0:
            return Candidates.none(input_ids)
        probabilities = self._logits(input_ids, hidden_states, depth).float().softmax(dim=-1)
        best = probabilities.topk(min(MAX_CHILDREN, probabilities.shape[-1]), dim=-1)
        trees = [
            grow_tree(accuracies, self.num_nodes, self.threshold)
            for accuracies in best.values.tolist()
        ]
        return from_ranks(trees, self._token_ids(best.indices).tolist(), input_ids)


def from_ranks(
    trees: Sequence[DraftTree], ranked: Sequence[Sequence[Sequence[int]]], input_ids: torch.Tensor
) -> Candidates:
    """Fill trees with tokens: `ranked[b][a - 1][r]` is row `b`'s rank-`r` token for distance `a`."""
    rows = [
        [of_row[depth - 1][rank] for depth, rank in zip(tree.depths[1:], tree.ranks, strict=True)]
        for tree, of_row in zip(trees, ranked, strict=True)
    ]
    return Candidates.of_rows(trees, rows, input_ids)


def _head_inputs(
    head: int, look_backs: Sequence[int], width: int, device: torch.device
) -> _HeadInputs:
    """From the state `s = t - j` the known tokens are `x_{s+1} … x_{t+1}`, the last one the root."""
    tokens = [[-1 - look_back + g for g in range(width)] for look_back in look_backs]
    shape = (len(look_backs), width)
    indices = torch.tensor(tokens, dtype=torch.long, device=device).reshape(shape)
    return _HeadInputs(
        head,
        states=torch.tensor([-1 - j for j in look_backs], dtype=torch.long, device=device),
        tokens=indices.clamp(max=-1),
        visible=indices < 0,
    )
