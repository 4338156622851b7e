"""`lmtp analyze`: figures, pictures and advice in a folder, from checkpoints and answers."""

import json
import re

import pytest
import torch
from commands import error_of, lmtp
from tiny import tiny_llama, tiny_tokenizer

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.benchmarks import pictures
from modeling_lmtp.benchmarks.pictures import draw_pictures, spread
from modeling_lmtp.conversion.saving import file_sha256

PROMPTS = ["What is the sea?", "Write a poem.", "A spider asks", "Paris", "The wind", "France?"]
QUICK = ["--num-answers", "4", "--marginalize-positions", "8", "--node_counts", "2", "4"]
CHECKPOINTS = {"near": ((2, 3, 4), 0), "far": ((3, 5), 0), "grounded": ((2, 3), 1)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints on one backbone, that backbone, another one, and answers."""
    folder = tmp_path_factory.mktemp("analyze")
    tokenizer = tiny_tokenizer()
    models = {"backbone": tiny_llama(), "other": tiny_llama(seed=1)}
    for name, (offsets, context) in CHECKPOINTS.items():
        torch.manual_seed(0)
        models[name] = LMTPForCausalLM.from_backbone(
            tiny_llama(), leap_offsets=offsets, head_context=context
        )
    models["stranger"] = LMTPForCausalLM.from_backbone(tiny_llama(seed=1), leap_offsets=(2,))
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [{"prompt": prompt, "response": f"{prompt} {prompt}"} for prompt in PROMPTS]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def analysis(folder):
    """The output of analyzing three checkpoints, what it printed, and `analysis.json`."""
    output = folder / "output"
    sources = [folder / name for name in CHECKPOINTS]
    answers = ["--answers", folder / "answers.jsonl"]
    result = lmtp("analyze", *sources, *answers, "--output", output, *QUICK)
    assert result.exit_code == 0, result.output
    return output, result.output, json.loads((output / "analysis.json").read_text())


def test_the_record_holds_every_figure_and_its_conditions(folder, analysis):
    _, _, record = analysis
    assert record["command"] == "lmtp analyze"
    assert record["answers"]["sha256"] == file_sha256(folder / "answers.jsonl")
    assert record["settings"]["num_answers"] == 4
    assert record["conditions"]["model_dtype"] == "float32"
    assert record["conditions"]["answers_tokens"] > 0
    assert set(record["versions"]) >= {"python", "torch", "transformers"}
    for found, (name, (offsets, context)) in zip(
        record["checkpoints"], CHECKPOINTS.items(), strict=True
    ):
        assert (found["name"], found["head_context"]) == (name, context)
        assert found["leap_offsets"] == list(offsets)
        assert set(found["top_k"]) == {"1", "3", "10"}
        assert all(len(values) == offsets[-1] - 1 for values in found["top_k"].values())
        assert (
            len(found["mean_probabilities"]) == len(found["ceiling_distances"]) == offsets[-1] - 1
        )
        assert found["attenuation"]["gamma"] > 0
        assert found["attenuation"]["standard_error"] is not None
        assert list(found["tokens_per_step"]) == ["chain", "2", "4"]
        assert all(1 <= e["value"] <= offsets[-1] for e in found["tokens_per_step"].values())
    marginalization = record["marginalization"]
    assert marginalization["positions"] == 8
    assert [row["distance"] for row in marginalization["distances"]] == [1, 2, 3]
    assert "Grounded heads see x_{t+1}" in marginalization["what"]
    assert record["leap_2_break_even"]["3"] == pytest.approx(0.139, abs=5e-4)
    promised = record["schedules"][0]["expected_tokens_per_step"]
    assert set(promised) == {*CHECKPOINTS, "model"}


def test_tables_advice_and_notes_are_printed(analysis):
    _, printed, record = analysis
    printed = re.sub(r"\s+", " ", printed)
    assert record["advice"] in printed
    assert "is predicted to emit the most" in record["advice"]
    assert "Top-1 accuracy" in printed
    assert "grounded, 1" in printed
    assert "these are not its greedy answers" in printed


def test_pictures_are_pngs_with_something_in_them(analysis):
    image_module = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    output, _, record = analysis
    assert record["pictures"] == ["accuracy.png", "tokens_per_step.png", "attenuation.png"]
    for name in record["pictures"]:
        with image_module.open(output / name) as image:
            image.verify()
        with image_module.open(output / name) as image:
            assert image.format == "PNG"
            assert 1000 < image.width < 2000
            assert len(image.convert("RGB").getcolors(maxcolors=1 << 20)) > 100


def test_pictures_can_be_drawn_again_from_the_record(analysis, tmp_path):
    pytest.importorskip("matplotlib")
    output, _, record = analysis
    for path in draw_pictures(record, tmp_path):
        assert path.read_bytes() == (output / path.name).read_bytes()


def test_a_plain_backbone_is_analyzed_by_marginalization(folder, tmp_path):
    arguments = ["--answers", folder / "answers.jsonl", "--output", tmp_path / "out", *QUICK]
    result = lmtp("analyze", folder / "backbone", *arguments)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert record["checkpoints"] == []
    assert record["pictures"] in (["attenuation.png"], [])  # none without matplotlib
    assert "by numerical marginalization" in record["advice"]


def test_without_matplotlib_the_figures_are_written_and_a_note_says_why(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    arguments = ["--answers", folder / "answers.jsonl", "--output", tmp_path / "out"]
    options = ["--num_answers", 4, "--node_counts", 2, "--marginalize_positions", 0]
    result = lmtp("analyze", folder / "far", *arguments, *options)
    assert result.exit_code == 0, result.output
    assert "pip install 'modeling-lmtp[plots]'" in re.sub(r"\s+", " ", result.output)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["analysis.json"]
    record = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert record["marginalization"] is None
    with pytest.raises(RuntimeError, match="Pictures need matplotlib"):
        draw_pictures(record, tmp_path)


def test_heads_judged_by_answers_that_they_learned_are_reported(folder, tmp_path):
    answers = folder / "answers.jsonl"
    train = ["--leap_offsets", 2, 3, "--held_out", 2, "--per_device_train_batch_size", 2]
    checkpoint = tmp_path / "trained"
    assert lmtp("train", folder / "backbone", answers, checkpoint, *train).exit_code == 0
    options = ["--answers", answers, "--marginalize-positions", 0, "--node_counts", 2]
    seen = lmtp("analyze", checkpoint, *options, "--num-answers", 4, "--output", tmp_path / "a")
    unseen = lmtp("analyze", checkpoint, *options, "--num-answers", 2, "--output", tmp_path / "b")
    assert "pass --num_answers 2" in re.sub(r"\s+", " ", seen.output)
    assert unseen.exit_code == 0
    assert "was trained on some of these" not in re.sub(r"\s+", " ", unseen.output)


def test_errors_say_what_to_do_and_write_nothing(folder, tmp_path):
    answers = ["--answers", folder / "answers.jsonl"]
    options = [*answers, "--output", tmp_path / "out"]
    far, backbone = folder / "far", folder / "backbone"
    assert "has no leap heads to compare" in error_of("analyze", far, backbone, *options)
    assert "is given twice" in error_of("analyze", far, far, *options)
    assert "num_answers must be at least 2, got 1" in error_of(
        "analyze", far, *options, "--num-answers", 1
    )
    assert "at most 6" in error_of("analyze", far, *options, "--num-answers", 7)
    too_many = error_of("analyze", far, *options, "--node_counts", 4, 64)
    assert "node_counts must be at least 1 and at most 63, got 64" in too_many
    negative = error_of("analyze", far, *options, "--marginalize-positions", -1)
    assert "marginalize_positions must be at least 0, got -1" in negative
    nothing = error_of("analyze", backbone, *options, "--marginalize-positions", 0)
    assert "nothing to measure" in nothing
    stranger = error_of("analyze", far, folder / "stranger", *options, *QUICK)
    assert "The backbone of 'stranger' is not that of 'far'" in stranger
    assert not any(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert "already holds something" in error_of("analyze", far, *options)


def test_labels_that_are_too_close_are_moved_apart():
    assert spread([1.0, 2.0, 1.05], gap=0.1) == pytest.approx([1.0, 2.0, 1.1])


def test_answers_of_one_token_say_nothing(folder, tmp_path):
    rows = [{"prompt": "a", "response": "", "finished": True}] * 3
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [
        "--answers",
        path,
        "--marginalize-positions",
        0,
        "--node_counts",
        2,
        "--num_answers",
        2,
    ]
    error = error_of("analyze", folder / "far", *options, "--output", tmp_path / "out")
    assert "There is nothing to draft in 2 answers" in error
