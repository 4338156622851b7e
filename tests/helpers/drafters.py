"""Drafters that know the answer, and say it as often as a test wants."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch

from modeling_lmtp.drafting_lmtp import Candidates, Drafter
from modeling_lmtp.tree_lmtp import DraftTree

CHAIN = DraftTree.chain(4)
# The right path, (1), (1, 2), (1, 2, 0), (1, 2, 0, 1), never goes by a first child alone
TREE = DraftTree.from_paths(
    [
        *[(0,), (1,), (2,)],
        *[(0, 0), (0, 1), (1, 0), (1, 2)],
        *[(0, 0, 0), (1, 0, 0), (1, 2, 0), (1, 2, 1)],
        *[(1, 2, 0, 0), (1, 2, 0, 1)],
    ]
)
RIGHT_PATH = (1, 2, 0, 1)

SHIFT = 7
# Whether the candidate for the token at an index, counted from 0 at the prompt's start, is right
Rule = Callable[[int], bool]


def always(_index: int) -> bool:
    return True


def never(_index: int) -> bool:
    return False


def sometimes(index: int) -> bool:
    """Right for two tokens in three, without a random generator."""
    return hashlib.sha256(str(index).encode()).digest()[0] % 3 != 0


RULES: dict[str, Rule] = {"always right": always, "never right": never, "sometimes": sometimes}


class Oracle(Drafter):
    """Knows all texts, and proposes them along one path of a tree, by a rule; the rest is wrong.

    Args:
        tokens: prompts and continuations, `(B, L)`.
        tree: a chain, or `TREE`.
        right: whether the candidate for a token is right, asked with an index that is shifted from
            row to row, so that rows differ.
        right_depth: candidates deeper than this are wrong.
    """

    num_states = 2

    def __init__(
        self,
        tokens: torch.Tensor,
        tree: DraftTree = CHAIN,
        right: Rule = always,
        right_depth: int = 1_000,
    ) -> None:
        self.texts: list[list[int]] = tokens.tolist()
        self.tree = tree
        self.right = right
        self.right_depth = right_depth
        self.asked: list[tuple[int, int]] = []  # tokens known in a batch of 1, and room

    def draft(
        self, input_ids: torch.Tensor, hidden_states: torch.Tensor, max_depth: int
    ) -> Candidates:
        assert 1 <= hidden_states.shape[1] <= self.num_states
        assert hidden_states.shape[0] == input_ids.shape[0]
        self.asked.append((input_ids.shape[1], max_depth))
        tree = self.tree.truncate(max_depth)
        rows = [self._candidates(tree, *self._place(row)) for row in input_ids.tolist()]
        return Candidates.from_rows([tree] * len(rows), rows, input_ids)

    def _place(self, known: list[int]) -> tuple[list[int], int]:
        """Find the text whose beginning the known tokens end with, and how much of it is known."""
        best = max(
            ((common_suffix(known, text[:end]), text, end) for text in self.texts
             for end in range(1, len(text) + 1) if text[end - 1] == known[-1]),
            key=lambda found: (found[0], found[2]),
            default=None,
        )  # fmt: skip
        assert best is not None, "the text went astray"
        if len(self.texts) == 1:
            assert known == best[1][: len(known)], "the text went astray"
        return best[1], best[2]

    def _candidates(self, tree: DraftTree, text: list[int], known: int) -> list[int]:
        right_path = RIGHT_PATH if self.tree == TREE else (0,) * self.tree.depth
        candidates = []
        for node, path in enumerate(tree.paths, start=1):
            depth = len(path)
            answer = text[min(known + depth - 1, len(text) - 1)]
            is_right = (
                path == right_path[:depth]
                and depth <= self.right_depth
                and self.right(known + depth - 1 + SHIFT * self.texts.index(text))
            )
            candidates.append(answer if is_right else (answer + node) % 96)
        return candidates


def common_suffix(first: list[int], second: list[int]) -> int:
    """How many last tokens two texts share."""
    length = 0
    for one, other in zip(reversed(first), reversed(second), strict=False):
        if one != other:
            break
        length += 1
    return length


def acceptance_lengths(
    prompt_length: int, total: int, depth: int, right: Rule = always, right_depth: int = 1_000
) -> list[int]:
    """What an `Oracle` gets accepted by each pass, bonus token included."""
    lengths = []
    known = prompt_length + 1  # the prefill gives one token
    while known < total:
        room = min(depth, right_depth, total - known - 1)
        accepted = 0
        while accepted < room and right(known + accepted):
            accepted += 1
        lengths.append(accepted + 1)
        known += accepted + 1
    return lengths
