"""Generates from prompts plainly and with L-MTP, in turns, and compares texts and speed."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.generation.streamers import BaseStreamer

from modeling_lmtp.conversion.batch_generation import pad_id
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.settings_lmtp import STRICT

from .bench_methods import Method, plain_method
from .bench_runner import Batch, Run, make_batches, run
from .divergence import Divergence, divergences, first_divergence
from .figures import FIGURES, Speed, Timing


class TokenClock(BaseStreamer):
    """A streamer that records when each token arrives."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Record the time; the first call passes the prompt."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing: the last token is recorded already."""

    @property
    def decoding_seconds(self) -> float:
        """Seconds from the first new token, which the prefill emits, to the last."""
        return self.times[-1] - self.times[1]


@dataclass(frozen=True)
class Pair:
    """One prompt, generated both ways.

    Args:
        plain_ids, lmtp_ids: the new tokens.
        plain_seconds, lmtp_seconds: the time after the prefill.
        steps: L-MTP's backbone passes after the prefill.
        divergences: where the texts differ. In greedy decoding, all tokens decided differently along the
            plain text; in sampling, the first.
    """

    plain_ids: list[int]
    lmtp_ids: list[int]
    plain_seconds: float
    lmtp_seconds: float
    steps: int
    divergences: list[Divergence]

    @property
    def is_equal(self) -> bool:
        """Whether both ways gave the same tokens."""
        return self.plain_ids == self.lmtp_ids

    @property
    def speed(self) -> Speed:
        """L-MTP's speed over plain decoding's; the prefill emits the first token of both."""
        plain_steps = len(self.plain_ids) - 1
        return Speed.over(
            Timing(len(self.lmtp_ids) - 1, self.steps, self.lmtp_seconds),
            Timing(plain_steps, plain_steps, self.plain_seconds),
        )


@dataclass(frozen=True)
class Comparison:
    """The pairs of several prompts, and their medians."""

    pairs: list[Pair]

    @property
    def num_equal(self) -> int:
        """How many prompts gave the same tokens both ways."""
        return sum(pair.is_equal for pair in self.pairs)

    @property
    def divergences(self) -> list[Divergence]:
        """All tokens decided differently."""
        return [divergence for pair in self.pairs for divergence in pair.divergences]

    @property
    def num_errors(self) -> int:
        """How many of them rounding does not explain."""
        return sum(divergence.is_error for divergence in self.divergences)

    def median(self, name: str) -> float:
        """Return the median over prompts of one of `FIGURES`."""
        return statistics.median(self._values(name))

    def _values(self, name: str) -> list[float]:
        return [getattr(pair.speed, name) for pair in self.pairs]

    def summary(self) -> dict[str, Any]:
        """Return the comparison as JSON-serialisable figures."""
        num_tokens = sum(len(pair.plain_ids) for pair in self.pairs)
        return {
            "prompts": len(self.pairs),
            "new_tokens": num_tokens,
            "equal": self.num_equal,
            "share_of_tokens_differing": len(self.divergences) / num_tokens,
            "differences": [
                {**asdict(divergence), "is_error": divergence.is_error}
                for divergence in self.divergences
            ],
            **{
                name: {
                    "median": round(self.median(name), 3),
                    "min": round(min(self._values(name)), 3),
                    "max": round(max(self._values(name)), 3),
                }
                for name in FIGURES
            },
        }


def compare(
    model: LMTPForCausalLM,
    prompts: Sequence[torch.Tensor],
    ways: dict[str, dict[str, Any]],
    *,
    seed: int | None = None,
    progress: bool = True,
    description: str = "generate both ways",
    **options: Any,
) -> dict[str, Comparison]:
    """Generate from each prompt plainly and then in each L-MTP way, prompt by prompt.

    Args:
        model: the model, in evaluation mode.
        prompts: token ids, each `(1, L)`.
        ways: by name, the draft's options such as `draft_length`; `{}` takes the checkpoint's settings.
        seed: set before each generation, for sampling.
        progress, description: whether to show a progress bar, and its label.
        options: passed to every call, such as `max_new_tokens` and `do_sample`.

    Returns:
        Each way's comparison with plain generation.
    """
    pairs: dict[str, list[Pair]] = {name: [] for name in ways}
    for input_ids in tqdm(prompts, desc=description, unit="prompt", disable=not progress):
        plain = _generate(model, input_ids, seed, {**options, "use_lmtp": False})
        for name, way in ways.items():
            lmtp = _generate(model, input_ids, seed, {**options, "use_lmtp": STRICT, **way})
            pair = _pair(input_ids.shape[1], plain, lmtp)
            if not pair.is_equal:
                found = _divergences(model, input_ids, pair, {**options, **way})
                pair = replace(pair, divergences=found)
            pairs[name].append(pair)
    return {name: Comparison(found) for name, found in pairs.items()}


def compare_batches(
    model: LMTPForCausalLM,
    prompts: Sequence[torch.Tensor],
    batch_size: int,
    ways: dict[str, dict[str, Any]],
    *,
    max_new_tokens: int,
    progress: bool = True,
) -> dict[str, Comparison]:
    """Generate greedily from several prompts at a time, plainly and then in each L-MTP way.

    Both ways get the same padded batch. A pair has the times of its whole batch. Of texts that differ, only
    the first difference is judged.

    Args:
        model, prompts, ways, progress: see `compare`.
        batch_size: how many prompts are decoded together; the last batch repeats the first prompts.
        max_new_tokens: how many tokens to generate per prompt, past any end token.
    """
    pad = pad_id(model)
    rows = {"": [input_ids[0].tolist() for input_ids in prompts]}
    batches = make_batches(rows, batch_size, pad, model.device)
    options = {"max_new_tokens": max_new_tokens, "pad_token_id": pad, "eos_token_id": None}
    options["do_sample"] = False
    methods = [Method(name, model, {"use_lmtp": STRICT, **way}) for name, way in ways.items()]
    pairs: dict[str, list[Pair]] = {name: [] for name in ways}
    for batch in tqdm(batches, desc=f"batches of {batch_size}", disable=not progress):
        plain = run(plain_method(model), batch, 0, options)
        for method in methods:
            lmtp = run(method, batch, 0, options)
            pairs[method.name] += [
                _pair_of_row(model, batch, row, plain, lmtp) for row in range(batch.size)
            ]
    return {name: Comparison(found) for name, found in pairs.items()}


def _pair_of_row(model: LMTPForCausalLM, batch: Batch, row: int, plain: Run, lmtp: Run) -> Pair:
    plain_ids, lmtp_ids = plain.texts[row], lmtp.texts[row]
    found = []
    if plain_ids != lmtp_ids:
        prompt = batch.input_ids[row, batch.attention_mask[row].bool()][None]
        found = [first_divergence(model, prompt, plain_ids, lmtp_ids)]
    return Pair(plain_ids, lmtp_ids, plain.seconds, lmtp.seconds, lmtp.passes, found)


def _pair(prompt_length: int, plain: tuple[Any, TokenClock], lmtp: tuple[Any, TokenClock]) -> Pair:
    (plain_output, plain_clock), (lmtp_output, lmtp_clock) = plain, lmtp
    return Pair(
        plain_ids=plain_output.sequences[0, prompt_length:].tolist(),
        lmtp_ids=lmtp_output.sequences[0, prompt_length:].tolist(),
        plain_seconds=plain_clock.decoding_seconds,
        lmtp_seconds=lmtp_clock.decoding_seconds,
        steps=len(lmtp_output.acceptance_lengths[0]),
        divergences=[],
    )


def _divergences(
    model: LMTPForCausalLM, prompt: torch.Tensor, pair: Pair, options: dict[str, Any]
) -> list[Divergence]:
    """Return all divergences of a greedy text, or the first of a sampled one, which cannot be resumed."""
    if options.get("do_sample"):
        return [first_divergence(model, prompt, pair.plain_ids, pair.lmtp_ids, is_sampled=True)]
    options = {name: value for name, value in options.items() if name != "max_new_tokens"}
    return divergences(model, prompt, pair.plain_ids, pair.lmtp_ids, **options)


def _generate(
    model: LMTPForCausalLM, input_ids: torch.Tensor, seed: int | None, options: dict[str, Any]
) -> tuple[Any, TokenClock]:
    if seed is not None:
        torch.manual_seed(seed)
    clock = TokenClock()
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        streamer=clock,
        return_dict_in_generate=True,
        **options,
    )
    return output, clock
