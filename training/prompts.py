"""Prompts for self-distillation: read from a file, or written by the model itself.

`render_prompt` is the one place that turns a prompt into token ids; self-distillation and training
both use it, so that the heads see a prompt exactly as the backbone did when it answered.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

if TYPE_CHECKING:
    from modeling_lmtp.training.distill import DistillSettings

SELF_WRITTEN = "self-written"
# A sampled user turn is dropped when it is empty, cut off or known already. Far more samples than
# prompts asked for means that the model repeats itself.
MAX_SAMPLES_PER_PROMPT = 10

_SENTINEL = "lmtpsentinel"

# Everything a checkpoint's generation_config may add to plain decoding, switched off: the answers
# follow the settings alone.
_PLAIN_DECODING = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "min_new_tokens": 0,  # it takes precedence over min_length
}


@dataclass(frozen=True)
class Prompt:
    """One user turn, and the label of the kind it belongs to (None where there is none)."""

    text: str
    kind: str | None = None


@dataclass(frozen=True)
class Sampling:
    """How `generate_ids` picks tokens: greedily where `temperature` is 0."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


def read_json_lines(path: Path | str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, JSON object) for each line of a .jsonl or .jsonl.gz file.

    Blank lines are skipped. Raises ValueError naming `file:line` for any other line that is no
    JSON object, and for a file name with another ending.
    """
    path = Path(path)
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"{path}: expected a file name that ends in .jsonl or .jsonl.gz")
    number = 0
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
        try:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, _json_object(line, f"{path}:{number}")
        except EOFError as error:
            raise ValueError(f"{path}:{number}: the gzip data ends early after here") from error


def _json_object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        hint = "" if line.endswith(b"\n") else " (the line is cut off: was its writer stopped?)"
        raise ValueError(f"{where}: not JSON: {error}{hint}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row


def read_prompts(path: Path | str, field: str = "prompt") -> list[Prompt]:
    """Read one prompt per line from a .jsonl or .jsonl.gz file.

    Args:
        path: the file. A row's optional string "kind" is kept.
        field: the name of the field that holds the prompt's text.

    Raises:
        ValueError: naming `file:line` and the fields found, if `field` is missing, empty or no
            string, or `kind` no string; also if the file holds no prompt.
    """
    prompts = []
    for number, row in read_json_lines(path):
        text, kind = row.get(field), row.get("kind")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"{path}:{number}: expected a non-empty string in field {field!r}, "
                f"got {text!r}; fields found: {sorted(row)}"
            )
        if kind is not None and not isinstance(kind, str):
            raise ValueError(f"{path}:{number}: expected a string in field 'kind', got {kind!r}")
        prompts.append(Prompt(text, kind))
    if not prompts:
        raise ValueError(f"{path}: holds no prompts")
    return prompts


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the token ids up to where the answer to `prompt` begins.

    With a chat template: one user turn and the header of the answer. The template writes its own
    special tokens, so none are added (no second BOS). Without one: the bare prompt, with the
    special tokens that the tokenizer itself adds.
    """
    if not tokenizer.chat_template:
        return list(tokenizer(prompt)["input_ids"])
    text = _render_turn(tokenizer, prompt, add_generation_prompt=True)
    return _encode(tokenizer, text)


def _render_turn(
    tokenizer: PreTrainedTokenizerBase, user_turn: str, *, add_generation_prompt: bool
) -> str:
    return str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": user_turn}],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    )


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end an answer: the model's own, else the tokenizer's; maybe none."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return []
    return list(ids) if isinstance(ids, (list, tuple)) else [int(ids)]


