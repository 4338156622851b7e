"""Head warm-up (stage 1): the backbone stays frozen, the leap heads learn its own answers.

`transformers.Trainer` does the training; this adds each head's loss to its log, the simulated tokens
per step on held-out answers, and checkpoints that hold the heads alone.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from modeling_lmtp.modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.training.evaluation import HeadReport, evaluate_heads
from modeling_lmtp.training.examples import AnswerDataset, Example, collate

HEAD_SETTINGS = (
    "leap_offsets",
    "head_context",
    "num_head_layers",
    "share_lm_head",
    "draft_token_ids",
    "base_model_name_or_path",
)


@dataclass(frozen=True)
class WarmupSettings:
    """How heads are warmed up; the defaults are the paper's, but for the length of the run.

    Raises ValueError naming the argument, the value and what is allowed.
    """

    epochs: float = 1.0
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3
    warmup_share: float = 0.1  # of the steps; then a cosine down to 0
    weight_decay: float = 0.0
    seed: int = 0
    logging_steps: int = 10
    save_steps: int = 200
    train_on_prompts: bool = False

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        for name in ("batch_size", "gradient_accumulation_steps", "logging_steps", "save_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        for name in ("epochs", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        if not 0 <= self.warmup_share < 1:
            raise ValueError(f"warmup_share: expected 0 or more, below 1, got {self.warmup_share}")


class LeapTrainer(Trainer):
    """A Trainer that also logs each leap head's mean cross-entropy, as `loss_head_<offset>`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._leap_losses: list[torch.Tensor] = []

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Compute the model's own loss, and note the heads'."""
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        self._leap_losses.append(outputs["leap_losses"])
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, and add the heads' losses since the last time."""
        if "loss" in logs and self._leap_losses:
            means = torch.stack(self._leap_losses).mean(dim=0).tolist()
            offsets = self.model.config.leap_offsets
            for offset, mean in zip(offsets, means, strict=True):
                logs[f"loss_head_{offset}"] = mean
            self._leap_losses.clear()
        super().log(logs, *args, **kwargs)


class HeldOutCallback(TrainerCallback):
    """Evaluates the heads on held-out answers at the end of each epoch."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: LMTPForCausalLM | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the simulated tokens per step to the log."""
        if model is None or not self.examples or not state.is_world_process_zero:
            return
        with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
            report, _ = evaluate_heads(model, self.examples)
        entry = {
            "epoch": state.epoch,
            "step": state.global_step,
            "held_out_tokens_per_step": report.chain_tokens_per_step,
            "held_out_top1": [row[0] for row in report.accuracies],
        }
        state.log_history.append(entry)


class StopOnBadLoss(TrainerCallback):
    """Stops a run whose loss is no longer a number, before it is saved."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Raise a RuntimeError at a loss that is not finite."""
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise RuntimeError(
                f"The loss is {loss} at step {state.global_step}. The last checkpoint in "
                f"{args.output_dir} is from before; lower learning_rate and start again."
            )


@dataclass(frozen=True)
class WarmupReport:
    """The Trainer's log, and the heads' final evaluation if answers were held out."""

    log: list[dict[str, Any]]
    held_out: HeadReport | None


def warm_up(
    model: LMTPForCausalLM,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    run_folder: Path,
    settings: WarmupSettings,
    *,
    resume: bool = True,
    progress: bool = True,
) -> WarmupReport:
    """Train the leap heads of `model`, in place, on answers of its backbone.

    A backbone in bfloat16 stays so; the heads are kept in float32 while they train (autocast) and
    take the backbone's dtype at the end.

    Args:
        model: its backbone is frozen.
        examples: answers to learn.
        held_out: answers to evaluate on, may be empty.
        run_folder: holds checkpoints while training; the caller removes it when all is saved.
        settings: how to train. A run that was stopped goes on if they are the same.
        resume: go on from the last checkpoint in `run_folder`, if there is one.
        progress: show a progress bar.

    Raises:
        ValueError: the backbone is not frozen, there are no heads, or `run_folder` belongs to a run
            with other settings.
        RuntimeError: the loss is not finite; names the step.
    """
    _check_model(model)
    _check_run(run_folder, model, settings, examples)
    backbone_dtype = model.backbone.dtype
    model.leap_heads.float()
    set_seed(settings.seed)
    trainer = LeapTrainer(
        model=model,
        args=_arguments(run_folder, settings, backbone_dtype, progress),
        train_dataset=AnswerDataset(examples, train_on_prompts=settings.train_on_prompts),
        data_collator=collate,
        callbacks=[HeldOutCallback(held_out), StopOnBadLoss()],
    )
    frozen = [f"backbone.{name}" for name in model.backbone.state_dict()]
    model._keys_to_ignore_on_save = set(frozen)  # checkpoints of the run hold the heads alone
    try:
        trainer.train(
            resume_from_checkpoint=get_last_checkpoint(str(run_folder)) if resume else None
        )
    finally:
        model._keys_to_ignore_on_save = set()
        model.leap_heads.to(backbone_dtype)
    model.eval()
    report = evaluate_heads(model, held_out, progress=progress)[0] if held_out else None
    return WarmupReport(trainer.state.log_history, report)


def _check_model(model: LMTPForCausalLM) -> None:
    if not model.leap_heads:
        raise ValueError("There are no leap heads to train: leap_offsets is empty.")
    if model.config.train_backbone:
        raise ValueError(
            "config.train_backbone is True. Warm-up freezes the backbone: load the model with "
            "train_backbone=False."
        )


def _check_run(
    run_folder: Path, model: LMTPForCausalLM, settings: WarmupSettings, examples: Sequence[Example]
) -> None:
    """Record what this run is, or refuse a folder that holds another one."""
    tokens = hashlib.sha256(repr([example.input_ids for example in examples]).encode())
    heads = {name: getattr(model.config, name) for name in HEAD_SETTINGS}
    identity = {**asdict(settings), **heads, "examples_sha256": tokens.hexdigest()}
    identity = json.loads(json.dumps(identity))  # as it will be read back
    record = run_folder / "run.json"
    if not record.exists():
        run_folder.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(identity, indent=2))
        return
    found = json.loads(record.read_text())
    differing = sorted(key for key in identity if identity[key] != found.get(key))
    if differing:
        raise ValueError(
            f"{run_folder} holds a run with another {', '.join(differing)}. Choose another output, "
            "or delete that folder to start again."
        )


def _arguments(
    run_folder: Path, settings: WarmupSettings, backbone_dtype: torch.dtype, progress: bool
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(run_folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_share,
        lr_scheduler_type="cosine",
        weight_decay=settings.weight_decay,
        train_sampling_strategy="group_by_length",
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
    )
