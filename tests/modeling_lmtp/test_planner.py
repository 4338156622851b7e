"""What planned drafts know: acceptance rates and the costs of passes."""

from __future__ import annotations

import random

import pytest

from modeling_lmtp.planner_lmtp import (
    KEPT_STEPS,
    LOST_SHARE,
    LOST_STEPS,
    MAX_RATE,
    MAX_REST,
    MEMORY,
    PASS_SIZES,
    PRIOR_TOKEN_COST,
    AcceptanceRates,
    Allowance,
    BatchMemory,
    DraftPlanner,
    HeadUse,
    PassCosts,
    TextRates,
)

# Acceptance rates


def test_a_rate_starts_at_the_probability_that_is_stated():
    rates = AcceptanceRates()
    for probability in (0.01, 0.3, 0.7, 0.97):
        assert rates.rate("head", probability) == pytest.approx(probability)
    assert rates.rate("head", 1.0) == MAX_RATE


@pytest.mark.parametrize(("stated", "real"), [(0.9, 0.3), (0.1, 0.6), (0.5, 0.0), (0.4, 1.0)])
def test_a_rate_becomes_what_is_observed(stated, real):
    rates, generator = AcceptanceRates(), random.Random(0)
    for _ in range(2 * MEMORY):
        rates.observe("head", stated, generator.random() < real)
    assert rates.rate("head", stated) == pytest.approx(min(real, MAX_RATE), abs=0.07)


def test_rates_are_counted_by_source_and_bucket():
    rates = AcceptanceRates()
    for _ in range(50):
        rates.observe("head", 0.7, is_right=False)
    assert rates.rate("head", 0.72) < 0.2  # the same bucket
    assert rates.rate("head", 0.3) == pytest.approx(0.3)
    assert rates.rate("lookup", 0.7) == pytest.approx(0.7)


def test_what_is_long_past_is_forgotten():
    rates = AcceptanceRates()
    for is_right, count in ((True, 3000), (False, 3 * MEMORY)):
        for _ in range(count):
            rates.observe("head", 0.5, is_right)
    assert rates.rate("head", 0.5) < 0.1


@pytest.mark.parametrize("real", [0.0, 0.2, 0.5, 0.9])
def test_a_text_has_rates_of_its_own(real):
    rates, generator = AcceptanceRates(), random.Random(1)
    for _ in range(MEMORY):
        rates.observe("lookup", 0.8, generator.random() < 0.8)
    text, other = TextRates(rates), TextRates(rates)
    assert text.rate("lookup", 0.8) == rates.rate("lookup", 0.8)
    for _ in range(60):
        text.observe("lookup", 0.8, generator.random() < real)
    assert text.rate("lookup", 0.8) == pytest.approx(real, abs=0.12)
    assert other.rate("lookup", 0.8) > 0.5
    assert text.rate("head", 0.8) == pytest.approx(0.8)


def test_what_a_text_shows_of_a_source_holds_for_all_probabilities_that_it_states():
    text = TextRates(AcceptanceRates())
    for _ in range(8):
        text.observe("lookup", 0.9, is_right=False)
    assert text.rate("lookup", 0.5) < 0.25
    better = TextRates(AcceptanceRates())
    for _ in range(30):
        better.observe("lookup", 0.5, is_right=True)
    assert 0.9 > better.rate("lookup", 0.7) > 0.8


def rates_of_wrong_copies(num_texts: int, num_copies: int) -> AcceptanceRates:
    """Return the rates after texts in each of which that many copies were wrong."""
    rates = AcceptanceRates()
    for _ in range(num_texts):
        text = TextRates(rates)
        for _ in range(num_copies):
            text.observe("lookup", 0.8, is_right=False)
    return rates


def test_one_long_text_hardly_changes_what_is_expected_of_others():
    rates = rates_of_wrong_copies(num_texts=20, num_copies=4)
    quoting = TextRates(rates)
    for _ in range(300):
        quoting.observe("lookup", 0.8, is_right=True)
    assert quoting.rate("lookup", 0.8) > 0.9
    # As if it had 8 (1 + log(300 / 8)) = 37 candidates, of all that count
    assert rates.rate("lookup", 0.8) < 0.45


