"""`lmtp bench`: figures, equality and conditions, on a tiny model; the times themselves mean nothing."""

import json

import pytest
import torch
from bench_runs import batches, tiny_model, write_checkpoint, write_prompts
from commands import error_of, lmtp
from tiny import tiny_llama, tiny_tokenizer

from modeling_lmtp.benchmarks import bench, bench_runner
from modeling_lmtp.benchmarks.bench_methods import Method, methods_to_compare, plain_method
from modeling_lmtp.benchmarks.bench_pictures import draw_bench
from modeling_lmtp.benchmarks.bench_report import rows
from modeling_lmtp.benchmarks.bench_runner import Measured, Run, measure
from modeling_lmtp.benchmarks.divergence import Divergence
from modeling_lmtp.benchmarks.figures import Speed, Timing
from modeling_lmtp.benchmarks.pass_clock import PassClock
from modeling_lmtp.benchmarks.pictures import pictures_available
from modeling_lmtp.benchmarks.quiet import Quietness, quiet_record
from modeling_lmtp.conversion.prompts import render_prompt
from modeling_lmtp.drafting_lmtp import Candidates, Drafter
from modeling_lmtp.support_lmtp import decoding_support
from modeling_lmtp.tree_lmtp import DraftTree

NEW_TOKENS = 12


class Knowing(Drafter):
    """Proposes what plain decoding gives next, two tokens at a time."""

    def __init__(self, model, batch):
        self.text = model.generate(
            batch.input_ids, attention_mask=batch.attention_mask, do_sample=False,
            max_new_tokens=NEW_TOKENS, eos_token_id=None,
        )  # fmt: skip

    def draft(self, input_ids, hidden_states, max_depth):
        known = input_ids.shape[1]
        following = self.text[:, known : known + min(2, max_depth)]
        return Candidates((DraftTree.chain(following.shape[1]),), following)


def test_a_clock_counts_the_passes_after_the_prefill():
    model, [batch, *_] = tiny_model(), batches(1)
    decoding_support(model.backbone)  # is found out by passes of its own, once
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
    for expected, drafter in [(11, None), (4, Knowing(model, batch))]:
        with PassClock(model.backbone) as clock:
            model.generate(
                batch.input_ids, attention_mask=batch.attention_mask, use_lmtp=drafter is not None,
                drafter=drafter, **options,
            )  # fmt: skip
        assert clock.passes == expected == len(clock.step_seconds)
        assert 0 < sum(clock.step_seconds) <= clock.seconds == clock.seconds_after(expected)


def test_figures_follow_from_tokens_passes_and_seconds():
    texts = [[1] * 9, [1] * 5]
    plain = Run(texts, seconds=8.0, passes=8, row_seconds=[], row_passes=16, nodes=16)
    own = Run(texts, seconds=6.0, passes=4, row_seconds=[], row_passes=6, nodes=24)
    speed = Speed.over(own.timing, plain.timing)
    assert speed == Speed(tokens_per_step=2.0, step_cost=1.5)
    assert speed.speed_up == pytest.approx(8 / 6)


def test_an_answer_of_one_token_has_no_step_to_compare():
    none = Timing(tokens=0, steps=0, seconds=0.0)
    speed = Speed.over(none, none)
    assert (speed.tokens_per_step, str(speed.step_cost)) == (0.0, "nan")
    assert str(none.tokens_per_second) == "nan"


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("mode", ["greedy", "sampling"])
def test_every_way_gives_plain_decodings_text(size, mode):
    model = tiny_model()
    measured = measure(
        methods_to_compare(model, assistant=tiny_llama()), batches(size), mode,
        max_new_tokens=NEW_TOKENS, rounds=1, stop_at_end=False, progress=False,
    )  # fmt: skip
    names = {result.method.name for result in measured}
    assert ({"assistant", "prompt lookup (Transformers)"} <= names) == (size == 1)
    assert {"plain", "chain", "static tree", "planned", "prompt lookup"} <= names
    for result in measured:
        if not result.method.is_ours and mode == "sampling":
            continue  # Transformers' own speculation draws otherwise
        compared = 0 if (size, mode) == (2, "sampling") else 2
        assert (result.num_compared, result.num_equal) == (compared, compared), result.method.name
    if (size, mode) == (1, "greedy"):
        chains = [r for r in measured if r.method.name == "chain"]
        assert any(own[0].passes < NEW_TOKENS - 1 for r in chains for own in r.runs)


