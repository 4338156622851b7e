"""Distilled answers as training examples: token ids, and labels where the answer is.

Shapes: `B` batch, `L` length.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
from torch.utils.data import Dataset

from modeling_lmtp.conversion.prompts import Example
from modeling_lmtp.losses_lmtp import IGNORE_INDEX

__all__ = [
    "AnswerDataset",
    "Example",
    "check_targets",
    "collate",
    "draft_vocabulary",
    "evenly",
    "split_examples",
]


Item = TypeVar("Item")


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """Take `count` of the items, or all if there are fewer, evenly spread over the sequence."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def split_examples(
    examples: Sequence[Example], held_out: int
) -> tuple[list[Example], list[Example]]:
    """Take `held_out` examples, evenly spread over the file, out of training.

    Raises:
        ValueError: fewer than `held_out + 1` examples.
    """
    if not 0 <= held_out < len(examples):
        raise ValueError(
            f"held_out must leave something to train on: got {held_out} of {len(examples)} examples."
        )
    chosen = {i * len(examples) // held_out for i in range(held_out)}
    return (
        [example for i, example in enumerate(examples) if i not in chosen],
        [examples[i] for i in sorted(chosen)],
    )


def to_examples(rows: Iterable[Example | Mapping[str, Any]]) -> list[Example]:
    """Return answers as examples.

    Args:
        rows: examples; or rows, as of a `datasets.Dataset`, with `input_ids` and, where tokens of the
            prompt are not learned, `labels` that are -100 there.

    Raises:
        ValueError: a row has no `input_ids`, or labels that do not belong to one answer at its end.
    """
    return [
        row if isinstance(row, Example) else _to_example(row, number)
        for number, row in enumerate(rows)
    ]


def _to_example(row: Mapping[str, Any], number: int) -> Example:
    if "input_ids" not in row:
        raise ValueError(
            f"Row {number} has no input_ids, but {', '.join(map(str, row))}. Tokenize the answers, or "
            "read a file of them with read_answers."
        )
    input_ids = list(row["input_ids"])
    labels = list(row.get("labels", input_ids))
    start = next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
    if labels[start:] != input_ids[start:]:
        raise ValueError(
            f"Row {number}: labels must be {IGNORE_INDEX} for the tokens of the prompt and the input_ids "
            "from there on, because heads learn one answer at the end of each row."
        )
    return Example(input_ids, start)


def check_targets(
    examples: Sequence[Example], leap_offsets: Sequence[int], *, train_on_prompts: bool = False
) -> None:
    """Raise a ValueError if a head has nothing to learn from any example.

    A target lies in the answer, `offset` tokens or more behind the example's first: an answer shorter
    than the furthest offset still has some, if its prompt is long enough.
    """
    furthest = max(leap_offsets, default=1)
    longest = max((len(example.input_ids) for example in examples), default=0)
    starts = [0 if train_on_prompts else example.answer_start for example in examples]
    if all(
        len(example.input_ids) <= max(start, furthest)
        for example, start in zip(examples, starts, strict=True)
    ):
        raise ValueError(
            f"leap_offsets {tuple(leap_offsets)}: nothing in {len(examples)} answers is a target at "
            f"offset {furthest}; the longest has {longest} tokens with its prompt. Get longer "
            "answers, raise max_length, or leave that head out."
        )


def draft_vocabulary(examples: Sequence[Example], size: int, vocab_size: int) -> tuple[int, ...]:
    """Choose the tokens that heads may draft: the most frequent ones of the answers.

    Where the answers hold fewer than `size`, the lowest ids fill up: subword vocabularies are
    numbered roughly by frequency.

    Args:
        examples: what the heads will learn.
        size: tokens wanted.
        vocab_size: the backbone's vocabulary.

    Returns:
        Increasing token ids, `size` of them.

    Raises:
        ValueError: `size` is not from 1 to `vocab_size`.
    """
    if not 1 <= size <= vocab_size:
        raise ValueError(f"draft_vocab_size must be from 1 to {vocab_size}, got {size}.")
    counts = Counter(
        token for example in examples for token in example.input_ids[example.answer_start :]
    )
    chosen = [token for token, _ in counts.most_common(size)]
    unseen = (token for token in range(vocab_size) if token not in counts)
    return tuple(sorted([*chosen, *islice(unseen, size - len(chosen))]))


Row = dict[str, Any]  # columns of one example's or pack's tokens


class AnswerDataset(Dataset[Row]):
    """Examples as a Trainer takes them: `input_ids` and unshifted `labels`.

    The row behind the last one is empty: a token that is no target, to fill up batches.

    Args:
        examples: the examples.
        train_on_prompts: also learn to predict the prompts' tokens.
        load_states: returns an example's states `(L, K·H)`, which become `known_states`.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        train_on_prompts: bool = False,
        load_states: Callable[[Example], torch.Tensor] | None = None,
    ) -> None:
        self.examples = examples
        self.train_on_prompts = train_on_prompts
        self.load_states = load_states

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.examples)

    def __getitem__(self, index: int) -> Row:
        """Return one example's token ids and labels, and its states where they are known."""
        if index == len(self.examples):
            return {"input_ids": [0], "labels": [IGNORE_INDEX]}
        example = self.examples[index]
        masked = 0 if self.train_on_prompts else example.answer_start
        labels = [IGNORE_INDEX] * masked + example.input_ids[masked:]
        row: Row = {"input_ids": example.input_ids, "labels": labels}
        if self.load_states is not None:
            row["known_states"] = self.load_states(example)
        return row


def collate(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Pad rows on the right: `input_ids`, `attention_mask` and `labels`, each `(B, L)`.

    Known states become `known_states` `(B, L, K·H)`.
    """
    length = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, value: int) -> torch.Tensor:
        return torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])

    ones = [{"mask": [1] * len(row["input_ids"])} for row in rows]
    mask = torch.tensor([row["mask"] + [0] * (length - len(row["mask"])) for row in ones])
    return {
        "input_ids": padded("input_ids", 0),  # hidden by the mask, so any id will do
        "attention_mask": mask,
        "labels": padded("labels", IGNORE_INDEX),
        **padded_states(rows, length),
    }


def padded_states(rows: Sequence[Row], length: int) -> dict[str, torch.Tensor]:
    """Return `known_states` `(B, length, K·H)`, 0 where a row has none, or nothing if no row has any."""
    known = [
        (number, row["known_states"]) for number, row in enumerate(rows) if "known_states" in row
    ]
    if not known:
        return {}
    padded = known[0][1].new_zeros(len(rows), length, known[0][1].shape[1])
    for number, states in known:
        padded[number, : len(states)] = states
    return {"known_states": padded}
