"""What both trainers share: a `transformers.Trainer` on answers, which resumes exactly.

Rows of similar length share a batch, in an order that the seed alone decides; checkpoints are saved whole
or not at all; a loss that is not finite stops the run; evaluation decodes in simulation.
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
    """A `transformers.Trainer` for answers of the backbone; base of `LeapTrainer` and `JointTrainer`.

    Args:
        model: a model with leap heads, in any precision; 16 bits train with autocast.
        trained: what is trained, `model` or a wrapper of it.
        args: the arguments.
        train_dataset, eval_dataset: the answers.
        rows: `train_dataset` as rows for batches.
        row_lengths: tokens of each of the rows.
        options: of `transformers.Trainer`.
    """

    args: AnswerTrainingArguments

    def __init__(
        self,
        model: LMTPForCausalLM,
        trained: torch.nn.Module,
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
            model=trained,
            args=args,
            train_dataset=rows,
            eval_dataset=AnswerDataset(eval_dataset) if eval_dataset else None,
            data_collator=collate_rows,
            **options,
        )
        self.add_callback(EvaluateBeforeSaving())

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train.

        Args:
            resume_from_checkpoint: a checkpoint of this run; True for the last whole one in
                `args.output_dir`, if there is one: then the run is started or resumed, whichever is
                due.
            kwargs: see `transformers.Trainer.train`.

        Raises:
            ValueError: `resume_from_checkpoint` is True, and `args.output_dir` holds another run; names
                what differs.
            RuntimeError: the loss is not finite; names the step, and the file that holds its batch.
            OSError: a checkpoint could not be saved; the one before it stays.
        """
        if resume_from_checkpoint is True:
            with self.args.main_process_first(local=False):
                claim_run_folder(Path(self.args.output_dir), self.identity)
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
        return super().train(resume_from_checkpoint, **kwargs)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Compute the loss, and what held-out answers say of the model, see `metrics`."""
        output = super().evaluation_loop(
            dataloader, description, True, ignore_keys, metric_key_prefix
        )
        metrics = self.metrics(dataloader.dataset.examples)
        output.metrics.update({f"{metric_key_prefix}_{name}": v for name, v in metrics.items()})
        return output

    def metrics(self, examples: Sequence[Example]) -> dict[str, float]:
        """Return what held-out answers say of the model: see `HeadReport.metrics`."""
        report = self.head_report(examples)
        return report.metrics() if report else {}

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the Trainer's model card, which names the backbone as what was trained on."""
        base = self.lmtp_model.config.base_model_name_or_path
        super().create_model_card(*args, **{"finetuned_from": base, **kwargs})

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return batches of `eval_dataset`, answers as for the constructor, or of the one given there."""
        if eval_dataset is not None and not isinstance(eval_dataset, (str, AnswerDataset)):
            eval_dataset = AnswerDataset(to_examples(eval_dataset))
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Return batches of `test_dataset`, answers as for the constructor."""
        return super().get_test_dataloader(AnswerDataset(to_examples(test_dataset)))

    def head_report(self, examples: Sequence[Example]) -> HeadReport | None:
        """Simulate decoding on answers; None without heads or answers."""
        if not self.lmtp_model.config.leap_offsets or not examples:
            return None
        with self.evaluation_autocast():
            return evaluate_heads(self.lmtp_model, examples, progress=self.shows_progress)[0]

    def evaluation_autocast(self) -> torch.autocast:
        """Return a context in which heads that train in float32 read states in 16 bits."""
        dtype = self.lmtp_model.backbone.dtype
        enabled = dtype.itemsize == 2 and self.is_in_train
        return torch.autocast(self.args.device.type, dtype, enabled=enabled)

    @property
    def shows_progress(self) -> bool:
        """Whether this process shows progress bars."""
        return not self.args.disable_tqdm and self.is_world_process_zero()

    def _get_train_sampler(self, train_dataset: Any = None) -> GroupedSampler:
        """Order rows by seed and epoch alone, so that a stopped run goes on where it was."""
        rows_per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return GroupedSampler(
            self.row_lengths, rows_per_step * self.args.world_size, self.args.seed
        )

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Compute loss and gradients of one batch.

        Raises:
            RuntimeError: the loss is not finite; names the step, and the file that the batch is in.
        """
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not math.isfinite(loss.item()):
            self._stop(loss.item(), inputs)
        return loss

    def _stop(self, loss: float, inputs: dict[str, Any]) -> NoReturn:
        step = self.state.global_step + 1
        process = f"_process_{self.args.process_index}" if self.args.world_size > 1 else ""
        file = Path(self.args.output_dir) / f"bad_batch_step_{step}{process}.safetensors"
        tensors = {
            name: value.detach().cpu().contiguous()
            for name, value in inputs.items()
            if isinstance(value, torch.Tensor)
        }
        save_file(tensors, file)
        whole = last_whole_checkpoint(self.args.output_dir)
        before = f"The last checkpoint, {whole}, is from before" if whole else "Nothing is saved"
        raise RuntimeError(
            f"The loss is {loss} at step {step}. Its batch is in {file} ({', '.join(tensors)}; "
            f"safetensors.torch.load_file reads it). {before}. Look for what is unusual in the batch, "
            "or lower learning_rate, and start again."
        )

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint; of one that cannot be saved whole, leave nothing.

        Raises:
            OSError: it could not be saved; names the one before.
        """
        step = self.state.global_step
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            whole = last_whole_checkpoint(self.args.output_dir)
            goes_on = f"{whole} is whole: the run goes on from there" if whole else "it starts anew"
            raise OSError(
                f"The checkpoint of step {step} could not be saved in {self.args.output_dir}: {error}. "
                f"Make room on that disk and start again; {goes_on}."
            ) from error


def last_whole_checkpoint(run_folder: Path | str) -> str | None:
    """Return the Trainer's last checkpoint in `run_folder` that was written to its end, if any."""
    found = {
        int(match[1]): folder
        for folder in Path(run_folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name))
        and _is_whole(folder)
    }
    return str(found[max(found)]) if found else None


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / STATE_FILE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return True


class EvaluateBeforeSaving(TrainerCallback):
    """Evaluates after the last step of an epoch, and not after the epoch.

    The Trainer would save the checkpoint of that step before it evaluates, so that the log of a run that
    resumes from there lacked the evaluation.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for an evaluation where an epoch ends."""
        is_end = float(state.epoch or 0).is_integer() or state.global_step == state.max_steps
        if args.eval_strategy == IntervalStrategy.EPOCH and is_end:
            control.should_evaluate = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take back what Transformers asks for here."""
        if args.eval_strategy == IntervalStrategy.EPOCH:
            control.should_evaluate = False


def prepared(
    model: LMTPForCausalLM,
    args: AnswerTrainingArguments,
    train_dataset: Any,
    eval_dataset: Any,
) -> tuple[AnswerTrainingArguments, list[Example], list[Example], dict[str, Any]]:
    """Return arguments that suit the model, both datasets as examples, and what makes the run this run.

    Raises:
        ValueError: `model` cannot be trained in its precision here, a row is no answer, or a head has
            nothing to learn.
    """
    dtype = model.backbone.dtype
    if dtype == torch.float16 and not torch.accelerator.is_available():
        raise ValueError(
            "The backbone is in float16, in which a CPU does not train. Load it with dtype bfloat16 or "
            "float32."
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
    """Give `model` its own `forward` back, which Accelerate wraps in autocast to train in 16 bits."""
    original = model.__dict__.pop("_original_forward", None)
    if original is None:
        return
    model.forward = original
    if getattr(original, "__func__", None) is type(model).forward:
        del model.forward