def test_a_text_that_differs_is_an_error_in_float32():
    model = tiny_model()
    methods = [
        plain_method(model),
        Method("wrong", model, {"suppress_tokens": list(range(0, 320, 2))}),
    ]
    measured = measure(
        methods, batches(1), "greedy", max_new_tokens=NEW_TOKENS, rounds=1, progress=False
    )
    wrong = [row for row in rows(measured, "float32") if row["decoding"] == "wrong"]
    assert wrong[0]["equal"] is False
    assert wrong[0]["errors"] > 0
    assert wrong[-1]["prompts"] == "all"
    assert wrong[-1]["errors"] == sum(row["errors"] for row in wrong[:-1])


def test_methods_that_part_from_the_plain_text_at_one_place_are_judged_there_once(monkeypatch):
    model, judged = tiny_model(), []

    def judge(model, known, position, is_sampled):
        judged.append(position)
        return Divergence(position, 0.0, 1.0)

    monkeypatch.setattr(bench_runner, "judge", judge)
    wrong = {"suppress_tokens": list(range(0, 320, 2))}
    methods = [plain_method(model), *(Method(name, model, wrong) for name in ("one", "other"))]
    measured = measure(
        methods, batches(1), "greedy", max_new_tokens=NEW_TOKENS, rounds=1, progress=False
    )
    one, other = ([r for r in measured if r.method.name == name] for name in ("one", "other"))
    places = [divergence.position for result in one for divergence in result.divergences]
    assert places == [d.position for result in other for d in result.divergences]
    assert judged == places
    assert len(places) > 1


