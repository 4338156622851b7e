"""Stage 1, warm-up: train leap heads on the answers of a frozen backbone."""

import contextlib
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_NAME

from modeling_lmtp.heads_only_lmtp import check_named_backbone
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM

from .answer_trainer import AnswerTrainer, prepare_training, remove_autocast
from .arguments import LeapTrainingArguments
from .curriculum import active_heads
from .examples import AnswerDataset, Example
from .objective import HeadObjective
from .packing import PackedDataset, check_isolation
from .sharding import distribute_heads, is_sharded, shard_backbone
from .state_cache import StateCache

AnswerRows = Iterable[Example | Mapping[str, Any]]


class LeapTrainer(AnswerTrainer):
    """A `transformers.Trainer` for the leap heads of a frozen backbone.

    A backbone in 16 bits stays in 16 bits; the heads train in float32 with autocast, and are cast to the
    backbone's dtype at the end. Checkpoints contain only the heads; `LMTPForCausalLM.from_pretrained`
    loads them if the configuration names the backbone.

    For each head it logs these means over the targets since the last log entry:

    - `loss_head_<offset>`: cross-entropy in nats;
    - `top1_head_<offset>`: accuracy; a target outside the draft vocabulary is a miss;
    - `coverage_head_<offset>`: share of targets inside the draft vocabulary, if there is one;
    - `divergence_head_<offset>`: KL to the backbone's distribution, with `distillation_weight`.

    It evaluates `eval_loss`, the simulated tokens per step of a chain `eval_tokens_per_step`, and the
    accuracy at each draft distance `eval_top1_distance_<a>`.

    Args:
        model: the backbone with its heads; `config.train_backbone` is False.
        args: the training arguments.
        train_dataset: the backbone's answers: `Example`s (see `load_answers`), or rows of, say, a
            `datasets.Dataset` with `input_ids` and `labels` (-100 for the prompt).
        eval_dataset: answers to evaluate on, in the same form.
        options: passed to `transformers.Trainer`: `processing_class`, `callbacks`, `optimizers`, …

    Raises:
        ValueError: the backbone is not frozen, there are no heads, a head has no targets, or `packing` is
            set and the backbone's attention does not keep packed answers apart.
    """

    args: LeapTrainingArguments

    def __init__(
        self,
        model: LMTPForCausalLM,
        args: LeapTrainingArguments,
        train_dataset: AnswerRows,
        eval_dataset: AnswerRows | None = None,
        **options: Any,
    ) -> None:
        _check_model(model)
        if options.get("compute_loss_func") is not None:
            raise ValueError(
                "compute_loss_func must be None: with it the Trainer withholds the labels from the model, "
                "which computes the loss of the heads. Override compute_loss in a subclass instead."
            )
        args, self.examples, held_out, identity = prepare_training(
            model, args, train_dataset, eval_dataset
        )
        args.ddp_find_unused_parameters = args.curriculum != "none"
        self.answers = AnswerDataset(self.examples, train_on_prompts=args.train_on_prompts)
        rows: AnswerDataset | PackedDataset = self.answers
        row_lengths = [len(example.input_ids) for example in self.examples]
        if args.packing:
            rows = packed = PackedDataset(self.answers, args.max_length)
            row_lengths = packed.lengths()
        if args.shard_backbone:
            shard_backbone(model, args.device, args.world_size)
        if args.packing and args.state_folder is None:
            check_isolation(model.backbone, args.per_device_train_batch_size)
        self.objective = _objective(model, args)
        super().__init__(
            model, model, args, self.examples, held_out, rows, row_lengths, identity, **options
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train the heads in place; see `AnswerTrainer.train`."""
        model = self.lmtp_model
        if self.args.state_folder is not None:
            self.answers.load_states = self._fill_state_cache(Path(self.args.state_folder)).load
        model.leap_heads.float()
        try:
            return super().train(resume_from_checkpoint, **kwargs)
        finally:
            remove_autocast(model)
            model.leap_heads.to(model.backbone.dtype)
            model.eval()

    def _fill_state_cache(self, folder: Path) -> StateCache:
        """Return the state cache in `folder`, after computing the states that it lacks."""
        with self.args.main_process_first(local=False):
            cache = StateCache(folder, self.lmtp_model)
        cache.fill(self.examples, progress=not self.args.disable_tqdm)
        return cache

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Compute the loss of the heads that the curriculum has added so far."""
        if not model.training:
            # Evaluate all heads, with a tally of their own that does not enter the training log
            objective: Any = _objective(self.lmtp_model, self.args)
        else:
            active = active_heads(
                self.args.curriculum,
                self.objective.num_heads,
                self.state.global_step,
                self.state.max_steps,
                self.args.curriculum_share,
            )
            objective = partial(self.objective, active=active)
        inputs = {**inputs, "leap_objective": objective}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the heads' means since the last log entry, over all processes, to the log entry."""
        if "loss" in logs:
            logs.update(self._head_logs())
        super().log(logs, *args, **kwargs)

    def _head_logs(self) -> dict[str, float]:
        tally = self.accelerator.reduce(self.objective.take_tally(), "sum")
        config, logs = self.model.config, {}
        for offset, sums in zip(config.leap_offsets, tally.tolist(), strict=True):
            loss, divergence, correct, targets, outside = sums
            if not targets:
                continue
            logs[f"loss_head_{offset}"] = loss / targets
            # A token that cannot be drafted is a miss, as it is in decoding
            logs[f"top1_head_{offset}"] = correct / (targets + outside)
            if config.draft_token_ids is not None:
                logs[f"coverage_head_{offset}"] = targets / (targets + outside)
            if self.objective.weight:
                logs[f"divergence_head_{offset}"] = divergence / targets
        return logs

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """Save only the heads, since the backbone is frozen and may be sharded."""
        if not self.args.should_save:
            return
        folder, model = Path(output_dir or self.args.output_dir), self.lmtp_model
        folder.mkdir(parents=True, exist_ok=True)
        heads = model.leap_heads.state_dict(prefix="leap_heads.")
        if model.config.base_model_name_or_path:
            model.save_pretrained(folder, heads_only=True, state_dict=heads)
        else:  # without a backbone's name `from_pretrained` could not load it, but the run can resume
            save_file(heads, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _move_model_to_device(self, model: torch.nn.Module, device: torch.device) -> None:
        if not is_sharded(model):
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """Wrap a sharded model in DDP for its heads, which Accelerate refuses to do."""
        if model is self.model and is_sharded(model) and kwargs.get("training", True):
            find_unused = self.args.ddp_find_unused_parameters
            return distribute_heads(model, self.args.device, find_unused=find_unused)
        return super()._wrap_model(model, *args, **kwargs)

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """Return Accelerate's context, plus autocast for a sharded model, which it does not wrap."""
        stack = super().compute_loss_context_manager()
        dtype = self.model.backbone.dtype
        if is_sharded(self.model) and dtype.itemsize == 2:
            stack.enter_context(torch.autocast(self.args.device.type, dtype))
        return stack


def _objective(model: LMTPForCausalLM, args: LeapTrainingArguments) -> HeadObjective:
    weight, temperature = args.distillation_weight, args.distillation_temperature
    return HeadObjective(len(model.leap_heads), weight, temperature)


def _check_model(model: LMTPForCausalLM) -> None:
    if not model.leap_heads:
        raise ValueError(
            "leap_offsets must not be empty, because there would be no leap heads to train. Add heads "
            "with LMTPForCausalLM.from_backbone."
        )
    if model.config.train_backbone:
        raise ValueError(
            "config.train_backbone must be False, got True: LeapTrainer freezes the backbone. Load the "
            "model with train_backbone=False, or use JointTrainer."
        )
    if model.config.base_model_name_or_path:
        check_named_backbone(model.config)  # before the work, because checkpoints are heads-only
