"""`lmtp compare`, sweeps and pictures: from result files that are made up, and a tiny model."""

import copy
import json

import pytest
from bench_runs import tiny_model, write_checkpoint, write_prompts
from test_cli import error_of, lmtp

from modeling_lmtp.conversion.bench_changes import changes, differing_conditions, read_result
from modeling_lmtp.conversion.bench_methods import methods_to_compare
from modeling_lmtp.conversion.bench_pictures import draw_bench
from modeling_lmtp.conversion.bench_run import BenchSettings
from modeling_lmtp.conversion.bench_sweeps import SWEEPS, Point, points
from modeling_lmtp.training.pictures import pictures_available


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


def moved(old, new):
    return {change.figure: change.by for change in changes(old, new) if change.moved}


def test_a_move_that_all_prompts_share_is_found_however_much_they_differ():
    old = result([1.1, 1.5, 1.9])
    new = result([1.21, 1.65, 2.09])
    assert moved(old, new) == {
        "speed_up": pytest.approx(0.1),
        "step_cost": pytest.approx(1 / 1.1 - 1),
    }


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (result([1.1, 1.5, 1.9]), result([1.1, 1.5, 1.9])),
        (result([1.1, 1.5, 1.9]), result([1.3, 1.5, 1.5])),
        (result([1.1, 1.5, 1.9], noise=0.3), result([1.21, 1.65, 2.09])),
        (result([1.1, 1.5, 1.9]), result([1.21, 1.65, 2.09], sha="b")),
        (result([1.1]), result([1.5], decoding="tree")),
        (result([1.1], decoding="plain"), result([1.5], decoding="plain")),
    ],
    ids=["equal", "each its own way", "noisy", "other prompts", "another way", "plain"],
)
def test_noise_is_no_move(old, new):
    assert moved(old, new) == {}


def test_results_on_other_prompts_are_compared_by_their_spread():
    assert moved(result([1.1, 1.1, 1.2]), result([1.6, 1.7, 1.7, 1.7], sha="b"))["speed_up"] > 0.4


def test_the_command_says_what_moved_and_what_was_not_the_same(tmp_path):
    old, new = result([1.1, 1.5, 1.9]), result([1.2, 1.6, 2.05])
    new["conditions"] |= {"threads": 4, "quiet": False}
    assert differing_conditions(old, new) == ["threads: 2 before, 4 after"]
    for name, record in (("old", old), ("new", new)):
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    found = lmtp("compare", tmp_path / "old.json", tmp_path / "new.json")
    assert found.exit_code == 0
    shown = " ".join(found.output.split())
    assert "2 of 3 figures moved beyond noise" in shown
    assert "threads: 2 before, 4 after" in shown
    assert "new.json was measured on a machine that was not quiet" in shown
    (tmp_path / "new.json").write_text("[]")
    message = error_of("compare", tmp_path / "old.json", tmp_path / "new.json")
    assert "no result of `lmtp bench`" in message


@pytest.mark.parametrize(
    ("change", "lacking"),
    [
        (lambda record: record["rows"][0].pop("prompts"), "row 1 lacks prompts"),
        (lambda record: record["rows"][0].pop("step_cost"), "row 1 lacks step_cost"),
        (lambda record: record["rows"][0].pop("by_batch"), "row 1 lacks by_batch"),
        (lambda record: record["rows"].append("maths"), "row 2 is no JSON object"),
        (lambda record: record.update(rows={}), "its rows are no list"),
        (lambda record: record.update(conditions=[]), "its conditions are no JSON object"),
        (lambda record: record.pop("rows"), "it lacks rows"),
    ],
    ids=["label", "figure", "batches", "row", "rows", "conditions", "no rows"],
)
def test_files_of_other_commands_are_not_compared(tmp_path, change, lacking):
    path, other = tmp_path / "old.json", tmp_path / "other.json"
    record = result([1.1])
    path.write_text(json.dumps(record))
    assert read_result(path) == record
    change(record)
    other.write_text(json.dumps(record))
    message = error_of("compare", path, other)
    assert f"other.json is no result of `lmtp bench`: {lacking}" in message


def test_the_results_of_this_repository_are_read(request):
    folder = request.config.rootpath / "benchmarks" / "results"
    for path in [*folder.glob("bench_*.json"), *folder.glob("sweep_*.json")]:
        assert read_result(path)["command"] == "lmtp bench"
    with pytest.raises(ValueError, match="row 1 lacks prompts, decoding"):
        read_result(folder / "step_profile.json")


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
