"""`lmtp train`: from a backbone, or a checkpoint, and answers to a checkpoint with trained heads."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from transformers import set_seed

from modeling_lmtp.backbone_lmtp import unembedding_size
from modeling_lmtp.conversion.command_line import console
from modeling_lmtp.conversion.loading import (
    best_device,
    has_leap_heads,
    load_backbone,
    load_lmtp,
    load_tokenizer,
)
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM

from .arguments import HeadOptions, LeapTrainingArguments
from .examples import Example, draft_vocabulary
from .leap_trainer import LeapTrainer
from .processes import processes
from .training_run import RunOptions, TrainingRun


def train(options: RunOptions, heads: HeadOptions, args: LeapTrainingArguments) -> None:
    """Train leap heads on answers of their backbone (stage 1: the backbone stays frozen).

    MODEL is a backbone, which gets new heads, or a checkpoint whose heads train on.
    `accelerate launch --num_processes 2 --no_python lmtp train ...` trains in several processes;
    `--use_fsdp` there means --shard_backbone here.

    Examples:
    lmtp train MODEL answers.jsonl OUT --leap_offsets 2 3 4 --head_context path --draft_vocab_size 8192
    lmtp train MODEL answers.jsonl OUT --num_leap_heads 3 --leap_stride 2   # the heads of the paper
    """
    run = TrainingRun("lmtp train", options, args)
    has_heads = has_leap_heads(options.model)
    if has_heads and heads != HeadOptions():
        raise ValueError(
            f"{options.model!r} has leap heads already, so their offsets and layers are settled. Leave "
            "out the options of heads to train them on, or start from the plain backbone."
        )
    tokenizer = load_tokenizer(options.model)
    model = _load(options, on_cpu=args.shard_backbone)  # then no device holds it all
    run.read_answers(model, tokenizer)
    if not has_heads:
        set_seed(args.seed)  # some weights start at random, the same in every process
        model = add_heads(model, heads, run.examples)
    trainer = LeapTrainer(model, args, run.examples, run.held_out, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=True)
    report = trainer.head_report(run.held_out)
    if args.shard_backbone and processes().is_main_process:
        model = _gathered(model, _load(options, on_cpu=True))
    run.save(model, tokenizer, trainer, {"held_out": report.as_dict() if report else None})
    if processes().is_main_process:
        if report is not None:
            console.print(f"On {len(run.held_out)} held-out answers: {report.summary()}.")
        console.print(f"Saved in {options.output}.", soft_wrap=True)


def _load(options: RunOptions, *, on_cpu: bool) -> Any:
    """Load a checkpoint with heads, or a plain backbone."""
    device = torch.device("cpu") if on_cpu else best_device()
    if has_leap_heads(options.model):
        return load_lmtp(options.model, options.dtype, device, train_backbone=False)
    return load_backbone(options.model, options.dtype, device)


def _gathered(model: LMTPForCausalLM, loaded: Any) -> LMTPForCausalLM:
    """Return a model to save: the trained heads with the backbone as it was loaded, not sharded."""
    backbone = loaded.backbone if isinstance(loaded, LMTPForCausalLM) else loaded
    whole = LMTPForCausalLM(model.config, backbone=backbone)
    whole.generation_config = model.generation_config
    whole.leap_heads.load_state_dict(model.leap_heads.state_dict())
    return whole


def add_heads(backbone: Any, heads: HeadOptions, examples: Sequence[Example]) -> LMTPForCausalLM:
    """Give a backbone new heads.

    Args:
        backbone: the model.
        heads: what heads.
        examples: answers, whose most frequent tokens become the draft vocabulary.
    """
    settings = asdict(heads)
    size = settings.pop("draft_vocab_size")
    if size is not None:
        vocab_size, _ = unembedding_size(backbone)
        settings["draft_token_ids"] = draft_vocabulary(examples, size, vocab_size)
    if settings["head_context"] != "path":
        settings["head_context"] = int(settings["head_context"])
    return LMTPForCausalLM.from_backbone(backbone, **settings)
