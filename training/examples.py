"""Answers as training examples: token ids, and labels for the tokens of the answer.

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
    """Return `count` items, evenly spread over the sequence, or all items if there are fewer."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def split_examples(
    examples: Sequence[Example], held_out: int
) -> tuple[list[Example], list[Example]]:
    """Split examples into a training set and `held_out` examples, evenly spread over the sequence.

    Raises:
        ValueError: there are fewer than `held_out + 1` examples.
    """
    if not 0 <= held_out < len(examples):
        raise ValueError(
            f"held_out must be from 0 to {len(examples) - 1}, one less than the number of examples, got "
            f"{held_out}."
        )
    indices = {i * len(examples) // held_out for i in range(held_out)}
    return (
        [example for i, example in enumerate(examples) if i not in indices],
        [examples[i] for i in sorted(indices)],
    )


def to_examples(rows: Iterable[Example | Mapping[str, Any]]) -> list[Example]:
    """Convert the rows of a dataset to examples.

    Args:
        rows: examples; or rows, for instance of a `datasets.Dataset`, with `input_ids` and optionally
            `labels`, which are -100 for the prompt.

    Raises:
        ValueError: a row has no `input_ids`, or its labels are not those of one answer at its end.
    """
    return [
        row if isinstance(row, Example) else _to_example(row, number)
        for number, row in enumerate(rows)
    ]


def _to_example(row: Mapping[str, Any], number: int) -> Example:
    if "input_ids" not in row:
        raise ValueError(
            f"Row {number} must have input_ids, got {', '.join(map(str, row))}. Tokenize the answers, or "
            "read a file of answers with load_answers."
        )
    input_ids = list(row["input_ids"])
    labels = list(row.get("labels", input_ids))
    start = next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
    if labels[start:] != input_ids[start:]:
        raise ValueError(
            f"Row {number}: labels must be {IGNORE_INDEX} for the prompt and equal to input_ids for the "
            "answer, because heads learn one answer at the end of each row."
        )
    return Example(input_ids, start)


def check_targets(
    examples: Sequence[Example], leap_offsets: Sequence[int], *, train_on_prompts: bool = False
) -> None:
    """Raise a ValueError if a head has no target in any example.

    A target is an answer token at least `offset` tokens after the example's first token. An answer
    shorter than the furthest offset therefore still has targets if its prompt is long enough.
    """
    furthest = max(leap_offsets, default=1)
    longest = max((len(example.input_ids) for example in examples), default=0)
    starts = [0 if train_on_prompts else example.answer_start for example in examples]
    if all(
        len(example.input_ids) <= max(start, furthest)
        for example, start in zip(examples, starts, strict=True)
    ):
        raise ValueError(
            f"leap_offsets must not exceed the answers, got {tuple(leap_offsets)}: none of the "
            f"{len(examples)} answers has a target at offset {furthest}; the longest has {longest} tokens "
            "with its prompt. Use longer answers, raise max_length, or leave that head out."
        )


def draft_vocabulary(examples: Sequence[Example], size: int, vocab_size: int) -> tuple[int, ...]:
    """Return the draft vocabulary: the `size` most frequent tokens of the answers.

    If the answers have fewer distinct tokens, the lowest unused ids are added, because subword
    vocabularies are numbered roughly by frequency.

    Args:
        examples: the training examples.
        size: size of the draft vocabulary.
        vocab_size: size of the backbone's vocabulary.

    Returns:
        `size` token ids in increasing order.

    Raises:
        ValueError: `size` is not from 1 to `vocab_size`.
    """
    if not 1 <= size <= vocab_size:
        raise ValueError(f"draft_vocab_size must be from 1 to {vocab_size}, got {size}.")
    counts = Counter(
        token for example in examples for token in example.input_ids[example.answer_start :]
    )
    frequent = [token for token, _ in counts.most_common(size)]
    unseen = (token for token in range(vocab_size) if token not in counts)
    return tuple(sorted([*frequent, *islice(unseen, size - len(frequent))]))


Row = dict[str, Any]  # one example or pack: `input_ids`, `labels`, …, each of length `L`


class AnswerDataset(Dataset[Row]):
    """Examples as rows for a Trainer: `input_ids` and unshifted `labels`.

    The index after the last example gives an empty row, one token without a target, which
    `GroupedSampler` uses to fill batches.

    Args:
        examples: the examples.
        train_on_prompts: also train on the tokens of the prompts.
        load_states: returns the states `(L, K·H)` of an example, for the column `known_states`.
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
        """Return the token ids and labels of one example, and its states with `load_states`."""
        if index == len(self.examples):
            return {"input_ids": [0], "labels": [IGNORE_INDEX]}
        example = self.examples[index]
        first = 0 if self.train_on_prompts else example.answer_start
        labels = [IGNORE_INDEX] * first + example.input_ids[first:]
        row: Row = {"input_ids": example.input_ids, "labels": labels}
        if self.load_states is not None:
            row["known_states"] = self.load_states(example)
        return row


def collate(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Pad rows on the right: `input_ids`, `attention_mask` and `labels`, each `(B, L)`.

    Rows with states also give `known_states` `(B, L, K·H)`.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    length = max(lengths)

    def pad(name: str, value: int) -> torch.Tensor:
        return torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])

    return {
        "input_ids": pad("input_ids", 0),  # the mask hides the padding, so any id will do
        "attention_mask": torch.tensor([[1] * n + [0] * (length - n) for n in lengths]),
        "labels": pad("labels", IGNORE_INDEX),
        **pad_states(rows, length),
    }


def pad_states(rows: Sequence[Row], length: int) -> dict[str, torch.Tensor]:
    """Return `known_states` `(B, length, K·H)`, zero in rows without states; empty if no row has any."""
    states = {i: row["known_states"] for i, row in enumerate(rows) if "known_states" in row}
    if not states:
        return {}
    first = next(iter(states.values()))
    batch = first.new_zeros(len(rows), length, first.shape[1])
    for i, row_states in states.items():
        batch[i, : len(row_states)] = row_states
    return {"known_states": batch}
