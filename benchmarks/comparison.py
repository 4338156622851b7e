"""Plain and L-MTP generation side by side: is the text the same, and how much sooner is it there?

The figures, in one vocabulary: *tokens per step* τ is tokens emitted by a backbone pass after the
prefill, the bonus token included (plain decoding: 1). *Step cost* is the time of a
drafting-and-verifying step over that of a plain step. *Speed-up* is τ / step cost.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.generation.streamers import BaseStreamer

from modeling_lmtp.modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.settings_lmtp import STRICT

from .divergence import Divergence, divergences, judge


class TokenClock(BaseStreamer):
    """A streamer that notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Note the time; the first call brings the prompt."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing: the last token has been noted."""

    @property
    def decoding_seconds(self) -> float:
        """Seconds from the first new token, which the prefill gives, to the last."""
        return self.times[-1] - self.times[1]


@dataclass(frozen=True)
class Pair:
    """One prompt, generated both ways.

    Args:
        plain_ids, lmtp_ids: the new tokens.
        plain_seconds, lmtp_seconds: decoding time, the prefill left out.
        steps: L-MTP's backbone passes after the prefill.
        divergences: where the texts part. In greedy decoding, all tokens decided differently along
            the plain text; in sampling, the first.
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
    def tokens_per_step(self) -> float:
        """Tokens emitted per backbone pass after the prefill, τ."""
        return (len(self.lmtp_ids) - 1) / max(1, self.steps)

    @property
    def step_cost(self) -> float:
        """The time of an L-MTP step over that of a plain step."""
        plain_step = self.plain_seconds / max(1, len(self.plain_ids) - 1)
        return self.lmtp_seconds / max(1, self.steps) / plain_step if plain_step else float("nan")

    @property
    def speed_up(self) -> float:
        """Tokens per second over plain decoding's, τ / step cost."""
        return self.tokens_per_step / self.step_cost


@dataclass(frozen=True)
class Comparison:
    """Pairs over several prompts, and their medians."""

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
        """Return the median over prompts of a property of `Pair`."""
        return statistics.median(getattr(pair, name) for pair in self.pairs)

    def summary(self) -> dict[str, Any]:
        """Return the comparison as JSON-serialisable figures."""
        figures = ("tokens_per_step", "step_cost", "speed_up")
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
                    "min": round(min(getattr(pair, name) for pair in self.pairs), 3),
                    "max": round(max(getattr(pair, name) for pair in self.pairs), 3),
                }
                for name in figures
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
        ways: by name, `draft_tree` or `draft_length`; `{}` is the checkpoint's own setting.
        seed: set before each generation, for sampling.
        progress, description: a progress bar and its label.
        options: for all ways, such as `max_new_tokens` and `do_sample`.

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
    """All of them where the text is the model's own; a sampled one cannot be taken up again midway."""
    options = {name: value for name, value in options.items() if name != "max_new_tokens"}
    if not options.get("do_sample"):
        return divergences(model, prompt, pair.plain_ids, pair.lmtp_ids, **options)
    agree = [a == b for a, b in zip(pair.plain_ids, pair.lmtp_ids, strict=False)]
    position = agree.index(False) if False in agree else len(agree)
    known = torch.cat([prompt, prompt.new_tensor([pair.plain_ids[:position]])], dim=-1)
    return [judge(model, known, position, is_sampled=True)]


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