def generate_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    stop_ids: list[int],
    stop_string: str | None = None,
) -> list[list[int]]:
    """Continue a batch of prompts and return the new ids of each row, the stop id included.

    The result depends on the batch and on `sampling.seed`, not on the state of torch's random
    generators, which is restored. `stop_string` ends a row without removing what follows in it.
    """
    length = max(len(ids) for ids in prompts)
    pad_id = _pad_id(model, tokenizer, stop_ids)
    input_ids = torch.tensor([[pad_id] * (length - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts])
    config = _decoding_config(sampling, pad_id, stop_ids, stop_string)
    was_training = model.training
    model.eval()
    try:
        with _seeded(sampling.seed, model.device):
            # PreTrainedModel's own type has no generate: its causal-LM classes mix it in.
            output = cast(Any, model).generate(
                input_ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=config,
                tokenizer=tokenizer if stop_string else None,
            )
    finally:
        model.train(was_training)
    return [_up_to_stop(row, set(stop_ids)) for row in output[:, length:].tolist()]


def _decoding_config(
    sampling: Sampling, pad_id: int, stop_ids: list[int], stop_string: str | None
) -> GenerationConfig:
    sample = sampling.temperature > 0
    return GenerationConfig(
        **_PLAIN_DECODING,
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sample,
        # Greedy decoding ignores these three; Transformers' defaults keep it from warning.
        temperature=sampling.temperature if sample else 1.0,
        top_p=sampling.top_p if sample else 1.0,
        top_k=0 if sample else 50,
        pad_token_id=pad_id,
        eos_token_id=stop_ids or None,
        stop_strings=stop_string,
    )


def _pad_id(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int]) -> int:
    """Return an id to pad with. Any does: the attention mask hides it."""
    for candidate in (model.generation_config.pad_token_id, tokenizer.pad_token_id, *stop_ids):
        if candidate is not None:
            return int(candidate)
    return 0


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch inside the block and restore its random state after it."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def derived_seed(seed: int, *parts: object) -> int:
    """Return a seed that depends on `seed` and `parts` alone (no process, no order of calls)."""
    digest = hashlib.sha256(json.dumps([seed, *map(str, parts)]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # torch takes signed 64-bit seeds


def _up_to_stop(row: list[int], stop_ids: set[int]) -> list[int]:
    stop = next((i for i, token in enumerate(row) if token in stop_ids), len(row) - 1)
    return row[: stop + 1]


def self_written_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    settings: DistillSettings,
) -> list[Prompt]:
    """Let the model write `count` different user turns (Magpie, arXiv 2406.08464).

    The model continues the bare header of a user turn of its chat template, until it closes the
    turn. Empty, cut-off and repeated turns are dropped and sampled anew, up to
    `MAX_SAMPLES_PER_PROMPT` samples for each prompt asked for; then a warning says how many were
    found. The same model, settings and count give the same prompts.

    Raises:
        ValueError: if `count` is below 1, or the tokenizer's chat template is missing or does not
            show where a user turn begins and ends.
        RuntimeError: if no usable turn was sampled at all.
    """
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    turn = _user_turn(tokenizer)
    found: dict[str, None] = {}  # a dict keeps the order
    for batch in range(math.ceil(count * MAX_SAMPLES_PER_PROMPT / settings.batch_size)):
        for text in _sample_user_turns(model, tokenizer, turn, batch, settings):
            if text and len(found) < count:
                found.setdefault(text)
        if len(found) == count:
            break
    shortage = f"{len(found)} of {count} prompts in {count * MAX_SAMPLES_PER_PROMPT} samples"
    if not found:
        raise RuntimeError(
            f"{shortage}: the model closes no user turn within magpie_max_tokens="
            f"{settings.magpie_max_tokens}; raise it, or read the prompts from a file"
        )
    if len(found) < count:
        warnings.warn(f"the model wrote only {shortage}; going on with those", stacklevel=2)
    return [Prompt(text, SELF_WRITTEN) for text in found]


@dataclass(frozen=True)
class _UserTurn:
    """A user turn of a chat template: the ids before its text and what closes it."""

    header_ids: list[int]
    end: str
    end_id: int | None  # the id of `end` where that is one special token


def _user_turn(tokenizer: PreTrainedTokenizerBase) -> _UserTurn:
    if not tokenizer.chat_template:
        raise ValueError(
            "tokenizer: has no chat template, so a user turn has no header to continue; "
            "read the prompts from a file instead"
        )
    rendered = _render_turn(tokenizer, _SENTINEL, add_generation_prompt=False)
    if rendered.endswith(_SENTINEL):  # some templates close the turn with the answer's header
        rendered = _render_turn(tokenizer, _SENTINEL, add_generation_prompt=True)
    header, _, tail = rendered.partition(_SENTINEL)
    # A trailing space belongs to the first word of the turn, as tokenizers cut text.
    header_ids = _encode(tokenizer, header.rstrip(" "))
    if not header_ids or not tail or _SENTINEL in tail:
        raise ValueError(
            "tokenizer: its chat template does not show where a user turn begins and ends "
            f"(rendered: {rendered!r}); read the prompts from a file instead"
        )
    end = tail.strip() or tail
    first = _encode(tokenizer, end)[0]
    if first not in _special_ids(tokenizer):
        return _UserTurn(header_ids, end, None)
    return _UserTurn(header_ids, str(tokenizer.convert_ids_to_tokens(first)), first)


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = tokenizer.added_tokens_decoder
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}


def _sample_user_turns(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    turn: _UserTurn,
    batch: int,
    settings: DistillSettings,
) -> list[str]:
    """Sample one batch of user turns; what was not closed, or is not plain text, comes empty."""
    sampling = Sampling(
        settings.magpie_max_tokens,
        settings.magpie_temperature,
        settings.magpie_top_p,
        derived_seed(settings.seed, SELF_WRITTEN, batch),
    )
    own_end = [] if turn.end_id is None else [turn.end_id]
    rows = generate_ids(
        model,
        tokenizer,
        [turn.header_ids] * settings.batch_size,
        sampling,
        stop_ids=[*own_end, *end_ids(model, tokenizer)],
        stop_string=turn.end if turn.end_id is None else None,
    )
    special = tokenizer.convert_ids_to_tokens(sorted(_special_ids(tokenizer)))
    texts = []
    for row in rows:
        whole = str(tokenizer.decode(row, clean_up_tokenization_spaces=False))
        text, closed, _ = whole.partition(turn.end)
        plain = closed and not any(token in text for token in special)
        texts.append(text.strip() if plain else "")
    return texts
