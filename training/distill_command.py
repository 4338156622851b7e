"""`lmtp distill`: gather prompts, then let the backbone, or a server, answer them."""

import dataclasses
import os
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, ClassVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from modeling_lmtp.conversion.command_line import console
from modeling_lmtp.conversion.loading import load_backbone, load_tokenizer
from modeling_lmtp.conversion.options import Dtype, Options, Range
from modeling_lmtp.conversion.prompts import Prompt, read_prompts
from modeling_lmtp.conversion.saving import file_sha256

from .answers import BadRows, SkippedRows
from .distill import DistillReport, DistillSettings, distill, run_identity
from .distill_files import (
    check_output_name,
    check_same_run,
    claimed,
    replace_rows,
)
from .distill_server import Server, distill_from_server
from .processes import MainProcessFailed, on_main, processes
from .prompt_datasets import DatasetSource, read_dataset_prompts
from .self_written import SampleLog, self_written_prompts

logger = logging.get_logger(__name__)


@dataclass
class DistillOptions(Options):
    """What answers, and where the answers go."""

    title: ClassVar[str] = "model"

    model: str = field(metadata={"help": "Folder or Hub id of the backbone."})
    output: Path = field(
        metadata={"help": "Answers (.jsonl). Give the command again to resume a run."}
    )
    dtype: Dtype = field(default="auto", metadata={"help": "Precision of the loaded backbone."})
    server: str | None = field(
        default=None,
        metadata={
            "metavar": "URL",
            "help": "Ask an OpenAI-compatible server, such as http://localhost:8000/v1.",
        },
    )
    server_model: str | None = field(
        default=None, metadata={"help": "The model's name on that server; MODEL by default."}
    )

    def __post_init__(self) -> None:
        """Refuse options that mean nothing together."""
        super().__post_init__()
        if self.server is None and self.server_model is not None:
            raise ValueError(
                f"--server_model {self.server_model} goes with --server URL, which is missing."
            )
        if self.server is not None and self.dtype != "auto":
            raise ValueError(f"--dtype {self.dtype} has no effect on a server: leave it out.")

    def endpoint(self) -> Server | None:
        """Return the server, if one answers; the environment variable OPENAI_API_KEY holds the key."""
        if self.server is None:
            return None
        return Server(
            self.server, self.server_model or self.model, os.environ.get("OPENAI_API_KEY")
        )


