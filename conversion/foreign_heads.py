"""Reading heads that other projects trained: tensors by the tables of `key_maps`, nothing left over.

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
        layout: where their names came from.
        tensors: of `leap_heads`, `{head}.blocks.{layer}.linear.weight` `(H, H)` and `.bias` `(H,)`,
            `{head}.lm_head.weight` `(V, H)` or none of these.
        num_heads: how many there are.
        num_layers: blocks of each.
        others: what the file holds beside heads, in its own names.
        notes: what was filled in, and why.
    """

    layout: Layout
    tensors: Tensors
    num_heads: int
    num_layers: int
    others: Tensors
    notes: tuple[str, ...]

    @property
    def has_unembeddings(self) -> bool:
        """Whether heads have an unembedding of their own."""
        return _ours(UNEMBEDDING, 0) in self.tensors

    @property
    def hidden_size(self) -> int:
        """`H`."""
        return self.tensors[_ours(WEIGHT, 0, 0)].shape[0]


def read_heads(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], num_heads: int | None = None
) -> ForeignHeads:
    """Find the heads among a checkpoint's tensors.

    Args:
        tensors: all that the files hold.
        config: its config.json; may be empty.
        num_heads: take the first so many, whatever the configuration says.

    Raises:
        ValueError: no layout fits, a tensor is missing or has a wrong shape or type, or the
            configuration says something else than the tensors.
    """
    layout, prefix = recognise(tensors)
    places = {name: place_of(layout, prefix, name) for name in tensors}
    others = {name: tensors[name] for name, place in places.items() if place is None}
    found = {place: tensors[name] for name, place in places.items() if place is not None}
    kept_heads = _count_heads(layout, found, config, num_heads)
    num_layers = _count_layers(layout, found, config)
    complete, notes = _complete(layout, prefix, found, kept_heads, num_layers)
    _check_alike(complete)
    return ForeignHeads(layout, complete, kept_heads, num_layers, others, notes)


def _count_heads(
    layout: Layout,
    found: Mapping[Place, torch.Tensor],
    config: Mapping[str, Any],
    num_heads: int | None,
) -> int:
    present = sorted({place.head for place in found})
    if present != list(range(len(present))):
        raise ValueError(f"Heads are missing: those found are {present}, and they count from 0.")
    field = layout.config["num_leap_heads"]
    if num_heads is None:
        declared = config.get(field, len(present))
        if declared != len(present):
            raise ValueError(
                f"config.json says {field}={declared!r}, but the tensors are of {len(present)} heads. "
                f"Pass --num_heads {len(present)} to take these, or another number for the first ones."
            )
    elif not 1 <= num_heads <= len(present):
        raise ValueError(
            f"num_heads must be 1 to {len(present)}, the heads that there are; got {num_heads}."
        )
    return num_heads or len(present)


def _count_layers(
    layout: Layout, found: Mapping[Place, torch.Tensor], config: Mapping[str, Any]
) -> int:
    """Return how many blocks a head has; those that are missing are found later."""
    field = layout.config["num_head_layers"]
    at_least = 1 + max((p.layer or 0 for p in found if p.ours == WEIGHT), default=0)
    told = {p.layer for p in found if p.ours == UNEMBEDDING and p.layer is not None}  # by the name
    in_tensors = max(told, default=at_least)
    number = config.get(field, in_tensors)
    if not isinstance(number, int) or number < at_least or told - {number}:
        raise ValueError(
            f"The tensors are of heads with {in_tensors} layers, but config.json says "
            f"{field}={number!r}. Correct it there, or get the files that belong together."
        )
    return number


def _complete(
    layout: Layout,
    prefix: str,
    found: Mapping[Place, torch.Tensor],
    num_heads: int,
    num_layers: int,
) -> tuple[Tensors, tuple[str, ...]]:
    """Give every tensor our name, and put in what the table lets a checkpoint lack."""
    by_place = {
        replace(place, layer=0) if place.ours == UNEMBEDDING else place: tensor
        for place, tensor in found.items()
    }
    result: Tensors = {}
    missing: list[str] = []
    reasons: dict[str, None] = {}  # a set that keeps the order
    for place in _needed(num_heads, num_layers):
        tensor = by_place.get(place)
        if tensor is None:
            reason = layout.may_miss.get(place.ours)
            may_miss, tensor = _stand_in(reason, place, by_place)
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
    reason: str | None, place: Place, found: Mapping[Place, torch.Tensor]
) -> tuple[bool, torch.Tensor | None]:
    """Tell whether a tensor is rightly missing, and what takes its place, if anything does."""
    alike = {p: tensor for p, tensor in found.items() if p.ours == place.ours}
    of_this_head = [tensor for p, tensor in alike.items() if p.head == place.head]
    if reason == SHARED_BLOCKS:
        return len(of_this_head) == 1, next(iter(of_this_head), None)
    if reason == NO_BIAS and not alike:
        weight = found.get(replace(place, ours=WEIGHT))
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
                f"The tensor for {name} has the shape {tuple(tensor.shape)}, but beside the others it "
                f"must have {expected}. The file mixes heads of different models."
            )
        if tensor.dtype != first.dtype or not tensor.dtype.is_floating_point:
            raise ValueError(
                f"The tensor for {name} is {tensor.dtype}, but the first head's are {first.dtype}. "
                "Heads of one checkpoint have one floating-point type; quantized ones are not read."
            )


def _ours(template: str, head: int, layer: int = 0) -> str:
    return template.format(head=head, layer=layer)
