"""Packing: several answers in one sequence, so that no time goes into padding, and none sees another.

The parts of a pack are told apart by `position_ids` that start anew with each. Transformers derives
the attention mask from them where no `attention_mask` is given, for eager, sdpa and flex attention,
and FlashAttention its sequence lengths where a batch has one row. Not every model heeds them
(recurrent layers carry on), so `check_isolation` tries it.

Shapes: `B` batch, `L` length.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from modeling_lmtp.losses_lmtp import IGNORE_INDEX, at_least_float32
from modeling_lmtp.states_lmtp import head_states
from modeling_lmtp.transformers_lmtp import attention_implementation

from .examples import AnswerDataset, Row, collate, padded_states

TRIED_LENGTHS = (7, 12, 9)
# How far, relative to their size, states may lie from those of a part alone. Rounding in 16 bits
# moves them by a percent or so, another part in sight by most of their size.
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


class PackedDataset(Dataset[Row]):
    """Rows of several examples each: `input_ids`, `labels`, `position_ids` that restart, known states.

    Args:
        rows: the examples' rows.
        pack_length: tokens that a pack holds at most.

    Raises:
        ValueError: an example is longer than a pack.
    """

    def __init__(self, rows: AnswerDataset, pack_length: int) -> None:
        self.rows = rows
        self.packs = pack([len(example.input_ids) for example in rows.examples], pack_length)

    def __len__(self) -> int:
        """Return the number of packs."""
        return len(self.packs)

    def __getitem__(self, index: int) -> Row:
        """Return one pack; the one behind the last is empty, see `AnswerDataset`."""
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
        """Return the tokens of each pack."""
        return [sum(len(self.rows.examples[i].input_ids) for i in pack) for pack in self.packs]


def pack(lengths: Sequence[int], pack_length: int) -> list[list[int]]:
    """Share out rows among as few packs as is easy: longest first, each where it fits most tightly.

    Args:
        lengths: tokens of each row.
        pack_length: tokens that a pack holds at most.

    Returns:
        The rows' indices, pack by pack.

    Raises:
        ValueError: a row is longer than a pack.
    """
    if max(lengths) > pack_length:
        raise ValueError(
            f"pack_length is {pack_length}, but an example has {max(lengths)} tokens. Raise it, or cut "
            "examples with max_length."
        )
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # tokens that still fit, and the pack; sorted
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        tightest = bisect_left(room, (lengths[row], 0))
        if tightest == len(room):
            left, chosen = pack_length, len(packs)
            packs.append([])
        else:
            left, chosen = room.pop(tightest)
        packs[chosen].append(row)
        insort(room, (left - lengths[row], chosen))
    return packs


def collate_packs(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Put packs in a batch: `input_ids`, `labels`, `position_ids`, each `(B, L)`, and no mask.

    Shorter packs end in one more part, which is no target.
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
    return {**tensors, **padded_states(rows, length)}


def collate_rows(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Put packs, or rows of one answer each, in a batch."""
    return collate_packs(rows) if "position_ids" in rows[0] else collate(rows)


@torch.no_grad()
def check_isolation(backbone: Any, batch_size: int) -> None:
    """Try whether the parts of a pack stay apart, on random tokens.

    Args:
        backbone: the model as it will train, on its device.
        batch_size: packs in a batch; with more than one, two are tried.

    Raises:
        ValueError: a part's states are not those that it has alone.
    """
    difference = largest_difference(backbone, min(batch_size, 2))
    tolerance = TOLERANCES[backbone.dtype]
    if not difference <= tolerance:
        raise ValueError(
            f"{type(backbone).__name__} with {attention_implementation(backbone.config)} attention does "
            f"not keep packed answers apart in batches of {batch_size}: their states differ by "
            f"{difference:.2g} of their size from those of each alone ({tolerance:g} is allowed). Train "
            "without packing, or try batch_size=1 with more gradient_accumulation_steps, or "
            "attn_implementation='sdpa'."
        )


@torch.no_grad()
def largest_difference(backbone: Any, num_rows: int) -> float:
    """Return how much packed parts' states differ from those of each alone, relative to their size."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = backbone.get_input_embeddings().weight.shape[0]
    parts = [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in TRIED_LENGTHS]
    orders = [parts, parts[::-1]][:num_rows]
    was_training = backbone.training
    backbone.eval()
    try:
        packed = collate_packs([_packed_row(order) for order in orders])
        states = _states(backbone, packed)
        worst = 0.0
        for row, order in enumerate(orders):
            start = 0
            for part in order:
                alone = _states(backbone, {"input_ids": torch.tensor([part])})[0]
                there = states[row, start : start + len(part)]
                worst = max(worst, ((there - alone).norm() / alone.norm()).item())
                start += len(part)
    finally:
        backbone.train(was_training)
    return worst


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
