"""Packing: put several answers into one sequence to avoid padding, without attention between them.

In a pack, `position_ids` restart at each part. Without an `attention_mask`, Transformers derives the mask
from them for eager, sdpa and flex attention, and for FlashAttention the sequence lengths if the batch has
one row. Some models ignore them (recurrent layers carry their state over), so `check_isolation` compares
packed and separate states before training.

Shapes: `B` batch, `L` length, `H` hidden size.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from modeling_lmtp.losses_lmtp import IGNORE_INDEX, at_least_float32
from modeling_lmtp.states_lmtp import head_states
from modeling_lmtp.transformers_lmtp import attention_implementation

from .examples import AnswerDataset, Row, collate, pad_states

PROBE_LENGTHS = (7, 12, 9)
# Largest allowed relative difference between packed and separate states. Rounding in 16 bits causes
# about 1 %, attention to another part most of 100 %.
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


class PackedDataset(Dataset[Row]):
    """Packs of several examples: `input_ids`, `labels`, restarting `position_ids`, `known_states`.

    Args:
        rows: the examples as rows.
        pack_length: maximum number of tokens per pack.

    Raises:
        ValueError: an example is longer than `pack_length`.
    """

    def __init__(self, rows: AnswerDataset, pack_length: int) -> None:
        self.rows = rows
        self.packs = pack([len(example.input_ids) for example in rows.examples], pack_length)

    def __len__(self) -> int:
        """Return the number of packs."""
        return len(self.packs)

    def __getitem__(self, index: int) -> Row:
        """Return one pack; the index after the last gives an empty one, see `AnswerDataset`."""
        parts = self.packs[index] if index < len(self.packs) else [len(self.rows)]
        rows = [self.rows[part] for part in parts]
        packed: Row = {"input_ids": [], "labels": [], "position_ids": []}
        for row in rows:
            packed["input_ids"] += row["input_ids"]
            packed["labels"] += row["labels"]
            packed["position_ids"] += range(len(row["input_ids"]))
        if "known_states" in rows[0]:
            packed["known_states"] = torch.cat([row["known_states"] for row in rows])
        return packed

    def lengths(self) -> list[int]:
        """Return the number of tokens of each pack."""
        return [sum(len(self.rows.examples[i].input_ids) for i in pack) for pack in self.packs]


def pack(lengths: Sequence[int], pack_length: int) -> list[list[int]]:
    """Assign rows to packs by best-fit decreasing: longest row first, each to the fullest pack it fits.

    Args:
        lengths: number of tokens of each row.
        pack_length: maximum number of tokens per pack.

    Returns:
        The row indices of each pack.

    Raises:
        ValueError: a row is longer than `pack_length`.
    """
    if max(lengths) > pack_length:
        raise ValueError(
            f"pack_length must be at least the longest example's {max(lengths)} tokens, got "
            f"{pack_length}. Raise max_length, or truncate the examples."
        )
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, pack), sorted
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        best = bisect_left(room, (lengths[row], 0))
        if best == len(room):
            free, index = pack_length, len(packs)
            packs.append([])
        else:
            free, index = room.pop(best)
        packs[index].append(row)
        insort(room, (free - lengths[row], index))
    return packs


def collate_packs(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Collate packs: `input_ids`, `labels` and `position_ids`, each `(B, L)`, without a mask.

    Padding forms one more part without targets, with its own `position_ids`.
    """
    length = max(len(row["input_ids"]) for row in rows)
    fill = [length - len(row["input_ids"]) for row in rows]
    columns = {
        "input_ids": [row["input_ids"] + [0] * n for row, n in zip(rows, fill, strict=True)],
        "labels": [row["labels"] + [IGNORE_INDEX] * n for row, n in zip(rows, fill, strict=True)],
        "position_ids": [
            row["position_ids"] + list(range(n)) for row, n in zip(rows, fill, strict=True)
        ],
    }
    tensors = {name: torch.tensor(values) for name, values in columns.items()}
    return {**tensors, **pad_states(rows, length)}


def collate_rows(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Collate packs, or rows of one answer each."""
    return collate_packs(rows) if "position_ids" in rows[0] else collate(rows)


@torch.no_grad()
def check_isolation(backbone: Any, batch_size: int) -> None:
    """Check on random tokens that the parts of a pack do not see each other.

    Args:
        backbone: the backbone on its training device, with its attention implementation.
        batch_size: number of packs per batch; the check uses at most two.

    Raises:
        ValueError: the states of a part depend on the other parts.
    """
    difference = max_relative_difference(backbone, min(batch_size, 2))
    tolerance = TOLERANCES[backbone.dtype]
    if not difference <= tolerance:
        raise ValueError(
            f"{type(backbone).__name__} with {attention_implementation(backbone.config)} attention does "
            f"not keep packed answers apart in batches of {batch_size}: the relative difference from the "
            f"states of separate answers must be at most {tolerance:g}, got {difference:.2g}. Train "
            "without packing, or try per_device_train_batch_size=1 with more "
            "gradient_accumulation_steps, or attn_implementation='sdpa'."
        )


@torch.no_grad()
def max_relative_difference(backbone: Any, num_rows: int) -> float:
    """Return the largest relative difference between the states of a part in a pack and alone."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = backbone.get_input_embeddings().weight.shape[0]
    parts = [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in PROBE_LENGTHS]
    orders = [parts, parts[::-1]][:num_rows]
    was_training = backbone.training
    backbone.eval()
    try:
        packed = collate_packs([_packed_row(order) for order in orders])
        states = _states(backbone, packed)
        difference = 0.0
        for row, order in enumerate(orders):
            start = 0
            for part in order:
                alone = _states(backbone, {"input_ids": torch.tensor([part])})[0]
                in_pack = states[row, start : start + len(part)]
                difference = max(difference, ((in_pack - alone).norm() / alone.norm()).item())
                start += len(part)
    finally:
        backbone.train(was_training)
    return difference


def _packed_row(parts: Sequence[list[int]]) -> dict[str, list[int]]:
    tokens = [token for part in parts for token in part]
    positions = [position for part in parts for position in range(len(part))]
    return {"input_ids": tokens, "labels": tokens, "position_ids": positions}


def _states(backbone: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the last hidden states `(B, L, H)`, in at least float32."""
    device = backbone.get_input_embeddings().weight.device
    names = ("input_ids", "position_ids")
    with head_states(backbone, num_logits=1) as states:
        backbone(**{n: inputs[n].to(device) for n in names if n in inputs}, use_cache=False)
    return at_least_float32(states[0])
