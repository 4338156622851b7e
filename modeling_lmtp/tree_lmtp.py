r"""Draft trees: which candidates are verified together, and which of them see each other.

Node 0 is the root, the last token emitted. Nodes `1 … N` are candidates, parents first, ordered by depth. A
node at depth `a` proposes a token for draft distance `a`; its rank says which: 0 is the leap head's most
likely token, 1 the next one. The example used by docs and tests, with the paths
`(0), (1), (0, 0), (0, 1), (0, 0, 0)`:

    node      0 ── 1 ── 3 ── 5        parents  (0, 0, 1, 1, 3)
               \    \── 4             ranks    (0, 1, 0, 1, 0)
                \── 2                 depths   (0, 1, 1, 2, 2, 3)
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

MAX_CHILDREN = 10  # per node of a tree that is grown, as in arXiv 2505.17505
MAX_NODES = 64  # root included; verifying more costs more than it can gain


@dataclass(frozen=True)
class DraftTree:
    """The structure of a tree of candidates; a drafter fills in the tokens.

    Args:
        parents: `parents[n - 1]` is the parent of node `n`; parents have smaller numbers.
        ranks: `ranks[n - 1]` is the rank of node `n` among its head's candidates.
    """

    parents: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()

    @classmethod
    def from_paths(cls, paths: Iterable[Sequence[int]]) -> "DraftTree":
        """Build a tree from its nodes' paths: the ranks from the root to each node.

        Raises:
            ValueError: `paths` is no list of paths; or a path is empty, repeated, has a negative rank, or
                has no parent.
        """
        try:
            ordered = sorted((tuple(path) for path in paths), key=lambda path: (len(path), path))
        except TypeError:
            raise ValueError(
                "A draft tree must be a list of paths, each a list of ranks, such as "
                f"[[0], [1], [0, 0]], got {paths!r}."
            ) from None
        numbers: dict[tuple[int, ...], int] = {(): 0}
        for path in ordered:
            _check_path(path, numbers)
            numbers[path] = len(numbers)
        if len(numbers) > MAX_NODES:
            raise ValueError(
                f"The draft tree has {len(numbers) - 1} nodes, at most {MAX_NODES - 1} are allowed."
            )
        return cls(
            parents=tuple(numbers[path[:-1]] for path in ordered),
            ranks=tuple(path[-1] for path in ordered),
        )

    @classmethod
    def chain(cls, length: int) -> "DraftTree":
        """Return the top-1 chain: one candidate per distance."""
        return cls(parents=tuple(range(length)), ranks=(0,) * length)

    @cached_property
    def paths(self) -> tuple[tuple[int, ...], ...]:
        """The ranks from the root to each candidate, as `from_paths` takes them."""
        paths: list[tuple[int, ...]] = [()]
        for parent, rank in zip(self.parents, self.ranks, strict=True):
            paths.append((*paths[parent], rank))
        return tuple(paths[1:])

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """The depth of each node, `(1 + N,)`: its position minus the root's."""
        return (0, *(len(path) for path in self.paths))

    @property
    def num_nodes(self) -> int:
        """The number of candidates `N`, without the root."""
        return len(self.parents)

    @property
    def depth(self) -> int:
        """The largest draft distance."""
        return self.depths[-1]

    @cached_property
    def is_chain(self) -> bool:
        """Whether there is one candidate per distance."""
        return self.parents == tuple(range(self.num_nodes))

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """The children of each node, `(1 + N,)`, best rank first."""
        children: list[list[int]] = [[] for _ in range(1 + self.num_nodes)]
        for node, parent in enumerate(self.parents, start=1):
            children[parent].append(node)
        return tuple(tuple(sorted(nodes, key=lambda n: self.ranks[n - 1])) for nodes in children)

    def child(self, node: int, token: int, candidates: Sequence[int]) -> int | None:
        """Return the child of `node` that proposes `token`, or None; `candidates[n - 1]` is node `n`'s."""
        return next((n for n in self.children[node] if candidates[n - 1] == token), None)

    def truncate(self, depth: int) -> "DraftTree":
        """Return the tree without the nodes deeper than `depth`."""
        num_nodes = sum(1 for node_depth in self.depths[1:] if node_depth <= depth)
        return DraftTree(self.parents[:num_nodes], self.ranks[:num_nodes])

    @cached_property
    def visible(self) -> torch.Tensor:
        """`(1 + N, 1 + N)` booleans: `[i, j]` is whether `j` is `i` or an ancestor of `i`."""
        rows = [[True] + [False] * self.num_nodes]
        for node, parent in enumerate(self.parents, start=1):
            row = list(rows[parent])
            row[node] = True
            rows.append(row)
        return torch.tensor(rows)


def _check_path(path: tuple[int, ...], numbers: dict[tuple[int, ...], int]) -> None:
    if not path or any(isinstance(r, bool) or not isinstance(r, int) or r < 0 for r in path):
        raise ValueError(
            f"A path of the draft tree must be a non-empty list of ranks (0 or more), got {path}."
        )
    if path in numbers:
        raise ValueError(f"The draft tree has the path {path} twice.")
    if path[:-1] not in numbers:
        raise ValueError(
            f"The draft tree's node {path} has no parent: add the path {path[:-1]}, or drop the node."
        )


def grow_tree(
    accuracies: Sequence[Sequence[float]],
    num_nodes: int,
    threshold: float = 0.0,
    max_children: int = MAX_CHILDREN,
) -> DraftTree:
    """Grow the tree with the largest expected acceptance length.

    A node's value is the product of the accuracies on its path, as if they were independent. The tree
    consists of the most valuable nodes, which always form a tree (greedy, as in Medusa, arXiv
    2401.10774).

    Args:
        accuracies: `accuracies[a - 1][r]` is how often the rank-`r` candidate for distance `a` is right, as
            measured on held-out text.
        num_nodes: the number of candidates; the tree has fewer if there are no more.
        threshold: leave out nodes with a smaller value.
        max_children: the number of ranks to consider per node.
    """
    if not 0 <= num_nodes < MAX_NODES:
        raise ValueError(f"num_nodes must be from 0 to {MAX_NODES - 1}, got {num_nodes}.")
    paths: list[tuple[int, ...]] = []
    frontier: list[tuple[float, tuple[int, ...]]] = []

    def offer_children(value: float, path: tuple[int, ...]) -> None:
        at_next_distance = accuracies[len(path)] if len(path) < len(accuracies) else ()
        for rank, accuracy in enumerate(at_next_distance[:max_children]):
            if accuracy > 0 and value * accuracy >= threshold:
                heapq.heappush(frontier, (-value * accuracy, (*path, rank)))

    offer_children(1.0, ())
    while frontier and len(paths) < num_nodes:
        negative_value, path = heapq.heappop(frontier)
        paths.append(path)
        offer_children(-negative_value, path)
    return DraftTree.from_paths(paths)
