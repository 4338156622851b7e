"""Self-distillation: the backbone answers each prompt, and the heads later learn its answers.

The answers go to a JSONL file, batch by batch, beside a manifest that says what made them. A run
can be stopped at any moment and started again: batches are cut the same way every time and each
batch has its own seed, so the file ends up as if the run had never been stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_lmtp.training.prompts import (
    Prompt,
    Sampling,
    derived_seed,
    end_ids,
    generate_ids,
    read_json_lines,
    render_prompt,
)

ROW_FIELDS = {
    "id": str,
    "kind": str | None,
    "prompt": str,
    "response": str,
    "finished": bool,
    "tokens": int,  # generated ones, the end-of-text token included
}
# What has to agree before a run may add rows to a file.
IDENTITY = ("model_fingerprint", "tokenizer_sha256", "prompts_sha256", "settings")


@dataclass(frozen=True)
class DistillSettings:
    """How prompts are answered and, for self-written ones (`magpie_…`), sampled.

    Raises ValueError naming the argument, the value and what is allowed.
    """

    max_new_tokens: int = 320  # a longer answer is cut; its row says `finished: false`
    temperature: float = 0.0  # 0 answers greedily
    top_p: float = 1.0
    num_answers: int = 1  # per prompt; more than one only when sampling
    batch_size: int = 16
    seed: int = 0
    magpie_temperature: float = 1.0
    magpie_top_p: float = 0.95
    magpie_max_tokens: int = 128  # a longer prompt is dropped

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        for name in ("max_new_tokens", "num_answers", "batch_size", "magpie_max_tokens"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("top_p", "magpie_top_p"):
            self._require(name, 0 < getattr(self, name) <= 1, "above 0 and at most 1")
        self._require("seed", self.seed >= 0, "0 or more")
        self._require("temperature", self.temperature >= 0, "0 (greedy) or more")
        self._require("magpie_temperature", self.magpie_temperature > 0, "more than 0")
        if self.temperature == 0:
            hint = " with temperature=0 (greedy); raise temperature to sample"
            self._require("num_answers", self.num_answers == 1, "1" + hint)
            self._require("top_p", self.top_p == 1, "1.0" + hint)

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{name}: expected {allowed}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class DistillReport:
    """What a run left behind: counts over all rows of `output`, and over this run's own."""

    output: Path
    rows: int
    new_rows: int
    tokens: int
    finished_share: float
    duplicate_prompts: int


@dataclass(frozen=True)
class _Item:
    """One answer to make: its stable id, its prompt and the prompt's token ids."""

    id: str
    prompt: Prompt
    input_ids: list[int]


def distill(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    output: Path | str,
    settings: DistillSettings,
    *,
    progress: bool = True,
) -> DistillReport:
    """Answer every prompt with `model` and append the answers to `output` (JSONL).

    Rows hold `ROW_FIELDS`; a prompt given twice is answered once. Call it again with the same
    arguments to go on after a stop. The answers follow `settings` alone: sampling options and
    penalties of the checkpoint's generation_config do not apply, its end-of-text ids do.

    Raises:
        ValueError: if there are no prompts, or `output` is no .jsonl name, or it exists and was
            made by another model, other settings or other prompts; its files stay as they are.
    """
    output = Path(output)
    if output.suffix != ".jsonl":
        raise ValueError(f"output: expected a file name that ends in .jsonl, got {output.name!r}")
    items, duplicates = _plan(tokenizer, prompts, settings)
    manifest = _describe(model, tokenizer, items, settings)
    rows = _resume(output, manifest)
    known = len(rows)
    done = {row["id"] for row in rows}
    size = settings.batch_size
    batches = [items[start : start + size] for start in range(0, len(items), size)]
    # Before the first row, so that no row is ever without a manifest.
    counts = _write_manifest(output, manifest, rows, duplicates)
    started = time.monotonic()
    with tqdm(total=len(items), initial=known, unit="answer", disable=not progress) as bar:
        for batch in batches:
            if done.issuperset(item.id for item in batch):
                continue
            # A batch that was cut is answered again as a whole: what a row samples depends on
            # the rows beside it.
            answered = _answer(model, tokenizer, batch, settings)
            missing = [row for row in answered if row["id"] not in done]
            append_rows(output, missing)
            rows += missing
            counts = _write_manifest(output, manifest, rows, duplicates)
            bar.update(len(missing))
            speed = sum(row["tokens"] for row in rows[known:]) / (time.monotonic() - started)
            bar.set_postfix_str(f"{speed:.0f} tokens/s")
    return DistillReport(output, new_rows=len(rows) - known, **counts)


