"""The base class of both trainers: a `transformers.Trainer` that resumes a run exactly.

It batches rows of similar length in an order that depends only on the seed, saves checkpoints completely or
not at all, stops at a loss that is not finite, and simulates decoding to evaluate the heads.
"""

import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.utils.data import Dataset
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, IntervalStrategy

from modeling_lmtp.modeling_lmtp import LMTPForCausalLM

from .arguments import AnswerTrainingArguments
from .batches import GroupedSampler
from .evaluation import HeadReport, evaluate_heads
from .examples import AnswerDataset, Example, check_targets, to_examples
from .packing import collate_rows
from .runs import claim_run_folder, run_identity

STATE_FILE = "trainer_state.json"  # the Trainer writes it last


class AnswerTrainer(Trainer):
    """Trains on the backbone's answers; the base class of `LeapTrainer` and `JointTrainer`.

    Args:
        model: a model with leap heads, in any precision; in 16 bits it trains with autocast.
        wrapped_model: the module to train, `model` or a wrapper around it.
        args: the training arguments.
        train_dataset, eval_dataset: the answers.
        rows: `train_dataset` as rows to batch, one answer or one pack each.
        row_lengths: number of tokens of each row.
        identity: see `run_identity`.
        options: passed to `transformers.Trainer`.
    """

    args: AnswerTrainingArguments

    def __init__(
        self,
        model: LMTPForCausalLM,
        wrapped_model: torch.nn.Module,
        args: AnswerTrainingArguments,
        train_dataset: Sequence[Example],
        eval_dataset: Sequence[Example],
        rows: Dataset[dict[str, Any]],
        row_lengths: Sequence[int],
        identity: dict[str, Any],
        **options: Any,
    ) -> None:
        self.row_lengths = row_lengths
        self.identity = identity
        self.lmtp_model = model
        super().__init__(
            model=wrapped_model,
            args=args,
            train_dataset=rows,
            eval_dataset=AnswerDataset(eval_dataset) if eval_dataset else None,
            data_collator=collate_rows,
            **options,
        )
        self.add_callback(EvaluateBeforeSaving())
        self.hidden_tokenizer = HiddenTokenizer(self)
        self.add_callback(self.hidden_tokenizer)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train the model, from the start or from a checkpoint.

        Args:
            resume_from_checkpoint: a checkpoint of this run. True resumes from the last complete
                checkpoint in `args.output_dir`, and starts the run if there is none.
            kwargs: see `transformers.Trainer.train`.

        Raises:
            ValueError: `resume_from_checkpoint` is True and `args.output_dir` holds another run; the
                message lists the differences.
            RuntimeError: the loss is not finite; the message gives the step and the file with its batch.
            OSError: a checkpoint could not be saved; earlier checkpoints are kept.
        """
        if resume_from_checkpoint is True:
            with self.args.main_process_first(local=False):
                claim_run_folder(Path(self.args.output_dir), self.identity)
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        with self.hidden_tokenizer:
            return super().train(resume_from_checkpoint, **kwargs)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Compute the loss and the metrics of `held_out_metrics`."""
        output = super().evaluation_loop(
            dataloader, description, True, ignore_keys, metric_key_prefix
        )
        metrics = self.held_out_metrics(dataloader.dataset.examples)
        output.metrics.update({f"{metric_key_prefix}_{name}": v for name, v in metrics.items()})
        return output

    def held_out_metrics(self, examples: Sequence[Example]) -> dict[str, float]:
        """Return the metrics of the heads on held-out answers, see `HeadReport.metrics`."""
        report = self.head_report(examples)
        return report.metrics() if report else {}

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the Trainer's model card, with the backbone as the base model."""
        base = self.lmtp_model.config.base_model_name_or_path
        super().create_model_card(*args, **{"finetuned_from": base, **kwargs})

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return batches of `eval_dataset`, or of the constructor's; it takes the same kinds of rows."""
        if eval_dataset is not None and not isinstance(eval_dataset, (str, AnswerDataset)):
            eval_dataset = AnswerDataset(to_examples(eval_dataset))
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Return batches of `test_dataset`, which takes the same kinds of rows as the constructor."""
        return super().get_test_dataloader(AnswerDataset(to_examples(test_dataset)))

    def head_report(self, examples: Sequence[Example]) -> HeadReport | None:
        """Simulate decoding on answers; return None if there are no heads or no answers."""
        if not self.lmtp_model.config.leap_offsets or not examples:
            return None
        with self.evaluation_autocast():
            return evaluate_heads(self.lmtp_model, examples, progress=self.shows_progress)[0]

    def evaluation_autocast(self) -> torch.autocast:
        """Return an autocast context for evaluation, enabled during training in 16 bits.

        The heads then hold float32 weights, and the backbone's states are in 16 bits.
        """
        dtype = self.lmtp_model.backbone.dtype
        enabled = dtype.itemsize == 2 and self.is_in_train
        return torch.autocast(self.args.device.type, dtype, enabled=enabled)

    @property
    def shows_progress(self) -> bool:
        """Whether this process shows progress bars."""
        return not self.args.disable_tqdm and self.is_world_process_zero()

    def _get_train_sampler(self, train_dataset: Any = None) -> GroupedSampler:
        """Return a sampler whose order depends only on seed and epoch, so that a run can resume."""
        rows_per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return GroupedSampler(
            self.row_lengths, rows_per_step * self.args.world_size, self.args.seed
        )

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Compute the loss and gradients of one batch.

        Raises:
            RuntimeError: the loss is not finite; the message gives the step and the file with the batch.
        """
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not math.isfinite(loss.item()):
            self._raise_bad_loss(loss.item(), inputs)
        return loss

    def _raise_bad_loss(self, loss: float, inputs: dict[str, Any]) -> NoReturn:
        """Save the batch to a file, and raise a RuntimeError that names it."""
        step = self.state.global_step + 1
        process = f"_process_{self.args.process_index}" if self.args.world_size > 1 else ""
        file = Path(self.args.output_dir) / f"bad_batch_step_{step}{process}.safetensors"
        tensors = {
            name: value.detach().cpu().contiguous()
            for name, value in inputs.items()
            if isinstance(value, torch.Tensor)
        }
        save_file(tensors, file)
        checkpoint = last_complete_checkpoint(self.args.output_dir)
        saved = (
            f"The last checkpoint before it is {checkpoint}" if checkpoint else "Nothing is saved"
        )
        raise RuntimeError(
            f"The loss is {loss} at step {step}. Its batch was saved to {file} ({', '.join(tensors)}); "
            f"read it with safetensors.torch.load_file. {saved}. Check the batch for unusual answers, or "
            "lower learning_rate, and start again."
        )

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint, and delete it again if it could not be saved completely.

        Raises:
            OSError: the checkpoint could not be saved; the message names the previous one.
        """
        step = self.state.global_step
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            checkpoint = last_complete_checkpoint(self.args.output_dir)
            resumes = f"resume from {checkpoint}" if checkpoint else "start from the beginning"
            raise OSError(
                f"The checkpoint of step {step} could not be saved in {self.args.output_dir}: {error}. "
                f"Free space on that disk and run again; the run will {resumes}."
            ) from error


def last_complete_checkpoint(run_folder: Path | str) -> str | None:
    """Return the Trainer's last completely written checkpoint in `run_folder`; None if there is none."""
    checkpoints = {
        int(match[1]): folder
        for folder in Path(run_folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name))
        and _is_complete(folder)
    }
    return str(checkpoints[max(checkpoints)]) if checkpoints else None


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / STATE_FILE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return True


