"""Draft trees: structure, visibility, and growing the best one."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch

from modeling_lmtp.tree_lmtp import MAX_NODES, DraftTree, grow_tree

# The tree drawn at the top of tree_lmtp.py
DRAWN_PATHS = ((0,), (1,), (0, 0), (0, 1), (0, 0, 0))
VISIBLE = [
    [1, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0],
    [1, 0, 1, 0, 0, 0],
    [1, 1, 0, 1, 0, 0],
    [1, 1, 0, 0, 1, 0],
    [1, 1, 0, 1, 0, 1],
]


@pytest.fixture
def drawn() -> DraftTree:
    return DraftTree.from_paths(DRAWN_PATHS)


def test_the_drawn_tree_has_the_drawn_structure(drawn):
    assert drawn.parents == (0, 0, 1, 1, 3)
    assert drawn.ranks == (0, 1, 0, 1, 0)
    assert drawn.depths == (0, 1, 1, 2, 2, 3)
    assert drawn.children == ((1, 2), (3, 4), (), (5,), (), ())
    assert (drawn.num_nodes, drawn.depth, drawn.is_chain) == (5, 3, False)


def test_a_node_sees_itself_and_its_ancestors(drawn):
    assert torch.equal(drawn.visible, torch.tensor(VISIBLE, dtype=torch.bool))


@pytest.mark.parametrize("order", [0, 17, 63, 119])
def test_the_order_of_the_paths_does_not_matter(drawn, order):
    paths = list(itertools.permutations(DRAWN_PATHS))[order]
    assert DraftTree.from_paths(paths) == drawn
    assert DraftTree.from_paths([list(path) for path in paths]) == drawn


@pytest.mark.parametrize(
    "paths",
    [
        (),
        ((0,),),
        DRAWN_PATHS,
        ((2,), (0,), (2, 5), (0, 1), (2, 5, 0)),
        tuple(itertools.product(range(3), repeat=1)) + tuple(itertools.product(range(3), repeat=2)),
    ],
    ids=["root only", "one node", "drawn", "gaps in the ranks", "full ternary"],
)
def test_a_tree_comes_back_from_its_own_paths(paths):
    tree = DraftTree.from_paths(paths)
    assert set(tree.paths) == set(paths)
    assert DraftTree.from_paths(tree.paths) == tree


def test_the_child_that_proposes_a_token_is_found_among_the_node_s_own(drawn):
    candidates = [10, 11, 12, 13, 12]  # nodes 1 … 5; nodes 3 and 5 propose the same token
    assert drawn.child(0, 10, candidates) == 1
    assert drawn.child(0, 11, candidates) == 2
    assert drawn.child(1, 12, candidates) == 3
    assert drawn.child(3, 12, candidates) == 5
    assert drawn.child(0, 12, candidates) is None
    assert drawn.child(2, 12, candidates) is None


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 9])
def test_truncating_drops_the_nodes_that_are_too_deep(drawn, depth):
    kept = [path for path in DRAWN_PATHS if len(path) <= depth]
    assert drawn.truncate(depth) == DraftTree.from_paths(kept)


@pytest.mark.parametrize("length", [0, 1, 5])
def test_a_chain_has_one_candidate_per_distance(length):
    chain = DraftTree.chain(length)
    assert chain == DraftTree.from_paths([(0,) * a for a in range(1, length + 1)])
    assert chain.is_chain
    assert chain.depths == tuple(range(length + 1))
    assert torch.equal(chain.visible, torch.ones(length + 1, length + 1).tril().bool())


def test_two_candidates_for_one_distance_are_no_chain():
    assert not DraftTree.from_paths([(0,), (1,)]).is_chain


BAD_PATHS = {
    "no parent": ([(0,), (1, 0)], "node (1, 0) has no parent: add the path (1,), or drop the node"),
    "empty path": ([(0,), ()], "must be a non-empty list of ranks (0 or more), got ()"),
    "negative rank": ([(0,), (0, -1)], "list of ranks (0 or more), got (0, -1)"),
    "not an integer": ([(0.0,)], "list of ranks (0 or more), got (0.0,)"),
    "boolean": ([(False,)], "list of ranks (0 or more), got (False,)"),
    "repeated": ([(0,), (0, 1), (0, 1)], "has the path (0, 1) twice"),
    "too many": ([(r,) for r in range(MAX_NODES)], "has 64 nodes, at most 63 are allowed"),
}


@pytest.mark.parametrize(("paths", "message"), BAD_PATHS.values(), ids=BAD_PATHS.keys())
def test_malformed_trees_are_refused(paths, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DraftTree.from_paths(paths)


def test_the_largest_tree_is_allowed():
    assert DraftTree.from_paths([(r,) for r in range(MAX_NODES - 1)]).num_nodes == 63


# accuracies[a - 1][r]; no two paths have the same value
ACCURACIES = [[0.61, 0.17, 0.07], [0.47, 0.23, 0.11], [0.37, 0.29]]


def value(path: tuple[int, ...]) -> float:
    return math.prod(ACCURACIES[distance][rank] for distance, rank in enumerate(path))


def all_paths(max_children: int = 10) -> list[tuple[int, ...]]:
    ranks = [range(min(len(row), max_children)) for row in ACCURACIES]
    depths = range(1, len(ACCURACIES) + 1)
    return [path for depth in depths for path in itertools.product(*ranks[:depth])]


def is_tree(paths: tuple[tuple[int, ...], ...]) -> bool:
    return all(len(path) == 1 or path[:-1] in paths for path in paths)


@pytest.mark.parametrize("num_nodes", range(5))
def test_no_other_tree_of_the_size_is_expected_to_be_accepted_further(num_nodes):
    trees = filter(is_tree, itertools.combinations(all_paths(), num_nodes))
    best = max(trees, key=lambda paths: sum(map(value, paths)))
    assert set(grow_tree(ACCURACIES, num_nodes).paths) == set(best)


@pytest.mark.parametrize("max_children", [1, 2, 3])
@pytest.mark.parametrize("num_nodes", [1, 6, 13, 63])
def test_the_tree_holds_the_most_valuable_paths(num_nodes, max_children):
    best = sorted(all_paths(max_children), key=value, reverse=True)[:num_nodes]
    assert set(grow_tree(ACCURACIES, num_nodes, max_children=max_children).paths) == set(best)


def test_candidates_that_are_never_right_are_left_out():
    assert grow_tree([[0.5, 0.0], [0.0, 0.0]], 5).paths == ((0,),)


@pytest.mark.parametrize("num_nodes", [-1, MAX_NODES])
def test_growing_too_large_a_tree_is_refused(num_nodes):
    message = f"num_nodes must be from 0 to 63, got {num_nodes}."
    with pytest.raises(ValueError, match=re.escape(message)):
        grow_tree(ACCURACIES, num_nodes)
