"""Figures of a method over many prompts: ratios of totals, each with its 95 % interval over prompts.

Prompts are resampled with replacement (bootstrap, see `resampling`), a method and plain decoding together.
Batches are resampled as a whole, since their rows share their passes.

Shapes: `N` prompts or batches, `R` resamples, `D` positions.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from .bench_runner import Run
from .figures import Timing
from .resampling import interval, resample, resampled_ratios

NUM_RESAMPLES = 2000  # the tails of a distribution need more of them than its standard deviation
Runs = Sequence[Sequence[Run]]  # for each batch, one run per round
Figure = tuple[float | None, list[float] | None]  # with its interval


def totals(runs: Runs, plain: Runs) -> dict[str, Any]:
    """Return the figures of a method, and the interval of each as `NAME_interval`, JSON-serialisable.

    - `acceptance_length`: tokens that a pass emits per row, the bonus token included; 1 for plain decoding,
      less for rows of a batch that have ended.
    - `conditional_acceptance`: for d = 1, 2, …, the share of passes that accepted d candidates or more
      among those that accepted d − 1 or more, as SPEED-Bench defines it. A pass that drafted fewer than d
      has not accepted d. None if it is not known what each pass emitted.
    - `nodes_per_step`: tokens that a pass runs over per row, the last known token included.
    - `tokens_per_second`, and `speed_up_of_totals`: tokens per second over plain decoding's.

    A figure is None where there is nothing to measure: the prefill emits an answer of one token.
    """
    # The first weights are those of the prompts as they are
    resamples = resample(len(runs), num_resamples=NUM_RESAMPLES)
    weights = torch.cat([torch.ones_like(resamples[:1]), resamples])
    tokens, seconds = _timings(runs)
    passes, nodes = _sums(runs, "row_passes"), _sums(runs, "nodes")
    speed = resampled_ratios(tokens, seconds, weights)
    figures = {
        "acceptance_length": resampled_ratios(tokens, passes, weights),
        "nodes_per_step": resampled_ratios(nodes, passes, weights),
        "tokens_per_second": speed,
        "speed_up_of_totals": speed / resampled_ratios(*_timings(plain), weights),
    }
    found: dict[str, Any] = {}
    for name, values in figures.items():
        found[name], found[f"{name}_interval"] = _with_interval(values, len(runs))
    acceptance = _conditional_acceptance(runs, weights)
    found["conditional_acceptance"] = acceptance and [value for value, _ in acceptance]
    found["conditional_acceptance_interval"] = acceptance and [between for _, between in acceptance]
    return found


def _timings(runs: Runs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens and seconds of each batch after the prefill, two tensors `(N,)`."""
    timings = [Timing.total(run.timing for run in of_batch) for of_batch in runs]
    tokens = torch.tensor([timing.tokens for timing in timings])
    # An answer of one token takes no measurable time, but not exactly none
    seconds = [timing.seconds if timing.tokens else 0.0 for timing in timings]
    return tokens, torch.tensor(seconds, dtype=torch.float64)


def _sums(runs: Runs, name: str) -> torch.Tensor:
    return torch.tensor([sum(getattr(run, name) for run in of_batch) for of_batch in runs])


def _with_interval(values: torch.Tensor, num_batches: int) -> Figure:
    """Return a figure, the first of `(1 + R,)`, and its interval from the others."""
    values = torch.where(values.isfinite(), values, torch.nan)
    value = values[0].item()
    if not value > 0:
        return None, None
    between = interval(values[1:], num_batches)
    return round(value, 4), between and [round(end, 4) for end in between]


def _conditional_acceptance(runs: Runs, weights: torch.Tensor) -> list[Figure] | None:
    """Return the share of each position with its interval."""
    if any(run.lengths is None for of_batch in runs for run in of_batch):
        return None
    counts = [Counter(n for run in of_batch for n in run.lengths or ()) for of_batch in runs]
    deepest = max((n for of_batch in counts for n in of_batch), default=1)
    # (N, 1 + D): how many passes accepted d candidates or more, d = 0 … D
    accepted = torch.tensor(
        [
            [sum(count for n, count in of_batch.items() if n > depth) for depth in range(deepest)]
            for of_batch in counts
        ]
    )
    shares = resampled_ratios(accepted[:, 1:], accepted[:, :-1], weights)
    shares[weights @ accepted[:, :-1].double() == 0] = torch.nan  # nothing drawn got as far
    return [_with_interval(share, len(runs)) for share in shares.T]
