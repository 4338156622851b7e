"""Standard errors by resampling the answers that a figure was measured on (bootstrap).

The tokens of one answer depend on each other, so answers are drawn and not tokens.

Shapes: `N` answers, `R` resamples, `…` any trailing dimensions.
"""

from dataclasses import dataclass

import torch

NUM_RESAMPLES = 500


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


def resample(num_answers: int, seed: int = 0) -> torch.Tensor:
    """Return `(R, N)` counts: how often each resample contains each answer."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(num_answers, (NUM_RESAMPLES, num_answers), generator=generator)
    return torch.zeros(NUM_RESAMPLES, num_answers, dtype=torch.float64).scatter_add_(
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
    return sums / torch.tensordot(resamples, counts.double(), dims=1).clamp(min=1)


def standard_error(values: torch.Tensor, num_answers: int) -> float | None:
    """Return the standard deviation of resampled values `(R,)`; None if there was one answer."""
    return values.std().item() if num_answers > 1 else None


def ratio(totals: torch.Tensor, counts: torch.Tensor, seed: int = 0) -> Estimate:
    """Return `Σ totals / Σ counts` of `(N,)` answers with its standard error."""
    num_answers = len(totals)
    value = (totals.double().sum() / counts.double().sum().clamp(min=1)).item()
    resampled = resampled_ratios(totals, counts, resample(num_answers, seed))
    return Estimate(value, standard_error(resampled, num_answers))
