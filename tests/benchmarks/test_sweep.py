"""The script that measures a sweep, on a tiny model."""

import json

import pytest
from bench_runs import tiny_model, write_checkpoint, write_prompts
from scripts import load_script

from modeling_lmtp.benchmarks.bench import BenchSettings
from modeling_lmtp.benchmarks.bench_methods import methods_to_compare
from modeling_lmtp.conversion.command_line import parse

PROMPTS = {"maths": [[3, 4, 5], [6, 7]], "chat": [[8]]}


@pytest.fixture(scope="module")
def script():
    return load_script("sweep")


@pytest.mark.parametrize("sweep", ["context", "output", "nodes"])
def test_a_point_varies_one_thing(script, sweep):
    methods, settings = methods_to_compare(tiny_model()), BenchSettings()
    chosen, prompts, varied = script.point(sweep, 3, methods, PROMPTS, settings)
    assert chosen[0] is methods[0]
    seen = {
        "context": {len(row) for rows in prompts.values() for row in rows},
        "output": {varied.max_new_tokens},
        "nodes": {method.options.get("draft_nodes") for method in chosen[1:]},
    }
    assert seen[sweep] == {3}
    assert (prompts == PROMPTS) == (sweep != "context")
    assert varied.stop_at_end == (sweep == "nodes")


def test_long_prompts_repeat_the_prompts_of_the_file(script):
    long = script.long_prompts(PROMPTS, 8)
    assert long == {"long": [[3, 4, 5, 6, 7, 8, 3, 4], [6, 7, 8, 3, 4, 5, 6, 7]]}


def test_a_sweep_is_measured(script, tmp_path):
    output = tmp_path / "result.json"
    arguments = [
        write_checkpoint(tmp_path / "checkpoint"), "nodes", output,
        "--prompts", write_prompts(tmp_path / "prompts.jsonl"), "--values", 2, 3, "--rounds", 1,
        "--max_new_tokens", 6, "--dtypes", "float32", "--per_kind", 1,
    ]  # fmt: skip
    script.sweep(*parse("sweep.py", script.sweep, [str(argument) for argument in arguments]))
    record = json.loads(output.read_text())
    rows = [row for row in record["rows"] if row["prompts"] == "all"]
    assert [(row["at"], row["decoding"]) for row in rows] == [
        (2, "plain"), (2, "planned"), (3, "plain"), (3, "planned"),
    ]  # fmt: skip
    assert record["conditions"]["sweep"] == "nodes"
    assert "planned" in load_script("speed").bench_tables(record)
