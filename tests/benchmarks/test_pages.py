"""The pages in `benchmarks/` say what the result files say."""

import json

import pytest
import torch
from bench_runs import tiny_model
from scripts import BENCHMARKS, load_script


def test_the_page_on_speed_is_up_to_date():
    speed = load_script("speed")
    text = speed.PAGE.read_text()
    names = [found[2] for found in speed.BLOCK.finditer(text)]
    assert names
    assert (
        speed.BLOCK.sub(lambda found: f"{found[1]}{speed.block(found[2])}{found[3]}", text) == text
    )


@pytest.mark.parametrize("study", ["kinds", "data", "joint"])
def test_the_page_on_heads_is_up_to_date(study):
    ablation = load_script("ablation")
    page = ablation.PAGE.read_text()
    assert page == ablation.with_table(page, study)


def test_the_page_on_tuned_backbones_is_up_to_date():
    script = load_script("tuned_backbones")
    record = json.loads((BENCHMARKS / "results" / "tuned_backbones.json").read_text())
    assert script.PAGE.read_text().endswith(f"{script.MARK}\n\n{script.tables(record)}")
    assert script.summary(record["models"]).items() <= record.items()


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("results/*.json")), ids=lambda p: p.name)
def test_no_result_breaks_the_promise_of_equal_texts(path):
    rows = json.loads(path.read_text()).get("rows", [])
    rows = list(rows.values()) if isinstance(rows, dict) else rows
    assert not any(row.get("errors") for row in rows)


def test_a_profile_has_the_parts_of_full_steps():
    step_profile, model = load_script("step_profile"), tiny_model()
    prompt = torch.arange(3, 12)[None]
    model.generate(prompt, use_lmtp=True, max_new_tokens=4)
    with torch.no_grad():
        rows = step_profile.profile(model, [prompt], step_profile.ways_of(model), 40, 1)
    assert [row["way"] for row in rows] == ["chain", "tree", "planned"]
    assert [row["tokens"] for row in rows] == [4, 13, 8]
    for row in rows:
        parts = ("pass", "draft", "arrange", "walk", "commit", "emit")
        assert row["steps"] > 0
        assert 0 < sum(row[f"{part}_ms"] for part in parts) < 1.5 * row["step_ms"]


def test_the_planner_s_log_counts_every_candidate_and_step(passes_are_the_clock_of_planned_drafts):
    log, model = load_script("planner_log").PlannerLog(), tiny_model()
    with log.listening():
        output = model.generate(
            torch.arange(3, 12)[None],
            use_lmtp=True,
            max_new_tokens=40,
            do_sample=False,
            return_dict_in_generate=True,
        )
    lengths = output.acceptance_lengths[0]
    assert len(log.steps) == len(lengths)
    assert sum(step["accepted"] for step in log.steps) == sum(lengths) - len(lengths)
    num_candidates = sum(step["tokens"] - 1 for step in log.steps)
    assert sum(row["candidates"] for row in log.calibration()) == num_candidates > 0
    accepted = sum(row["candidates"] * row["accepted"] for row in log.calibration())
    assert round(accepted) == sum(lengths) - len(lengths)
    costs = {row["tokens"]: row["cost"] for row in log.costs()}
    assert set(costs.values()) == {1.0}  # a pass takes a second, whatever its size
