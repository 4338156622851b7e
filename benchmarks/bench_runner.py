"""Decodes batches of prompts in several ways, which take turns in one process."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from modeling_lmtp.conversion.batch_generation import pad_id
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM

from .bench_methods import Method
from .divergence import Divergence, first_difference, judge
from .drafts_to_try import SAMPLING
from .figures import Timing
from .pass_clock import PassClock

Mode = Literal["greedy", "sampling"]
WARMUP_TOKENS = 8


@dataclass(frozen=True)
class Batch:
    """Prompts that are decoded together.

    Args:
        kind: the kind of all of them.
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
        texts: the new tokens of each row, up to its end.
        seconds: the time after the prefill.
        passes: how many passes the backbone ran after the prefill.
        row_seconds: the times at which rows ended, sorted.
        row_passes: these passes, counted once for each row in them.
        nodes: the tokens that they ran over in all rows.
        lengths: how many tokens each pass emitted; None for a batch, or if it cannot be told.
    """

    texts: list[list[int]]
    seconds: float
    passes: int
    row_seconds: list[float]
    row_passes: int
    nodes: int
    lengths: list[int] | None = None

    @property
    def timing(self) -> Timing:
        """Tokens, passes and seconds after the prefill."""
        # Transformers' speculation may emit several tokens in the prefill; anything else emits one
        first = sum(len(text) - 1 for text in self.texts)
        tokens = first if self.lengths is None else sum(self.lengths)
        return Timing(tokens, self.passes, self.seconds)


@dataclass
class Measured:
    """The runs of one method with one kind of prompts, batch size and mode.

    Args:
        method: the way of decoding.
        kind, batch_size, mode: of the prompts and calls.
        runs: for each batch, one run per round.
        plain: the runs of plain decoding, in the same order.
        divergences: the first difference from the plain text, of each row that has one.
        num_compared, num_equal: how many rows were compared with the plain text, and how many equal it.
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
        """How many differences are errors; methods of Transformers promise no equal texts here."""
        return sum(d.is_error for d in self.divergences) if self.method.is_ours else 0