class EvaluateBeforeSaving(TrainerCallback):
    """Evaluates at the last step of an epoch instead of after the epoch.

    Otherwise the Trainer saves the checkpoint of that step before it evaluates, and the log of a run that
    resumes from it lacks the evaluation.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Request an evaluation at the last step of an epoch."""
        is_end = float(state.epoch or 0).is_integer() or state.global_step == state.max_steps
        if args.eval_strategy == IntervalStrategy.EPOCH and is_end:
            control.should_evaluate = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cancel the evaluation that Transformers requests here."""
        if args.eval_strategy == IntervalStrategy.EPOCH:
            control.should_evaluate = False


class HiddenTokenizer(TrainerCallback):
    """Hides the tokenizer from the Trainer until it trains, which else changes the model's settings.

    It writes the tokenizer's special tokens into them: texts of the checkpoint would end elsewhere than the
    backbone's, and a padding id that the backbone does not embed keeps the checkpoint from loading.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.tokenizer = trainer, trainer.processing_class

    def __enter__(self) -> None:
        """Hide the tokenizer."""
        self.trainer.processing_class = None

    def __exit__(self, *exception: object) -> None:
        """Restore it, also if the Trainer failed before."""
        self.trainer.processing_class = self.tokenizer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the tokenizer, to be saved with checkpoints."""
        self.trainer.processing_class = self.tokenizer


def prepare_training(
    model: LMTPForCausalLM,
    args: AnswerTrainingArguments,
    train_dataset: Any,
    eval_dataset: Any,
) -> tuple[AnswerTrainingArguments, list[Example], list[Example], dict[str, Any]]:
    """Return the arguments adapted to the model, both datasets as examples, and the run's identity.

    Raises:
        ValueError: this device cannot train in the model's precision, a row is not an answer, or a head
            has no target in the answers.
    """
    dtype = model.backbone.dtype
    if dtype == torch.float16 and not torch.accelerator.is_available():
        raise ValueError(
            "The backbone's dtype must be bfloat16 or float32 to train on a CPU, got float16. Load it "
            "with one of these."
        )
    examples = to_examples(train_dataset)
    held_out = [] if eval_dataset is None else to_examples(eval_dataset)
    check_targets(examples, model.config.leap_offsets, train_on_prompts=args.train_on_prompts)
    changes: dict[str, Any] = {} if held_out else {"eval_strategy": "no"}
    if dtype == torch.bfloat16:
        changes["bf16"] = True
    if dtype == torch.float16:
        changes["fp16"] = True
    args = replace(args, **changes)
    return args, examples, held_out, run_identity(args, model, examples)


def remove_autocast(model: torch.nn.Module) -> None:
    """Restore the `forward` of `model`, which Accelerate wraps in autocast to train in 16 bits."""
    original = model.__dict__.pop("_original_forward", None)
    if original is None:
        return
    model.forward = original
    if getattr(original, "__func__", None) is type(model).forward:
        del model.forward
