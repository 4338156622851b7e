"""Stage 1, warm-up: the backbone stays frozen, and the leap heads learn its own answers."""

import contextlib
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_NAME

from modeling_lmtp.modeling_lmtp import LMTPForCausalLM

from .answer_trainer import AnswerTrainer, prepared, remove_autocast
from .arguments import LeapTrainingArguments
from .curriculum import active_heads
from .examples import AnswerDataset, Example
from .objective import HeadObjective
from .packing import PackedDataset, check_isolation
from .sharding import distribute_heads, is_sharded, shard_backbone
from .state_cache import StateCache

Answers = Iterable[Example | Mapping[str, Any]]


class LeapTrainer(AnswerTrainer):
    """A `transformers.Trainer` for the leap heads of a frozen backbone.

    A backbone in 16 bits stays so; the heads train in float32 (autocast) and take the backbone's dtype at
    the end. Its checkpoints hold the heads: `LMTPForCausalLM.from_pretrained` loads them where the
    configuration names the backbone.

    It logs for each head, as means over the targets since the last time:

    - `loss_head_<offset>`: cross-entropy;
    - `top1_head_<offset>`: accuracy, in which targets outside a draft vocabulary are misses;
    - `coverage_head_<offset>`: with a draft vocabulary, the share of targets inside it;
    - `divergence_head_<offset>`: the KL to the backbone's distribution, where that is learned.

    It evaluates `eval_loss`, the simulated `eval_tokens_per_step` of a chain, and
    `eval_top1_distance_<a>`, how often the token drafted `a` tokens ahead is right.

    Args:
        model: the backbone with its heads; `config.train_backbone` is False.
        args: the arguments.
        train_dataset: answers of the backbone: `Example`s, as `read_answers` returns them, or rows, as of
            a `datasets.Dataset`, with `input_ids` and `labels` (-100 for the prompt).
        eval_dataset: answers to evaluate on, in the same form.
        options: of `transformers.Trainer`: `processing_class`, `callbacks`, `optimizers`, …

    Raises:
        ValueError: the backbone is not frozen, there are no heads or nothing for them to learn, or the
            backbone cannot keep packed answers apart.
    """

    args: LeapTrainingArguments

    def __init__(
        self,
        model: LMTPForCausalLM,
        args: LeapTrainingArguments,
        train_dataset: Answers,
        eval_dataset: Answers | None = None,
        **options: Any,
    ) -> None:
        _check_model(model)
        if options.get("compute_loss_func") is not None:
            raise ValueError(
                "compute_loss_func takes the labels away from the model, which computes the loss of the "
                "heads. Subclass LeapTrainer and override compute_loss."
            )
        args, self.examples, held_out, identity = prepared(model, args, train_dataset, eval_dataset)
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
            self.answers.load_states = self._known_states(Path(self.args.state_folder)).load
        model.leap_heads.float()
        try:
            return super().train(resume_from_checkpoint, **kwargs)
        finally:
            remove_autocast(model)
            model.leap_heads.to(model.backbone.dtype)
            model.eval()

    def _known_states(self, folder: Path) -> StateCache:
        """Let the backbone read the answers whose states are not in `folder` yet."""
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
        """Compute the objective of the heads whose turn it is."""
        # The Trainer puts all into training mode; the states that heads learn from have no dropout
        self.lmtp_model.backbone.eval()
        if not model.training:  # an evaluation is of all heads, and counts for no log of training
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
        """Log, and add what the heads have done since the last time, in all processes."""
        if "loss" in logs:
            tally = self.accelerator.reduce(self.objective.take_tally(), "sum")
            offsets = self.model.config.leap_offsets
            for offset, (loss, divergence, correct, targets, outside) in zip(
                offsets, tally.tolist(), strict=True
            ):
                if targets:
                    logs[f"loss_head_{offset}"] = loss / targets
                    # A token that cannot be drafted is a miss, as it is in decoding
                    logs[f"top1_head_{offset}"] = correct / (targets + outside)
                    if self.model.config.draft_token_ids is not None:
                        logs[f"coverage_head_{offset}"] = targets / (targets + outside)
                    if self.objective.weight:
                        logs[f"divergence_head_{offset}"] = divergence / targets
        super().log(logs, *args, **kwargs)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """Save the heads: all that changes, and the same for any number of processes."""
        if not self.args.should_save:
            return
        folder, model = Path(output_dir or self.args.output_dir), self.lmtp_model
        folder.mkdir(parents=True, exist_ok=True)
        heads = model.leap_heads.state_dict(prefix="leap_heads.")
        if model.config.base_model_name_or_path:
            model.save_pretrained(folder, heads_only=True, state_dict=heads)
        else:  # nobody could load such a checkpoint, but the run resumes from it
            save_file(heads, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _move_model_to_device(self, model: torch.nn.Module, device: torch.device) -> None:
        if not is_sharded(model):
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """Wrap a sharded model, which Accelerate refuses to combine with DDP."""
        if model is self.model and is_sharded(model) and kwargs.get("training", True):
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


def _objective(model: LMTPForCausalLM, args: LeapTrainingArguments) -> HeadObjective:
    weight, temperature = args.distillation_weight, args.distillation_temperature
    return HeadObjective(len(model.leap_heads), weight, temperature)


def _check_model(model: LMTPForCausalLM) -> None:
    if not model.leap_heads:
        raise ValueError("There are no leap heads to train: leap_offsets is empty.")
    if model.config.train_backbone:
        raise ValueError(
            "config.train_backbone is True. LeapTrainer freezes the backbone: load the model with "
            "train_backbone=False, or use JointTrainer."
        )
