"""Figures as ratios of totals: by hand, and their intervals against a naive bootstrap."""

import random
import statistics

import pytest
import torch
from bench_runs import batches, tiny_model
from scripts import load_script
from tiny import tiny_llama

from modeling_lmtp.benchmarks.bench_methods import Method, choose_methods, methods_to_compare
from modeling_lmtp.benchmarks.bench_report import ALL_KINDS, rows, tables
from modeling_lmtp.benchmarks.bench_runner import Measured, Run, measure
from modeling_lmtp.benchmarks.resampling import interval, resample, resampled_ratios
from modeling_lmtp.benchmarks.totals import totals
from modeling_lmtp.conversion.command_line import console

NEW_TOKENS = 12
FIGURES = ("acceptance_length", "nodes_per_step", "tokens_per_second", "speed_up_of_totals")


def run(lengths: list[int], seconds: float, num_nodes: int = 1) -> Run:
    """Return a call whose passes emitted so many tokens."""
    text, passes = [1] * (1 + sum(lengths)), len(lengths)
    return Run([text], seconds, passes, [seconds], passes, passes * num_nodes, lengths)


def plain_run(own: Run, seconds_per_step: float = 0.5) -> Run:
    return run([1] * sum(own.lengths), seconds_per_step * sum(own.lengths))


def made_up(num_prompts: int, seed: int = 0) -> list[Run]:
    """Return calls whose acceptance lengths and times vary from prompt to prompt."""
    draw = random.Random(seed)
    lengths = [[draw.randint(1, 5) for _ in range(draw.randint(3, 30))] for _ in range(num_prompts)]
    return [run(of_prompt, draw.uniform(0.2, 0.9) * len(of_prompt), 6) for of_prompt in lengths]


def test_figures_are_ratios_of_totals():
    own = [[run([3, 1], 1.0, 4)], [run([1, 1, 1, 5], 4.0, 2)]]
    plain = [[plain_run(of_batch[0])] for of_batch in own]
    found = totals(own, plain)
    assert found["acceptance_length"] == 12 / 6
    assert found["nodes_per_step"] == pytest.approx(16 / 6, abs=1e-4)
    assert found["tokens_per_second"] == pytest.approx(12 / 5)
    assert found["speed_up_of_totals"] == pytest.approx((12 / 5) / (12 / 6))


def test_what_the_prefill_emits_is_not_counted_though_it_be_several_tokens():
    own = Run([[1] * 9], 2.0, 3, [2.0], 3, 12, lengths=[2, 2, 2])  # three from the prefill
    found = totals([[own]], [[run([1] * 8, 4.0)]])
    assert (found["acceptance_length"], found["tokens_per_second"]) == (2.0, 3.0)


def test_acceptance_by_position_is_what_a_count_by_hand_gives():
    own = [[run([1, 3, 2], 1.0), run([4], 1.0)], [run([1, 1, 2], 1.0)]]
    found = totals(own, own)
    # Of 7 passes 4 accepted a candidate; 2 of these a second one; 1 of these a third one
    assert found["conditional_acceptance"] == [pytest.approx(4 / 7, abs=1e-4), 0.5, 0.5]
    assert totals([[run([1, 1], 1.0)]], [[run([1, 1], 1.0)]])["conditional_acceptance"] == []


def test_the_products_of_acceptance_by_position_add_up_to_the_acceptance_length():
    own = [[one] for one in made_up(9)]
    found = totals(own, own)
    reached, length = 1.0, 1.0
    for share in found["conditional_acceptance"]:
        reached *= share
        length += reached
    assert length == pytest.approx(found["acceptance_length"], abs=1e-3)


def naive_interval(own: list[Run], plain: list[Run], figure) -> list[float]:
    """Resample prompts one by one, and return the percentiles of a figure."""
    draw, values = random.Random(1), []
    for _ in range(4000):
        drawn = [draw.randrange(len(own)) for _ in own]
        values.append(figure([own[n] for n in drawn], [plain[n] for n in drawn]))
    cuts = statistics.quantiles(values, n=40, method="inclusive")
    return [cuts[0], cuts[-1]]


def speed(runs: list[Run]) -> float:
    return sum(sum(one.lengths) for one in runs) / sum(one.seconds for one in runs)


def second_position(runs: list[Run]) -> float:
    lengths = [length for one in runs for length in one.lengths]
    return sum(n > 2 for n in lengths) / sum(n > 1 for n in lengths)


def test_intervals_are_those_of_a_naive_bootstrap():
    own = made_up(12)
    plain = [plain_run(one, seconds) for one, seconds in zip(own, (0.4, 0.5, 0.8) * 4, strict=True)]
    found = totals([[one] for one in own], [[one] for one in plain])
    naive = {
        "acceptance_length": lambda own, _: (
            sum(map(sum, (r.lengths for r in own))) / sum(r.passes for r in own)
        ),
        "tokens_per_second": lambda own, _: speed(own),
        "speed_up_of_totals": lambda own, plain: speed(own) / speed(plain),
    }
    for name, figure in naive.items():
        low, high = naive_interval(own, plain, figure)
        assert found[f"{name}_interval"] == pytest.approx([low, high], abs=0.1 * (high - low)), name
    low, high = naive_interval(own, plain, lambda own, _: second_position(own))
    between = found["conditional_acceptance_interval"][1]
    assert between == pytest.approx([low, high], abs=0.1 * (high - low))