def append_rows(path: Path | str, rows: list[dict[str, Any]]) -> None:
    """Append rows to a JSONL file; they are on the disk when this returns."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with Path(path).open("ab") as stream:
        stream.write(lines.encode("utf-8"))
        stream.flush()
        os.fsync(stream.fileno())


def read_rows(path: Path | str) -> list[dict[str, Any]]:
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


def manifest_path(output: Path | str) -> Path:
    """Return the path of the manifest that belongs to an output file."""
    return Path(f"{output}.manifest.json")


def row_id(prompt: str, answer: int) -> str:
    """Return the id of the answer number `answer` (from 0) to `prompt`: a hash of the two."""
    return hashlib.sha256(f"{answer}\n{prompt}".encode()).hexdigest()[:20]


def _plan(
    tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt], settings: DistillSettings
) -> tuple[list[_Item], int]:
    """Return the answers to make, longest prompt first, and how many prompts were repeats."""
    if not prompts:
        raise ValueError("prompts: expected at least one, got none")
    distinct = {prompt.text: prompt for prompt in reversed(prompts)}
    items = []
    for prompt in distinct.values():
        input_ids = render_prompt(tokenizer, prompt.text)
        for answer in range(settings.num_answers):
            items.append(_Item(row_id(prompt.text, answer), prompt, input_ids))
    # Rows of like length share a batch, and the batch that needs most memory comes first. The id
    # settles ties, so that the batches do not depend on the order of the prompts.
    items.sort(key=lambda item: (-len(item.input_ids), item.id))
    return items, len(prompts) - len(distinct)


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: list[_Item],
    settings: DistillSettings,
) -> list[dict[str, Any]]:
    """Answer one batch; return its rows."""
    seed = derived_seed(settings.seed, *(item.id for item in batch))
    sampling = Sampling(settings.max_new_tokens, settings.temperature, settings.top_p, seed)
    stop_ids = end_ids(model, tokenizer)
    input_ids = [item.input_ids for item in batch]
    answers = generate_ids(model, tokenizer, input_ids, sampling, stop_ids=stop_ids)
    return [
        {
            "id": item.id,
            "kind": item.prompt.kind,
            "prompt": item.prompt.text,
            "response": tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            ),
            "finished": ids[-1] in stop_ids,
            "tokens": len(ids),
        }
        for item, ids in zip(batch, answers, strict=True)
    ]


def _resume(output: Path, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows `output` already holds, once its manifest is known to agree.

    A last line that was cut by a kill is removed.
    """
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        return []
    try:
        found = json.loads(manifest_path(output).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"{output}: exists without {manifest_path(output).name}, so it can't be known what "
            "made it. Choose another output or delete this one"
        ) from error
    differing = [line for name in IDENTITY for line in _differences(name, found, manifest)]
    if differing:
        raise ValueError(
            f"{output}: was made differently: {'; '.join(differing)}. "
            "Choose another output or delete this one with its manifest"
        )
    manifest["versions"] += [old for old in found["versions"] if old not in manifest["versions"]]
    _cut_partial_line(output)
    return read_rows(output)


def _differences(name: str, found: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    """Say how entry `name` of two manifests differs; dictionaries are compared key by key."""
    there, here = found.get(name), wanted[name]
    if isinstance(there, dict) and isinstance(here, dict):
        for key in here:
            for line in _differences(key, there, here):
                yield f"{name}.{line}"
    elif there != here:
        yield f"{name} is {there!r} there and {here!r} now"


def _cut_partial_line(path: Path) -> None:
    """Remove what follows the last line break: a row whose writing was cut short."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as stream:
            stream.truncate(whole)
            os.fsync(stream.fileno())


def _describe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: list[_Item],
    settings: DistillSettings,
) -> dict[str, Any]:
    """Return what the manifest says about a run, without its counts."""
    return {
        "model": model.config.name_or_path or None,
        "model_revision": getattr(model.config, "_commit_hash", None),
        "model_class": type(model).__name__,
        "model_dtype": str(model.dtype).removeprefix("torch."),
        "model_fingerprint": model_fingerprint(model),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "prompts_sha256": _sha256([[item.id, item.prompt.kind] for item in items]),
        "settings": asdict(settings),
        "versions": [
            {
                "modeling_lmtp": version("modeling-lmtp"),
                "torch": str(torch.__version__),
                "transformers": transformers.__version__,
            }
        ],
    }


def model_fingerprint(model: PreTrainedModel) -> str:
    """Return a cheap hash of a model: names, shapes, dtypes and first 16 values of its parameters.

    It tells checkpoints apart, and a merged or trained model from its base. It is no checksum of
    the weights: a change that spares the start of every parameter goes unnoticed.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        if not parameter.is_meta:
            first = parameter.detach().reshape(-1)[:16].cpu().contiguous()
            digest.update(first.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of a tokenizer's vocabulary, special tokens and chat template."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return _sha256([sorted(tokenizer.get_vocab().items()), special, tokenizer.chat_template])


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _write_manifest(
    output: Path, manifest: dict[str, Any], rows: list[dict[str, Any]], duplicates: int
) -> dict[str, Any]:
    """Replace the manifest in one step and return its counts."""
    counts = {
        "rows": len(rows),
        "tokens": sum(row["tokens"] for row in rows),
        "finished_share": sum(row["finished"] for row in rows) / max(len(rows), 1),
        "duplicate_prompts": duplicates,
    }
    path = manifest_path(output)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump({**manifest, **counts}, stream, indent=2)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    return counts
