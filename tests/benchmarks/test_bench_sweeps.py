"""Sweeps and pictures of `lmtp bench`, on a tiny model."""

import copy
import json

import pytest
from bench_runs import tiny_model, write_checkpoint, write_prompts
from commands import lmtp

from modeling_lmtp.benchmarks.bench_methods import methods_to_compare
from modeling_lmtp.benchmarks.bench_pictures import draw_bench
from modeling_lmtp.benchmarks.bench_settings import SWEEPS, BenchSettings
from modeling_lmtp.benchmarks.bench_sweeps import Point, points
from modeling_lmtp.benchmarks.pictures import pictures_available


def result(speed_ups, noise=0.01, decoding="chain", kind="maths", sha="a"):
    values = sorted(speed_ups)
    middle = values[len(values) // 2]
    figures = {
        "tokens_per_step": (2.0, [2.0] * len(values), [2.0, 2.0]),
        "step_cost": (2 / middle, [2 / value for value in speed_ups], [2 / values[-1], 2 / values[0]]),
        "speed_up": (middle, list(speed_ups), [values[0], values[-1]]),
    }  # fmt: skip
    row = {
        "prompts": kind, "decoding": decoding, "dtype": "float32", "mode": "greedy",
        "batch_size": 1, "at": None, "noise": noise,
        **{name: value for name, (value, _, _) in figures.items()},
        **{f"{name}_quartiles": spread for name, (_, _, spread) in figures.items()},
        "by_batch": {name: own for name, (_, own, _) in figures.items()},
    }  # fmt: skip
    conditions = {
        "prompts": [{"file": "p.jsonl", "sha256": sha}], "base_model": "m", "device": "cpu",
        "threads": 2, "checkpoint": "c", "quiet": True,
    }  # fmt: skip
    return {"conditions": conditions, "rows": [row]}


def start_point():
    model = tiny_model()
    prompts = {"maths": [[3, 4, 5], [6, 7]], "chat": [[8]]}
    return Point(None, methods_to_compare(model), prompts, BenchSettings())


def test_no_sweep_is_one_point():
    start = start_point()
    assert points(start, None) == [start]


@pytest.mark.parametrize("sweep", SWEEPS)
def test_a_sweep_varies_one_thing(sweep):
    start = start_point()
    found = points(start, sweep, (2, 3))
    assert [point.at for point in found] == [2, 3]
    for point in found:
        assert point.methods[0] is start.methods[0]
        seen = {
            "context": {len(row) for rows in point.prompts.values() for row in rows},
            "output": {point.settings.max_new_tokens},
            "batch": set(point.settings.batch_sizes),
            "heads": {m.options["draft_length"] for m in point.methods[1:] if sweep == "heads"},
            "nodes": {m.options["draft_nodes"] for m in point.methods[1:] if sweep == "nodes"},
        }[sweep]
        assert seen == {point.at}


def test_long_prompts_repeat_the_given_ones():
    [point] = points(start_point(), "context", (8,))
    assert point.prompts["long"] == [[3, 4, 5, 6, 7, 8, 3, 4], [6, 7, 8, 3, 4, 5, 6, 7]]


def test_chains_are_swept_as_far_as_the_heads_reach():
    assert [point.at for point in points(start_point(), "heads")] == [1, 2, 3]


@pytest.mark.skipif(not pictures_available(), reason="needs matplotlib")
def test_a_sweep_is_measured_and_drawn(tmp_path):
    write_checkpoint(tmp_path / "checkpoint")
    output, picture = tmp_path / "result.json", tmp_path / "result.png"
    found = lmtp(
        "bench", tmp_path / "checkpoint", "--prompts", write_prompts(tmp_path / "prompts.jsonl"),
        "--sweep", "nodes", "--at", "2,3", "--rounds", 1, "--max-new-tokens", 6, "--dtypes", "float32",
        "--output", output, "--picture", picture, "--per-kind", 1,
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    rows = [row for row in json.loads(output.read_text())["rows"] if row["prompts"] == "all"]
    assert [(row["at"], row["decoding"]) for row in rows] == [
        (2, "plain"), (2, "dynamic tree"), (3, "plain"), (3, "dynamic tree"),
    ]  # fmt: skip
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not pictures_available(), reason="needs matplotlib")
def test_bars_by_kind_are_drawn(tmp_path):
    record = result([1.1, 1.5, 1.9])
    record["rows"] += copy.deepcopy(result([1.0, 1.2], kind="chat", decoding="tree")["rows"])
    draw_bench(record, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not pictures_available(), reason="needs matplotlib")
def test_plain_decoding_alone_is_not_drawn(tmp_path):
    record = result([1.0], decoding="plain")
    with pytest.raises(ValueError, match="nothing was measured beside plain decoding"):
        draw_bench(record, tmp_path / "bars.png")


def test_values_of_no_sweep_are_refused():
    with pytest.raises(ValueError, match=r"at=\(1, 8\) are values of a sweep, and sweep is None"):
        BenchSettings(at=(1, 8))


def test_an_unknown_sweep_is_refused():
    with pytest.raises(
        ValueError, match="sweep must be one of context, output, batch, heads, nodes"
    ):
        BenchSettings(sweep="depth")
