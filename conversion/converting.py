"""`lmtp convert`: heads that another project trained become a checkpoint with leap heads."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from modeling_lmtp.backbone_lmtp import unembedding_size
from modeling_lmtp.leaps_lmtp import evenly_spaced_offsets, resolve_offsets
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM

from .foreign_files import ForeignFiles, find_files
from .foreign_heads import ForeignHeads, read_heads
from .leap_check import PROMPTS, fit_leaps, own_texts
from .loading import first_prompts, load_backbone, load_tokenizer
from .saving import check_output_folder, file_sha256, save_checkpoint


@dataclass(frozen=True)
class ConversionReport:
    """What was converted.

    Args:
        layout: whose names the tensors had.
        leap_offsets: of the heads.
        share_lm_head: whether they share the backbone's unembedding.
        notes: what a reader should know.
    """

    layout: str
    leap_offsets: tuple[int, ...]
    share_lm_head: bool
    notes: tuple[str, ...]


def convert_heads(
    source: str | Path,
    output: Path,
    *,
    backbone: str | None = None,
    revision: str | None = None,
    leap_offsets: tuple[int, ...] | None = None,
    leap_stride: int | None = None,
    num_heads: int | None = None,
    dtype: str = "auto",
    check_leap: bool = True,
    prompts: tuple[Path, str] | None = None,
) -> ConversionReport:
    """Read Medusa or official L-MTP heads and save them as a checkpoint in `output`.

    Args:
        source: folder, file or Hub id with the heads.
        output: a new folder.
        backbone: folder or Hub id of the model that they stand on; by default what their
            configuration names.
        revision: of `source`, on the Hub.
        leap_offsets, leap_stride: how far ahead they look, if their files do not say, or not rightly.
        num_heads: take the first so many.
        dtype: of backbone and heads; `"auto"` keeps theirs, which must be one.
        check_leap: find out on the backbone's own text whether the offsets are right.
        prompts: a JSONL file, and its field, with prompts for that text.

    Raises:
        ValueError: files are damaged or incomplete, or heads, configuration, backbone, tokenizer and
            offsets do not belong together; says what does not fit.
    """
    check_output_folder(output)
    files = find_files(source, revision)
    heads = read_heads(files.tensors(), files.config, num_heads)
    offsets = find_offsets(heads, files.config, leap_offsets, leap_stride)
    backbone = backbone or files.config.get(heads.layout.config["backbone"])
    if backbone is None:
        raise ValueError(f"{source} does not name its backbone. Pass --backbone.")
    tokenizer = load_tokenizer(backbone)
    check_tokenizer(tokenizer, files)
    base = load_backbone(backbone, dtype)
    notes = [*heads.notes, *take_backbone(heads, base)]
    model = attach_heads(heads, base, offsets, cast=dtype != "auto")
    accuracies = None
    if check_leap:
        texts = PROMPTS if prompts is None else tuple(first_prompts(*prompts, len(PROMPTS)))
        fit = fit_leaps(model, own_texts(model.backbone, tokenizer, texts))
        warning = fit.check()
        notes += [warning] if warning else []
        accuracies = fit.accuracies
    record = {
        "command": "lmtp convert",
        "source": str(source),
        "source_revision": files.revision,
        "source_sha256": {path.name: file_sha256(path) for path in files.weights},
        "layout": heads.layout.name,
        "leap_offsets": list(offsets),
        "accuracies_by_offset": accuracies,
        "notes": notes,
    }
    save_checkpoint(model, tokenizer, output, record)
    return ConversionReport(heads.layout.name, offsets, model.config.share_lm_head, tuple(notes))


def find_offsets(
    heads: ForeignHeads,
    config: Mapping[str, Any],
    leap_offsets: tuple[int, ...] | None = None,
    leap_stride: int | None = None,
) -> tuple[int, ...]:
    """Return the offsets given, or else those that the layout or the configuration stands for.

    Raises:
        ValueError: nothing says what they are, or their number is not that of the heads.
    """
    if leap_offsets is None and leap_stride is None:
        field = heads.layout.config.get("leap_stride", "")
        leap_stride = heads.layout.leap_stride or config.get(field)
        if not isinstance(leap_stride, int):
            raise ValueError(
                f"The checkpoint does not say how far its heads look ahead ({field} in config.json is "
                f"{leap_stride!r}). Pass --leap-stride or --leap-offsets."
            )
        return evenly_spaced_offsets(heads.num_heads, leap_stride)
    num_heads = None if leap_stride is None else heads.num_heads
    offsets = resolve_offsets(num_heads, leap_stride, leap_offsets)
    if len(offsets) != heads.num_heads:
        raise ValueError(
            f"leap_offsets {offsets} are for {len(offsets)} heads, but there are {heads.num_heads}. "
            "Pass one offset per head, or --num-heads to take the first ones."
        )
    return offsets


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, files: ForeignFiles) -> None:
    """Raise a ValueError if the tokenizer beside the heads gives tokens other ids than `tokenizer`."""
    if not files.has_tokenizer:
        return
    ours, theirs = tokenizer.get_vocab(), load_tokenizer(files.folder).get_vocab()
    ids = {index: token for token, index in ours.items()}
    differing = [
        token
        for token, index in theirs.items()
        if ours.get(token, index) != index or ids.get(index, token) != token
    ]
    if differing:
        raise ValueError(
            f"The tokenizer in {files.folder} is not the backbone's: {len(differing)} tokens, such as "
            f"{differing[0]!r}, have another id. The heads belong to another backbone; pass theirs "
            "with --backbone."
        )


def take_backbone(heads: ForeignHeads, backbone: Any) -> list[str]:
    """Load the backbone that a checkpoint holds beside its heads, if it does, into `backbone`.

    Returns:
        Notes on what differs.

    Raises:
        ValueError: what is there beside the heads is no such backbone, or not all of it.
    """
    if not heads.others:
        return []
    state = backbone.state_dict()
    unknown = sorted(set(heads.others) - set(state))
    if unknown:
        raise ValueError(
            f"The checkpoint holds tensors that belong neither to its heads nor to "
            f"{type(backbone).__name__}: {', '.join(unknown[:5])}"
            + (f" and {len(unknown) - 5} more." if len(unknown) > 5 else ".")
        )
    kept = {state[name].data_ptr() for name in heads.others}  # tied weights are stored once
    missing = sorted(name for name, tensor in state.items() if tensor.data_ptr() not in kept)
    if missing:
        raise ValueError(
            f"The checkpoint holds {len(heads.others)} tensors of a backbone beside its heads, but "
            f"lacks {', '.join(missing[:5])}. Get the whole checkpoint."
        )
    for name, tensor in heads.others.items():
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"{name} has the shape {tuple(tensor.shape)} in the checkpoint and "
                f"{tuple(state[name].shape)} in the backbone. Pass the heads' own with --backbone."
            )
    differing = [
        name
        for name, tensor in heads.others.items()
        if not torch.equal(tensor.to(state[name]), state[name])
    ]
    backbone.load_state_dict(heads.others, strict=False)  # tied weights may be missing
    if not differing:
        return []
    return [
        f"The checkpoint's own backbone is kept: {len(differing)} of its {len(heads.others)} tensors "
        "differ from those of the backbone that it names."
    ]


def attach_heads(
    heads: ForeignHeads, backbone: Any, offsets: tuple[int, ...], *, cast: bool
) -> LMTPForCausalLM:
    """Put heads on a backbone; where all unembeddings equal the backbone's, they share it.

    Args:
        heads: as they were read.
        backbone: a loaded causal language model.
        offsets: one per head.
        cast: give heads the backbone's type if they have another.

    Raises:
        ValueError: hidden size or vocabulary differ, or the type does and `cast` is false.
    """
    vocab_size, hidden_size = unembedding_size(backbone)
    if heads.hidden_size != hidden_size:
        raise ValueError(
            f"The heads read states of {heads.hidden_size} numbers, but the backbone's have "
            f"{hidden_size}. Pass the backbone that they were trained on with --backbone."
        )
    tensors = dict(heads.tensors)
    unembeddings = [name for name in tensors if name.endswith(".lm_head.weight")]
    if unembeddings and tensors[unembeddings[0]].shape[0] != vocab_size:
        raise ValueError(
            f"The heads predict {tensors[unembeddings[0]].shape[0]} tokens, but the backbone's "
            f"vocabulary has {vocab_size}. Pass the backbone that they were trained on with --backbone."
        )
    dtype = next(iter(tensors.values())).dtype
    if dtype != backbone.dtype and not cast:
        raise ValueError(
            f"The heads are {dtype} and the backbone {backbone.dtype}. Pass --dtype to settle on one; "
            "float32 holds both without rounding."
        )
    source = backbone.get_output_embeddings()
    bias = getattr(source, "bias", None)
    weight = source.weight.to("cpu", dtype)
    shared = (bias is None or not bias.any()) and all(
        torch.equal(tensors[name], weight) for name in unembeddings
    )
    model = LMTPForCausalLM.from_backbone(
        backbone,
        leap_offsets=offsets,
        num_head_layers=heads.num_layers,
        share_lm_head=shared or not unembeddings,
    )
    for name in unembeddings:
        if model.config.share_lm_head:
            del tensors[name]
        elif bias is not None:
            tensors[name.replace("weight", "bias")] = torch.zeros(vocab_size)
    model.leap_heads.load_state_dict(tensors)
    return model
