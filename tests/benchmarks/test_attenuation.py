"""The attenuation curve: its fit, and the tokens per step that it promises."""

import math

import pytest
import torch

from modeling_lmtp.benchmarks.attenuation import (
    break_even,
    expected_tokens_per_step,
    fit_attenuation,
    fit_gamma,
    leap_break_even,
    probability,
)
from modeling_lmtp.benchmarks.resampling import Estimate, ratio
from modeling_lmtp.leaps_lmtp import evenly_spaced_offsets

# (γ, MTP, L-MTP at leap 2), both with three heads
PROMISED = [
    (0.01, 3.90, 6.37),
    (0.05, 3.55, 4.65),
    (0.10, 3.19, 3.50),
    (0.15, 2.90, 2.85),
    (0.30, 2.31, 1.97),
]


@pytest.mark.parametrize(("gamma", "near", "far"), PROMISED)
def test_three_heads_promise_what_the_papers_sum_of_products_gives(gamma, near, far):
    assert expected_tokens_per_step((2, 3, 4), gamma) == pytest.approx(near, abs=0.005)
    assert expected_tokens_per_step((3, 5, 7), gamma) == pytest.approx(far, abs=0.005)


def test_a_schedule_promises_one_token_and_what_each_draft_adds():
    two, three, five = (math.exp(-0.2 * (offset - 1)) for offset in (2, 3, 5))
    expected = 1 + two + two * three + two * three * five + two * three * five * five
    assert expected_tokens_per_step((2, 3, 5), 0.2) == pytest.approx(expected)
    assert expected_tokens_per_step((), 0.2) == 1
    assert expected_tokens_per_step((3, 5, 7), 0) == 7


def test_leap_two_breaks_even_with_leap_one_at_three_heads():
    limit = leap_break_even(3)
    assert limit == pytest.approx(0.139, abs=0.0005)
    near, far = evenly_spaced_offsets(3, 1), evenly_spaced_offsets(3, 2)
    promised = expected_tokens_per_step(near, limit), expected_tokens_per_step(far, limit)
    assert promised[0] == pytest.approx(promised[1], abs=1e-6)
    assert leap_break_even(5) < limit < leap_break_even(2), "γ = O(1/n²)"


def test_a_schedule_that_only_adds_drafts_breaks_even_never():
    assert break_even((2, 3, 4), (2, 3, 4, 5)) is None


@pytest.mark.parametrize("planted", [0.0, 0.03, 0.139, 0.7, 4.0])
def test_the_fit_finds_a_planted_gamma(planted):
    distances = [1, 2, 3, 5, 7]
    values = torch.tensor([[probability(planted, distance) for distance in distances]])
    assert fit_gamma(distances, values).item() == pytest.approx(planted, abs=1e-6)


def test_the_fit_is_least_squares():
    distances, values = [2, 3, 4], torch.tensor([[0.6, 0.5, 0.2]])
    gamma = fit_gamma(distances, values).item()

    def error(candidate):
        curve = torch.tensor([probability(candidate, distance) for distance in distances])
        return (curve - values[0]).square().sum().item()

    assert error(gamma) < min(error(gamma - 1e-3), error(gamma + 1e-3))
    assert error(gamma) <= min(error(step / 100) for step in range(1000))


def test_gamma_comes_with_the_error_that_repeated_measurement_would_show():
    distances, planted, num_answers = [2, 3, 4], 0.3, 40
    curve = torch.tensor([probability(planted, distance) for distance in distances])
    counts = torch.full((num_answers, 3), 20.0)

    def measure(seed):
        generator = torch.Generator().manual_seed(seed)
        hits = torch.binomial(counts, curve.expand(num_answers, -1), generator=generator)
        return fit_attenuation(distances, hits, counts)

    fits = [measure(seed) for seed in range(25)]
    gammas = torch.tensor([fit.gamma for fit in fits])
    assert gammas.mean().item() == pytest.approx(planted, abs=0.01)
    errors = torch.tensor([fit.standard_error for fit in fits])
    assert errors.mean().item() == pytest.approx(gammas.std().item(), rel=0.4)


def test_one_answer_gives_a_gamma_without_an_error():
    fit = fit_attenuation([2, 3], torch.tensor([[5.0, 2.5]]), torch.tensor([[10.0, 10.0]]))
    assert fit.values == [0.5, 0.25]
    assert fit.gamma == pytest.approx(math.log(2))
    assert fit.rms_residual == pytest.approx(0, abs=1e-6)
    assert fit.standard_error is None


def test_an_estimate_is_a_ratio_of_sums_not_a_mean_of_ratios():
    estimate = ratio(torch.tensor([9.0, 1.0]), torch.tensor([3.0, 1.0]))
    assert estimate.value == 2.5
    assert 0 < estimate.standard_error < 2
    assert str(Estimate(2.5, 0.1234)) == "2.50 ± 0.12"
    assert str(Estimate(2.5, None)) == "2.50"


def test_what_cannot_be_computed_is_refused():
    with pytest.raises(ValueError, match=r"gamma must be 0 or more, got -0\.1"):
        expected_tokens_per_step((2, 3), -0.1)
    with pytest.raises(ValueError, match="gamma must be 0 or more, got nan"):
        expected_tokens_per_step((2, 3), float("nan"))
    with pytest.raises(ValueError, match="distances must include one greater than 1"):
        fit_gamma([1], torch.ones(1, 1))
    with pytest.raises(ValueError, match="num_leap_heads must be 1 or more, got 0"):
        leap_break_even(0)
