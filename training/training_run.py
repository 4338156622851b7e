"""One run of `lmtp train` or `lmtp joint`: read the answers, and save the checkpoint and its record."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from transformers import PreTrainedTokenizerBase

from modeling_lmtp.conversion.options import Dtype, Options, Range, own_fields
from modeling_lmtp.conversion.saving import (
    check_settings,
    file_sha256,
    run_folder_of,
    save_checkpoint,
)

from .answers import BadRows, load_answers, warn
from .arguments import AnswerTrainingArguments
from .examples import Example, split_examples
from .processes import process_state
from .training_log import save_training_log

REPORTS = "runs"  # the folder of TensorBoard's reports in a run's folder


@dataclass
class RunOptions(Options):
    """The model to train, the answers, and the output."""

    title: ClassVar[str] = "data"

    model: str = field(metadata={"help": "Folder or Hub id of the model."})
    answers: Path = field(
        metadata={"help": "Answers of this backbone, from `lmtp distill` (.jsonl)."}
    )
    output: Path = field(metadata={"help": "New folder for the result; run again to resume."})
    held_out: Annotated[int, Range(ge=0)] = field(
        default=32, metadata={"help": "Number of answers to hold out for evaluation."}
    )
    bad_rows: BadRows = field(
        default="refuse", metadata={"help": "How to treat rows that are not valid answers."}
    )
    dtype: Dtype = field(
        default="auto",
        metadata={"metavar": "TYPE", "help": "auto, bfloat16, float16 or float32."},
    )


class TrainingRun:
    """A run of a command, with its checkpoints in `<output>.training` until `output` is saved.

    After a stop, the same command resumes from the last checkpoint. Only the main process writes.

    Args:
        command: name of the command, for the record.
        options: the model, the answers and the output.
        args: the training arguments; `output_dir` is set to the folder of the run.

    Raises:
        ValueError: `options.output` is not empty, or `args.output_dir` is set.
    """

    def __init__(self, command: str, options: RunOptions, args: AnswerTrainingArguments) -> None:
        self.command = command
        self.options = options
        self.args = args
        if args.output_dir not in (
            None,
            "trainer_output",
        ):  # the defaults of Transformers' releases
            raise ValueError(
                f"--output_dir must be left out, got {args.output_dir}: the third argument of {command}, "
                "OUTPUT, is the output."
            )
        self.folder = run_folder_of(options.output, command)
        args.output_dir = str(self.folder)
        args.hub_model_id = args.hub_model_id or options.output.name
        args.run_name = args.run_name or options.output.name
        self.examples: list[Example] = []
        self.held_out: list[Example] = []
        self.notes: Sequence[str] = ()

    def read_answers(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        """Read the answers, and hold some out for evaluation.

        Raises:
            ValueError: a row is not an answer, no answers are left to train on, or the model's generation
                settings could not be saved.
        """
        check_settings(model.generation_config)
        options, max_length = self.options, self.args.max_length
        answers = load_answers(options.answers, model, tokenizer, max_length, options.bad_rows)
        warn(answers.notes)
        self.notes = answers.notes
        self.examples, self.held_out = split_examples(answers.examples, options.held_out)

    def save(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        trainer: Any,
        record: dict[str, Any],
    ) -> None:
        """Save the trained model with a record of the run, and delete the run's folder.

        Args:
            model: the model, or PEFT's wrapper to save an adapter.
            tokenizer: the model's tokenizer.
            trainer: the trainer of the model.
            record: entries that the command adds to the record.
        """
        output, log = self.options.output, trainer.state.log_history
        if self.args.push_to_hub:
            trainer.push_to_hub()  # a collective call, so on every process
        if process_state().is_main_process:
            record = {
                "command": self.command,
                "answers_sha256": file_sha256(self.options.answers),
                "answers_notes": self.notes,
                "examples": len(self.examples),
                "processes": process_state().num_processes,
                "settings": recorded_arguments(trainer.args),
                **record,
                "log": log,
            }
            offsets = trainer.lmtp_model.config.leap_offsets
            save_checkpoint(
                model, tokenizer, output, record, lambda f: save_training_log(f, log, offsets)
            )
            if (self.folder / REPORTS).is_dir():
                shutil.move(self.folder / REPORTS, output / REPORTS)
            shutil.rmtree(self.folder)
        process_state().wait_for_everyone()


def recorded_arguments(args: AnswerTrainingArguments) -> dict[str, Any]:
    """Return the arguments for a record: this package's, and others that differ from their defaults."""
    values, defaults = args.to_dict(), type(args)().to_dict()
    names = {field.name for field in own_fields(type(args))}
    recorded = {n: v for n, v in values.items() if n in names or v != defaults.get(n)}
    # A published record must reveal neither local paths nor tokens
    return {name: value for name, value in recorded.items() if not name.endswith(("_dir", "token"))}