@pytest.mark.parametrize("pad", [-1, 320, None])
def test_rows_that_end_are_padded_with_a_token_that_the_model_embeds(pad):
    model = tiny_model()
    model.generation_config.pad_token_id = pad
    [batch, *_] = batches(2)
    first = model.generate(
        batch.input_ids, attention_mask=batch.attention_mask, do_sample=False, max_new_tokens=2,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model.generation_config.eos_token_id = first[0, -1].item()  # the other row goes on
    methods = [plain_method(model), Method("chain", model, {"use_lmtp": "strict"})]
    measured = measure(
        methods, [batch], "greedy", max_new_tokens=NEW_TOKENS, rounds=1, progress=False
    )
    lengths = sorted(len(text) for text in measured[0].runs[0][0].texts)
    assert lengths == [2, NEW_TOKENS]
    assert [(result.num_compared, result.num_equal) for result in measured] == [(2, 2)] * 2


def test_ways_take_turns(monkeypatch):
    model, order = tiny_model(), []

    def record(method, batch, seed, options):
        order.append((method.name, batch.kind, options["max_new_tokens"]))
        return Run([[1, 1]] * batch.size, 1.0, 1, [1.0] * batch.size, batch.size, batch.size)

    monkeypatch.setattr(bench_runner, "run", record)
    methods = [plain_method(model), Method("a", model, {}), Method("b", model, {})]
    measure(methods, batches(2), "greedy", max_new_tokens=20, rounds=2, progress=False)
    names = [name for name, _, tokens in order if tokens == 20]
    assert len(names) == 2 * 2 * 3
    for turn in range(4):
        assert set(names[3 * turn : 3 * turn + 3]) == {"plain", "a", "b"}
    assert len({tuple(names[3 * turn : 3 * turn + 3]) for turn in range(4)}) == 3


def test_medians_are_over_batches_and_rounds():
    def runs(*seconds):
        return [Run([[1] * 11], second, 10, [second], 10, 10) for second in seconds]

    method = Method("a", tiny_model(), {})
    measured = Measured(
        method, "k", 1, "greedy", runs=[runs(1, 2), runs(4, 4)], plain=[runs(4, 4)] * 2
    )
    [row] = rows([measured], "float32")
    assert row["speed_up"] == 1.5
    assert row["by_batch"]["speed_up"] == [3, 1]
    assert row["speed_up_of_totals"] == pytest.approx(16 / 11, abs=1e-4)


def test_the_last_batch_of_a_kind_is_filled_up():
    sizes = [(batch.kind, batch.size) for batch in batches(3)]
    assert sizes == [("maths", 3), ("chat", 3)]
    first = batches(3)[0]
    assert first.input_ids[2].tolist() == first.input_ids[0].tolist()
    assert first.attention_mask.sum() < first.input_ids.numel()


def test_a_busy_machine_is_told():
    quiet, busy = Quietness(0.1, 1.0, 1.02), Quietness(64.0, 1.0, 1.5)
    assert quiet_record(quiet, quiet)["quiet"]
    assert quiet_record(quiet, Quietness(9.0, 1.0, 1.0))["quiet"]  # its own load, by then
    assert len(quiet_record(busy, quiet)["complaints"]) == 2
    slower = quiet_record(quiet, Quietness(0.1, 2.0, 1.0))
    assert "2.00 times as long" in slower["complaints"][0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    write_checkpoint(folder / "checkpoint")
    write_checkpoint(folder / "leap-1", head_context=0)
    write_prompts(folder / "prompts.jsonl")
    return folder


def test_the_command_writes_rows_and_conditions(folder):
    output = folder / "result.json"
    result = lmtp(
        "bench", folder / "checkpoint", "--prompts", folder / "prompts.jsonl", "--output", output,
        "--against", folder / "leap-1", "--max-new-tokens", 8, "--rounds", 1, "--dtypes",
        "float32", "--only", "chain", "leap-1: chain", "--per-kind", 1,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    record = json.loads(output.read_text())
    conditions = record["conditions"]
    assert conditions["kinds"] == {"maths": 1, "chat": 1}
    assert len(conditions["prompts"][0]["sha256"]) == 64
    assert {"device", "threads", "versions", "load", "quiet", "max_new_tokens"} <= set(conditions)
    assert [(row["prompts"], row["decoding"]) for row in record["rows"]] == [
        (kind, name)
        for kind in ("maths", "chat", "all")
        for name in ("plain", "chain", "leap-1: chain")
    ]
    assert all(row["equal"] for row in record["rows"])


def test_the_categories_of_a_file_of_spec_bench_are_the_kinds(folder):
    path = folder / "question.jsonl"
    asked = [("writing", ["A haiku.", "Again."]), ("qa", ["Why?"]), ("writing", ["An ode."])]
    rows = [{"question_id": 1, "category": kind, "turns": turns} for kind, turns in asked]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = bench.BenchOptions(str(folder / "checkpoint"), prompts=[path])
    found = bench.read_token_ids(options, bench.BenchSettings())
    tokenizer = tiny_tokenizer()
    assert found == {
        "writing": [render_prompt(tokenizer, text) for text in ("A haiku.", "An ode.")],
        "qa": [render_prompt(tokenizer, "Why?")],
    }


def test_answers_of_one_token_have_no_speed(folder, monkeypatch):
    output = folder / "short.json"
    monkeypatch.setattr(
        "modeling_lmtp.benchmarks.bench.load_lmtp", lambda *_: ends_at_once(tiny_model())
    )
    result = lmtp(
        "bench", folder / "checkpoint", "--prompts", folder / "prompts.jsonl", "--output", output,
        "--rounds", 1, "--dtypes", "float32", "--only", "chain", "--per-kind", 1,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads(output.read_text())["rows"]
    assert {row["new_tokens"] for row in rows} == {1, 2}
    assert (
        {row["speed_up"] for row in rows} == {row["speed_up_of_totals"] for row in rows} == {None}
    )


def ends_at_once(model):
    """Return the model such that all of its tokens end its text."""
    model.generation_config.eos_token_id = list(range(model.config.get_text_config().vocab_size))
    return model


def test_what_has_been_measured_is_written_though_the_rest_fails(folder, monkeypatch):
    output = folder / "first_half.json"
    measured = bench.measure

    def once(*arguments, **options):
        monkeypatch.setattr(bench, "measure", fail)
        return measured(*arguments, **options)

    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("No memory left.")

    monkeypatch.setattr(bench, "measure", once)
    error = error_of(
        "bench", folder / "checkpoint", "--prompts", folder / "prompts.jsonl", "--output", output,
        "--batch_sizes", 1, 2, "--rounds", 1, "--max_new_tokens", 4, "--dtypes", "float32",
        "--only", "chain",
    )  # fmt: skip
    assert "No memory left." in error
    record = json.loads(output.read_text())
    assert {row["batch_size"] for row in record["rows"]} == {1}
    assert record["conditions"]["batch_sizes"] == [1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtypes", "float32", "fp32"], "--dtypes: invalid choice: 'fp32'"),
        (["--modes", "warm"], "--modes: invalid choice: 'warm'"),
        (["--draft_nodes", 64], "draft_nodes must be at least 0 and at most 63, got 64."),
        (["--batch_sizes", 1, 0], "batch_sizes must be at least 1, got 0."),
        (
            ["--batch_sizes", "1,2"],
            "invalid int value: '1,2'. Separate several values with spaces.",
        ),
    ],
)
def test_a_setting_out_of_range_is_refused_before_anything_is_loaded(
    folder, monkeypatch, options, message
):
    monkeypatch.setattr(bench, "load_lmtp", None)
    common = ["bench", folder / "checkpoint", "--prompts", folder / "prompts.jsonl"]
    assert message in error_of(*common, *options)


def test_heads_in_folders_of_one_name_are_told_apart_by_their_paths(folder):
    one, other = folder / "leap-1", write_checkpoint(folder / "more" / "leap-1", head_context=0)
    output = folder / "told_apart.json"
    common = ["bench", folder / "checkpoint", "--prompts", folder / "prompts.jsonl"]
    result = lmtp(
        *common, "--against", one, other, "--output", output, "--max-new-tokens", 4, "--rounds", 1,
        "--dtypes", "float32", "--only", f"{one}: chain", f"{other}: chain", "--per-kind", 1,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    record = json.loads(output.read_text())
    assert record["conditions"]["against"] == [str(one), str(other)]
    names = {row["decoding"] for row in record["rows"]}
    assert names == {"plain", f"{one}: chain", f"{other}: chain"}
    twice = error_of(*common, "--against", one, one)
    assert f"'{one}' is given twice" in twice


def test_a_place_for_the_result_is_made_sure_of_before_anything_is_loaded(folder, monkeypatch):
    common = ["bench", folder / "missing", "--prompts", folder / "missing.jsonl"]
    for option in ("--output", "--picture"):
        nowhere = error_of(*common, option, folder / "nowhere" / "result")
        assert f"cannot be written: there is no folder {folder / 'nowhere'}." in nowhere
        assert f"{folder} is a folder" in error_of(*common, option, folder)
    monkeypatch.setattr("modeling_lmtp.benchmarks.pictures.pictures_available", lambda: False)
    without = error_of(*common, "--picture", folder / "picture.png")
    assert "Pictures need matplotlib, which is not installed: pip install" in without


def test_other_heads_must_stand_on_the_same_backbone(folder):
    other = folder / "other"
    model = tiny_model()
    with torch.no_grad():
        model.backbone.lm_head.weight[0, 0] += 1
    model.save_pretrained(other)
    common = ["bench", folder / "checkpoint", "--prompts", folder / "prompts.jsonl"]
    options = ["--dtypes", "float32"]
    message = "is not that of the first checkpoint: their weights differ"
    assert message in error_of(*common, *options, "--against", other)
    assert "There is no method 'x'. Choose from: plain, " in error_of(*common, "--only", "x")


def row_of(kind, decoding, speed_up):
    return {
        "prompts": kind, "decoding": decoding, "dtype": "float32", "mode": "greedy", "batch_size": 1,
        "speed_up_of_totals": speed_up, "speed_up_of_totals_interval": [speed_up - 0.1, speed_up + 0.2],
        "acceptance_length": 2.0, "acceptance_length_interval": None, "step_cost": 2.0 / speed_up,
    }  # fmt: skip


CONDITIONS = {"base_model": "m", "checkpoint": "c", "device": "cpu", "threads": 2}


@pytest.mark.skipif(not pictures_available(), reason="needs matplotlib")
def test_bars_by_kind_are_drawn(tmp_path):
    drawn = [row_of("maths", "chain", 1.5), row_of("chat", "tree", 1.2)]
    draw_bench({"conditions": CONDITIONS, "rows": drawn}, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not pictures_available(), reason="needs matplotlib")
def test_plain_decoding_alone_is_not_drawn(tmp_path):
    record = {"conditions": CONDITIONS, "rows": [row_of("maths", "plain", 1.0)]}
    with pytest.raises(ValueError, match="only plain decoding was measured"):
        draw_bench(record, tmp_path / "bars.png")
