"""The files of self-distillation, from which a stopped run resumes.

The answers are rows of one JSONL file, `output`, next to a manifest that records model, settings and
prompts. With several processes, the main process appends to `output` and every other process to its own
part file. The main process folds the parts into `output` when all are done, or when a run resumes. Each
process locks the file it appends to, because a killed launcher may leave processes running.
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
    "tokens": int,  # number of generated tokens, including the end-of-text token
}
# Manifest entries that must match before a run may add rows to a file. A manifest lacks either the
# entries of a local model or `server_model`.
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
    """Number of rows, of generated tokens and of finished answers, for manifest and report."""

    rows: int = 0
    tokens: int = 0
    finished: int = 0

    def plus(self, rows: Iterable[Row]) -> Counts:
        """Return the counts including `rows`."""
        rows = list(rows)
        return Counts(
            self.rows + len(rows),
            self.tokens + sum(row["tokens"] for row in rows),
            self.finished + sum(row["finished"] for row in rows),
        )

    @property
    def finished_share(self) -> float:
        """Return the share of answers that are not truncated."""
        return self.finished / max(self.rows, 1)


class AnswerFiles:
    """The files of one run: `output`, its manifest, and the part files of the other processes.

    Args:
        output: a .jsonl file; it need not exist.
        manifest: the manifest without counts; the entries of `IDENTITY` identify the run.
        order: the ids of all answers, in the order of the finished file.
        duplicates: number of duplicate prompts, for the manifest.

    Raises:
        ValueError: `output` does not end in .jsonl.
    """

    def __init__(
        self, output: Path | str, manifest: dict[str, Any], order: list[str], duplicates: int
    ) -> None:
        self.output = Path(output)
        self.manifest = manifest
        self.positions = {id_: position for position, id_ in enumerate(order)}
        self.duplicates = duplicates
        check_output_name(self.output)

    def open(self) -> tuple[set[str], Counts]:
        """Fold existing parts, write the manifest, and return the ids and counts of existing answers.

        A last line that a kill cut short is removed.

        Raises:
            ValueError: the files belong to another run, or another process is writing to them. All
                files stay unchanged.
        """
        self.manifest["versions"] += [
            old
            for old in check_same_run(self.output, self.manifest).get("versions", [])
            if old not in self.manifest["versions"]
        ]
        with ExitStack() as locks:
            for part in find_parts(self.output):
                locks.enter_context(writer_lock(part))
            rows = self._fold()
        counts = Counts().plus(rows)
        # Now, so that a kill never leaves rows without a manifest
        self.write_manifest(counts)
        return {row["id"] for row in rows}, counts

    def append(self, rows: list[Row], process: int) -> None:
        """Append rows to the file of a process, and flush them to disk."""
        append_rows(self.path_for(process), rows)

    def path_for(self, process: int) -> Path:
        """Return the file that process number `process` (from 0) appends to."""
        return part_path(self.output, process) if process else self.output

    def close(self, num_skipped: int = 0) -> Counts:
        """Fold all parts into `output`, in order, write the manifest and return its counts.

        Args:
            num_skipped: how many answers were skipped; the next run tries them again.

        Raises:
            RuntimeError: more answers are missing although every process is done.
        """
        counts = Counts().plus(self._fold())
        self.write_manifest(counts)
        if counts.rows + num_skipped < len(self.positions):
            raise RuntimeError(
                f"{self.output} lacks {len(self.positions) - counts.rows} answers. Write to a folder "
                "that all processes share, and run again to resume."
            )
        return counts

    def write_manifest(self, counts: Counts) -> None:
        """Replace the manifest atomically."""
        entries = {
            **self.manifest,
            "rows": counts.rows,
            "tokens": counts.tokens,
            "finished_share": counts.finished_share,
            "duplicate_prompts": self.duplicates,
        }
        replace_file(manifest_path(self.output), json.dumps(entries, indent=2) + "\n")

    def _fold(self) -> list[Row]:
        """Move the rows of all parts to `output`, sorted and without duplicates, and return them."""
        parts = find_parts(self.output)
        all_rows = [row for path in (self.output, *parts) for row in self._complete_rows(path)]
        # A kill between replacing `output` and removing a part leaves that part's rows in both
        rows = sorted({row["id"]: row for row in all_rows}.values(), key=self._position)
        if parts or rows != all_rows:
            replace_rows(self.output, rows)
        for part in parts:
            part.unlink()
        return rows

    def _complete_rows(self, path: Path) -> list[Row]:
        if not path.exists():
            return []
        truncate_partial_line(path)
        return read_rows(path)

    def _position(self, row: Row) -> int:
        if row["id"] not in self.positions:
            raise ValueError(
                f"{self.output} has a row {row['id']!r} that answers none of the prompts, although the "
                "manifest matches; was the file edited? Choose another output, or delete this one."
            )
        return self.positions[row["id"]]


@contextmanager
def writer_lock(path: Path) -> Iterator[None]:
    """Lock a file against other writers inside a `with` block; the lock ends with the process.

    Raises:
        ValueError: another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"), blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"Another process is writing to {path}. Wait for it or stop it, and run again."
        ) from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def check_output_name(output: Path) -> None:
    """Raise a ValueError unless `output` ends in .jsonl."""
    if output.suffix != ".jsonl":
        raise ValueError(f"output must be a file name that ends in .jsonl, got {output.name!r}.")


