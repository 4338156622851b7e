"""Joint tuning (stage 2): LoRA on backbone and heads, loss = NTP + β · Σ heads (arXiv 2505.17505).

Held-out answers say what it did to both: how much better the heads draft, and how far the backbone has
drifted from the original.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from modeling_lmtp.modeling_lmtp import LMTPForCausalLM

from .adapters import add_adapters, cast_trained, check_trainable
from .drift import DriftReport, measure_drift
from .evaluation import HeadReport, evaluate_heads
from .examples import AnswerDataset, Example, check_targets, collate
from .fingerprints import model_fingerprint
from .guarded_trainer import last_whole_checkpoint, take_off_autocast
from .joint_settings import JointSettings
from .joint_trainer import JointTrainer
from .runs import claim_run_folder, examples_sha256
from .trainer import HeldOutCallback
from .warmup import HEAD_SETTINGS

# Transformers has renamed it, and warns of the older name
RECOMPUTE = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)


@dataclass(frozen=True)
class JointReport:
    """What joint tuning did.

    Args:
        log: the Trainer's, with what held-out answers said at the end of each epoch.
        drift: of the backbone from the original, if answers were held out.
        heads_before, heads_after: the heads on held-out answers, if there are both. The answers are
            the same, so after a drift they are not quite what the tuned backbone would write.
    """

    log: list[dict[str, Any]]
    drift: DriftReport | None = None
    heads_before: HeadReport | None = None
    heads_after: HeadReport | None = None

    def held_out(self) -> dict[str, Any]:
        """Return all but the log as JSON-serialisable values."""
        parts = {name: getattr(self, name) for name in ("drift", "heads_before", "heads_after")}
        return {name: part.as_dict() if part else None for name, part in parts.items()}

    def summary(self) -> list[str]:
        """Return what to tell a reader, in lines."""
        lines = []
        if self.drift is not None:
            drift = self.drift
            lines.append(
                f"Held-out drift from the original backbone: KL {drift.kl:.4f} nats per token, top-1 "
                f"agreement {drift.top1_agreement:.2%}, perplexity {drift.perplexity_original:.3f} -> "
                f"{drift.perplexity_tuned:.3f}."
            )
        for name, heads in (("before", self.heads_before), ("after", self.heads_after)):
            if heads is not None:
                top1 = ", ".join(f"{row[0]:.2f}" for row in heads.accuracies)
                lines.append(
                    f"Heads {name}: top-1 accuracy per draft distance {top1}; simulated tokens per "
                    f"step of the chain {heads.chain_tokens_per_step:.2f}."
                )
        return lines


class DriftCallback(HeldOutCallback):
    """Measures the drift on held-out answers after each epoch."""

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Add the drift to the log, before a checkpoint of this step is saved."""
        if not self.examples or not self._is_due(state) or not state.is_world_process_zero:
            return
        dtype = model.backbone.dtype
        with torch.autocast(model.device.type, dtype, enabled=dtype.itemsize == 2):
            drift = measure_drift(model, self.examples).as_dict()
        entry = {f"held_out_{name}": value for name, value in drift.items()}
        state.log_history.append({"epoch": state.epoch, "step": state.global_step, **entry})


