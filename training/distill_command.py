"""`lmtp distill`: collect prompts, and let the backbone or a server answer them."""

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

from .answers import BadRowHandler, BadRows
from .distill import DistillReport, DistillSettings, distill, model_identity
from .distill_files import (
    check_output_name,
    check_same_run,
    replace_rows,
    writer_lock,
)
from .distill_server import Server, distill_from_server
from .processes import MainProcessError, on_main, process_state
from .prompt_datasets import DatasetSource, read_dataset_prompts
from .self_written import SampleLog, self_written_prompts

logger = logging.get_logger(__name__)


@dataclass
class DistillOptions(Options):
    """The model that answers, and the output file."""

    title: ClassVar[str] = "model"

    model: str = field(metadata={"help": "Folder or Hub id of the backbone."})
    output: Path = field(metadata={"help": "File for the answers (.jsonl); run again to resume."})
    dtype: Dtype = field(default="auto", metadata={"help": "Precision of the backbone."})
    server: str | None = field(
        default=None,
        metadata={
            "metavar": "URL",
            "help": "Let an OpenAI-compatible server answer, e.g. http://localhost:8000/v1.",
        },
    )
    server_model: str | None = field(
        default=None, metadata={"help": "Name of the model on that server; MODEL by default."}
    )

    def __post_init__(self) -> None:
        """Raise a ValueError for options that contradict each other."""
        super().__post_init__()
        if self.server is None and self.server_model is not None:
            raise ValueError(
                f"--server_model {self.server_model} needs --server URL. Add it, or leave the name out."
            )
        if self.server is not None and self.dtype != "auto":
            raise ValueError(f"--dtype {self.dtype} has no effect with --server. Leave it out.")

    def endpoint(self) -> Server | None:
        """Return the server, if any; the environment variable OPENAI_API_KEY holds its key."""
        if self.server is None:
            return None
        return Server(
            self.server, self.server_model or self.model, os.environ.get("OPENAI_API_KEY")
        )