def test_short_texts_count_in_full():
    assert rates_of_wrong_copies(num_texts=30, num_copies=8).rate("lookup", 0.8) < 0.05


# Costs of passes


def fed(costs: PassCosts, seconds, sizes, rounds: int = 12) -> PassCosts:
    for _ in range(rounds):
        for size in sizes:
            costs.observe(size, seconds(size))
    return costs


CURVES = {
    "flat": lambda size: 0.03,
    "linear": lambda size: 0.04 + 0.001 * size,
    "steep": lambda size: 0.01 * size,
    "a jump": lambda size: 0.02 if size == 1 else 0.05,
}


@pytest.mark.parametrize("seconds", CURVES.values(), ids=CURVES.keys())
def test_costs_become_those_of_the_device(seconds):
    costs = fed(PassCosts(), seconds, PASS_SIZES)
    for size in PASS_SIZES:
        assert costs.cost(size) == pytest.approx(seconds(size) / seconds(1), rel=0.05)
    assert costs.seconds == pytest.approx(seconds(1), rel=0.1)


def test_before_any_pass_each_token_costs_a_little():
    costs = PassCosts()
    assert costs.seconds is None
    assert costs.cost(1) == 1
    assert costs.cost(8) == pytest.approx(1 + 7 * PRIOR_TOKEN_COST)
    assert PassCosts(8).cost(8) > costs.cost(8)


@pytest.mark.parametrize("seconds", [CURVES["flat"], CURVES["steep"]], ids=["flat", "steep"])
def test_a_size_that_was_not_tried_is_predicted_from_those_that_were(seconds):
    costs = fed(PassCosts(), seconds, (1, 4, 8))
    real = seconds(16) / seconds(1)
    prior = PassCosts().cost(16)
    assert abs(costs.cost(16) - real) < abs(prior - real) / 3 + 0.05


def test_sizes_between_those_that_are_planned_cost_as_the_next_larger():
    costs = fed(PassCosts(), CURVES["linear"], PASS_SIZES)
    assert costs.cost(9) == costs.cost(12)
    assert costs.cost(64) == costs.cost(70)


def test_a_growing_context_is_no_cost_of_the_sizes_at_hand():
    costs = PassCosts()
    for step in range(400):
        size = 1 if step < 20 else 8
        costs.observe(size, (1.2 if size == 8 else 1.0) * (0.04 + 0.00004 * step))
    assert costs.cost(8) == pytest.approx(1.2, rel=0.05)


def test_what_drafts_cost_is_found_out_although_they_come_one_after_another():
    """The level must not take over what their size costs: plain passes show it again and again."""
    costs = fed(PassCosts(), lambda size: 0.04, (1, 3))  # the size was cheap at first
    for _ in range(12):
        for size in [1] * 5 + [3] * 10:
            costs.observe(size, 0.04 * (1.3 if size == 3 else 1))
    assert costs.cost(3) == pytest.approx(1.3, rel=0.04)


@pytest.mark.parametrize("seed", range(4))
def test_costs_are_known_on_a_machine_whose_speed_drifts(seed):
    generator, costs, drift = random.Random(seed), PassCosts(), 1.0
    for _ in range(600):
        size = generator.choice((1, 1, 1, 3, 8))
        drift *= generator.lognormvariate(0, 0.01)
        costs.observe(size, 0.02 * (1 + size) * drift * generator.lognormvariate(0, 0.15))
    assert costs.cost(3) == pytest.approx(2, rel=0.12)
    assert costs.cost(8) == pytest.approx(4.5, rel=0.12)


def test_the_first_pass_of_a_size_may_be_slow():
    costs = fed(PassCosts(), CURVES["linear"], (1, 4))
    expected = costs.cost(8)
    costs.observe(8, 1.0)  # twenty times the usual
    assert costs.cost(8) == pytest.approx(expected, rel=0.05)


