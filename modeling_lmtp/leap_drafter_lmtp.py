"""Drafting with leap heads, looking backward (arXiv 2505.17505).

Shapes: `B` batch, `L` known tokens, `S` known states, `H` hidden size, `N` candidates, `D` draft vocabulary
size, `c` context width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import nn

from .drafting_lmtp import HEAD, Candidates, Drafter, Proposal, ProposingDrafter
from .heads_lmtp import LeapHeads
from .leaps_lmtp import draftable, drafts, embed_context, num_draft_states
from .tree_lmtp import MAX_CHILDREN, DraftTree, grow_tree
from .unembeddings_lmtp import HeadUnembedding, unembed


@dataclass(frozen=True)
class DraftHeads:
    """The parts of a model that its drafters use, see `LMTPForCausalLM.draft_heads`.

    Args:
        leap_heads: one head per offset, or PEFT's wrapper around them.
        offsets: the heads' offsets.
        context_widths: how many following tokens each head sees, see `leaps_lmtp`.
        is_path_grounded: whether heads also see the tokens drafted before theirs on the same path.
        embeddings: the backbone's input embeddings.
        unembeddings: one per head, often sharing a matrix.
        token_ids: `(D,)`, the token of each row of the logits; None for the whole vocabulary.
    """

    leap_heads: LeapHeads | nn.Module
    offsets: Sequence[int]
    context_widths: Sequence[int]
    is_path_grounded: bool
    embeddings: nn.Module
    unembeddings: Sequence[HeadUnembedding]
    token_ids: torch.Tensor | None

    @property
    def horizon(self) -> int:
        """The largest distance that the heads can draft."""
        return len(drafts(self.offsets))

    def to_token_ids(self, indices: torch.Tensor) -> torch.Tensor:
        """Map indices of the draft vocabulary to token ids, in any shape."""
        return indices if self.token_ids is None else self.token_ids.to(indices.device)[indices]


class _HeadInputs(NamedTuple):
    """Which states and tokens one head reads; indices count from the end."""

    head: int
    states: torch.Tensor  # (n,), one for each distance that the head serves
    tokens: torch.Tensor  # (n, c)
    visible: torch.Tensor  # (n, c): which of the tokens are known


class LeapHeadDrafter(Drafter):
    """Fills a static tree with each head's most likely tokens.

    One head and one earlier state serve each draft distance (see `leaps_lmtp.drafts`), so a draft needs no
    backbone pass of its own.

    Args:
        heads: the model's heads.
        tree: the tree to fill; not deeper than `heads.horizon`.
    """

    def __init__(self, heads: DraftHeads, tree: DraftTree) -> None:
        self.heads = heads
        self.tree = tree
        self.schedule = drafts(heads.offsets)[: tree.depth]
        self.num_states = max(1, num_draft_states(self.schedule))
        self.max_nodes = tree.num_nodes
        self._inputs: dict[int, list[_HeadInputs]] = {}
        self._trees: dict[int, tuple[DraftTree, torch.Tensor, torch.Tensor]] = {}

    def draft(
        self, input_ids: torch.Tensor, hidden_states: torch.Tensor, max_depth: int
    ) -> Candidates:
        """Fill the tree, truncated to the distances that have a state and may be emitted."""
        depth = self._depth(hidden_states, max_depth)
        tree, distances, ranks = self._truncated(depth, hidden_states.device)
        if tree.num_nodes == 0:
            return Candidates.none(input_ids)
        logits = self._logits(input_ids, hidden_states, depth)
        ranked = logits.topk(1 + max(tree.ranks), dim=-1).indices
        token_ids = self.heads.to_token_ids(ranked[:, distances, ranks])
        num_rows, sources = input_ids.shape[0], (HEAD,) * tree.num_nodes
        return Candidates((tree,) * num_rows, token_ids, sources=(sources,) * num_rows)

    def _depth(self, hidden_states: torch.Tensor, max_depth: int) -> int:
        """Return the largest distance that has a state and may be emitted."""
        return min(len(draftable(self.schedule, hidden_states.shape[1])), max_depth)

    def _truncated(
        self, depth: int, device: torch.device
    ) -> tuple[DraftTree, torch.Tensor, torch.Tensor]:
        """Return the truncated tree, and each node's 0-based distance and rank, `(N,)`."""
        if depth not in self._trees:
            tree = self.tree.truncate(depth)
            distances = torch.tensor(tree.depths[1:], dtype=torch.long, device=device) - 1
            ranks = torch.tensor(tree.ranks, dtype=torch.long, device=device)
            self._trees[depth] = tree, distances, ranks
        return self._trees[depth]

    def _logits(
        self, input_ids: torch.Tensor, hidden_states: torch.Tensor, depth: int
    ) -> torch.Tensor:
        """Return the heads' logits for distances `1 … depth`, `(B, depth, D)`."""
        if depth not in self._inputs:
            self._inputs[depth] = self._inputs_up_to(depth, hidden_states.device)
        heads, inputs = self.heads, self._inputs[depth]
        features = []
        for read in inputs:
            context = None
            if heads.context_widths[read.head]:
                context = embed_context(heads.embeddings, input_ids[:, read.tokens], read.visible)
            features.append(heads.leap_heads(read.head, hidden_states[:, read.states], context))
        return unembed([heads.unembeddings[read.head] for read in inputs], features)

    def _inputs_up_to(self, depth: int, device: torch.device) -> list[_HeadInputs]:
        # A head serves consecutive distances, so it runs once for all of them
        by_head = groupby(self.schedule[:depth], key=lambda draft: draft.head)
        return [
            _head_inputs(
                head, [draft.look_back for draft in served], self.heads.context_widths[head], device
            )
            for head, served in by_head
        ]


