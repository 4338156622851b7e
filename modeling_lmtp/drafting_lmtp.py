"""Drafters: where candidates come from, and the one seam where they plug in.

Shapes: `B` batch, `L` known tokens, `S` last states known, `H` hidden size, `N` candidates.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch

from .tree_lmtp import MAX_NODES, DraftTree


@dataclass(frozen=True)
class Candidates:
    """Candidates for each row of a batch.

    Args:
        trees: one tree per row; rows may differ in structure and size.
        token_ids: `(B, N)`, `N` the size of the largest tree; what stands behind the nodes of a
            smaller one is any valid token id and is never accepted.
        rows: the same as lists, where they were made on the host.
    """

    trees: tuple[DraftTree, ...]
    token_ids: torch.Tensor
    rows: list[list[int]] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def none(cls, input_ids: torch.Tensor) -> "Candidates":
        """No candidates for the rows of `input_ids` `(B, L)`."""
        num_rows = input_ids.shape[0]
        return cls((DraftTree(),) * num_rows, input_ids[:, :0], [[] for _ in range(num_rows)])

    @classmethod
    def from_rows(
        cls,
        trees: Sequence[DraftTree],
        token_ids: Sequence[Sequence[int]],
        input_ids: torch.Tensor,
    ) -> "Candidates":
        """Take lists of different lengths, one token per node of each row's tree.

        Args:
            trees: one per row of `input_ids`, `(B, L)`.
            token_ids: per row.
        """
        longest = max(len(row) for row in token_ids)
        padded = [[*row, *[0] * (longest - len(row))] for row in token_ids]
        ids = torch.tensor(padded, dtype=input_ids.dtype, device=input_ids.device)
        return cls(tuple(trees), ids.reshape(len(padded), longest), padded)

    def on_host(self) -> list[list[int]]:
        """Return the tokens as lists; waits for the device only if they come from there."""
        return self.token_ids.tolist() if self.rows is None else self.rows

    @property
    def num_nodes(self) -> int:
        """The number of candidates `N` per row."""
        return self.token_ids.shape[1]

    @property
    def is_shared(self) -> bool:
        """Whether all rows have one tree, of `N` nodes."""
        first = self.trees[0]
        same = all(tree is first or tree == first for tree in self.trees[1:])
        return same and first.num_nodes == self.num_nodes

    @property
    def is_chain(self) -> bool:
        """Whether no row has two candidates for one distance."""
        return all(tree.is_chain for tree in self.trees)

    def to(self, device: torch.device) -> "Candidates":
        """Return the same with `token_ids` on that device."""
        if self.token_ids.device == device:
            return self
        return replace(self, token_ids=self.token_ids.to(device))

    def truncate(self, depths: Sequence[int]) -> "Candidates":
        """Return the draft without the nodes of row `b` that are deeper than `depths[b]`."""
        deepest = max(tree.depth for tree in self.trees)
        if all(depth >= deepest for depth in depths):
            return self
        trees = tuple(
            tree.truncate(max(depth, 0)) for tree, depth in zip(self.trees, depths, strict=True)
        )
        num_nodes = max(tree.num_nodes for tree in trees)
        rows = None if self.rows is None else [row[:num_nodes] for row in self.rows]
        return Candidates(trees, self.token_ids[:, :num_nodes], rows)


def tree_from_paths(texts: Iterable[tuple[int, ...]]) -> tuple[DraftTree, list[int]]:
    """Build a tree from the tokens on the way to each node; return it and each node's token.

    Args:
        texts: one per node, each with its parent's among them; better ones before their siblings.
    """
    ordered = sorted(texts, key=len)
    number = {(): 0, **{text: node for node, text in enumerate(ordered, start=1)}}
    num_children: Counter[tuple[int, ...]] = Counter()
    ranks = []
    for text in ordered:
        ranks.append(num_children[text[:-1]])
        num_children[text[:-1]] += 1
    tree = DraftTree(tuple(number[text[:-1]] for text in ordered), tuple(ranks))
    return tree, [text[-1] for text in ordered]


class Drafter(ABC):
    """Proposes candidates for the tokens after the last one emitted.

    Attributes:
        num_states: how many of the last hidden states `draft` wants to see.
        max_nodes: how many candidates a row is given at most; over a static cache, each pass has room
            for as many.
    """

    num_states: int = 1
    max_nodes: int = MAX_NODES - 1

    @abstractmethod
    def draft(
        self, input_ids: torch.Tensor, hidden_states: torch.Tensor, max_depth: int
    ) -> Candidates:
        """Propose candidates; whatever they are, the text generated stays the same.

        Args:
            input_ids: `(B, L)`, all tokens known, flush right: the last one of each row is the root
                of its tree, and shorter rows begin with tokens of no meaning.
            hidden_states: `(B, S, H)`, states of the tokens before the root, the latest last;
                `S` is at most `num_states`, fewer right after a short prompt.
            max_depth: at least 0; no candidate may lie deeper, because no token may follow there.
        """
