"""Drafting with path-grounded leap heads: level by level, each node by the tokens on its own path.

The backbone still runs once a step. Each level of the tree costs one small pass of one head, over the
nodes that have children, in place of one pass over all levels.

Shapes: `B` batch, `L` known tokens, `S` last states known, `H` hidden size, `N` candidates, `n` nodes of
a level that have children, `D` draft vocabulary size.
"""

import math
from itertools import islice
from typing import Any, NamedTuple

import torch

from .context_lmtp import embed_context
from .drafting_lmtp import Candidates, tree_of_texts
from .leap_drafter_lmtp import LeapHeadDrafter
from .tree_lmtp import MAX_CHILDREN, DraftTree

# Nodes of one level that a dynamic tree goes on from: what bounds the heads' passes over a level
MAX_PARENTS = 8


class PathDrafter(LeapHeadDrafter):
    """Fills a static tree, each level knowing the one before it.

    Args:
        heads: as for `LeapHeadDrafter`, with a context of `offset - 1` tokens each.
    """

    def __init__(self, *heads: Any) -> None:
        super().__init__(*heads)
        self._levels: dict[DraftTree, list[_Level]] = {}

    def draft(
        self, input_ids: torch.Tensor, hidden_states: torch.Tensor, max_depth: int
    ) -> Candidates:
        """Fill the tree, cut to the positions that have a state and may be emitted."""
        tree, _, _ = self._cut(self._depth(hidden_states, max_depth), hidden_states.device)
        if tree.num_nodes == 0:
            return Candidates.none(input_ids)
        if tree not in self._levels:
            self._levels[tree] = _levels(tree, hidden_states.device)
        token_ids = input_ids.new_zeros((input_ids.shape[0], 1 + tree.num_nodes))
        for distance, level in enumerate(self._levels[tree], start=1):
            logits = self._level_logits(
                distance, input_ids, hidden_states, token_ids[:, level.paths]
            )
            ranked = logits.topk(level.num_ranks, dim=-1).indices
            token_ids[:, level.nodes] = self._token_ids(ranked[:, level.rows, level.ranks])
        return Candidates((tree,) * input_ids.shape[0], token_ids[:, 1:])

    def _level_logits(
        self,
        distance: int,
        input_ids: torch.Tensor,
        hidden_states: torch.Tensor,
        paths: torch.Tensor,
    ) -> torch.Tensor:
        """Return what the head of a distance holds after each path `(B, n, distance - 1)`, `(B, n, D)`."""
        served = self.schedule[distance - 1]
        num_paths = paths.shape[1]
        known = input_ids[:, None, -1 - served.look_back :].expand(-1, num_paths, -1)
        tokens = torch.cat([known, paths], dim=-1)
        context = embed_context(self.embeddings, tokens)
        states = hidden_states[:, None, -1 - served.look_back].expand(-1, num_paths, -1)
        features = self.leap_heads(served.head, states, context)
        return self.unembeddings[served.head](features)


class _Level(NamedTuple):
    """One level of a static tree."""

    paths: torch.Tensor  # (n, distance - 1): the nodes on the way to each parent, itself included
    nodes: torch.Tensor  # the level's own nodes
    rows: torch.Tensor  # for each of these its parent's row among the paths
    ranks: torch.Tensor
    num_ranks: int


def _levels(tree: DraftTree, device: torch.device) -> list[_Level]:
    ways: list[tuple[int, ...]] = [()]
    for node, parent in enumerate(tree.parents, start=1):
        ways.append((*ways[parent], node))
    levels = []
    for distance in range(1, tree.depth + 1):
        nodes = [node for node in range(1, len(ways)) if len(ways[node]) == distance]
        parents = sorted({tree.parents[node - 1] for node in nodes})
        paths = torch.tensor([ways[parent] for parent in parents], dtype=torch.long, device=device)
        ranks = [tree.ranks[node - 1] for node in nodes]
        levels.append(
            _Level(
                paths.reshape(len(parents), distance - 1),
                torch.tensor(nodes, device=device),
                torch.tensor([parents.index(tree.parents[n - 1]) for n in nodes], device=device),
                torch.tensor(ranks, device=device),
                1 + max(ranks),
            )
        )
    return levels