@dataclass
class PromptOptions(Options):
    """Which prompts to answer: those of a file or a dataset, self-written ones, or both."""

    title: ClassVar[str] = "prompts"

    prompts: Path | None = field(
        default=None, metadata={"help": "A file of prompts (.jsonl or .jsonl.gz)."}
    )
    dataset: str | None = field(
        default=None, metadata={"help": "A dataset: a Hub id, or a local folder or file."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    split: str | None = field(default=None, metadata={"help": "Its split; train by default."})
    field: str = dataclasses.field(
        default="prompt",
        metadata={"help": "The field of the prompt; in a dataset, of a conversation too."},
    )
    self_written: Annotated[int, Range(ge=0)] = dataclasses.field(
        default=0, metadata={"help": "Let an instruct model write N prompts itself."}
    )
    limit: Annotated[int | None, Range(ge=1)] = dataclasses.field(
        default=None, metadata={"help": "Use the first N prompts of the file or dataset."}
    )
    bad_rows: BadRows = dataclasses.field(
        default="refuse", metadata={"help": "What to do with rows that hold no prompt."}
    )

    def __post_init__(self) -> None:
        """Refuse no source, two sources at once, and options of a source that is missing."""
        super().__post_init__()
        if self.prompts is not None and self.dataset is not None:
            raise ValueError("Pass --prompts FILE or --dataset NAME, not both.")
        if self.prompts is None and self.dataset is None and not self.self_written:
            raise ValueError(
                "There is nothing to answer: pass --prompts FILE, --dataset NAME or "
                "--self_written N (which goes with either)."
            )
        for name in ("dataset_config", "split"):
            if self.dataset is None and getattr(self, name) is not None:
                raise ValueError(
                    f"--{name} {getattr(self, name)} goes with --dataset NAME, which is missing."
                )
        if self.prompts is None and self.dataset is None and self.limit is not None:
            raise ValueError(
                f"--limit {self.limit} goes with --prompts FILE or --dataset NAME, which are missing; "
                "--self_written alone says how many prompts the model writes."
            )

    def read(self) -> tuple[list[Prompt], dict[str, Any]]:
        """Return the prompts of the file or dataset, and a record of where they are from.

        Raises:
            ValueError: a row has no prompt, or another mistake that the message names.
        """
        on_bad_row = SkippedRows(self.bad_rows)
        prompts, sources = self._read(on_bad_row)
        for note in on_bad_row.notes():
            logger.warning(note)
        return prompts, sources

    def _read(self, on_bad_row: SkippedRows) -> tuple[list[Prompt], dict[str, Any]]:
        if self.prompts is not None:
            prompts = read_prompts(self.prompts, self.field, on_bad_row)[: self.limit]
            sha256 = file_sha256(self.prompts)
            record = {"path": str(self.prompts), "sha256": sha256, "field": self.field}
            return prompts, {"file": {**record, "rows": len(prompts)}}
        if self.dataset is not None:
            source = DatasetSource(self.dataset, self.dataset_config, self.split, self.field)
            prompts, record = read_dataset_prompts(source, self.limit, on_bad_row)
            return prompts, {"dataset": record}
        return [], {}


def distill_answers(
    options: DistillOptions, prompts: PromptOptions, settings: DistillSettings
) -> None:
    """Let a backbone answer prompts: its answers are what leap heads learn.

    `accelerate launch --num_processes 2 --no_python lmtp distill ...` shares the work among processes.
    With --server no model is loaded: a server that holds the whole of MODEL, in the precision that the
    heads will run with, answers, for instance vLLM; OPENAI_API_KEY holds the key, if it needs one.

    Examples:
    lmtp distill MODEL answers.jsonl --self_written 2000
    lmtp distill MODEL answers.jsonl --dataset HuggingFaceH4/no_robots --field messages
    lmtp distill MODEL answers.jsonl --prompts prompts.jsonl --server http://localhost:8000/v1
    """
    try:
        report = distill_from(
            options.model,
            options.output,
            settings,
            prompts,
            dtype=options.dtype,
            server=options.endpoint(),
        )
    except MainProcessFailed:  # the main process says why
        sys.exit(1)
    if processes().is_main_process:
        console.print(report.summary(), markup=False, soft_wrap=True)


def distill_from(
    source: str,
    output: Path,
    settings: DistillSettings,
    choice: PromptOptions,
    *,
    dtype: str = "auto",
    server: Server | None = None,
) -> DistillReport:
    """Answer the chosen prompts with the model `source`, or with the server that serves it.

    Self-written prompts, and until then a log of what was sampled, are kept in files beside
    `output`, so that a stopped run goes on with the same ones.

    Args:
        source: folder or Hub id of the backbone; only named in the manifest if a server answers.
        output: a .jsonl file, new or of the same run.
        settings: how to answer.
        choice: which prompts.
        dtype: of the loaded model.
        server: answers instead of a loaded model.

    Raises:
        ValueError: something is wrong with the prompts, or `output` was made by another run.
    """
    check_output_name(output)
    if server is not None and choice.self_written:
        raise ValueError(
            "--self_written needs the model itself, not a server. Let `lmtp distill` write "
            "prompts with a smaller model first, and pass them with --prompts."
        )
    # What travels is small and may be waited for long, as in the end for the slowest process.
    processes(backend="gloo", timeout=timedelta(weeks=1))
    prompts, sources = on_main(choice.read)
    if server is not None:
        return distill_from_server(server, prompts, output, settings, model=source, sources=sources)
    model, tokenizer = load_backbone(source, dtype), load_tokenizer(source)
    if not choice.self_written:
        return distill(model, tokenizer, prompts, output, settings, sources=sources)
    log = SampleLog(Path(f"{output}.samples.jsonl"), run_identity(model, tokenizer), settings)
    prompts += _self_written(model, tokenizer, output, settings, choice.self_written, log)
    sources["self_written"] = choice.self_written
    report = distill(model, tokenizer, prompts, output, settings, sources=sources)
    on_main(lambda: log.path.unlink(missing_ok=True))
    return report


def _self_written(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    settings: DistillSettings,
    count: int,
    log: SampleLog,
) -> list[Prompt]:
    """Return the prompts that the run began to answer, or else let the model write them."""
    written = Path(f"{output}.prompts.jsonl")
    identity = {**run_identity(model, tokenizer), "settings": asdict(settings)}
    earlier = on_main(lambda: _earlier_prompts(output, written, identity, count))
    if earlier is not None:
        return earlier
    with claimed(log.path) if processes().is_main_process else nullcontext():
        prompts = self_written_prompts(model, tokenizer, count, settings, log=log, progress=True)
    rows = [{"prompt": prompt.text, "kind": prompt.kind} for prompt in prompts]
    on_main(lambda: replace_rows(written, rows))
    return prompts


def _earlier_prompts(
    output: Path, written: Path, identity: dict[str, Any], count: int
) -> list[Prompt] | None:
    # Before hours of sampling, not after them, `output` is known to be of this run.
    manifest = check_same_run(output, identity, tuple(identity))
    if not manifest:
        return None
    asked = (manifest.get("prompt_sources") or {}).get("self_written", count)
    if asked != count or not written.exists():
        found = f"with --self_written {asked}" if written.exists() else f"without {written.name}"
        raise ValueError(
            f"{output}: was made {found}. Choose another output or delete this one with its manifest"
        )
    return read_prompts(written)