def test_noise_and_outliers_change_little():
    generator = random.Random(1)

    def noisy(size: int) -> float:
        slow = 5 if generator.random() < 0.1 else 1
        return (0.04 + 0.001 * size) * generator.uniform(0.93, 1.07) * slow

    costs = fed(PassCosts(), noisy, (1, 4, 16), 40)
    assert costs.cost(16) == pytest.approx(0.056 / 0.041, rel=0.1)


def test_the_least_that_a_further_token_costs():
    costs = fed(PassCosts(), CURVES["linear"], PASS_SIZES)
    assert costs.cost_per_token(31) == pytest.approx(0.001 / 0.041, rel=0.2)


# What is known of batches


def test_a_batch_is_as_fast_as_plain_decoding_at_least():
    memory = BatchMemory(3)
    assert memory.rate == 3
    for _ in range(100):
        memory.observe_step(4, 0.06, 0.0, num_tokens=3)
    assert memory.rate == 3


def test_the_rate_counts_what_drafting_takes():
    memory = BatchMemory(1)
    for size, tokens, drafting in [(1, 1, 0.0)] * 9 + [(4, 3, 0.02)] * 200:
        memory.observe_step(size, 0.04, drafting, tokens)
    assert memory.rate == pytest.approx(3 / 1.5, rel=0.02)


def test_plain_steps_are_measured_first_and_again_until_they_are_known():
    memory, plain = BatchMemory(1), []
    for step in range(1000):
        if memory.must_be_plain:
            plain.append(step)
        memory.observe_step(1 if memory.must_be_plain else 4, 0.04, 0.0, 1)
    assert plain[:3] == [0, 1, 2]
    assert 9 <= len(plain) <= 11
    assert plain[8] < 400


def test_an_allowance_covers_what_may_be_lost():
    allowance = Allowance()
    assert allowance.covers(1 + LOST_STEPS)
    assert not allowance.covers(1.1 + LOST_STEPS)
    allowance.observe(cost=1.5, num_tokens=4)  # of which 2.5 are gained
    assert allowance.covers(3.5 + LOST_STEPS)
    for _ in range(2):
        allowance.observe(cost=3.0, num_tokens=1)
    assert allowance.covers(1.5)
    assert not allowance.covers(2.6)
    allowance.observe(cost=1.6, num_tokens=1)
    assert not allowance.covers(1.2)
    for _ in range(10):
        allowance.observe(cost=1.0, num_tokens=1)
    assert allowance.covers(1 + 10 * LOST_SHARE)


def test_a_call_may_lose_some_of_what_earlier_ones_gained_and_owes_nothing_for_them():
    allowance = Allowance()
    allowance.observe(cost=2.0, num_tokens=30)
    allowance.begin_call()
    assert allowance.covers(1 + KEPT_STEPS)
    assert not allowance.covers(1.1 + KEPT_STEPS)
    allowance.observe(cost=40.0, num_tokens=1)
    assert not allowance.covers(1.0)
    allowance.begin_call()
    assert allowance.covers(1 + LOST_STEPS)
    assert not allowance.covers(1.1 + LOST_STEPS)


def test_heads_that_do_not_pay_are_asked_ever_more_seldom():
    use, asked = HeadUse(), []
    for step in range(1000):
        if use.begin_step():
            asked.append(step)
            use.observe(-0.1)
    assert asked[:4] == [0, 2, 6, 14]
    assert asked[-1] - asked[-2] == 1 + MAX_REST


def test_heads_that_pay_again_are_asked_in_every_step():
    use = HeadUse()
    for _ in range(5):
        use.observe(-0.1)
    assert not use.begin_step()
    use.observe(1.0)
    assert use.begin_step()


def test_heads_may_pay_only_where_copies_do_not():
    memory = BatchMemory(2)
    assert memory.head_use(0.1) is memory.head_use(0.5)
    assert memory.head_use(0.1) is not memory.head_use(8.0)


def test_batches_of_other_sizes_and_conditions_are_known_apart():
    planner = DraftPlanner()
    assert planner.batch(1, "cpu") is planner.batch(1, "cpu")
    assert planner.batch(1, "cpu") is not planner.batch(2, "cpu")
    assert planner.batch(1, "cpu") is not planner.batch(1, "cuda")
    assert planner.clock() <= planner.clock()
