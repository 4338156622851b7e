"""Stage 2, joint tuning: LoRA on backbone and heads, loss = NTP + β · Σ heads (arXiv 2505.17505).

Held-out answers say what it did to both: how much better the heads draft, and how far the backbone has
drifted from the original.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import set_seed

from modeling_lmtp.losses_lmtp import IGNORE_INDEX
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM

from .adapters import add_adapters, cast_trained, check_trainable, parameter_groups
from .answer_trainer import AnswerTrainer, prepared, remove_autocast
from .arguments import JointTrainingArguments
from .drift import DriftReport, measure_drift, next_token_kl, next_token_nll, original_model
from .examples import AnswerDataset, Example
from .leap_trainer import Answers


class JointTrainer(AnswerTrainer):
    """A `transformers.Trainer` that tunes backbone and heads with LoRA adapters, which it adds.

    A backbone in 16 bits stays so; what trains is kept in float32. Beside what every Trainer logs, it
    logs, as means over the batches since the last time, `loss_ntp`, `loss_head_<offset>` and, where it
    counts, `kl` to the original. It evaluates what `LeapTrainer` evaluates, and the drift from the
    original backbone (`eval_kl`, `eval_perplexity_original`, …, see `DriftReport`).

    After `train`, `trainer.model` is the model in PEFT's wrapper: its `save_pretrained` writes the
    adapter, its `merge_and_unload` returns a plain `LMTPForCausalLM`. The configuration says then what it
    was trained with (`leap_loss_weight`), not that its backbone trains (`train_backbone`): merged, it is a
    checkpoint whose heads can be trained further by `LeapTrainer`.

    Args:
        model: heads that were trained by `LeapTrainer`. It may be quantized; then the "original" is
            what the quantized model was.
        args: the arguments.
        train_dataset, eval_dataset, options: see `LeapTrainer`.

    Raises:
        ValueError: `model` cannot be trained (see `check_trainable`), or there is nothing to learn.
    """

    args: JointTrainingArguments
    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        model: LMTPForCausalLM,
        args: JointTrainingArguments,
        train_dataset: Answers,
        eval_dataset: Answers | None = None,
        **options: Any,
    ) -> None:
        check_trainable(model)
        args, examples, held_out, identity = prepared(model, args, train_dataset, eval_dataset)
        # Nobody's loss counts the heads at 0, so no optimizer needs to know them
        self.head_training = args.head_training if args.leap_loss_weight else "none"
        set_seed(args.seed)  # adapters start at random
        model.config.leap_loss_weight = args.leap_loss_weight
        adapted = add_adapters(
            model,
            rank=args.lora_r,
            alpha=args.lora_alpha,
            dropout=args.lora_dropout,
            heads=self.head_training,
        )
        self._parts: list[dict[str, torch.Tensor]] = []
        rows = AnswerDataset(examples, train_on_prompts=args.train_on_prompts)
        lengths = [len(example.input_ids) for example in examples]
        super().__init__(
            model, adapted, args, examples, held_out, rows, lengths, identity, **options
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train the adapters; see `AnswerTrainer.train`."""
        config, dtype = self.lmtp_model.config, self.lmtp_model.backbone.dtype
        train_backbone, config.train_backbone = config.train_backbone, True
        try:
            return super().train(resume_from_checkpoint, **kwargs)
        finally:
            remove_autocast(self.model)
            config.train_backbone = train_backbone
            cast_trained(self.model, dtype, only_heads=True)
            self.model.eval()

    def metrics(self, examples: Sequence[Example]) -> dict[str, float]:
        """Return what held-out answers say of the heads, and of the drift."""
        return {**super().metrics(examples), **self.drift_report(examples).as_dict()}

    def drift_report(self, examples: Sequence[Example]) -> DriftReport:
        """Compare the tuned backbone with the original on answers."""
        model: PeftModel = self.model
        with self.evaluation_autocast():
            return measure_drift(model, examples, progress=self.shows_progress)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Make the optimizer that the arguments name, with one group for each part."""
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
        """Compute the model's own loss, and add the KL to the original backbone."""
        if (
            not model.training
        ):  # the metrics say what it did to both, and nothing is logged as training
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        inputs = {**inputs, "use_cache": False}
        original = self._original_logits(model, inputs) if self.args.kl_weight else None
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        count = max(int((labels[:, 1:] != IGNORE_INDEX).sum()), 1)
        parts = {"loss_ntp": next_token_nll(outputs["logits"].detach(), labels) / count}
        if outputs.get("leap_losses") is not None:
            offsets = self.model.config.leap_offsets
            names = [f"loss_head_{offset}" for offset in offsets]
            parts.update(zip(names, outputs["leap_losses"], strict=True))
        if original is not None:
            kl, _ = next_token_kl(original, outputs["logits"], labels)
            parts["kl"] = kl.detach() / count
            kl = kl * self._num_averaged(num_items_in_batch) / (num_items_in_batch or count)
            loss = loss + self.args.kl_weight * kl
        self._parts.append(parts)
        return (loss, outputs) if return_outputs else loss

    def _original_logits(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Return `(B, L, V)`, by the pass that training makes (autocast included), adapters off."""
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        with original_model(self.accelerator.unwrap_model(model)):
            return model(**inputs).logits

    def _num_averaged(self, num_items_in_batch: torch.Tensor | int | None) -> int:
        """Return over how many processes losses that are shares of one sum will be averaged."""
        shares = num_items_in_batch is not None and self.args.average_tokens_across_devices
        return int(self.accelerator.num_processes) if shares else 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, and add the parts of the loss and the heads' learning rate."""
        if "loss" in logs and self._parts:
            for name in self._parts[0]:
                mean = torch.stack([parts[name] for parts in self._parts]).mean()
                logs[name] = float(self.accelerator.reduce(mean, "mean"))
            self._parts.clear()
            if self.head_training != "none":
                logs["learning_rate_heads"] = self.lr_scheduler.get_last_lr()[-1]
        super().log(logs, *args, **kwargs)
