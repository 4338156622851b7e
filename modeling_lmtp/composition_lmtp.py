"""Drafters made of drafters: several proposals in one tree, and forward decoding.

Shapes: `B` batch, `L` known tokens, `S` last states known, `H` hidden size.
"""

from collections.abc import Sequence

import torch

from .drafting_lmtp import Candidates, Drafter, tree_from_paths
from .tree_lmtp import MAX_NODES, DraftTree


class MergedDrafter(Drafter):
    """Merges what several drafters propose into one tree, verified in one pass.

    Args:
        drafters: the first ones have precedence where the tree is full.
        takes_trees: whether trees can be verified; where only chains can, each row gets the first
            drafter's proposal that is not empty.
    """

    def __init__(self, drafters: Sequence[Drafter], takes_trees: bool = True) -> None:
        self.drafters = tuple(drafters)
        self.takes_trees = takes_trees
        self.num_states = max(drafter.num_states for drafter in drafters)
        self.max_nodes = min(MAX_NODES - 1, sum(drafter.max_nodes for drafter in drafters))

    def draft(
        self, input_ids: torch.Tensor, hidden_states: torch.Tensor, max_depth: int
    ) -> Candidates:
        """Ask every drafter, and merge row by row."""
        proposed = [drafter.draft(input_ids, hidden_states, max_depth) for drafter in self.drafters]
        token_ids = [candidates.on_host() for candidates in proposed]
        merge = merge_trees if self.takes_trees else _first
        merged = [
            merge([(c.trees[row], ids[row]) for c, ids in zip(proposed, token_ids, strict=True)])
            for row in range(input_ids.shape[0])
        ]
        return Candidates.from_rows(
            [tree for tree, _ in merged], [ids for _, ids in merged], input_ids
        )


def _first(proposals: Sequence[tuple[DraftTree, list[int]]]) -> tuple[DraftTree, list[int]]:
    tree, token_ids = next((p for p in proposals if p[0].num_nodes), proposals[-1])
    return tree, token_ids[: tree.num_nodes]


def merge_trees(
    proposals: Sequence[tuple[DraftTree, Sequence[int]]],
) -> tuple[DraftTree, list[int]]:
    """Merge trees of tokens: a path of tokens that several propose becomes one path.

    Args:
        proposals: trees and, per node, its token; of the later ones, as much as `MAX_NODES` leaves.
    """
    known: dict[tuple[int, ...], None] = {}  # a set that keeps the order
    for tree, token_ids in proposals:
        texts: list[tuple[int, ...]] = [()]
        for parent, token in zip(tree.parents, token_ids, strict=False):
            text = (*texts[parent], token)
            texts.append(text)
            if len(known) < MAX_NODES - 1 and (len(text) == 1 or text[:-1] in known):
                known.setdefault(text)
    return tree_from_paths(known)


class ForwardDrafter(Drafter):
    """Forward decoding (F-MTP, the ablation of arXiv 2505.17505): a plain pass before every draft.

    The pass over the token just emitted gives the state that looking backward does without.

    Args:
        drafter: what drafts after that pass.
    """

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.num_states, self.max_nodes = drafter.num_states, drafter.max_nodes
        self._has_forward_state = False

    def draft(
        self, input_ids: torch.Tensor, hidden_states: torch.Tensor, max_depth: int
    ) -> Candidates:
        """Draft nothing every other time."""
        self._has_forward_state = not self._has_forward_state
        if self._has_forward_state:
            return Candidates.none(input_ids)
        return self.drafter.draft(input_ids, hidden_states, max_depth)
