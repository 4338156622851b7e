"""Drafting with path-grounded leap heads, level by level: each node is drafted from the tokens on its path.

The backbone still runs once per step. Each level of the tree takes one pass of one head over the nodes that
have children, where other leap heads take one pass for all levels.

Shapes: `B` batch, `L` known tokens, `S` known states, `H` hidden size, `N` candidates, `n` nodes of a level
that have children, `D` draft vocabulary size.
"""

import math
from itertools import islice
from typing import NamedTuple

import torch

from .drafting_lmtp import Candidates, tree_from_paths
from .leap_drafter_lmtp import DraftHeads, LeapHeadDrafter
from .leaps_lmtp import embed_context
from .tree_lmtp import MAX_CHILDREN, DraftTree

MAX_PARENTS = 8  # nodes per level that a dynamic tree expands; bounds the cost of a head's pass


class PathDrafter(LeapHeadDrafter):
    """Fills a static tree, each level given the one before it.

    Args:
        heads: path-grounded heads: each sees `offset - 1` following tokens.
        tree: the tree to fill; not deeper than `heads.horizon`.
    """

    def __init__(self, heads: DraftHeads, tree: DraftTree) -> None:
        super().__init__(heads, tree)
        self._levels: dict[DraftTree, list[_Level]] = {}

    def draft(
        self, input_ids: torch.Tensor, hidden_states: torch.Tensor, max_depth: int
    ) -> Candidates:
        """Fill the tree, truncated to the distances that have a state and may be emitted."""
        depth = self._depth(hidden_states, max_depth)
        tree, _, _ = self._truncated(depth, hidden_states.device)
        if tree.num_nodes == 0:
            return Candidates.none(input_ids)
        if tree not in self._levels:
            self._levels[tree] = _levels(tree, hidden_states.device)
        token_ids = input_ids.new_zeros((input_ids.shape[0], 1 + tree.num_nodes))
        for distance, level in enumerate(self._levels[tree], start=1):
            paths = token_ids[:, level.paths]
            logits = self._level_logits(distance, input_ids, hidden_states, paths)
            ranked = logits.topk(level.num_ranks, dim=-1).indices
            drafted = ranked[:, level.parents, level.ranks]
            token_ids[:, level.nodes] = self.heads.to_token_ids(drafted)
        return Candidates((tree,) * input_ids.shape[0], token_ids[:, 1:])

    def _level_logits(
        self,
        distance: int,
        input_ids: torch.Tensor,
        hidden_states: torch.Tensor,
        paths: torch.Tensor,
    ) -> torch.Tensor:
        """Return the logits `(B, n, D)` for a distance after each path `(B, n, distance - 1)`."""
        draft = self.schedule[distance - 1]
        num_paths = paths.shape[1]
        known = input_ids[:, None, -1 - draft.look_back :].expand(-1, num_paths, -1)
        context = embed_context(self.heads.embeddings, torch.cat([known, paths], dim=-1))
        states = hidden_states[:, None, -1 - draft.look_back].expand(-1, num_paths, -1)
        features = self.heads.leap_heads(draft.head, states, context)
        return self.heads.unembeddings[draft.head](features)


class _Level(NamedTuple):
    """One level of a static tree."""

    paths: torch.Tensor  # (n, distance - 1): the nodes on the path to each parent, parent included
    nodes: torch.Tensor  # the level's nodes
    parents: torch.Tensor  # the row of each node's parent in `paths`
    ranks: torch.Tensor  # the rank of each node
    num_ranks: int


def _levels(tree: DraftTree, device: torch.device) -> list[_Level]:
    node_paths: list[tuple[int, ...]] = [()]
    for node, parent in enumerate(tree.parents, start=1):
        node_paths.append((*node_paths[parent], node))
    levels = []
    for distance in range(1, tree.depth + 1):
        nodes = [node for node, path in enumerate(node_paths) if len(path) == distance]
        parents = sorted({tree.parents[node - 1] for node in nodes})
        paths = torch.tensor([node_paths[parent] for parent in parents], dtype=torch.long)
        ranks = [tree.ranks[node - 1] for node in nodes]
        levels.append(
            _Level(
                paths.reshape(len(parents), distance - 1).to(device),
                torch.tensor(nodes, device=device),
                torch.tensor([parents.index(tree.parents[n - 1]) for n in nodes], device=device),
                torch.tensor(ranks, device=device),
                1 + max(ranks),
            )
        )
    return levels


