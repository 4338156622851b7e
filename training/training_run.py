"""One run of `lmtp train` or `lmtp joint`: from a file of answers to a saved checkpoint."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from transformers import PreTrainedTokenizerBase

from modeling_lmtp.conversion.options import Dtype, Options, Range, own_fields
from modeling_lmtp.conversion.saving import file_sha256, run_folder_of, save_checkpoint

from .answers import load_answers, warn
from .arguments import AnswerTrainingArguments
from .examples import Example, split_examples
from .processes import processes
from .training_log import save_training_log

REPORTS = "runs"  # where TensorBoard's reports go within the folder of a run


@dataclass
class RunOptions(Options):
    """What a run trains, on what, and where it is saved."""

    title: ClassVar[str] = "data"

    model: str = field(metadata={"help": "A folder or Hub id."})
    answers: Path = field(
        metadata={"help": "What `lmtp distill` made with this backbone (.jsonl)."}
    )
    output: Path = field(metadata={"help": "New folder. Give the command again to resume a run."})
    held_out: Annotated[int, Range(ge=0)] = field(
        default=32, metadata={"help": "Answers kept out of training, for evaluation."}
    )
    bad_rows: Literal["refuse", "skip"] = field(
        default="refuse", metadata={"help": "What to do with rows that are not answers."}
    )
    dtype: Dtype = field(default="auto", metadata={"help": "Precision of the backbone."})


class TrainingRun:
    """A run, whose checkpoints are kept in `<output>.training` until `output` is saved.

    Called again after a stop, the command resumes from the last of them. Of several processes, the main
    one writes.

    Args:
        command: its name, for the record.
        options: what is trained, and where it is saved.
        args: how; their `output_dir` becomes the folder of the run.

    Raises:
        ValueError: `options.output` holds something, or `args` name another output.
    """

    def __init__(self, command: str, options: RunOptions, args: AnswerTrainingArguments) -> None:
        self.command = command
        self.options = options
        self.args = args
        if args.output_dir not in (None, "trainer_output"):  # Transformers' default
            raise ValueError(
                f"--output_dir {args.output_dir} is the third argument of {command}, OUTPUT; leave the "
                "option out."
            )
        self.folder = run_folder_of(options.output, command)
        args.output_dir = str(self.folder)
        args.hub_model_id = args.hub_model_id or options.output.name
        args.run_name = args.run_name or options.output.name
        self.examples: list[Example] = []
        self.held_out: list[Example] = []
        self.notes: Sequence[str] = ()

    def read_answers(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        """Read the answers, and set some aside.

        Raises:
            ValueError: a row is no answer, or too few are left to train on.
        """
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
        """Save what was trained, and on the main process only, with a record of the run.

        Args:
            model: a model, or an adapter in PEFT's wrapper.
            tokenizer: its tokenizer.
            trainer: has trained it.
            record: what the command adds to the record.
        """
        output, log = self.options.output, trainer.state.log_history
        if self.args.push_to_hub:
            trainer.push_to_hub()  # every process takes part
        if processes().is_main_process:
            record = {
                "command": self.command,
                "answers_sha256": file_sha256(self.options.answers),
                "answers_notes": self.notes,
                "examples": len(self.examples),
                "processes": processes().num_processes,
                "settings": settings(trainer.args),
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
        processes().wait_for_everyone()


def settings(args: AnswerTrainingArguments) -> dict[str, Any]:
    """Return the arguments for a record: this package's, and those that differ from the defaults."""
    values, defaults = args.to_dict(), type(args)().to_dict()
    own = {field.name for field in own_fields(type(args))}
    shown = {n: v for n, v in values.items() if n in own or v != defaults.get(n)}
    return {name: value for name, value in shown.items() if not name.endswith(("_dir", "token"))}
