"""Attenuation: how fast predictions lose certainty with distance, and which leap that favours.

The paper (arXiv 2505.17505) assumes `E[p(x_{t+d} | x_≤t)] = exp(-γ (d - 1))`: certainty falls at one
constant rate γ per position. Here γ is fitted to measurements, by least squares on the probabilities and
not on their logarithms: tokens per step are sums of products of probabilities, and logarithms would give
the most weight to the smallest and least certain ones.

Shapes: `N` answers, `D` distances, `R` sets of points.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from modeling_lmtp.leaps_lmtp import drafts, evenly_spaced_offsets

from .resampling import resample, resampled_ratios, standard_error

MAX_GAMMA = 10.0  # exp(-10) of the certainty remains at the next position
GRID = 201
REFINEMENTS = 5

# Common schedules, by name
SCHEDULES = {
    "MTP, 3 heads": (2, 3, 4),
    "L-MTP, 3 heads": (3, 5, 7),
    "2, 3, 5": (2, 3, 5),
    "2, 4, 6": (2, 4, 6),
    "MTP, 6 heads": (2, 3, 4, 5, 6, 7),
}


@dataclass(frozen=True)
class Attenuation:
    """A fitted attenuation curve.

    Args:
        gamma: γ.
        standard_error: of γ, from resampling the answers; None if there was only one.
        rms_residual: root mean square of the distances between curve and points.
        distances: `d` of the points.
        values: the probabilities of the points.
    """

    gamma: float
    standard_error: float | None
    rms_residual: float
    distances: list[int]
    values: list[float]


def fit_gamma(distances: Sequence[int], values: torch.Tensor) -> torch.Tensor:
    """Fit γ by least squares: minimise `Σ_d (value_d - exp(-γ (d - 1)))²`, `0 ≤ γ ≤ MAX_GAMMA`.

    Args:
        distances: `D` integers `d`; at `d = 1` the curve is 1 for every γ.
        values: `(R, D)` probabilities or accuracies.

    Returns:
        `(R,)`, float64, to 1e-9.

    Raises:
        ValueError: no distance is greater than 1.
    """
    if not any(distance > 1 for distance in distances):
        raise ValueError(
            f"distances must include one greater than 1, got {list(distances)}: at 1 the curve is 1 for "
            "every γ. Measure further ahead."
        )
    exponents = torch.tensor(distances, dtype=torch.float64) - 1
    lowest = torch.zeros(len(values), dtype=torch.float64)
    highest = torch.full_like(lowest, MAX_GAMMA)
    steps = torch.linspace(0, 1, GRID, dtype=torch.float64)
    for _ in range(REFINEMENTS):
        grid = lowest[:, None] + (highest - lowest)[:, None] * steps
        curves = torch.exp(-grid[..., None] * exponents)
        errors = ((curves - values.double()[:, None]) ** 2).sum(dim=-1)
        best = errors.argmin(dim=1, keepdim=True)
        lowest = grid.gather(1, (best - 1).clamp(min=0))[:, 0]
        highest = grid.gather(1, (best + 1).clamp(max=GRID - 1))[:, 0]
    return (lowest + highest) / 2


def fit_attenuation(
    distances: Sequence[int], totals: torch.Tensor, counts: torch.Tensor, seed: int = 0
) -> Attenuation:
    """Fit the curve to means over answers, and resample the answers for its standard error.

    Args:
        distances: `D` integers `d`.
        totals: `(N, D)`, the sum of the probabilities in each answer at each distance.
        counts: `(N, D)`, their numbers.
        seed: seed of the resampling.

    Raises:
        ValueError: no distance is greater than 1.
    """
    means = totals.double().sum(dim=0) / counts.double().sum(dim=0).clamp(min=1)
    gamma = fit_gamma(distances, means[None])[0].item()
    resampled = resampled_ratios(totals, counts, resample(len(totals), seed))
    residuals = means - torch.tensor([probability(gamma, distance) for distance in distances])
    return Attenuation(
        gamma=gamma,
        standard_error=standard_error(fit_gamma(distances, resampled), len(totals)),
        rms_residual=residuals.square().mean().sqrt().item(),
        distances=list(distances),
        values=means.tolist(),
    )


def probability(gamma: float, distance: float) -> float:
    """Return `exp(-γ (d - 1))`."""
    return math.exp(-gamma * (distance - 1))


def expected_tokens_per_step(offsets: Sequence[int], gamma: float) -> float:
    """Return the tokens per step of a chain of the paper's heads, if the curve holds.

    `1 + Σ_{A=1}^{horizon} Π_{a=1}^{A} exp(-γ (d_a - 1))`, `d_a` the offset of the head that serves
    draft distance `a` (arXiv 2505.17505; the 1 is the bonus token). Evenly spaced heads of leap `k`
    serve `k` distances each, all at the certainty of the furthest: that is the cost of leaping.

    Args:
        offsets: leap offsets; without any it is plain decoding, 1 token.
        gamma: γ ≥ 0.

    Raises:
        ValueError: γ is negative or NaN, or the offsets are invalid.
    """
    if not gamma >= 0:
        raise ValueError(f"gamma must be 0 or more, got {gamma}: certainty only falls.")
    accepted, expected = 1.0, 1.0
    for draft in drafts(offsets):
        accepted *= probability(gamma, offsets[draft.head])
        expected += accepted
    return expected


def break_even(near: Sequence[int], far: Sequence[int]) -> float | None:
    """Return the γ at which two schedules emit equally many tokens; below it the far one emits more.

    Args:
        near, far: leap offsets; `far` drafts more distances.

    Returns:
        γ to 1e-9; None if the same schedule is better for every γ.
    """

    def gain(gamma: float) -> float:
        return expected_tokens_per_step(far, gamma) - expected_tokens_per_step(near, gamma)

    lowest, highest = 0.0, 1.0
    if gain(lowest) <= 0 or gain(highest) >= 0:
        return None
    while highest - lowest > 1e-9:
        middle = (lowest + highest) / 2
        lowest, highest = (middle, highest) if gain(middle) > 0 else (lowest, middle)
    return (lowest + highest) / 2


def leap_break_even(num_leap_heads: int) -> float:
    """Return the γ below which leap 2 emits more tokens than leap 1, with `num_leap_heads` heads.

    Raises:
        ValueError: there are no heads.
    """
    near = evenly_spaced_offsets(num_leap_heads, 1)
    limit = break_even(near, evenly_spaced_offsets(num_leap_heads, 2))
    if limit is None:
        raise ValueError(f"num_leap_heads must be 1 or more, got {num_leap_heads}.")
    return limit
