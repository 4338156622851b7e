"""Tokens per step, step cost and speed-up: the figures of every measurement, computed here alone.

*Tokens per step* τ is the number of tokens that a backbone pass after the prefill emits, the bonus token
included, over that of plain decoding; for a single prompt plain decoding emits 1. *Step cost* is the time
of a step with drafting and verification over that of a plain step. *Speed-up* is τ / step cost.
"""

from collections.abc import Iterable
from dataclasses import dataclass

FIGURES = ("tokens_per_step", "step_cost", "speed_up")


@dataclass(frozen=True)
class Timing:
    """What a call of `generate` did after the prefill, which emits the first token of each row.

    Args:
        tokens: how many tokens it emitted.
        steps: how many passes the backbone ran.
        seconds: how long it took.
    """

    tokens: int
    steps: int
    seconds: float

    @classmethod
    def total(cls, timings: Iterable["Timing"]) -> "Timing":
        """Add up several calls."""
        every = list(timings)
        return cls(
            sum(timing.tokens for timing in every),
            sum(timing.steps for timing in every),
            sum(timing.seconds for timing in every),
        )

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a pass emits, over all rows; 0 if there was no pass."""
        return self.tokens / max(1, self.steps)

    @property
    def seconds_per_step(self) -> float:
        """Seconds from the start of a pass to the start of the next."""
        return self.seconds / max(1, self.steps)

    @property
    def tokens_per_second(self) -> float:
        """Tokens emitted per second; NaN if no time passed, as for an answer of one token."""
        return self.tokens / self.seconds if self.seconds else float("nan")


@dataclass(frozen=True)
class Speed:
    """How one way of decoding compares with plain decoding of the same prompts.

    Args:
        tokens_per_step: τ.
        step_cost: the time of its step over that of a plain step.
    """

    tokens_per_step: float
    step_cost: float

    @classmethod
    def over(cls, timing: Timing, plain: Timing) -> "Speed":
        """Compare a call with the plain call; the step cost is NaN if the plain one took no time."""
        plain_seconds = plain.seconds_per_step
        return cls(
            # A plain answer of one token has no step; the other's tokens count as they are
            timing.tokens_per_step / (plain.tokens_per_step or 1.0),
            timing.seconds_per_step / plain_seconds if plain_seconds else float("nan"),
        )

    @property
    def speed_up(self) -> float:
        """Tokens per second over those of plain decoding."""
        return self.tokens_per_step / self.step_cost
