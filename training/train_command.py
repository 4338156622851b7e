"""`lmtp train`: train leap heads on a backbone's answers, and save a checkpoint."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from transformers import set_seed

from modeling_lmtp.backbone_lmtp import unembedding_size
from modeling_lmtp.configuration_lmtp import LMTPConfig
from modeling_lmtp.conversion.command_line import console
from modeling_lmtp.conversion.loading import (
    best_device,
    lmtp_config,
    load_backbone,
    load_lmtp,
    load_tokenizer,
)
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.pretrained_lmtp import check_quantization
from modeling_lmtp.transformers_lmtp import commit_of

from .arguments import HeadOptions, LeapTrainingArguments
from .examples import Example, draft_vocabulary
from .leap_trainer import LeapTrainer
from .processes import process_state
from .training_run import RunOptions, TrainingRun


def train(options: RunOptions, heads: HeadOptions, args: LeapTrainingArguments) -> None:
    """Train leap heads on answers of their backbone (stage 1: the backbone stays frozen).

    MODEL is a backbone, which gets new heads, or a checkpoint, whose heads are trained further.

    Examples:
    lmtp train BASE answers.jsonl OUT --leap_offsets 2 3 4 --head_context path --draft_vocab_size 8192
    lmtp train BASE answers.jsonl OUT --num_leap_heads 3 --leap_stride 2   # the heads of the paper
    """
    run = TrainingRun("lmtp train", options, args)
    config = lmtp_config(options.model)
    if config is not None:
        check_options(options.model, config, heads)
    tokenizer = load_tokenizer(options.model)
    # A backbone to shard is loaded on the CPU, because no device may be able to hold all of it
    model = _load(options, on_cpu=args.shard_backbone)
    check_quantization(getattr(model.config, "backbone_config", model.config))
    run.read_answers(model, tokenizer)
    record: dict[str, Any] = {}
    if config is not None:
        record = {"checkpoint": options.model, "checkpoint_revision": commit_of(model.config)}
        if heads.draft_vocab_size is not None:
            choose_draft_vocabulary(model, heads.draft_vocab_size, run.examples)
    else:
        set_seed(args.seed)  # every process must initialize the heads alike
        model = add_heads(model, heads, run.examples)
    trainer = LeapTrainer(model, args, run.examples, run.held_out, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=True)
    report = trainer.head_report(run.held_out)
    if args.shard_backbone and process_state().is_main_process:
        model = _unsharded(model, _load(options, on_cpu=True))
    record["held_out"] = report.as_dict() if report else None
    run.save(model, tokenizer, trainer, record)
    if process_state().is_main_process:
        if report is not None:
            console.print(f"On {len(run.held_out)} held-out answers: {report.summary()}.")
        console.print(f"Saved in {options.output}.", soft_wrap=True)


def check_options(checkpoint: str, config: LMTPConfig, heads: HeadOptions) -> None:
    """Raise a ValueError if a checkpoint's heads are asked for what they cannot change."""
    size = heads.draft_vocab_size
    if heads != HeadOptions(draft_vocab_size=size):
        raise ValueError(
            f"{checkpoint!r} has leap heads already, of which only the draft vocabulary can change. "
            "Leave their other options out to train the heads further, or start from the plain backbone."
        )
    if size is not None and (not config.share_lm_head or config.lm_head_rank):
        raise ValueError(
            "Only heads that share the backbone's unembedding can be given another draft vocabulary: these "
            "have trained rows for the tokens that they draft. Leave draft_vocab_size out."
        )


def choose_draft_vocabulary(model: LMTPForCausalLM, size: int, examples: Sequence[Example]) -> None:
    """Let trained heads draft the `size` most frequent tokens of other answers."""
    vocab_size, _ = unembedding_size(model.backbone)
    model.config.draft_token_ids = draft_vocabulary(examples, size, vocab_size)


def _load(options: RunOptions, *, on_cpu: bool) -> Any:
    """Load a checkpoint with heads, or a plain backbone."""
    device = torch.device("cpu") if on_cpu else best_device()
    if lmtp_config(options.model) is not None:
        return load_lmtp(options.model, options.dtype, device, train_backbone=False)
    return load_backbone(options.model, options.dtype, device)


def _unsharded(model: LMTPForCausalLM, loaded: Any) -> LMTPForCausalLM:
    """Return the trained heads on an unsharded, freshly loaded backbone, to save."""
    backbone = loaded.backbone if isinstance(loaded, LMTPForCausalLM) else loaded
    unsharded = LMTPForCausalLM(model.config, backbone=backbone)
    unsharded.generation_config = model.generation_config
    unsharded.leap_heads.load_state_dict(model.leap_heads.state_dict())
    return unsharded


def add_heads(backbone: Any, heads: HeadOptions, examples: Sequence[Example]) -> LMTPForCausalLM:
    """Add new leap heads to a backbone.

    Args:
        backbone: a causal LM of Transformers.
        heads: the options of the heads.
        examples: answers; their most frequent tokens form the draft vocabulary, if there is one.
    """
    settings = asdict(heads)
    size = settings.pop("draft_vocab_size")
    if size is not None:
        vocab_size, _ = unembedding_size(backbone)
        settings["draft_token_ids"] = draft_vocabulary(examples, size, vocab_size)
    if settings["head_context"] != "path":
        settings["head_context"] = int(settings["head_context"])
    return LMTPForCausalLM.from_backbone(backbone, **settings)
