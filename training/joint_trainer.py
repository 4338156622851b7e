"""Stage 2, joint tuning: LoRA on backbone and heads with loss = NTP + β · Σ heads (arXiv 2505.17505).

On held-out answers it measures how well the heads draft, and how far the backbone has drifted from the
original.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import set_seed

from modeling_lmtp.losses_lmtp import IGNORE_INDEX
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM

from .adapters import add_adapters, cast_trained, check_trainable, parameter_groups
from .answer_trainer import AnswerTrainer, prepare_training, remove_autocast
from .arguments import JointTrainingArguments
from .drift import DriftReport, measure_drift, next_token_kl, next_token_nll, original_model
from .examples import AnswerDataset, Example
from .leap_trainer import AnswerRows


class JointTrainer(AnswerTrainer):
    """A `transformers.Trainer` that adds LoRA adapters to backbone and heads, and trains them.

    A backbone in 16 bits stays in 16 bits; trainable weights are in float32. In addition to the Trainer's
    logs, it logs the means over the batches since the last log entry of `loss_ntp`, `loss_head_<offset>`
    and, with `kl_weight`, `kl`. It evaluates the metrics of `LeapTrainer` and the drift from the original
    backbone (`eval_kl`, `eval_perplexity_original`, …, see `DriftReport`).

    After `train`, `trainer.model` is the model in PEFT's wrapper: `save_pretrained` writes the adapter,
    `merge_and_unload` returns a plain `LMTPForCausalLM`. The configuration then records
    `leap_loss_weight` but not `train_backbone`, so that `LeapTrainer` can train the merged model's heads
    further.

    Args:
        model: a model with heads that `LeapTrainer` trained. It may be quantized; drift is then measured
            from the quantized model.
        args: the training arguments.
        train_dataset, eval_dataset, options: see `LeapTrainer`.

    Raises:
        ValueError: `model` cannot be trained (see `check_trainable`), or a head has no targets.
    """

    args: JointTrainingArguments
    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        model: LMTPForCausalLM,
        args: JointTrainingArguments,
        train_dataset: AnswerRows,
        eval_dataset: AnswerRows | None = None,
        **options: Any,
    ) -> None:
        check_trainable(model)
        args, examples, held_out, identity = prepare_training(
            model, args, train_dataset, eval_dataset
        )
        # With weight 0 the heads get no gradient, so they need no adapters and no optimizer state
        self.head_training = args.head_training if args.leap_loss_weight else "none"
        set_seed(args.seed)  # LoRA initializes its weights at random
        model.config.leap_loss_weight = args.leap_loss_weight
        adapted = add_adapters(
            model,
            rank=args.lora_r,
            alpha=args.lora_alpha,
            dropout=args.lora_dropout,
            heads=self.head_training,
        )
        self._loss_parts: list[dict[str, torch.Tensor]] = []  # since the last log entry
        rows = AnswerDataset(examples, train_on_prompts=args.train_on_prompts)
        lengths = [len(example.input_ids) for example in examples]
        super().__init__(
            model, adapted, args, examples, held_out, rows, lengths, identity, **options
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train the adapters in place; see `AnswerTrainer.train`."""
        config, dtype = self.lmtp_model.config, self.lmtp_model.backbone.dtype
        train_backbone, config.train_backbone = config.train_backbone, True
        try:
            return super().train(resume_from_checkpoint, **kwargs)
        finally:
            remove_autocast(self.model)
            config.train_backbone = train_backbone
            cast_trained(self.model, dtype, only_heads=True)
            self.model.eval()

    def held_out_metrics(self, examples: Sequence[Example]) -> dict[str, float]:
        """Return the metrics of the heads, and of the drift, on held-out answers."""
        return {**super().held_out_metrics(examples), **self.drift_report(examples).as_dict()}

    def drift_report(self, examples: Sequence[Example]) -> DriftReport:
        """Compare the tuned backbone with the original on answers."""
        model: PeftModel = self.model
        with self.evaluation_autocast():
            return measure_drift(model, examples, progress=self.shows_progress)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the optimizer of the arguments, with one parameter group each for backbone and heads."""
        if self.optimizer is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args)
            rate = self.args.learning_rate
            groups = parameter_groups(self.model, rate, self.args.head_learning_rate or rate)
            options["weight_decay"] = self.args.weight_decay
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Compute the model's loss and, in training, add the KL to the original backbone."""
        # In evaluation `held_out_metrics` reports the KL, and the parts must not enter the training log
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        inputs = {**inputs, "use_cache": False}
        original = self._original_logits(model, inputs) if self.args.kl_weight else None
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        num_targets = max(int((labels[:, 1:] != IGNORE_INDEX).sum()), 1)
        parts = {"loss_ntp": next_token_nll(outputs["logits"].detach(), labels) / num_targets}
        if outputs.get("leap_losses") is not None:
            offsets = self.model.config.leap_offsets
            names = [f"loss_head_{offset}" for offset in offsets]
            parts.update(zip(names, outputs["leap_losses"], strict=True))
        if original is not None:
            kl, _ = next_token_kl(original, outputs["logits"], labels)
            parts["kl"] = kl.detach() / num_targets
            kl = (
                kl
                * self._averaging_factor(num_items_in_batch)
                / (num_items_in_batch or num_targets)
            )
            loss = loss + self.args.kl_weight * kl
        self._loss_parts.append(parts)
        return (loss, outputs) if return_outputs else loss

    def _original_logits(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Return the logits `(B, L, V)` without adapters.

        The pass goes through the Trainer's wrapped model, so that it runs under the same autocast.
        """
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        with original_model(self.accelerator.unwrap_model(model)):
            return model(**inputs).logits

    def _averaging_factor(self, num_items_in_batch: torch.Tensor | int | None) -> int:
        """Return the factor that turns DDP's average of the processes' losses back into their sum."""
        is_global = num_items_in_batch is not None and self.args.average_tokens_across_devices
        return int(self.accelerator.num_processes) if is_global else 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the parts of the loss and the heads' learning rate to the log entry."""
        if "loss" in logs and self._loss_parts:
            for name in self._loss_parts[0]:
                mean = torch.stack([parts[name] for parts in self._loss_parts]).mean()
                logs[name] = float(self.accelerator.reduce(mean, "mean"))
            self._loss_parts.clear()
            if self.head_training != "none":
                logs["learning_rate_heads"] = self.lr_scheduler.get_last_lr()[-1]
        super().log(logs, *args, **kwargs)
