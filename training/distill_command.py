"""`lmtp distill`: gather prompts, then let the backbone, or a server, answer them."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from modeling_lmtp.conversion.loading import load_backbone, load_tokenizer
from modeling_lmtp.conversion.prompts import Prompt, read_prompts
from modeling_lmtp.conversion.saving import file_sha256

from .answers import SkippedRows
from .distill import DistillReport, DistillSettings, distill, run_identity
from .distill_files import (
    check_output_name,
    check_same_run,
    claimed,
    replace_rows,
)
from .distill_server import Server, distill_from_server
from .processes import on_main, processes
from .prompt_datasets import DatasetSource, read_dataset_prompts
from .sample_log import SampleLog
from .self_written import self_written_prompts

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class PromptChoice:
    """Which prompts to answer: those of a file or a dataset, self-written ones, or both.

    Raises ValueError for a choice that means nothing.
    """

    file: Path | None = None
    dataset: DatasetSource | None = None
    field: str = "prompt"  # of the file
    self_written: int = 0
    limit: int | None = None  # of the file or dataset
    bad_rows: str = "refuse"  # or "skip", see `SkippedRows`

    def __post_init__(self) -> None:
        """Refuse no source and two sources at once."""
        SkippedRows(self.bad_rows)
        if self.file is not None and self.dataset is not None:
            raise ValueError("Pass --prompts FILE or --dataset NAME, not both.")
        if self.file is None and self.dataset is None and not self.self_written:
            raise ValueError(
                "There is nothing to answer: pass --prompts FILE, --dataset NAME or "
                "--self-written N (which goes with either)."
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
        if self.file is not None:
            prompts = read_prompts(self.file, self.field, on_bad_row)[: self.limit]
            sha256 = file_sha256(self.file)
            record = {"path": str(self.file), "sha256": sha256, "field": self.field}
            return prompts, {"file": {**record, "rows": len(prompts)}}
        if self.dataset is not None:
            prompts, record = read_dataset_prompts(self.dataset, self.limit, on_bad_row)
            return prompts, {"dataset": record}
        return [], {}


def choose_prompts(
    file: Path | None,
    dataset: str | None,
    config: str | None,
    split: str | None,
    field: str,
    self_written: int,
    limit: int | None,
    bad_rows: str = "refuse",
) -> PromptChoice:
    """Return the choice that the options of `lmtp distill` make.

    Raises:
        ValueError: they mean nothing together.
    """
    if dataset is None:
        for option, value in (("--dataset-config", config), ("--split", split)):
            if value is not None:
                raise ValueError(f"{option} {value} goes with --dataset NAME, which is missing.")
        choice = PromptChoice(file, None, field, self_written, limit, bad_rows)
        if file is None and limit is not None:
            raise ValueError(
                f"--limit {limit} goes with --prompts FILE or --dataset NAME, which are missing; how "
                "many prompts the model writes is said by --self-written alone."
            )
        return choice
    chosen = DatasetSource(dataset, config, split, field)
    return PromptChoice(file, chosen, field, self_written, limit, bad_rows)


def choose_server(model: str, url: str | None, name: str | None, dtype: str) -> Server | None:
    """Return the server that the options of `lmtp distill` name, or None.

    Raises:
        ValueError: they mean nothing together.
    """
    if url is None:
        if name is not None:
            raise ValueError(f"--server-model {name} goes with --server URL, which is missing.")
        return None
    if dtype != "auto":
        raise ValueError(f"--dtype {dtype} has no effect on a server: leave it out.")
    return Server(url, name or model, os.environ.get("OPENAI_API_KEY"))


def distill_from(
    source: str,
    output: Path,
    settings: DistillSettings,
    choice: PromptChoice,
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
            "--self-written needs the model itself, not a server. Let `lmtp distill` write "
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
        found = f"with --self-written {asked}" if written.exists() else f"without {written.name}"
        raise ValueError(
            f"{output}: was made {found}. Choose another output or delete this one with its manifest"
        )
    return read_prompts(written)
