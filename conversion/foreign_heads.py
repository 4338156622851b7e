"""Reads heads that other projects trained, by the tables of `key_maps`; every tensor must have a place.

Shapes: `H` hidden size, `V` vocabulary size.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from .key_maps import (
    BIAS,
    NO_BIAS,
    SHARED_BLOCKS,
    SHARED_UNEMBEDDING,
    UNEMBEDDING,
    WEIGHT,
    Layout,
    Place,
    place_of,
    recognise,
    their_name,
)

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ForeignHeads:
    """Heads read from a checkpoint, in our names.

    Args:
        layout: the layout of their original names.
        tensors: of `leap_heads`, `{head}.blocks.{layer}.linear.weight` `(H, H)` and `.bias` `(H,)`,
            `{head}.lm_head.weight` `(V, H)` of all heads or of none.
        num_heads: the number of heads.
        num_layers: the number of blocks in each.
        others: the other tensors of the file, under their original names.
        notes: which tensors were filled in, and why.
    """

    layout: Layout
    tensors: Tensors
    num_heads: int
    num_layers: int
    others: Tensors
    notes: tuple[str, ...]

    @property
    def hidden_size(self) -> int:
        """`H`."""
        return self.tensors[_ours(WEIGHT, 0, 0)].shape[0]


def read_heads(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], num_heads: int | None = None
) -> ForeignHeads:
    """Find the heads among a checkpoint's tensors.

    Args:
        tensors: all tensors of the checkpoint.
        config: its config.json; may be empty.
        num_heads: read the first N heads, whatever the configuration says.

    Raises:
        ValueError: no layout fits, a tensor is missing or has a wrong shape or dtype, or the
            configuration contradicts the tensors.
    """
    layout, prefix = recognise(tensors)
    places = {name: place_of(layout, prefix, name) for name in tensors}
    others = {name: tensors[name] for name, place in places.items() if place is None}
    by_place = {place: tensors[name] for name, place in places.items() if place is not None}
    kept_heads = _count_heads(layout, by_place, config, num_heads)
    num_layers = _count_layers(layout, by_place, config)
    complete, notes = _complete(layout, prefix, by_place, kept_heads, num_layers)
    _check_alike(complete)
    return ForeignHeads(layout, complete, kept_heads, num_layers, others, notes)


def _count_heads(
    layout: Layout,
    by_place: Mapping[Place, torch.Tensor],
    config: Mapping[str, Any],
    num_heads: int | None,
) -> int:
    present = sorted({place.head for place in by_place})
    if present != list(range(len(present))):
        raise ValueError(f"Heads are missing: the file has heads {present}, but they count from 0.")
    field = layout.config["num_leap_heads"]
    if num_heads is None:
        declared = config.get(field, len(present))
        if declared != len(present):
            raise ValueError(
                f"config.json says {field}={declared!r}, but there are tensors of {len(present)} heads. "
                f"Pass --num_heads {len(present)} to convert these, or a smaller number for the first ones."
            )
    elif not 1 <= num_heads <= len(present):
        raise ValueError(
            f"num_heads must be 1 to {len(present)}, the number of heads in the file; got {num_heads}."
        )
    return num_heads or len(present)


def _count_layers(
    layout: Layout, by_place: Mapping[Place, torch.Tensor], config: Mapping[str, Any]
) -> int:
    """Return how many blocks a head has; `_complete` reports missing ones."""
    field = layout.config["num_head_layers"]
    at_least = 1 + max((p.layer or 0 for p in by_place if p.ours == WEIGHT), default=0)
    # Some layouts put the number of layers into the unembedding's name
    named = {p.layer for p in by_place if p.ours == UNEMBEDDING and p.layer is not None}
    in_tensors = max(named, default=at_least)
    number = config.get(field, in_tensors)
    if not isinstance(number, int) or number < at_least or named - {number}:
        raise ValueError(
            f"The tensors are of heads with {in_tensors} layers, but config.json says "
            f"{field}={number!r}. Correct config.json, or get files that belong together."
        )
    return number


def _complete(
    layout: Layout,
    prefix: str,
    by_place: Mapping[Place, torch.Tensor],
    num_heads: int,
    num_layers: int,
) -> tuple[Tensors, tuple[str, ...]]:
    """Rename every tensor to ours, and fill in those that the layout allows to be missing."""
    tensors = {
        replace(place, layer=0) if place.ours == UNEMBEDDING else place: tensor
        for place, tensor in by_place.items()
    }
    result: Tensors = {}
    missing: list[str] = []
    reasons: dict[str, None] = {}  # an ordered set
    for place in _needed(num_heads, num_layers):
        tensor = tensors.get(place)
        if tensor is None:
            reason = layout.may_miss.get(place.ours)
            may_miss, tensor = _stand_in(reason, place, tensors)
            if may_miss and reason is not None:
                reasons[reason] = None
            else:
                missing.append(prefix + their_name(layout, place, num_layers))
        if tensor is not None:
            result[_ours(place.ours, place.head, place.layer or 0)] = tensor.contiguous()
    if missing:
        raise ValueError(
            f"Tensors of the heads are missing: {', '.join(missing)}. The file is incomplete, or "
            "config.json describes other heads."
        )
    return result, tuple(reasons)


def _needed(num_heads: int, num_layers: int) -> Iterator[Place]:
    for head in range(num_heads):
        for layer in range(num_layers):
            yield Place(WEIGHT, head, layer)
            yield Place(BIAS, head, layer)
        yield Place(UNEMBEDDING, head, 0)


def _stand_in(
    reason: str | None, place: Place, by_place: Mapping[Place, torch.Tensor]
) -> tuple[bool, torch.Tensor | None]:
    """Return whether a tensor may be missing, and the tensor that replaces it, if any."""
    alike = {p: tensor for p, tensor in by_place.items() if p.ours == place.ours}
    of_this_head = [tensor for p, tensor in alike.items() if p.head == place.head]
    if reason == SHARED_BLOCKS:
        return len(of_this_head) == 1, next(iter(of_this_head), None)
    if reason == NO_BIAS and not alike:
        weight = by_place.get(replace(place, ours=WEIGHT))
        return weight is not None, None if weight is None else torch.zeros_like(weight[:, 0])
    return reason == SHARED_UNEMBEDDING and not alike, None


def _check_alike(tensors: Tensors) -> None:
    first = tensors[_ours(WEIGHT, 0, 0)]
    size = first.shape[0]
    vocab_size = tensors.get(_ours(UNEMBEDDING, 0), first).shape[0]
    for name, tensor in tensors.items():
        if name.endswith(".lm_head.weight"):
            expected: tuple[int, ...] = (vocab_size, size)
        else:
            expected = (size,) if name.endswith(".bias") else (size, size)
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"The tensor for {name} has the shape {tuple(tensor.shape)}, but the others require "
                f"{expected}. The file mixes heads of different models."
            )
        if tensor.dtype != first.dtype or not tensor.dtype.is_floating_point:
            raise ValueError(
                f"The tensor for {name} is {tensor.dtype}, but the first head's are {first.dtype}. All "
                "heads of a checkpoint must have one floating-point dtype; quantized heads cannot be "
                "converted."
            )


def _ours(template: str, head: int, layer: int = 0) -> str:
    return template.format(head=head, layer=layer)