class ProposingLeapHeadDrafter(LeapHeadDrafter, ProposingDrafter):
    """Proposes the paths that the heads consider most likely, as if they were independent.

    Args:
        heads: the model's heads.
        num_nodes: at most that many candidates per row and step.
    """

    def __init__(self, heads: DraftHeads, num_nodes: int) -> None:
        # A tree is no deeper than it has nodes
        super().__init__(heads, DraftTree.chain(min(heads.horizon, num_nodes)))
        self.num_nodes = self.max_nodes = num_nodes

    def propose(
        self,
        input_ids: torch.Tensor,
        hidden_states: torch.Tensor,
        max_depth: int,
        min_value: float = 0.0,
    ) -> list[list[Proposal]]:
        """Grow a tree per row."""
        depth = self._depth(hidden_states, max_depth)
        if depth == 0:
            return [[] for _ in range(input_ids.shape[0])]
        probabilities = self._logits(input_ids, hidden_states, depth).float().softmax(dim=-1)
        best = probabilities.topk(min(MAX_CHILDREN, probabilities.shape[-1]), dim=-1)
        token_ids = self.heads.to_token_ids(best.indices).tolist()
        return [
            _proposals(grow_tree(values, self.num_nodes, min_value), values, tokens)
            for values, tokens in zip(best.values.tolist(), token_ids, strict=True)
        ]


def _proposals(
    tree: DraftTree, probabilities: Sequence[Sequence[float]], token_ids: Sequence[Sequence[int]]
) -> list[Proposal]:
    """Return the nodes of a tree, given the values and tokens of each distance's ranks."""
    return [
        Proposal(
            tuple(token_ids[distance][rank] for distance, rank in enumerate(path)),
            len(path),
            probabilities[len(path) - 1][path[-1]],
        )
        for path in tree.paths
    ]


def _head_inputs(
    head: int, look_backs: Sequence[int], width: int, device: torch.device
) -> _HeadInputs:
    """From the state `s = t - j`, the known tokens are `x_{s+1} … x_{t+1}`; the last one is the root."""
    tokens = [[-1 - look_back + g for g in range(width)] for look_back in look_backs]
    shape = (len(look_backs), width)
    indices = torch.tensor(tokens, dtype=torch.long, device=device).reshape(shape)
    return _HeadInputs(
        head,
        states=torch.tensor([-1 - j for j in look_backs], dtype=torch.long, device=device),
        tokens=indices.clamp(max=-1),
        visible=indices < 0,
    )
