"""`transformers.Trainer` for leap heads: what it logs, saves and evaluates, and the order of the data."""

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME

from modeling_lmtp.modeling_lmtp import LMTPForCausalLM

from .batches import GroupedSampler
from .curriculum import NONE, active_heads
from .evaluation import evaluate_heads
from .examples import Example
from .guarded_trainer import GuardedTrainer
from .objective import HeadObjective
from .sharding import distribute_heads, is_sharded


class LeapTrainer(GuardedTrainer):
    """A Trainer for heads on a frozen backbone.

    It logs `loss_head_<offset>` (cross-entropy) and `top1_head_<offset>` for each head, means over all
    targets since the last time, and `divergence_head_<offset>` where the backbone's distribution is
    learned.

    Args:
        objective: what the heads learn.
        row_lengths: tokens of each row of the training set, for its order.
        curriculum, curriculum_share: see `active_heads`.
    """

    def __init__(
        self,
        *args: Any,
        objective: HeadObjective,
        row_lengths: Sequence[int],
        curriculum: str = NONE,
        curriculum_share: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.objective = objective
        self.row_lengths = row_lengths
        self.curriculum = curriculum
        self.curriculum_share = curriculum_share

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Compute the objective of the heads whose turn it is."""
        # The Trainer puts all into training mode; the states that heads learn from have no dropout
        self.accelerator.unwrap_model(model).backbone.eval()
        active = active_heads(
            self.curriculum,
            self.objective.num_heads,
            self.state.global_step,
            self.state.max_steps,
            self.curriculum_share,
        )
        inputs = {**inputs, "leap_objective": partial(self.objective, active=active)}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, and add what the heads have done since the last time, in all processes."""
        if "loss" in logs:
            tally = self.accelerator.reduce(self.objective.take_tally(), "sum")
            offsets = self.model.config.leap_offsets
            for offset, (loss, divergence, correct, targets) in zip(
                offsets, tally.tolist(), strict=True
            ):
                if targets:
                    logs[f"loss_head_{offset}"] = loss / targets
                    logs[f"top1_head_{offset}"] = correct / targets
                    if self.objective.weight:
                        logs[f"divergence_head_{offset}"] = divergence / targets
        super().log(logs, *args, **kwargs)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """Save the heads: all that changes, and the same for any number of processes."""
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            heads = self.model.leap_heads.state_dict(prefix="leap_heads.")
            save_file(heads, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})

    def _move_model_to_device(self, model: torch.nn.Module, device: torch.device) -> None:
        if not is_sharded(model):
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """Wrap a sharded model, which Accelerate refuses to combine with DDP."""
        if model is self.model and is_sharded(model):
            find_unused = self.args.ddp_find_unused_parameters
            return distribute_heads(model, self.args.device, find_unused=find_unused)
        return super()._wrap_model(model, *args, **kwargs)

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """Autocast where Accelerate has not wrapped the model to do so."""
        stack = super().compute_loss_context_manager()
        dtype = self.model.backbone.dtype
        if is_sharded(self.model) and dtype.itemsize == 2:
            stack.enter_context(torch.autocast(self.args.device.type, dtype))
        return stack

    def _get_train_sampler(self, train_dataset: Any = None) -> GroupedSampler:
        rows_per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return GroupedSampler(
            self.row_lengths, rows_per_step * self.args.world_size, self.args.seed
        )


class HeldOutCallback(TrainerCallback):
    """Evaluates the heads on held-out answers, after each epoch and every `eval_steps`.

    Args:
        examples: the answers; may be empty.
        eval_steps: optimizer steps, or None for the epochs alone.
    """

    def __init__(self, examples: Sequence[Example], eval_steps: int | None) -> None:
        self.examples = examples
        self.eval_steps = eval_steps

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: LMTPForCausalLM | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the simulated tokens per step to the log, before a checkpoint of this step is saved."""
        if model is None or not self.examples or not self._is_due(state):
            return
        if not state.is_world_process_zero and not is_sharded(model):
            return
        dtype = model.backbone.dtype
        with torch.autocast(model.device.type, dtype, enabled=dtype.itemsize == 2):
            report, _ = evaluate_heads(model, self.examples)
        entry = {
            "epoch": state.epoch,
            "step": state.global_step,
            "held_out_tokens_per_step": report.chain_tokens_per_step,
            "held_out_top1": [row[0] for row in report.accuracies],
        }
        state.log_history.append(entry)

    def _is_due(self, state: TrainerState) -> bool:
        step, epoch = state.global_step, state.epoch or 0.0
        is_end = float(epoch).is_integer() or step == state.max_steps
        return is_end or (self.eval_steps is not None and step % self.eval_steps == 0)
