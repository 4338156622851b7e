"""Standard errors and intervals by resampling the answers that a figure was measured on (bootstrap).

The tokens of one answer depend on each other, so answers are drawn and not tokens.

Shapes: `N` answers, `R` resamples, `…` any trailing dimensions.
"""

from dataclasses import dataclass

import torch

NUM_RESAMPLES = 500  # enough for standard errors
CONFIDENCE = 0.95  # of intervals


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error, which is None if there was only one answer."""

    value: float
    standard_error: float | None

    def __str__(self) -> str:
        """Return the figure with its error, to two decimals."""
        if self.standard_error is None:
            return f"{self.value:.2f}"
        return f"{self.value:.2f} ± {self.standard_error:.2f}"


def resample(num_answers: int, seed: int = 0, num_resamples: int = NUM_RESAMPLES) -> torch.Tensor:
    """Return `(R, N)` counts: how often each resample contains each answer."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(num_answers, (num_resamples, num_answers), generator=generator)
    return torch.zeros(num_resamples, num_answers, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones_like(drawn, dtype=torch.float64)
    )


def resampled_ratios(
    totals: torch.Tensor, counts: torch.Tensor, resamples: torch.Tensor
) -> torch.Tensor:
    """Return `Σ totals / Σ counts` of each resample, 0 if its counts are 0.

    Args:
        totals, counts: `(N, …)`, for each answer.
        resamples: `(R, N)`.

    Returns:
        `(R, …)`, float64.
    """
    sums = torch.tensordot(resamples, totals.double(), dims=1)
    counted = torch.tensordot(resamples, counts.double(), dims=1)
    return torch.where(counted == 0, 0.0, sums / counted)  # counts may be fractions: seconds


def standard_error(values: torch.Tensor, num_answers: int) -> float | None:
    """Return the standard deviation of resampled values `(R,)`; None if there was one answer."""
    return values.std().item() if num_answers > 1 else None


def interval(values: torch.Tensor, num_answers: int) -> tuple[float, float] | None:
    """Return the percentile interval of resampled values `(R,)`, at the confidence of `CONFIDENCE`.

    Resamples in which the figure is not defined (NaN) do not count. None if there was one answer, or the
    figure is defined in no resample.
    """
    tails = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=values.dtype)
    lower, upper = torch.nanquantile(values, tails).tolist()
    return (lower, upper) if num_answers > 1 and lower == lower else None


def ratio(totals: torch.Tensor, counts: torch.Tensor, seed: int = 0) -> Estimate:
    """Return `Σ totals / Σ counts` of `(N,)` answers with its standard error."""
    num_answers = len(totals)
    value = (totals.double().sum() / counts.double().sum().clamp(min=1)).item()
    resampled = resampled_ratios(totals, counts, resample(num_answers, seed))
    return Estimate(value, standard_error(resampled, num_answers))