class DynamicPathDrafter(PathDrafter):
    """Grows a tree of its own for every state, of the paths that the heads hold most likely there.

    A path is worth the product of its tokens' probabilities, each given the tokens before it. Up to
    `MAX_PARENTS` nodes these are the best paths of all; a larger tree may lack some, because it goes
    on from each level's best `MAX_PARENTS` paths only.

    Args:
        num_nodes: candidates per row and step, at most.
        threshold: no path less probable is drafted.
        heads: as for `PathDrafter`; the tree says how deep.
    """

    def __init__(self, num_nodes: int, threshold: float, *heads: Any) -> None:
        super().__init__(*heads)
        self.num_nodes = self.max_nodes = num_nodes
        # Where a level has children, they take at least one of the nodes
        self.num_parents = min(MAX_PARENTS, max(1, num_nodes - 1))
        self.least = math.log(threshold) if threshold else -math.inf

    def draft(
        self, input_ids: torch.Tensor, hidden_states: torch.Tensor, max_depth: int
    ) -> Candidates:
        """Grow a tree per row: go on from each level's best paths, and keep the best of all."""
        depth = min(self._depth(hidden_states, max_depth), self.num_nodes)
        if depth == 0:
            return Candidates.none(input_ids)
        batch_size = input_ids.shape[0]
        paths = input_ids.new_zeros((batch_size, 1, 0))
        values = torch.zeros((batch_size, 1), device=input_ids.device)
        levels: list[tuple[torch.Tensor, torch.Tensor]] = []
        for distance in range(1, depth + 1):
            logits = self._level_logits(distance, input_ids, hidden_states, paths).float()
            best = logits.log_softmax(dim=-1).topk(min(MAX_CHILDREN, logits.shape[-1]), dim=-1)
            reached = (values[..., None] + best.values).flatten(1)
            kept = reached.topk(min(self.num_nodes, reached.shape[1]), dim=-1)
            parents = kept.indices // best.indices.shape[-1]
            tokens = self._token_ids(best.indices).flatten(1).gather(1, kept.indices)
            way = paths.gather(1, parents[..., None].expand(-1, -1, distance - 1))
            longer = torch.cat([way, tokens[..., None]], dim=-1)
            levels.append((kept.values, longer))
            values, paths = kept.values[:, : self.num_parents], longer[:, : self.num_parents]
        grown = [tree_of_texts(self._best(own)) for own in _on_host(levels)]
        return Candidates.of_rows([t for t, _ in grown], [ids for _, ids in grown], input_ids)

    def _best(self, found: list[tuple[float, tuple[int, ...]]]) -> list[tuple[int, ...]]:
        """Pick the likeliest texts; a text is never likelier than its parent, so they form a tree."""
        likely = [item for item in found if item[0] >= self.least]
        likely.sort(key=lambda item: (-item[0], len(item[1])))
        return [text for _, text in likely[: self.num_nodes]]


def _on_host(
    levels: list[tuple[torch.Tensor, torch.Tensor]],
) -> list[list[tuple[float, tuple[int, ...]]]]:
    """Return each row's texts and what they are worth, all levels in two transfers to the host.

    Args:
        levels: per distance, values `(B, n)` and texts `(B, n, distance)`; `n` may differ.
    """
    shapes = [texts.shape[1:] for _, texts in levels]
    worth = torch.cat([values for values, _ in levels], dim=1).tolist()
    tokens = torch.cat([texts.flatten(1) for _, texts in levels], dim=1).tolist()
    found = []
    for values, row in zip(worth, map(iter, tokens), strict=True):
        texts = [tuple(islice(row, depth)) for count, depth in shapes for _ in range(count)]
        found.append(list(zip(values, texts, strict=True)))
    return found