class DynamicPathDrafter(PathDrafter):
    """Grows a new tree for every state, of the paths that the heads consider most likely there.

    A path's value is the product of its tokens' probabilities, each given the tokens before it. With up to
    `MAX_PARENTS` nodes these are the best of all paths. A larger tree may miss some, because only the best
    `MAX_PARENTS` paths of each level are expanded.

    Args:
        heads: path-grounded heads.
        num_nodes: at most that many candidates per row and step.
        threshold: draft no path that is less probable.
    """

    def __init__(self, heads: DraftHeads, num_nodes: int, threshold: float = 0.0) -> None:
        # A tree is no deeper than it has nodes
        super().__init__(heads, DraftTree.chain(min(heads.horizon, num_nodes)))
        self.num_nodes = self.max_nodes = num_nodes
        # A level that has children leaves at least one of the nodes to them
        self.num_parents = min(MAX_PARENTS, max(1, num_nodes - 1))
        self.min_value = math.log(threshold) if threshold else -math.inf

    def draft(
        self, input_ids: torch.Tensor, hidden_states: torch.Tensor, max_depth: int
    ) -> Candidates:
        """Grow a tree per row by beam search over the levels, and keep the best paths of all levels."""
        depth = self._depth(hidden_states, max_depth)
        if depth == 0:
            return Candidates.none(input_ids)
        batch_size = input_ids.shape[0]
        paths = input_ids.new_zeros((batch_size, 1, 0))
        values = torch.zeros((batch_size, 1), device=input_ids.device)
        levels: list[tuple[torch.Tensor, torch.Tensor]] = []
        for distance in range(1, depth + 1):
            logits = self._level_logits(distance, input_ids, hidden_states, paths).float()
            best = logits.log_softmax(dim=-1).topk(min(MAX_CHILDREN, logits.shape[-1]), dim=-1)
            child_values = (values[..., None] + best.values).flatten(1)
            top = child_values.topk(min(self.num_nodes, child_values.shape[1]), dim=-1)
            parents = top.indices // best.indices.shape[-1]
            tokens = self.heads.to_token_ids(best.indices).flatten(1).gather(1, top.indices)
            to_parents = paths.gather(1, parents[..., None].expand(-1, -1, distance - 1))
            children = torch.cat([to_parents, tokens[..., None]], dim=-1)
            levels.append((top.values, children))
            values, paths = top.values[:, : self.num_parents], children[:, : self.num_parents]
        grown = [tree_from_paths(self._best(scored)) for scored in _on_host(levels)]
        return Candidates.from_rows(
            [tree for tree, _ in grown], [token_ids for _, token_ids in grown], input_ids
        )

    def _best(self, scored: list[tuple[float, tuple[int, ...]]]) -> list[tuple[int, ...]]:
        """Return the most likely paths. None is likelier than its parent, so they form a tree."""
        likely = [item for item in scored if item[0] >= self.min_value]
        likely.sort(key=lambda item: (-item[0], len(item[1])))
        return [path for _, path in likely[: self.num_nodes]]


def _on_host(
    levels: list[tuple[torch.Tensor, torch.Tensor]],
) -> list[list[tuple[float, tuple[int, ...]]]]:
    """Return each row's values and paths, moving all levels to the host in two transfers.

    Args:
        levels: per distance, values `(B, n)` and paths `(B, n, distance)`; `n` may differ.
    """
    shapes = [paths.shape[1:] for _, paths in levels]
    all_values = torch.cat([values for values, _ in levels], dim=1).tolist()
    all_tokens = torch.cat([paths.flatten(1) for _, paths in levels], dim=1).tolist()
    rows = []
    for values, tokens in zip(all_values, map(iter, all_tokens), strict=True):
        paths = [tuple(islice(tokens, depth)) for count, depth in shapes for _ in range(count)]
        rows.append(list(zip(values, paths, strict=True)))
    return rows
