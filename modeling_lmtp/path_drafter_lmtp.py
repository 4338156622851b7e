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

from .drafting_lmtp import HEAD, Candidates, Proposal, ProposingDrafter
from .leap_drafter_lmtp import DraftHeads, LeapHeadDrafter, ProposingLeapHeadDrafter
from .leaps_lmtp import embed_context
from .tree_lmtp import MAX_CHILDREN, DraftTree

MAX_PER_LEVEL = 16  # paths that are proposed of each level; more are hardly ever worth their cost
MAX_PARENTS = 8  # paths per level that are expanded; bounds the cost of a head's pass


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
        num_rows, sources = input_ids.shape[0], (HEAD,) * tree.num_nodes
        return Candidates((tree,) * num_rows, token_ids[:, 1:], sources=(sources,) * num_rows)

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


class ProposingPathDrafter(PathDrafter, ProposingDrafter):
    """Proposes the paths that the heads consider most likely, found by beam search over the levels.

    A path's value is the product of its tokens' probabilities, each given the tokens before it. Only the
    best `MAX_PARENTS` paths of each level are expanded.

    Args:
        heads: path-grounded heads.
        num_nodes: at most that many candidates per row, level and step.
    """

    def __init__(self, heads: DraftHeads, num_nodes: int) -> None:
        # A tree is no deeper than it has nodes
        super().__init__(heads, DraftTree.chain(min(heads.horizon, num_nodes)))
        self.num_nodes = self.max_nodes = num_nodes
        self.num_per_level = min(num_nodes, MAX_PER_LEVEL)
        # A level that has children leaves at least one of the nodes to them
        self.num_parents = min(MAX_PARENTS, max(1, num_nodes - 1))

    def propose(
        self,
        input_ids: torch.Tensor,
        hidden_states: torch.Tensor,
        max_depth: int,
        min_value: float = 0.0,
    ) -> list[list[Proposal]]:
        """Search row by row; the levels move to the host together."""
        batch_size = input_ids.shape[0]
        paths = input_ids.new_zeros((batch_size, 1, 0))
        values = torch.zeros((batch_size, 1), device=input_ids.device)
        levels: list[tuple[torch.Tensor, torch.Tensor]] = []
        for distance in range(1, self._depth(hidden_states, max_depth) + 1):
            num_parents = self._num_parents(values, min_value)
            if num_parents == 0:
                break
            values, paths = values[:, :num_parents], paths[:, :num_parents]
            logits = self._level_logits(distance, input_ids, hidden_states, paths)
            best = logits.topk(min(MAX_CHILDREN, logits.shape[-1]), dim=-1)
            # Only the best tokens' probabilities are of use, so the others are summed and not computed
            likely = best.values.float() - logits.float().logsumexp(dim=-1, keepdim=True)
            children = (values[..., None] + likely).flatten(1)
            top = children.topk(min(self.num_per_level, children.shape[1]), dim=-1)
            tokens = self.heads.to_token_ids(best.indices.flatten(1).gather(1, top.indices))
            parents = (top.indices // best.indices.shape[-1])[..., None].expand(
                -1, -1, distance - 1
            )
            paths = torch.cat([paths.gather(1, parents), tokens[..., None]], dim=-1)
            values = top.values
            levels.append((likely.flatten(1).gather(1, top.indices), paths))
        return _on_host(levels, batch_size)

    def _num_parents(self, values: torch.Tensor, min_value: float) -> int:
        """Return how many paths of a level, given their log probabilities `(B, n)`, to expand.

        On the CPU, these are the ones that are likely enough. Elsewhere that would make the host wait.
        """
        num_parents = min(self.num_parents, values.shape[1])
        if values.device.type != "cpu" or min_value <= 0:
            return num_parents
        likely = (values >= math.log(min_value)).sum(dim=1).max()
        return min(num_parents, int(likely))


def _on_host(
    levels: list[tuple[torch.Tensor, torch.Tensor]], batch_size: int
) -> list[list[Proposal]]:
    """Return each row's proposals, moving all levels to the host in two transfers.

    Args:
        levels: per distance, log probabilities `(B, n)` and paths `(B, n, distance)`; `n` may differ.
        batch_size: `B`.
    """
    if not levels:
        return [[] for _ in range(batch_size)]
    shapes = [paths.shape[1:] for _, paths in levels]
    all_likely = torch.cat([likely for likely, _ in levels], dim=1).exp().tolist()
    all_tokens = torch.cat([paths.flatten(1) for _, paths in levels], dim=1).tolist()
    rows = []
    for probabilities, tokens in zip(map(iter, all_likely), map(iter, all_tokens), strict=True):
        rows.append([
            Proposal(tuple(islice(tokens, depth)), depth, next(probabilities))
            for count, depth in shapes
            for _ in range(count)
        ])  # fmt: skip
    return rows


def proposing_drafter(heads: DraftHeads, num_nodes: int) -> ProposingDrafter | None:
    """Return the drafter that proposes what these heads consider likely; None without heads."""
    if heads.horizon == 0:
        return None
    kind = ProposingPathDrafter if heads.is_path_grounded else ProposingLeapHeadDrafter
    return kind(heads, num_nodes)
