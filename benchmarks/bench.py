"""`lmtp bench`: ways of decoding side by side, in one process, taking turns prompt by prompt.

Figures are those of `comparison`. Over a batch, *tokens per step* is what a pass emits over what a
pass of plain decoding emits in the same batch, so that speed-up = tokens per step / step cost always.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm

from modeling_lmtp.modeling_lmtp import LMTPForCausalLM

from .bench_methods import Method
from .divergence import Divergence, judge
from .exactness import SAMPLING
from .pass_clock import PassClock

GREEDY_MODE, SAMPLING_MODE = MODES = "greedy", "sampling"
WARMUP_TOKENS = 8


@dataclass(frozen=True)
class Batch:
    """Prompts that are decoded together.

    Args:
        kind: of the prompts.
        input_ids, attention_mask: `(B, L)`, padded on the left.
    """

    kind: str
    input_ids: torch.Tensor
    attention_mask: torch.Tensor

    @property
    def size(self) -> int:
        """The number of prompts."""
        return len(self.input_ids)


@dataclass(frozen=True)
class Run:
    """One call of `generate`.

    Args:
        texts: each row's new tokens, up to its end.
        seconds: after the prefill.
        passes: of the backbone, after the prefill.
        row_seconds: when rows ended, the earliest first.
    """

    texts: list[list[int]]
    seconds: float
    passes: int
    row_seconds: list[float]

    @property
    def tokens(self) -> int:
        """Tokens emitted after the prefill's."""
        return sum(len(text) - 1 for text in self.texts)


@dataclass
class Measured:
    """What one way of decoding did with one kind of prompts, batch size and mode.

    Args:
        method: the way.
        kind, batch_size, mode: see above.
        runs: per batch, one run per round.
        plain: plain decoding's runs, laid out the same.
        divergences: where the texts part, the first place of each row.
        num_compared, num_equal: rows whose texts were compared, and were equal.
    """

    method: Method
    kind: str
    batch_size: int
    mode: str
    runs: list[list[Run]] = field(default_factory=list)
    plain: list[list[Run]] = field(default_factory=list)
    divergences: list[Divergence] = field(default_factory=list)
    num_compared: int = 0
    num_equal: int = 0

    @property
    def num_errors(self) -> int:
        """How many differences break a promise."""
        return sum(d.is_error for d in self.divergences) if self.method.is_ours else 0


def make_batches(
    prompts: Mapping[str, Sequence[list[int]]], size: int, pad_id: int, device: torch.device
) -> list[Batch]:
    """Put prompts of one kind together, `size` at a time; the last batch takes some again.

    Args:
        prompts: by kind, token ids.
        size: `B`.
        pad_id: stands before the shorter ones.
        device: where they go.
    """
    batches = []
    for kind, rows in prompts.items():
        for start in range(0, len(rows), size):
            chosen = [rows[number % len(rows)] for number in range(start, start + size)]
            length = max(map(len, chosen))
            ids = [[pad_id] * (length - len(row)) + row for row in chosen]
            mask = [[0] * (length - len(row)) + [1] * len(row) for row in chosen]
            batches.append(
                Batch(kind, torch.tensor(ids, device=device), torch.tensor(mask, device=device))
            )
    return batches


def run(method: Method, batch: Batch, seed: int, options: Mapping[str, Any]) -> Run:
    """Generate once and time it."""
    torch.manual_seed(seed)
    with PassClock(method.model.backbone) as clock:
        sequences = method.model.generate(
            batch.input_ids,
            attention_mask=batch.attention_mask,
            **{**options, **method.options},
        )
    texts = [
        _up_to_end(row, _end_ids(method.model, options))
        for row in sequences[:, batch.input_ids.shape[1] :].tolist()
    ]
    return Run(texts, clock.seconds, clock.passes, _row_seconds(clock, texts))


def _end_ids(model: LMTPForCausalLM, options: Mapping[str, Any]) -> set[int]:
    ends = options.get("eos_token_id", model.generation_config.eos_token_id)
    if ends is None:
        return set()
    return {ends} if isinstance(ends, int) else set(ends)


def _up_to_end(tokens: list[int], end_ids: set[int]) -> list[int]:
    end = next((place for place, token in enumerate(tokens) if token in end_ids), len(tokens))
    return tokens[: end + 1]


