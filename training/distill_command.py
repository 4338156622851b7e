"""`lmtp distill`: collect prompts, and let the backbone or a server answer them."""

import dataclasses
import os
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

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
from .distill_server import distill_from_server, server_settings
from .processes import MainProcessError, on_main, process_state
from .prompt_datasets import DatasetSource, read_dataset_prompts
from .prompt_kinds import ALL, KINDS, PromptKind, prompt_kinds
from .self_written import SampleLog, self_written_prompts
from .server import Server
from .writers import ModelWriter, ServerWriter, Writer

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
    kinds: list[str] = dataclasses.field(
        default_factory=list,
        metadata={
            "metavar": "KIND",
            "help": f"Spread self-written prompts over kinds: {ALL}, or some of {', '.join(KINDS)}.",
        },
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
        prompt_kinds(self.kinds)
        if self.kinds and not self.self_written:
            raise ValueError(
                f"--kinds {' '.join(self.kinds)} needs --self_written N. Add it, or leave --kinds out."
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
    With --server, a server such as vLLM writes and no model is loaded here. Serve MODEL in the precision
    in which the heads will run; OPENAI_API_KEY holds the key, if the server needs one.

    Examples:
    lmtp distill MODEL answers.jsonl --self_written 2000
    lmtp distill MODEL answers.jsonl --self_written 9000 --kinds all --server http://localhost:8000/v1
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
    # gloo, because only small objects travel; the others may wait days for the slowest process
    process_state(backend="gloo", timeout=timedelta(weeks=1))
    prompts, sources = on_main(prompt_options.read)
    count = prompt_options.self_written
    if server is None:
        model, tokenizer = load_backbone(source, dtype), load_tokenizer(source)
        answer = partial(distill, model, tokenizer)
        writer: Writer = ModelWriter(model, tokenizer)
        identity = {**model_identity(model, tokenizer), "settings": asdict(settings)}
    else:
        answer = partial(_distill_from_server, server, source, prompt_options.bad_rows)
        if count:
            writer = ServerWriter(server, load_tokenizer(source), settings.batch_size)
        identity = {"server_model": server.model, "settings": server_settings(settings, count > 0)}
    if not count:
        return answer(prompts, output, settings, sources=sources)
    kinds = prompt_kinds(prompt_options.kinds)
    written: dict[str, Any] = {"self_written": count}
    if prompt_options.kinds:
        written["kinds"] = [kind.name for kind in kinds]
    log = SampleLog(Path(f"{output}.samples.jsonl"), identity, settings)
    earlier = on_main(lambda: _earlier_prompts(output, identity, written))
    prompts += earlier or _write_prompts(writer, output, settings, count, kinds, log)
    report = answer(prompts, output, settings, sources={**sources, **written})
    on_main(lambda: log.path.unlink(missing_ok=True))
    return report


def _distill_from_server(
    server: Server, source: str, bad_rows: str, *arguments: Any, **options: Any
) -> DistillReport:
    on_bad_row = BadRowHandler(bad_rows)
    try:
        return distill_from_server(
            server, *arguments, model=source, on_bad_row=on_bad_row, **options
        )
    finally:
        for note in on_bad_row.notes():
            logger.warning(note)


def _write_prompts(
    writer: Writer,
    output: Path,
    settings: DistillSettings,
    count: int,
    kinds: list[PromptKind],
    log: SampleLog,
) -> list[Prompt]:
    """Let the model write prompts, and keep them in a file for a run that resumes."""
    with writer_lock(log.path) if process_state().is_main_process else nullcontext():
        prompts = self_written_prompts(writer, count, settings, kinds=kinds, log=log, progress=True)
    rows = [{"prompt": prompt.text, "kind": prompt.kind} for prompt in prompts]
    on_main(lambda: replace_rows(_prompt_file(output), rows))
    return prompts


def _earlier_prompts(
    output: Path, identity: dict[str, Any], written: dict[str, Any]
) -> list[Prompt] | None:
    """Return the self-written prompts of the run to resume, if there is one."""
    # Refuse the output of another run now, not after hours of sampling
    manifest = check_same_run(output, identity, tuple(identity))
    if not manifest:
        return None
    sources, prompt_file = manifest.get("prompt_sources") or {}, _prompt_file(output)
    earlier = {name: sources[name] for name in ("self_written", "kinds") if name in sources}
    if prompt_file.exists() and earlier == written:
        return read_prompts(prompt_file)
    raise ValueError(
        f"{output} was made {_how(earlier) if prompt_file.exists() else f'without {prompt_file.name}'}. "
        "Choose another output, or delete this one with its manifest."
    )


def _how(written: dict[str, Any]) -> str:
    """Return the options that made self-written prompts."""
    kinds = ["--kinds", *written["kinds"]] if "kinds" in written else []
    return " ".join(["with --self_written", str(written.get("self_written", 0)), *kinds])


def _prompt_file(output: Path) -> Path:
    return Path(f"{output}.prompts.jsonl")