@dataclass
class PromptOptions(Options):
    """The prompts to answer: from a file or a dataset, self-written, or both."""

    title: ClassVar[str] = "prompts"

    prompts: Path | None = field(
        default=None, metadata={"help": "File of prompts (.jsonl or .jsonl.gz)."}
    )
    dataset: str | None = field(
        default=None, metadata={"help": "Dataset of prompts: Hub id, local folder or file."}
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the dataset."}
    )
    split: str | None = field(
        default=None, metadata={"help": "Split of the dataset; train by default."}
    )
    field: str = dataclasses.field(
        default="prompt",
        metadata={"help": "Field that holds the prompt, or in a dataset a conversation."},
    )
    self_written: Annotated[int, Range(ge=0)] = dataclasses.field(
        default=0, metadata={"help": "Let the model (an instruct model) write N prompts itself."}
    )
    limit: Annotated[int | None, Range(ge=1)] = dataclasses.field(
        default=None, metadata={"help": "Use the first N prompts of the file or dataset."}
    )
    bad_rows: BadRows = dataclasses.field(
        default="refuse",
        metadata={
            "help": "How to treat rows without a valid prompt, or without an answer of the server."
        },
    )

    def __post_init__(self) -> None:
        """Raise a ValueError for no source, for two sources, and for options of a missing source."""
        super().__post_init__()
        if self.prompts is not None and self.dataset is not None:
            raise ValueError("Pass --prompts FILE or --dataset NAME, not both.")
        if self.prompts is None and self.dataset is None and not self.self_written:
            raise ValueError(
                "There are no prompts to answer: pass --prompts FILE, --dataset NAME or "
                "--self_written N (alone, or with one of the others)."
            )
        for name in ("dataset_config", "split"):
            if self.dataset is None and getattr(self, name) is not None:
                raise ValueError(
                    f"--{name} {getattr(self, name)} needs --dataset NAME. Add it, or leave --{name} out."
                )
        if self.prompts is None and self.dataset is None and self.limit is not None:
            raise ValueError(
                f"--limit {self.limit} needs --prompts FILE or --dataset NAME. Leave it out: "
                "--self_written sets the number of self-written prompts."
            )

    def read(self) -> tuple[list[Prompt], dict[str, Any]]:
        """Return the prompts of the file or dataset, and a record of their source.

        Raises:
            ValueError: the file or dataset cannot be read, or a row has no valid prompt.
        """
        on_bad_row = BadRowHandler(self.bad_rows)
        prompts, sources = self._read(on_bad_row)
        for note in on_bad_row.notes():
            logger.warning(note)
        return prompts, sources

    def _read(self, on_bad_row: BadRowHandler) -> tuple[list[Prompt], dict[str, Any]]:
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

    `accelerate launch --num_processes 2 --no_python lmtp distill ...` splits the work across processes.
    With --server, a server such as vLLM answers and no model is loaded here. Serve MODEL in the precision
    in which the heads will run; OPENAI_API_KEY holds the key, if the server needs one.

    Examples:
    lmtp distill MODEL answers.jsonl --self_written 2000
    lmtp distill MODEL answers.jsonl --dataset HuggingFaceH4/no_robots --field messages
    lmtp distill MODEL answers.jsonl --prompts prompts.jsonl --server http://localhost:8000/v1
    """
    try:
        report = run_distillation(
            options.model,
            options.output,
            settings,
            prompts,
            dtype=options.dtype,
            server=options.endpoint(),
        )
    except MainProcessError:  # the main process reports the reason
        sys.exit(1)
    if process_state().is_main_process:
        console.print(report.summary(), markup=False, soft_wrap=True)


def run_distillation(
    source: str,
    output: Path,
    settings: DistillSettings,
    prompt_options: PromptOptions,
    *,
    dtype: str = "auto",
    server: Server | None = None,
) -> DistillReport:
    """Answer prompts with the model `source`, or with a server that serves it.

    Files next to `output` keep the self-written prompts, and until these are complete a log of the
    samples, so that a resumed run uses the same prompts.

    Args:
        source: folder or Hub id of the backbone; with `server`, only recorded in the manifest.
        output: a .jsonl file, new or of the same run.
        settings: how to generate the answers.
        prompt_options: the prompts to answer.
        dtype: precision of the loaded model.
        server: answers in place of a loaded model.

    Raises:
        ValueError: the prompts cannot be read, or `output` belongs to another run.
    """
    check_output_name(output)
    if server is not None and prompt_options.self_written:
        raise ValueError(
            f"--self_written must be 0 with --server, got {prompt_options.self_written}: a server cannot "
            "continue a bare user turn. Let `lmtp distill` write prompts with a smaller model first, and "
            "pass them with --prompts."
        )
    # gloo, because only small objects travel; the others may wait days for the slowest process
    process_state(backend="gloo", timeout=timedelta(weeks=1))
    prompts, sources = on_main(prompt_options.read)
    if server is not None:
        on_bad_row = BadRowHandler(prompt_options.bad_rows)
        record: dict[str, Any] = {"model": source, "sources": sources}
        try:
            return distill_from_server(
                server, prompts, output, settings, on_bad_row=on_bad_row, **record
            )
        finally:
            for note in on_bad_row.notes():
                logger.warning(note)
    model, tokenizer = load_backbone(source, dtype), load_tokenizer(source)
    count = prompt_options.self_written
    if not count:
        return distill(model, tokenizer, prompts, output, settings, sources=sources)
    log = SampleLog(Path(f"{output}.samples.jsonl"), model_identity(model, tokenizer), settings)
    prompts += _self_written(model, tokenizer, output, settings, count, log)
    sources["self_written"] = count
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
    """Return the self-written prompts of the run to resume, or let the model write new ones."""
    prompt_file = Path(f"{output}.prompts.jsonl")
    identity = {**model_identity(model, tokenizer), "settings": asdict(settings)}
    earlier = on_main(lambda: _earlier_prompts(output, prompt_file, identity, count))
    if earlier is not None:
        return earlier
    with writer_lock(log.path) if process_state().is_main_process else nullcontext():
        prompts = self_written_prompts(model, tokenizer, count, settings, log=log, progress=True)
    rows = [{"prompt": prompt.text, "kind": prompt.kind} for prompt in prompts]
    on_main(lambda: replace_rows(prompt_file, rows))
    return prompts


def _earlier_prompts(
    output: Path, prompt_file: Path, identity: dict[str, Any], count: int
) -> list[Prompt] | None:
    # Refuse the output of another run now, not after hours of sampling
    manifest = check_same_run(output, identity, tuple(identity))
    if not manifest:
        return None
    earlier = (manifest.get("prompt_sources") or {}).get("self_written", count)
    if prompt_file.exists() and earlier == count:
        return read_prompts(prompt_file)
    how = (
        f"with --self_written {earlier}" if prompt_file.exists() else f"without {prompt_file.name}"
    )
    raise ValueError(
        f"{output} was made {how}. Choose another output, or delete this one with its manifest."
    )