def test_a_method_and_plain_decoding_are_resampled_together():
    own = made_up(8)
    found = totals([[one] for one in own], [[plain_run(one, 0.5)] for one in own])
    slower = [[run(one.lengths, 2 * one.seconds)] for one in own]
    paired = totals([[one] for one in own], slower)
    assert paired["speed_up_of_totals_interval"] == [2.0, 2.0]  # whichever prompts are drawn
    low, high = found["speed_up_of_totals_interval"]
    assert low < found["speed_up_of_totals"] < high


def test_one_prompt_has_no_interval():
    own = made_up(1)
    found = totals([own], [[plain_run(own[0])]])
    assert found["speed_up_of_totals"] > 0
    assert {found[f"{name}_interval"] for name in FIGURES} == {None}


def test_a_resample_without_the_figure_does_not_count():
    own = [[run([1, 1], 1.0)], [run([2, 3], 1.0)]]
    first, second = totals(own, own)["conditional_acceptance_interval"]
    assert first == [0.0, 1.0]
    # A quarter of the resamples hold the first prompt alone, which never accepts a first candidate
    assert second == [0.5, 0.5]


def test_a_ratio_of_fractions_is_not_rounded_up():
    totals_, seconds = torch.tensor([1.0, 1.0]), torch.tensor([0.125, 0.125])
    assert resampled_ratios(totals_, seconds, resample(2)).unique().tolist() == [8.0]
    nothing = torch.zeros(2)
    assert resampled_ratios(nothing, nothing, resample(2)).unique().tolist() == [0.0]
    assert interval(torch.full((5,), torch.nan), 2) is None


def measured_with(size: int, *names: str) -> dict[str, list[Measured]]:
    """Measure some methods and plain decoding on a tiny model, and return the results by name."""
    methods = choose_methods(methods_to_compare(tiny_model(), assistant=tiny_llama()), names)
    measured = measure(
        methods, batches(size), "greedy", max_new_tokens=NEW_TOKENS, rounds=1, stop_at_end=False,
        progress=False,
    )  # fmt: skip
    return {
        method.name: [result for result in measured if result.method is method]
        for method in methods
    }


def test_what_each_pass_emitted_is_known_of_every_method():
    theirs = ("assistant", "prompt lookup (Transformers)")
    for name, results in measured_with(1, "chain", *theirs).items():
        runs = [one for result in results for [one] in result.runs]
        for one in runs:
            assert len(one.lengths) == one.passes == one.row_passes <= one.nodes
            assert min(one.lengths) >= 1
            # The speculation of Transformers drafts in its prefill, which is not timed
            from_prefill = NEW_TOKENS - one.timing.tokens
            assert from_prefill >= 1 if name in theirs else from_prefill == 1
        if name == "plain":
            assert all({*one.lengths} == {1} and one.nodes == one.passes for one in runs)
        elif name != "prompt lookup (Transformers)":
            assert any(max(one.lengths) > 1 for one in runs), name


def test_a_batch_counts_its_passes_by_row():
    measured = measured_with(2, "chain")
    for name, results in measured.items():
        for row in rows(results, "float32"):
            assert row["conditional_acceptance"] is None
            length, nodes = row["acceptance_length"], row["nodes_per_step"]
            assert (length, nodes) == (1, 1) if name == "plain" else 1 <= length < nodes <= 4


def many_kinds(num_kinds: int, methods: tuple[str, ...]) -> list[dict]:
    measured = []
    for kind in range(num_kinds):
        own = [[one] for one in made_up(3, kind)]
        plain = [[plain_run(of_batch[0])] for of_batch in own]
        for name in ("plain", *methods):
            method, runs = Method(name, None, {}), plain if name == "plain" else own
            measured.append(Measured(method, f"kind-{kind}", 1, "greedy", runs, plain))
    return rows(measured, "bfloat16")


@pytest.mark.parametrize("width", [80, 120])
def test_many_kinds_take_a_line_each_and_lose_no_figure(width):
    methods = ("prompt lookup", "chain", "static tree", "planned, heads alone", "planned", "more")
    found = many_kinds(12, methods)
    by_method, *by_kind = tables(found, "title")
    assert by_method.row_count == len(methods)
    assert [len(table.columns) for table in by_kind] == [1 + 5, 1 + 1]
    assert [table.row_count for table in by_kind] == [12 + 1] * 2
    with console.capture() as captured:
        for table in by_kind:
            console.print(table, width=width)
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in captured.get()
    for row in found:
        if row["decoding"] == "plain":
            continue
        low, high = row["speed_up_of_totals_interval"]
        assert f"{low:.2f}-{high:.2f}" in captured.get()
    assert found[-1]["prompts"] == ALL_KINDS


def test_the_page_on_speed_shows_intervals_by_method_and_by_kind():
    speed_page = load_script("speed")
    found = many_kinds(12, ("chain", "planned"))
    record = {"conditions": {}, "rows": found}
    _, by_method, by_kind = speed_page.bench_tables(record).split("\n\n")
    assert [len(table.splitlines()) - 2 for table in (by_method, by_kind)] == [2, 13]
    for row in found:
        if row["decoding"] != "plain":
            low, high = row["speed_up_of_totals_interval"]
            assert f"| {row['speed_up_of_totals']:.2f} ({low:.2f}–{high:.2f}) |" in by_kind
    shares = " ".join(f"{share:.2f}" for share in found[-1]["conditional_acceptance"])
    assert f"| {shares} |" in by_method


def test_one_kind_needs_one_table():
    assert len(tables(many_kinds(1, ("chain",)), "title")) == 1
