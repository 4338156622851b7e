"""The Trainer of joint tuning: a learning rate per part, and the loss towards the original backbone."""

from typing import Any

import torch

from modeling_lmtp.losses_lmtp import IGNORE_INDEX

from .adapters import parameter_groups
from .batches import GroupedSampler
from .drift import next_token_kl, next_token_nll, original_model
from .guarded_trainer import GuardedTrainer
from .joint_settings import JointSettings


class JointTrainer(GuardedTrainer):
    """A Trainer with a learning rate per part, and the loss towards the original backbone.

    It logs, as means over the batches since the last time, `loss_ntp`, `loss_head_<offset>` and, where
    it counts, `kl` to the original.

    Args:
        settings: how to tune.
        arguments: the Trainer's own; its model is `LMTPForCausalLM` in PEFT's wrapper.
    """

    optimizer: torch.optim.Optimizer | None

    def __init__(self, settings: JointSettings, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.settings = settings
        self._parts: list[dict[str, torch.Tensor]] = []

    def _get_train_sampler(self, train_dataset: Any = None) -> GroupedSampler:
        """Order rows by seed and epoch alone, so that a stopped run goes on where it was."""
        data = self.train_dataset if train_dataset is None else train_dataset
        lengths = [len(data[index]["input_ids"]) for index in range(len(data))]
        steps = self.args.gradient_accumulation_steps
        global_batch_size = self.args.train_batch_size * steps * self.args.world_size
        return GroupedSampler(lengths, global_batch_size, self.args.seed)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Make the optimizer that the arguments name, with one group for each part."""
        if self.optimizer is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args)
            backbone_rate = self.settings.learning_rate
            groups = parameter_groups(
                self.model, backbone_rate, self.settings.head_learning_rate or backbone_rate
            )
            options["weight_decay"] = self.settings.weight_decay
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
        labels = inputs["labels"]
        inputs = {**inputs, "use_cache": False}
        original = self._original_logits(model, inputs) if self.settings.kl_weight else None
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
            loss = loss + self.settings.kl_weight * kl
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
            if self.settings.head_training != "none":
                logs["learning_rate_heads"] = self.lr_scheduler.get_last_lr()[-1]
        super().log(logs, *args, **kwargs)