def _row_seconds(clock: PassClock, texts: Sequence[list[int]]) -> list[float]:
    """L-MTP's rows leave the batch when they end; plain decoding's end with their last token's pass."""
    if min(clock.rows, default=len(texts)) < len(texts):
        ended = [sum(rows >= left for rows in clock.rows) for left in range(len(texts), 0, -1)]
    elif clock.passes == max(len(text) - 1 for text in texts):
        ended = sorted(len(text) - 1 for text in texts)
    else:
        ended = [clock.passes] * len(texts)
    return [clock.seconds_after(passes) for passes in ended]


def measure(
    methods: Sequence[Method],
    batches: Sequence[Batch],
    mode: str,
    *,
    max_new_tokens: int,
    rounds: int = 3,
    seed: int = 0,
    stop_at_end: bool = True,
    progress: bool = True,
) -> list[Measured]:
    """Let all methods take turns, batch by batch and round by round.

    Args:
        methods: the first one is plain decoding.
        batches: all of one size.
        mode: `"greedy"` or `"sampling"`.
        max_new_tokens, seed: for every call.
        rounds: how often each batch is decoded in each way.
        stop_at_end: end where the model ends; otherwise always go on to `max_new_tokens`.
        progress: show a progress bar.

    Returns:
        Per kind and method, plain decoding included.

    Raises:
        ValueError: `mode` is unknown.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}.")
    size = batches[0].size
    methods = [method for method in methods if size == 1 or method.takes_batches]
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    options |= SAMPLING if mode == SAMPLING_MODE else {"do_sample": False}
    if not stop_at_end:
        options["eos_token_id"] = None
    for method in methods:
        run(method, batches[0], seed, {**options, "max_new_tokens": WARMUP_TOKENS})
    runs: list[list[list[Run]]] = [[[] for _ in batches] for _ in methods]
    bar = tqdm(total=rounds * len(batches), desc=f"{mode}, batch {size}", disable=not progress)
    for turn in range(rounds):
        for place, batch in enumerate(batches):
            first = (turn + place) % len(methods)  # nobody always comes after the same one
            for number in [*range(first, len(methods)), *range(first)]:
                runs[number][place].append(run(methods[number], batch, seed + place, options))
            bar.update()
    bar.close()
    measured = _by_kind(methods, batches, runs, mode)
    compares = mode == GREEDY_MODE or size == 1  # sampled rows of a batch are equal in law only
    if compares:
        for result in measured:
            _compare_texts(result, batches, is_sampled=mode == SAMPLING_MODE)
    return measured


def _by_kind(
    methods: Sequence[Method],
    batches: Sequence[Batch],
    runs: Sequence[Sequence[list[Run]]],
    mode: str,
) -> list[Measured]:
    measured = []
    for kind in dict.fromkeys(batch.kind for batch in batches):
        places = [place for place, batch in enumerate(batches) if batch.kind == kind]
        for method, own in zip(methods, runs, strict=True):
            found = Measured(method, kind, batches[0].size, mode)
            found.runs = [own[place] for place in places]
            found.plain = [runs[0][place] for place in places]
            measured.append(found)
    return measured


def _compare_texts(measured: Measured, batches: Sequence[Batch], is_sampled: bool) -> None:
    own_batches = [batch for batch in batches if batch.kind == measured.kind]
    for batch, own, plain in zip(own_batches, measured.runs, measured.plain, strict=True):
        for row, (text, plain_text) in enumerate(zip(own[0].texts, plain[0].texts, strict=True)):
            measured.num_compared += 1
            if text == plain_text:
                measured.num_equal += 1
                continue
            prompt = batch.input_ids[row, batch.attention_mask[row].bool()]
            measured.divergences.append(
                first_divergence(measured.method.model, prompt, plain_text, text, is_sampled)
            )


def first_divergence(
    model: LMTPForCausalLM,
    prompt: torch.Tensor,
    plain_text: list[int],
    text: list[int],
    is_sampled: bool,
) -> Divergence:
    """Look at the first token that differs, after the prompt `(L,)`."""
    agree = [a == b for a, b in zip(plain_text, text, strict=False)]
    position = agree.index(False) if False in agree else len(agree)
    known = torch.cat([prompt, prompt.new_tensor(plain_text[:position])])[None]
    return judge(model, known, position, is_sampled)
