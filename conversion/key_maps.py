"""Tables of the names that other projects give to the tensors of a leap head, and how to read them.

Their heads compute what ours do: `z' = z + SiLU(W z + b)` in each block, then an unembedding without
bias. Names are templates: `{head}` and `{layer}` count from 0, `{layers}` is the number of layers.

Sources: `medusa` from github.com/FasterDecoding/Medusa and text-generation-inference, `vllm` from
github.com/vllm-project/vllm, `official` from github.com/Xiaohao-Liu/L-MTP at 93065a3.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

WEIGHT = "{head}.blocks.{layer}.linear.weight"
BIAS = "{head}.blocks.{layer}.linear.bias"
UNEMBEDDING = "{head}.lm_head.weight"

# Why a tensor may be missing from a complete checkpoint
SHARED_BLOCKS = "a head repeats one block, and files that store shared tensors once hold it once"
SHARED_UNEMBEDDING = "heads without an unembedding (Medusa's version 2) share the backbone's"
NO_BIAS = "medusa_fc_bias is false: the biases are zero"


@dataclass(frozen=True)
class Layout:
    """How one project names the tensors of its heads, and the fields of its config.json.

    Args:
        name: the layout's name.
        names: maps our name of a tensor (relative to `leap_heads`) to theirs.
        prefixes: the prefixes that their names may have, the most common first.
        may_miss: our names of tensors that a complete checkpoint may lack, each with the reason.
        config: maps our name of a configuration field to theirs.
        leap_stride: the leap of all heads in this layout; None if the configuration says it.
        file_name: the file of the weights.
        fixed_config: fields that every configuration in this layout has.
    """

    name: str
    names: Mapping[str, str]
    prefixes: tuple[str, ...]
    may_miss: Mapping[str, str]
    config: Mapping[str, str]
    leap_stride: int | None
    file_name: str = "model.safetensors"
    fixed_config: Mapping[str, object] = field(default_factory=dict)


MEDUSA = Layout(
    name="medusa",
    names={
        WEIGHT: "{head}.{layer}.linear.weight",
        BIAS: "{head}.{layer}.linear.bias",
        UNEMBEDDING: "{head}.{layers}.weight",
    },
    prefixes=("", "medusa_head.", "medusa_heads."),
    may_miss={
        WEIGHT: SHARED_BLOCKS,
        BIAS: SHARED_BLOCKS,
        UNEMBEDDING: SHARED_UNEMBEDDING,
    },
    config={
        "num_leap_heads": "medusa_num_heads",
        "num_head_layers": "medusa_num_layers",
        "backbone": "base_model_name_or_path",
    },
    leap_stride=1,
    file_name="medusa_lm_head.safetensors",
)

VLLM = Layout(
    name="vllm",
    names={
        WEIGHT: "blocks.{head}.layers.{layer}.weight",
        BIAS: "blocks.{head}.layers.{layer}.bias",
        UNEMBEDDING: "lm_heads.{head}.weight",
    },
    prefixes=("", "medusa_heads."),
    may_miss={BIAS: NO_BIAS},
    config={
        "num_leap_heads": "num_heads",
        "num_head_layers": "num_hidden_layers",
        "backbone": "base_model_name_or_path",
    },
    leap_stride=1,
    fixed_config={
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "medusa_fc_bias": True,
    },
)

OFFICIAL = Layout(
    name="official",
    names={
        WEIGHT: "heads.heads.{head}.resblock.{layer}.l_proj.weight",
        BIAS: "heads.heads.{head}.resblock.{layer}.l_proj.bias",
        UNEMBEDDING: "heads.heads.{head}.lm_head.weight",
    },
    prefixes=("",),
    may_miss={WEIGHT: SHARED_BLOCKS, BIAS: SHARED_BLOCKS},
    config={
        "num_leap_heads": "n_head",
        "num_head_layers": "head_num_layers",
        "backbone": "model_name",
        "leap_stride": "skip_token",
    },
    leap_stride=None,
)

LAYOUTS = (MEDUSA, VLLM, OFFICIAL)


@dataclass(frozen=True)
class Place:
    """The place of a tensor in the heads.

    Args:
        ours: our template of its name.
        head: the head's index.
        layer: the block's index; for an unembedding, the number of layers if its name contains it.
    """

    ours: str
    head: int
    layer: int | None


def recognise(names: Iterable[str]) -> tuple[Layout, str]:
    """Return the layout and prefix that match most of a checkpoint's tensors.

    Raises:
        ValueError: no name matches any layout.
    """
    names = list(names)
    matches = [
        (sum(place_of(layout, prefix, name) is not None for name in names), layout, prefix)
        for layout in LAYOUTS
        for prefix in layout.prefixes
    ]
    count, layout, prefix = max(matches, key=lambda entry: entry[0])
    if not count:
        known = "; ".join(f"{layout.name}: {layout.names[WEIGHT]}" for layout in LAYOUTS)
        raise ValueError(
            f"None of the {len(names)} tensors belongs to heads in a known layout ({known}). The file has "
            f"{', '.join(sorted(names)[:5]) or 'none'}."
        )
    return layout, prefix


def place_of(layout: Layout, prefix: str, name: str) -> Place | None:
    """Return the place of their tensor, or None if it is not part of a head."""
    for ours, theirs in layout.names.items():
        match = re.fullmatch(_pattern(prefix + theirs), name)
        if match is not None:
            layer = match.groupdict().get("layer") or match.groupdict().get("layers")
            return Place(ours, int(match["head"]), None if layer is None else int(layer))
    return None


def their_name(layout: Layout, place: Place, num_layers: int) -> str:
    """Return a layout's name of a tensor of heads with `num_layers` layers, without a prefix."""
    return layout.names[place.ours].format(head=place.head, layer=place.layer, layers=num_layers)


def _pattern(template: str) -> str:
    return re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(template))