def joint_tune(
    model: LMTPForCausalLM,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    run_folder: Path,
    settings: JointSettings,
    *,
    resume: bool = True,
    progress: bool = True,
) -> tuple[PeftModel, JointReport]:
    """Tune backbone and heads of `model` with LoRA adapters, in place.

    Its configuration says afterwards what it was trained with (`leap_loss_weight`), not that its backbone
    trains (`train_backbone`): merged, it is a checkpoint whose heads can be warmed up further.
    A backbone in 16 bits stays so; what trains is kept in float32.

    Args:
        model: heads that were warmed up. It may be quantized; then the "original" is what the
            quantized model was.
        examples: answers to learn.
        held_out: answers to evaluate on, may be empty.
        run_folder: holds checkpoints while training; the caller removes it when all is saved.
        settings: how to tune. A run that was stopped goes on if they are the same; the global batch
            may be shared among another number of processes.
        resume: go on from the last checkpoint in `run_folder`, if there is one.
        progress: show progress bars.

    Returns:
        The model in PEFT's wrapper, in evaluation mode, and a report. Its `save_pretrained` writes
        the adapter, its `merge_and_unload` gives a plain `LMTPForCausalLM`.

    Raises:
        ValueError: `model` cannot be trained (see `check_trainable`), there are no targets, or
            `run_folder` belongs to another run.
        RuntimeError: the loss is not finite; names the step, and the file that its batch is in.
        OSError: a checkpoint could not be saved; the one before it stays.
    """
    check_trainable(model)
    check_targets(examples, model.config.leap_offsets, train_on_prompts=settings.train_on_prompts)
    arguments = _arguments(run_folder, settings, model.backbone.dtype, progress)
    with arguments.main_process_first(local=False):
        claim_run_folder(run_folder, _identity(model, settings, examples, arguments.world_size))
    heads_before = _evaluate_heads(model, held_out, progress=progress)
    backbone_dtype = model.backbone.dtype
    set_seed(settings.seed)
    train_backbone, model.config.train_backbone = model.config.train_backbone, True
    model.config.leap_loss_weight = settings.leap_loss_weight
    tuned = add_adapters(
        model,
        rank=settings.rank,
        alpha=settings.alpha,
        dropout=settings.dropout,
        heads=settings.head_training,
    )
    trainer = JointTrainer(
        settings,
        model=tuned,
        args=arguments,
        train_dataset=AnswerDataset(examples, train_on_prompts=settings.train_on_prompts),
        data_collator=collate,
        callbacks=_held_out_callbacks(model, held_out),
    )
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(run_folder) if resume else None)
    take_off_autocast(tuned)
    model.config.train_backbone = train_backbone
    tuned.eval()
    cast_trained(tuned, backbone_dtype, only_heads=True)
    drift = measure_drift(tuned, held_out, progress=progress) if held_out else None
    heads_after = _evaluate_heads(model, held_out, progress=progress)
    return tuned, JointReport(trainer.state.log_history, drift, heads_before, heads_after)


def _held_out_callbacks(
    model: LMTPForCausalLM, examples: Sequence[Example]
) -> list[TrainerCallback]:
    heads = [HeldOutCallback(examples, None)] if model.config.leap_offsets else []
    return [DriftCallback(examples, None), *heads]


def _evaluate_heads(
    model: Any, examples: Sequence[Example], *, progress: bool = False
) -> HeadReport | None:
    if not model.config.leap_offsets or not examples:
        return None
    return evaluate_heads(model, examples, progress=progress)[0]


def _identity(
    model: LMTPForCausalLM,
    settings: JointSettings,
    examples: Sequence[Example],
    world_size: int,
) -> dict[str, Any]:
    """Return what makes a run this run; how its global batch is shared out is left open."""
    heads = {name: getattr(model.config, name) for name in HEAD_SETTINGS}
    options = asdict(settings)
    rows_per_step = options.pop("batch_size") * options.pop("gradient_accumulation_steps")
    return {
        **options,
        **heads,
        "global_batch_size": rows_per_step * world_size,
        "checkpoint": model_fingerprint(model),
        "examples_sha256": examples_sha256(examples),
    }


def _arguments(
    run_folder: Path, settings: JointSettings, backbone_dtype: torch.dtype, progress: bool
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(run_folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,  # shown; the optimizer's groups have their own
        warmup_steps=settings.warmup_share,
        lr_scheduler_type="cosine",
        seed=settings.seed,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        save_steps=settings.save_steps,
        save_total_limit=2,
        bf16=backbone_dtype == torch.bfloat16,
        fp16=backbone_dtype == torch.float16,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=not progress,
        **{RECOMPUTE: settings.activation_checkpointing},
    )
