"""`lmtp convert`: makes a checkpoint with leap heads from heads that another project trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import has_file

from modeling_lmtp.backbone_lmtp import unembedding_size
from modeling_lmtp.leaps_lmtp import evenly_spaced_offsets, resolve_offsets
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM

from .command_line import console
from .foreign_files import TOKENIZER_FILES, ForeignFiles, find_files
from .foreign_heads import ForeignHeads, read_heads
from .leap_check import PROMPTS, fit_leaps, generated_texts
from .loading import first_prompts, load_backbone, load_tokenizer
from .options import Dtype, Options, Range
from .saving import check_output_folder, check_settings, file_sha256, save_checkpoint


@dataclass
class ConvertOptions(Options):
    """What to convert."""

    title: ClassVar[str] = "checkpoint"

    source: str = field(metadata={"help": "Folder, file or Hub id with the heads."})
    output: Path = field(metadata={"help": "New folder for the checkpoint."})
    backbone: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of their backbone, if their config.json does not name it."
        },
    )
    revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of SOURCE on the Hub."}
    )
    leap_offsets: list[int] | None = field(
        default=None,
        metadata={"help": "Offsets of the heads, such as 3 5 7, if their files do not say."},
    )
    leap_stride: Annotated[int, Range(ge=1)] | None = field(
        default=None,
        metadata={"help": "Distance between the heads' offsets, in place of all offsets."},
    )
    num_heads: int | None = field(
        default=None, metadata={"help": "Convert the first N heads; all by default."}
    )
    dtype: Dtype = field(
        default="auto", metadata={"help": "Dtype of the checkpoint; auto keeps that of its parts."}
    )


@dataclass
class CheckOptions(Options):
    """How to check the offsets."""

    title: ClassVar[str] = "check of the offsets"

    check_leap: bool = field(
        default=True,
        metadata={"help": "Do not check the offsets on text that the backbone writes."},
    )
    prompts: Path | None = field(
        default=None, metadata={"help": "Prompts for that text, .jsonl or .jsonl.gz."}
    )
    field: str = field(default="prompt", metadata={"help": "Field of a row that holds the prompt."})


@dataclass(frozen=True)
class ConversionReport:
    """What was converted.

    Args:
        layout: the project whose names the tensors had.
        leap_offsets: the heads' offsets.
        share_lm_head: whether they share the backbone's unembedding.
        notes: what a reader should know.
    """

    layout: str
    leap_offsets: tuple[int, ...]
    share_lm_head: bool
    notes: tuple[str, ...]


def convert(options: ConvertOptions, check: CheckOptions) -> None:
    """Convert Medusa heads, or heads trained with the official L-MTP code, into a checkpoint.

    The offsets are checked: on text that the backbone writes, a head is right most often at its own.

    Examples:
      lmtp convert FasterDecoding/medusa-vicuna-7b-v1.3 OUT --backbone lmsys/vicuna-7b-v1.3
      lmtp convert OFFICIAL OUT --leap_offsets 3 5 7
    """
    report = convert_heads(options, check)
    for note in report.notes:
        console.print(f"Note: {note}", markup=False, highlight=False)
    console.print(
        f"Saved {len(report.leap_offsets)} heads ({report.layout} layout, offsets "
        f"{report.leap_offsets}, {'shared' if report.share_lm_head else 'separate'} unembeddings) and "
        f"their backbone in {options.output}.",
        markup=False,
        highlight=False,
    )


def convert_heads(options: ConvertOptions, check: CheckOptions) -> ConversionReport:
    """Read Medusa or official L-MTP heads and save them as a checkpoint.

    Raises:
        ValueError: files are damaged or incomplete, or heads, configuration, backbone, tokenizer and
            offsets do not belong together; the message says what does not fit.
    """
    check_output_folder(options.output)
    files = find_files(options.source, options.revision)
    heads = read_heads(files.tensors(), files.config, options.num_heads)
    offsets = find_offsets(heads, files.config, options.leap_offsets, options.leap_stride)
    backbone = options.backbone or files.config.get(heads.layout.config["backbone"])
    if backbone is None:
        raise ValueError(f"{options.source} does not name its backbone. Pass --backbone.")
    tokenizer = _tokenizer_of(backbone, needed=check.check_leap)
    if tokenizer is not None:
        check_tokenizer(tokenizer, files)
    base = load_backbone(backbone, options.dtype)
    check_settings(base.generation_config)
    notes = [*heads.notes, *take_backbone(heads, base)]
    model = attach_heads(heads, base, offsets, cast=options.dtype != "auto")
    accuracies = None
    if check.check_leap:
        texts: tuple[str, ...] = PROMPTS
        if check.prompts is not None:
            texts = tuple(first_prompts(check.prompts, check.field, len(PROMPTS)))
        fit = fit_leaps(model, generated_texts(model.backbone, tokenizer, texts))
        warning = fit.check()
        notes += [warning] if warning else []
        accuracies = fit.accuracies.tolist()
    record = {
        "command": "lmtp convert",
        "source": options.source,
        "source_revision": files.revision,
        "source_sha256": {path.name: file_sha256(path) for path in files.weights},
        "layout": heads.layout.name,
        "leap_offsets": list(offsets),
        "accuracies_by_offset": accuracies,
        "notes": notes,
    }
    save_checkpoint(model, tokenizer, options.output, record)
    return ConversionReport(heads.layout.name, offsets, model.config.share_lm_head, tuple(notes))


def _tokenizer_of(backbone: str, *, needed: bool) -> PreTrainedTokenizerBase | None:
    """Return a backbone's tokenizer, or None if it has none.

    Raises:
        ValueError: it has none, and the check of the offsets needs one.
    """
    if any(has_file(backbone, name) for name in TOKENIZER_FILES):
        return load_tokenizer(backbone)
    if needed:
        raise ValueError(
            f"{backbone} has no tokenizer, which the check of the offsets needs. Put the backbone's "
            "tokenizer there, or pass --no_check_leap to convert without both."
        )
    return None


def find_offsets(
    heads: ForeignHeads,
    config: Mapping[str, Any],
    leap_offsets: Sequence[int] | None = None,
    leap_stride: int | None = None,
) -> tuple[int, ...]:
    """Return the offsets passed in, or else those that the layout or the configuration implies.

    Raises:
        ValueError: the offsets are unknown, or their number is not that of the heads.
    """
    if leap_offsets is None and leap_stride is None:
        name = heads.layout.config.get("leap_stride", "")
        leap_stride = heads.layout.leap_stride or config.get(name)
        if not isinstance(leap_stride, int):
            raise ValueError(
                f"The checkpoint does not say how far its heads look ahead ({name} in config.json is "
                f"{leap_stride!r}). Pass --leap_stride or --leap_offsets."
            )
        return evenly_spaced_offsets(heads.num_heads, leap_stride)
    num_heads = None if leap_stride is None else heads.num_heads
    offsets = resolve_offsets(num_heads, leap_stride, leap_offsets and tuple(leap_offsets))
    if len(offsets) != heads.num_heads:
        raise ValueError(
            f"leap_offsets {offsets} are for {len(offsets)} heads, but there are {heads.num_heads}. "
            "Pass one offset per head, or --num_heads to convert the first ones."
        )
    return offsets


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, files: ForeignFiles) -> None:
    """Raise a ValueError if `tokenizer` has other ids than the one saved with the heads."""
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
            f"{differing[0]!r}, have another id. The heads belong to another backbone; pass that one "
            "with --backbone."
        )


def take_backbone(heads: ForeignHeads, backbone: Any) -> list[str]:
    """Load the backbone weights that a checkpoint holds, if any, into `backbone`.

    Returns:
        Notes on what differs.

    Raises:
        ValueError: the tensors besides the heads are not this backbone's, or are incomplete.
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
            f"The checkpoint holds {len(heads.others)} tensors of a backbone besides its heads, but "
            f"lacks {', '.join(missing[:5])}. Get the whole checkpoint."
        )
    for name, tensor in heads.others.items():
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"{name} has the shape {tuple(tensor.shape)} in the checkpoint and "
                f"{tuple(state[name].shape)} in the backbone. Pass the backbone of these heads with "
                "--backbone."
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
    """Put heads on a backbone; if all unembeddings equal the backbone's, the heads share it.

    Args:
        heads: the heads as read.
        backbone: a loaded causal language model.
        offsets: one per head.
        cast: convert the heads to the backbone's dtype.

    Raises:
        ValueError: hidden size or vocabulary differ, or the dtype does and `cast` is false.
    """
    vocab_size, hidden_size = unembedding_size(backbone)
    if heads.hidden_size != hidden_size:
        raise ValueError(
            f"The heads read states of {heads.hidden_size} numbers, but the backbone's have "
            f"{hidden_size}. Pass the backbone they were trained on with --backbone."
        )
    tensors = dict(heads.tensors)
    unembeddings = [name for name in tensors if name.endswith(".lm_head.weight")]
    if unembeddings and tensors[unembeddings[0]].shape[0] != vocab_size:
        raise ValueError(
            f"The heads predict {tensors[unembeddings[0]].shape[0]} tokens, but the backbone's "
            f"vocabulary has {vocab_size}. Pass the backbone they were trained on with --backbone."
        )
    dtype = next(iter(tensors.values())).dtype
    if dtype != backbone.dtype and not cast:
        raise ValueError(
            f"The heads are {dtype} and the backbone {backbone.dtype}. Pass --dtype to choose one; float32 "
            "represents both without rounding."
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