def make_batches(
    prompts: Mapping[str, Sequence[list[int]]], size: int, pad_id: int, device: torch.device
) -> list[Batch]:
    """Group prompts of one kind, `size` at a time; the last batch is filled with earlier prompts.

    Args:
        prompts: token ids, by kind.
        size: `B`.
        pad_id: pads shorter prompts on the left.
        device: where the batches go.
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
    # The dict holds a batch's cache as well, which costs passes after the last one that emits tokens
    returns_dict = batch.size == 1
    with PassClock(method.model.backbone) as clock:
        output: Any = method.model.generate(
            batch.input_ids,
            attention_mask=batch.attention_mask,
            return_dict_in_generate=returns_dict,
            **{**options, **method.options},
        )
    sequences = output.sequences if returns_dict else output
    texts = [
        _up_to_end(row, _end_ids(method.model, options))
        for row in sequences[:, batch.input_ids.shape[1] :].tolist()
    ]
    lengths = _lengths(output, clock, batch, texts) if returns_dict else None
    passes = clock.passes if lengths is None else len(lengths)
    return Run(
        texts,
        clock.seconds_after(passes),
        passes,
        _row_seconds(clock, texts),
        row_passes=sum(clock.rows[:passes]),
        nodes=sum(map(operator.mul, clock.rows[:passes], clock.nodes[:passes])),
        lengths=lengths,
    )


def _lengths(
    output: Any, clock: PassClock, batch: Batch, texts: Sequence[list[int]]
) -> list[int] | None:
    """Return how many tokens each pass emitted, for a batch of one prompt."""
    of_rows = getattr(output, "acceptance_lengths", None)  # the heads' only
    if of_rows is not None:
        return list(of_rows[0])
    return clock.emitted_by_passes(batch.input_ids.shape[1] + len(texts[0]))


def _end_ids(model: LMTPForCausalLM, options: Mapping[str, Any]) -> set[int]:
    ends = options.get("eos_token_id", model.generation_config.eos_token_id)
    if ends is None:
        return set()
    return {ends} if isinstance(ends, int) else set(ends)


def _up_to_end(tokens: list[int], end_ids: set[int]) -> list[int]:
    end = next((place for place, token in enumerate(tokens) if token in end_ids), len(tokens))
    return tokens[: end + 1]


def _row_seconds(clock: PassClock, texts: Sequence[list[int]]) -> list[float]:
    """Return when rows ended: L-MTP drops them from the batch; in plain decoding count their tokens."""
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
    mode: Mode,
    *,
    max_new_tokens: int,
    rounds: int = 3,
    seed: int = 0,
    stop_at_end: bool = True,
    progress: bool = True,
) -> list[Measured]:
    """Let all methods take turns, batch by batch and round by round.

    Args:
        methods: plain decoding first.
        batches: all of one size.
        mode: greedy search or sampling.
        max_new_tokens, seed: of every call.
        rounds: how often each method decodes each batch.
        stop_at_end: stop at the model's end token; otherwise always generate `max_new_tokens`.
        progress: show a progress bar.

    Returns:
        One entry per kind and method, plain decoding included.
    """
    size = batches[0].size
    methods = [method for method in methods if size == 1 or method.takes_batches]
    pad = pad_id(methods[0].model)  # `generate` feeds it to rows that have ended
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "pad_token_id": pad}
    options |= SAMPLING if mode == "sampling" else {"do_sample": False}
    if not stop_at_end:
        options["eos_token_id"] = None
    for method in methods:
        run(method, batches[0], seed, {**options, "max_new_tokens": WARMUP_TOKENS})
    runs: list[list[list[Run]]] = [[[] for _ in batches] for _ in methods]
    bar = tqdm(total=rounds * len(batches), desc=f"{mode}, batch {size}", disable=not progress)
    for turn in range(rounds):
        for place, batch in enumerate(batches):
            first = (turn + place) % len(methods)  # so that no method always follows the same one
            for number in [*range(first, len(methods)), *range(first)]:
                runs[number][place].append(run(methods[number], batch, seed + place, options))
            bar.update()
    bar.close()
    measured = _by_kind(methods, batches, runs, mode)
    if mode == "greedy" or size == 1:  # sampled rows of a batch are equal in distribution only
        _compare_texts(measured, batches, is_sampled=mode == "sampling")
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
        for method, method_runs in zip(methods, runs, strict=True):
            result = Measured(method, kind, batches[0].size, mode)
            result.runs = [method_runs[place] for place in places]
            result.plain = [runs[0][place] for place in places]
            measured.append(result)
    return measured


def _compare_texts(
    measured: Sequence[Measured], batches: Sequence[Batch], is_sampled: bool
) -> None:
    """Compare the texts with plain decoding's, and judge where they part: once for all methods."""
    for kind in dict.fromkeys(result.kind for result in measured):
        of_kind = [result for result in measured if result.kind == kind]
        for place, batch in enumerate(batch for batch in batches if batch.kind == kind):
            for row in range(batch.size):
                prompt = batch.input_ids[row, batch.attention_mask[row].bool()][None]
                _compare_row(of_kind, place, row, prompt, is_sampled)


def _compare_row(
    measured: Sequence[Measured], place: int, row: int, prompt: torch.Tensor, is_sampled: bool
) -> None:
    """Compare what several methods made of one prompt `(1, L)`, a row of a batch, in the first round."""
    plain = measured[0].plain[place][0].texts[row]
    parted: dict[int, list[Measured]] = {}
    for result in measured:
        text = result.runs[place][0].texts[row]
        result.num_compared += 1
        result.num_equal += text == plain
        if text != plain:
            parted.setdefault(first_difference(plain, text), []).append(result)
    model = measured[0].method.model  # all methods share its backbone
    for position, results in parted.items():
        known = torch.cat([prompt, prompt.new_tensor([plain[:position]])], dim=-1)
        judged = judge(model, known, position, is_sampled)
        for result in results:
            result.divergences.append(judged)
