"""What self-distillation leaves on the disk, and how a stopped run finds its way back.

The answers are rows of one JSONL file, `output`, beside a manifest that says what made them. Where
several processes answer, the first one appends to `output` and each further one to a part file of
its own; parts are folded into `output` when all are done, or when a later run finds them. Each
process claims the file that it appends to: a killed launcher may leave processes that go on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from modeling_lmtp.conversion.prompts import read_json_lines
from modeling_lmtp.conversion.saving import read_json

Row = dict[str, Any]

ROW_FIELDS = {
    "id": str,
    "kind": str | None,
    "prompt": str,
    "response": str,
    "finished": bool,
    "tokens": int,  # generated ones, the end-of-text token included
}
# What has to agree before a run may add rows to a file. A model answers here or on a server, so
# each manifest lacks one of the two groups.
IDENTITY = (
    "model_fingerprint",
    "tokenizer_sha256",
    "server_model",
    "prompts_sha256",
    "rendered_sha256",
    "settings",
)


@dataclass(frozen=True)
class Counts:
    """What the manifest and the report say about some rows: how many, and how long."""

    rows: int = 0
    tokens: int = 0
    finished: int = 0

    def plus(self, rows: Iterable[Row]) -> Counts:
        """Return the counts with more rows."""
        rows = list(rows)
        return Counts(
            self.rows + len(rows),
            self.tokens + sum(row["tokens"] for row in rows),
            self.finished + sum(row["finished"] for row in rows),
        )

    @property
    def finished_share(self) -> float:
        """Return the share of answers that came to their end."""
        return self.finished / max(self.rows, 1)


class AnswerFiles:
    """The answers of one run: `output`, its manifest and the parts of further processes.

    Args:
        output: a .jsonl file; it need not exist.
        manifest: what the run is, without counts; `IDENTITY` names what another run may not
            differ in.
        order: the ids of all answers, in the order that the finished file has them.
        duplicates: how many prompts were repeats; the manifest says so.

    Raises:
        ValueError: `output` is no .jsonl name.
    """

    def __init__(
        self, output: Path | str, manifest: dict[str, Any], order: list[str], duplicates: int
    ) -> None:
        self.output = Path(output)
        self.manifest = manifest
        self.places = {id_: place for place, id_ in enumerate(order)}
        self.duplicates = duplicates
        check_output_name(self.output)

    def open(self) -> tuple[set[str], Counts]:
        """Return the ids and the counts of the answers that exist, and write the manifest.

        Parts are folded into `output`; a last line that was cut by a kill is removed.

        Raises:
            ValueError: the answers were made by another run, or another process is answering into
                them; all files stay as they are.
        """
        self.manifest["versions"] += [
            old
            for old in check_same_run(self.output, self.manifest).get("versions", [])
            if old not in self.manifest["versions"]
        ]
        with ExitStack() as claims:
            for part in find_parts(self.output):
                claims.enter_context(claimed(part))
            rows = self._fold()
        counts = Counts().plus(rows)
        # Before the first row, so that no row is ever without a manifest.
        self.write_manifest(counts)
        return {row["id"] for row in rows}, counts

    def append(self, rows: list[Row], process: int) -> None:
        """Append rows on behalf of a process; they are on the disk when this returns."""
        append_rows(self.path_of(process), rows)

    def path_of(self, process: int) -> Path:
        """Return the file that a process appends to."""
        return part_path(self.output, process) if process else self.output

    def close(self) -> Counts:
        """Fold all parts into `output`, in order, and write the manifest; return its counts.

        Raises:
            RuntimeError: answers are missing, though every process made its share.
        """
        counts = Counts().plus(self._fold())
        self.write_manifest(counts)
        if counts.rows < len(self.places):
            raise RuntimeError(
                f"{self.output}: {len(self.places) - counts.rows} answers are missing. Let all "
                "processes write to one folder that each of them sees, and run again to go on"
            )
        return counts

    def write_manifest(self, counts: Counts) -> None:
        """Replace the manifest in one step."""
        entries = {
            **self.manifest,
            "rows": counts.rows,
            "tokens": counts.tokens,
            "finished_share": counts.finished_share,
            "duplicate_prompts": self.duplicates,
        }
        replace_file(manifest_path(self.output), json.dumps(entries, indent=2) + "\n")

    def _fold(self) -> list[Row]:
        """Return all rows, once each and in order, after making `output` hold just these."""
        parts = find_parts(self.output)
        found = [row for path in (self.output, *parts) for row in self._whole_rows(path)]
        # A kill between the two steps below leaves rows both in `output` and in a part.
        rows = sorted({row["id"]: row for row in found}.values(), key=self._place)
        if parts or rows != found:
            replace_rows(self.output, rows)
        for part in parts:
            part.unlink()
        return rows

    def _whole_rows(self, path: Path) -> list[Row]:
        if not path.exists():
            return []
        cut_partial_line(path)
        return read_rows(path)

    def _place(self, row: Row) -> int:
        if row["id"] not in self.places:
            raise ValueError(
                f"{self.output}: row {row['id']!r} answers none of the prompts, though the manifest "
                "agrees; was the file edited? Choose another output or delete this one"
            )
        return self.places[row["id"]]


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Keep other processes off a file for a `with` block, or for as long as this one lives.

    Raises ValueError if another process keeps it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"), blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"{path}: another process is writing to it. Let it finish or stop it, and start again"
        ) from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def check_output_name(output: Path) -> None:
    """Raise a ValueError unless `output` is a .jsonl name."""
    if output.suffix != ".jsonl":
        raise ValueError(f"output: expected a file name that ends in .jsonl, got {output.name!r}")


def check_same_run(
    output: Path, manifest: dict[str, Any], names: Iterable[str] = IDENTITY
) -> dict[str, Any]:
    """Return the manifest of the answers that exist at `output`; empty if there are none.

    Args:
        output: the file of answers.
        manifest: what the run is.
        names: the entries to compare; one that `manifest` lacks is expected to be missing.

    Raises:
        ValueError: there are answers, but no manifest, or one that differs; says in what.
    """
    existing = [path for path in (output, *find_parts(output)) if path.exists()]
    if not existing:
        return {}
    try:
        found = read_json(manifest_path(output))
    except FileNotFoundError as error:
        raise ValueError(
            f"{existing[0]}: exists without {manifest_path(output).name}, so it can't be known what "
            "made it. Choose another output or delete this one"
        ) from error
    refuse_differences(output, names, found, manifest)
    return found


def refuse_differences(
    path: Path, names: Iterable[str], found: dict[str, Any], wanted: dict[str, Any]
) -> None:
    """Raise a ValueError that says in which entries what made the file `path` differs."""
    differing = [line for name in names for line in _differences(name, found, wanted)]
    if differing:
        raise ValueError(
            f"{path}: was made differently: {'; '.join(differing)}. "
            "Choose another output or delete this one with its manifest"
        )


def _differences(name: str, found: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    """Say how entry `name` of two manifests differs; dictionaries are compared key by key."""
    there, here = found.get(name), wanted.get(name)
    if isinstance(there, dict) and isinstance(here, dict):
        for key in here:
            for line in _differences(key, there, here):
                yield f"{name}.{line}"
    elif there != here:
        yield f"{name} is {there!r} there and {here!r} now"


def append_rows(path: Path | str, rows: list[Row]) -> None:
    """Append rows to a JSONL file; they are on the disk when this returns."""
    with Path(path).open("ab") as stream:
        stream.write("".join(_line(row) for row in rows).encode("utf-8"))
        stream.flush()
        os.fsync(stream.fileno())


def replace_rows(path: Path, rows: list[Row]) -> None:
    """Make a JSONL file hold just these rows, in one step."""
    replace_file(path, "".join(_line(row) for row in rows))


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_rows(path: Path | str) -> list[Row]:
    """Read the answers in a .jsonl or .jsonl.gz file that `distill` made.

    Raises ValueError naming `file:line` for a row that is not JSON, was cut off, lacks one of
    `ROW_FIELDS` or holds another type there.
    """
    rows = []
    for number, row in read_json_lines(path):
        for field, types in ROW_FIELDS.items():
            if field not in row or not isinstance(row[field], types):
                raise ValueError(
                    f"{path}:{number}: expected {getattr(types, '__name__', types)} in field "
                    f"{field!r}, got {row.get(field)!r}; fields found: {sorted(row)}"
                )
        rows.append(row)
    return rows


def cut_partial_line(path: Path) -> None:
    """Remove what follows the last line break: a row whose writing was cut short."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as stream:
            stream.truncate(whole)
            os.fsync(stream.fileno())


def replace_file(path: Path, text: str) -> None:
    """Write a file in one step: a kill leaves either the old one or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8", newline="") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def manifest_path(output: Path | str) -> Path:
    """Return the path of the manifest that belongs to an output file."""
    return Path(f"{output}.manifest.json")


def part_path(output: Path, process: int) -> Path:
    """Return where process number `process` (from 1) keeps its answers until they are folded."""
    return output.with_name(f"{output.name}.part{process}.jsonl")


def find_parts(output: Path) -> list[Path]:
    """Return the part files that belong to an output file, of however many processes."""
    candidates = output.parent.glob("*.jsonl") if output.parent.exists() else iter(())
    start = f"{output.name}.part"
    return sorted(
        path
        for path in candidates
        if path.stem.startswith(start) and path.stem.removeprefix(start).isdigit()
    )


def row_id(prompt: str, answer: int) -> str:
    """Return the id of the answer number `answer` (from 0) to `prompt`: a hash of the two."""
    return hashlib.sha256(f"{answer}\n{prompt}".encode()).hexdigest()[:20]
