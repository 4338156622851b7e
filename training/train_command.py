"""`lmtp train`: from a backbone, or a checkpoint, and answers to a checkpoint with trained heads."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from modeling_lmtp.backbone_lmtp import unembedding_size
from modeling_lmtp.conversion.loading import (
    best_device,
    has_leap_heads,
    load_backbone,
    load_lmtp,
    load_tokenizer,
)
from modeling_lmtp.conversion.saving import file_sha256, run_folder_of, save_checkpoint
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM

from .answer_files import load_answers, warn
from .examples import Example, draft_vocabulary, split_examples
from .processes import processes
from .sharding import take_over_fsdp
from .training_log import save_training_log
from .warmup import WarmupReport, WarmupSettings, warm_up

COMMAND = "lmtp train"


@dataclass(frozen=True)
class HeadShape:
    """The heads to add to a backbone, see `LMTPForCausalLM.from_backbone`."""

    num_leap_heads: int | None = None
    leap_stride: int | None = None
    leap_offsets: tuple[int, ...] | None = None
    head_context: int | str = 0
    head_input: str = "last"
    num_head_layers: int = 1
    share_lm_head: bool = True
    lm_head_rank: int = 0
    draft_vocab_size: int | None = None  # the most frequent tokens of the answers; None is all


def train_heads(
    source: str,
    answers: Path,
    output: Path,
    shape: HeadShape,
    settings: WarmupSettings,
    *,
    max_length: int,
    held_out: int,
    dtype: str,
    state_folder: Path | None = None,
    bad_rows: str = "refuse",
) -> WarmupReport:
    """Warm up heads and save the checkpoint in `output`, with its log as a file and as a picture.

    Checkpoints of the run itself are kept in `<output>.training` until then; called again after a
    stop, it goes on from the last. Of several processes, the main one writes.

    Raises:
        ValueError: `output` holds something, heads are described for a checkpoint that has some, or
            the answers are unusable.
    """
    run_folder = run_folder_of(output, COMMAND)
    if take_over_fsdp():
        settings = replace(settings, shard_backbone=True)
    this_process = processes()  # before models are loaded: each process takes its own device
    has_heads = has_leap_heads(source)
    if has_heads and shape != HeadShape():
        raise ValueError(
            f"{source!r} has leap heads already, so their offsets and layers are settled. Leave those "
            "options out to train them on, or start from the plain backbone."
        )
    tokenizer = load_tokenizer(source)
    model = _load(source, dtype, on_cpu=settings.shard_backbone)  # then no device holds it all
    found = load_answers(answers, model, tokenizer, max_length, bad_rows)
    warn(found.notes)
    training, evaluation = split_examples(found.examples, held_out)
    if not has_heads:
        set_seed(settings.seed)  # some weights start at random, the same in every process
        model = add_heads(model, shape, training)
    report = warm_up(model, training, evaluation, run_folder, settings, state_folder=state_folder)
    if this_process.is_main_process:
        record = {
            "command": COMMAND,
            "answers_sha256": file_sha256(answers),
            "answers_notes": found.notes,
            "examples": len(training),
            "processes": this_process.num_processes,
            "settings": asdict(settings),
            "held_out": report.held_out.as_dict() if report.held_out else None,
            "log": report.log,
        }
        if settings.shard_backbone:
            model = _gathered(model, _load(source, dtype, on_cpu=True))
        save_checkpoint(
            model,
            tokenizer,
            output,
            record,
            lambda folder: save_training_log(folder, report.log, model.config.leap_offsets),
        )
        shutil.rmtree(run_folder)
    this_process.wait_for_everyone()
    return report


def _load(source: str, dtype: str, *, on_cpu: bool) -> Any:
    """Load a checkpoint with heads, or a plain backbone."""
    device = torch.device("cpu") if on_cpu else best_device()
    if has_leap_heads(source):
        return load_lmtp(source, dtype, device, train_backbone=False)
    return load_backbone(source, dtype, device)


def _gathered(model: LMTPForCausalLM, loaded: Any) -> LMTPForCausalLM:
    """Return a model to save: the trained heads with the backbone as it was loaded, not sharded."""
    backbone = loaded.backbone if isinstance(loaded, LMTPForCausalLM) else loaded
    whole = LMTPForCausalLM(model.config, backbone=backbone)
    whole.generation_config = model.generation_config
    whole.leap_heads.load_state_dict(model.leap_heads.state_dict())
    return whole


def add_heads(backbone: Any, shape: HeadShape, examples: Sequence[Example]) -> LMTPForCausalLM:
    """Give a backbone the heads that `shape` describes; the draft vocabulary is that of `examples`."""
    options = asdict(shape)
    size = options.pop("draft_vocab_size")
    if size is not None:
        vocab_size, _ = unembedding_size(backbone)
        options["draft_token_ids"] = draft_vocabulary(examples, size, vocab_size)
    return LMTPForCausalLM.from_backbone(backbone, **options)