def check_same_run(
    output: Path, manifest: dict[str, Any], names: Iterable[str] = IDENTITY
) -> dict[str, Any]:
    """Return the manifest of existing answers at `output`; empty if there are none.

    Args:
        output: the file of answers.
        manifest: the manifest of the run that wants to add answers.
        names: the entries to compare; an entry that one manifest lacks must be absent in the other.

    Raises:
        ValueError: answers exist without a manifest, or their manifest differs; the message lists the
            differences.
    """
    existing = [path for path in (output, *find_parts(output)) if path.exists()]
    if not existing:
        return {}
    try:
        existing_manifest = read_json(manifest_path(output))
    except FileNotFoundError as error:
        raise ValueError(
            f"{existing[0]} exists without {manifest_path(output).name}, so its model and settings are "
            "unknown. Choose another output, or delete this one."
        ) from error
    check_same_origin(output, names, existing_manifest, manifest)
    return existing_manifest


def check_same_origin(
    path: Path, names: Iterable[str], existing: dict[str, Any], current: dict[str, Any]
) -> None:
    """Raise a ValueError if a file's manifest differs from the current one in an entry of `names`."""
    differences = [line for name in names for line in _differences(name, existing, current)]
    if differences:
        raise ValueError(
            f"{path} belongs to another run: {'; '.join(differences)}. "
            "Choose another output, or delete this one with its manifest."
        )


def _differences(name: str, existing: dict[str, Any], current: dict[str, Any]) -> Iterator[str]:
    """Describe how an entry of two manifests differs; dictionaries are compared key by key."""
    old, new = existing.get(name), current.get(name)
    if isinstance(old, dict) and isinstance(new, dict):
        for key in new:
            for line in _differences(key, old, new):
                yield f"{name}.{line}"
    elif old != new:
        yield f"{name} was {old!r} and is {new!r} now"


def append_rows(path: Path | str, rows: list[Row]) -> None:
    """Append rows to a JSONL file, and flush them to disk."""
    with Path(path).open("ab") as stream:
        stream.write("".join(_line(row) for row in rows).encode("utf-8"))
        stream.flush()
        os.fsync(stream.fileno())


def replace_rows(path: Path, rows: list[Row]) -> None:
    """Replace the rows of a JSONL file atomically."""
    replace_file(path, "".join(_line(row) for row in rows))


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_rows(path: Path | str) -> list[Row]:
    """Read the answers in a .jsonl or .jsonl.gz file that `distill` wrote.

    Raises:
        ValueError: a row is not JSON, is truncated, or lacks a field of `ROW_FIELDS` or has another
            type there; the message starts with `file:line`.
    """
    rows = []
    for number, row in read_json_lines(path):
        for field, types in ROW_FIELDS.items():
            if field not in row or not isinstance(row[field], types):
                raise ValueError(
                    f"{path}:{number}: field {field!r} must be {getattr(types, '__name__', types)}, got "
                    f"{row.get(field)!r}; the row has the fields {sorted(row)}."
                )
        rows.append(row)
    return rows


def truncate_partial_line(path: Path) -> None:
    """Remove an unfinished last line, which a kill leaves behind."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        with path.open("r+b") as stream:
            stream.truncate(end)
            os.fsync(stream.fileno())


def replace_file(path: Path, text: str) -> None:
    """Write a file atomically: a kill leaves either the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8", newline="") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def manifest_path(output: Path | str) -> Path:
    """Return the path of an output file's manifest."""
    return Path(f"{output}.manifest.json")


def part_path(output: Path, process: int) -> Path:
    """Return the part file of process number `process` (from 1)."""
    return output.with_name(f"{output.name}.part{process}.jsonl")


def find_parts(output: Path) -> list[Path]:
    """Return the existing part files of an output file."""
    candidates = output.parent.glob("*.jsonl") if output.parent.exists() else iter(())
    prefix = f"{output.name}.part"
    return sorted(
        path
        for path in candidates
        if path.stem.startswith(prefix) and path.stem.removeprefix(prefix).isdigit()
    )


def row_id(prompt: str, answer: int) -> str:
    """Return the id of answer number `answer` (from 0) to `prompt`, a hash of both."""
    return hashlib.sha256(f"{answer}\n{prompt}".encode()).hexdigest()[:20]
