"""Bad rows, short and empty answers, foreign tokens and foreign models: said clearly, and nothing lost."""

import json

import pytest
import torch
from commands import error_of, lmtp
from tiny import tiny_llama, tiny_tokenizer
from tiny_training import settings, warm_up

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.training.answers import load_answers, other_model_note, read_answers
from modeling_lmtp.training.distill_files import manifest_path
from modeling_lmtp.training.evaluation import evaluate_heads
from modeling_lmtp.training.examples import Example, check_targets
from modeling_lmtp.training.fingerprints import model_fingerprint

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]
END = 2
GOOD = '{"prompt": "x", "response": "The sea."}'
BAD = {
    '{"prompt": "x", "respo': "not JSON",
    "[1, 2]": "expected a JSON object, got list",
    "{}": "expected text in the field 'prompt', got None",
    '{"prompt": " ", "response": "y"}': "expected text in the field 'prompt', got ' '",
    '{"prompt": "x"}': "expected text in the field 'response', got None; fields found: ['prompt']",
    '{"prompt": "x", "response": 3}': "expected text in the field 'response', got 3",
    '{"prompt": "x", "response": ""}': "the response is empty",
    '{"prompt": "x", "response": "", "finished": false}': "the response is empty",
    '{"prompt": "x", "response": "y", "finished": "no"}': "expected true or false in the field",
    '{"prompt": "x", "response": "\\ud800"}': "surrogates not allowed",
}


def write(path, *lines):
    path.write_text("".join(line + "\n" for line in lines))
    return path


@pytest.mark.parametrize("line", BAD, ids=BAD.values())
def test_a_bad_row_is_refused_by_file_and_line_or_skipped_and_counted(tmp_path, line):
    path = write(tmp_path / "a.jsonl", GOOD, "", line, GOOD)
    with pytest.raises(ValueError, match=r"a\.jsonl:3: .*--bad_rows skip") as raised:
        read_answers(path, tiny_tokenizer(), END)
    assert BAD[line] in str(raised.value)
    answers = read_answers(path, tiny_tokenizer(), END, bad_rows="skip")
    assert len(answers.examples) == 2
    [told] = answers.skipped
    assert "a.jsonl:3: " in told
    assert answers.notes == (f"1 bad rows skipped: {told}.",)


def test_many_skipped_rows_are_counted_and_the_first_ones_told(tmp_path):
    path = write(tmp_path / "a.jsonl", *["{}"] * 5, GOOD)
    answers = read_answers(path, tiny_tokenizer(), END, bad_rows="skip")
    assert len(answers.skipped) == 5
    [note] = answers.notes
    assert note.startswith("5 bad rows skipped: ")
    assert note.endswith("; and 2 more.")
    assert "a.jsonl:3" in note
    assert "a.jsonl:4" not in note


def test_a_file_of_bad_rows_alone_holds_nothing(tmp_path):
    path = write(tmp_path / "a.jsonl", "{}", "{}")
    with pytest.raises(ValueError, match=r"holds no answer .* 2 bad rows skipped"):
        read_answers(path, tiny_tokenizer(), END, bad_rows="skip")
    with pytest.raises(ValueError, match="bad_rows: expected one of refuse, skip, got 'keep'"):
        read_answers(path, tiny_tokenizer(), END, bad_rows="keep")


def test_an_answer_that_the_model_ended_at_once_is_its_end(tmp_path):
    row = '{"prompt": "x", "response": "", "finished": true}'
    path = write(tmp_path / "a.jsonl", row)
    [example] = read_answers(path, tiny_tokenizer(), END).examples
    assert example.input_ids[example.answer_start :] == [END]
    with pytest.raises(ValueError, match="no token that ends it"):
        read_answers(path, tiny_tokenizer(), None)


def test_a_prompt_that_leaves_no_room_is_told_of(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD, json.dumps({"prompt": "sea " * 90, "response": "x"}))
    answers = read_answers(path, tiny_tokenizer(), END, max_length=60)
    assert len(answers.examples) == 1
    [note] = answers.notes
    assert "1 answers of" in note
    assert "their prompts alone fill 60 tokens" in note


def test_a_token_that_the_model_does_not_have_makes_a_row_bad(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD)
    model = tiny_llama(vocab_size=300)
    with pytest.raises(
        ValueError, match=r"a\.jsonl:1: its token 3\d\d is not in .* of 300: is the"
    ):
        load_answers(path, model, tiny_tokenizer(), 1024)


@pytest.mark.parametrize("train_backbone", [False, True], ids=["stage 1", "stage 2"])
@pytest.mark.parametrize("label", [64, -1])
def test_labels_outside_the_vocabulary_are_refused(train_backbone, label):
    model = LMTPForCausalLM.from_backbone(
        tiny_llama(vocab_size=64), leap_offsets=(2, 3), train_backbone=train_backbone
    )
    tokens = torch.tensor([[5, 6, 7, 8]])
    labels = torch.tensor([[-100, 6, label, 63]])
    with pytest.raises(ValueError, match=f"labels: expected .* 0 to 63, or -100, got {label}"):
        model(tokens, labels=labels)
    assert model(tokens, labels=labels.masked_fill(labels == label, -100)).loss.isfinite()


def warmed_up(folder, rows, batch_size=4):
    torch.manual_seed(0)
    model = LMTPForCausalLM.from_backbone(tiny_llama(vocab_size=64), leap_offsets=(2, 5))
    args = settings(num_train_epochs=3, per_device_train_batch_size=batch_size, learning_rate=1e-2)
    report = warm_up(model, rows, rows, folder, args)
    return model.leap_heads.state_dict(), report


LONG = [Example(list(range(5 + i, 25 + i)), 3) for i in range(4)]


def test_rows_without_targets_change_nothing(tmp_path):
    all_masked = Example([5, 6, 7, 8], 4)
    expected, _ = warmed_up(tmp_path / "a", LONG, batch_size=4)
    actual, report = warmed_up(tmp_path / "b", [*LONG, all_masked], batch_size=5)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    assert report.head_report([*LONG, all_masked]).chain_tokens_per_step >= 1


def test_answers_shorter_than_the_horizon_are_learned_as_far_as_they_go(tmp_path):
    short = [Example([9, 10, 11], 2), Example([9, 10], 1)]
    state, report = warmed_up(tmp_path, [*LONG, *short], batch_size=2)
    assert all(value.isfinite().all() for value in state.values())
    assert all(entry["loss"] < 100 for entry in report.state.log_history if "loss" in entry)
    model = LMTPForCausalLM.from_backbone(tiny_llama(vocab_size=64), leap_offsets=(2, 5))
    assert evaluate_heads(model, short)[0].chain_tokens_per_step >= 1


@pytest.mark.parametrize(
    "examples",
    [[], [Example([5, 6, 7, 8, 9], 1)] * 2, [Example(list(range(9)), 9)]],
    ids=["no answers", "all shorter than the furthest offset", "all masked"],
)
def test_a_head_without_any_target_is_refused_before_training(tmp_path, examples):
    with pytest.raises(
        ValueError, match=f"nothing in {len(examples)} answers is a target at offset 5"
    ):
        warmed_up(tmp_path / "run", examples)
    assert not (tmp_path / "run").exists()


def test_a_target_may_lie_just_behind_the_furthest_offset():
    check_targets([Example([5, 6, 7, 8, 9, 10], 1)], (2, 5))
    check_targets([Example(list(range(9)), 9)], (2, 5), train_on_prompts=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    for name, seed in [("mine", 0), ("other", 1)]:
        tiny_llama(seed=seed).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    rows = [{"prompt": f"Question {i}?"} for i in range(5)]
    write(folder / "prompts.jsonl", *(json.dumps(row) for row in rows))
    options = ["--prompts", folder / "prompts.jsonl", "--max_new_tokens", 8]
    assert lmtp("distill", folder / "mine", folder / "answers.jsonl", *options).exit_code == 0
    return folder


def test_train_joint_and_analyze_say_if_another_model_made_the_answers(
    folder, tmp_path, monkeypatch
):
    told = []
    monkeypatch.setattr("modeling_lmtp.training.answers.logger.warning", told.append)
    answers = folder / "answers.jsonl"
    train = ["--held_out", 2, "--leap_offsets", 2, 3]
    assert lmtp("train", folder / "mine", answers, tmp_path / "m", *train).exit_code == 0
    assert not told
    assert lmtp("train", folder / "other", answers, tmp_path / "o", *train).exit_code == 0
    assert len(told) == 1
    assert f"were made by another model or revision, {folder / 'mine'}" in told[0]
    record = json.loads((tmp_path / "o" / "provenance.json").read_text())
    assert record["answers_notes"] == told
    joint = ["--held_out", 2, "--lora_r", 2, "--num_train_epochs", 1]
    assert lmtp("joint", tmp_path / "o", answers, tmp_path / "j", *joint).exit_code == 0
    assert len(told) == 2
    analyze = ["--num_answers", 2, "--marginalize_positions", 0, "--nodes", 2]
    options = ["--answers", answers, "--output", tmp_path / "a", *analyze]
    result = lmtp("analyze", tmp_path / "o", *options)
    assert result.exit_code == 0, result.output
    notes = json.loads((tmp_path / "a" / "analysis.json").read_text())["notes"]
    assert told[1] in notes
    assert "made by another model or revision" in " ".join(result.output.split())


def test_precision_makes_no_other_model(folder, tmp_path):
    answers = folder / "answers.jsonl"
    assert other_model_note(answers, tiny_llama()) is None
    assert other_model_note(answers, tiny_llama().double()) is None
    assert other_model_note(answers, tiny_llama().bfloat16()) is None  # rounding hides it
    assert other_model_note(answers, tiny_llama(seed=1)) is not None
    sixteen = write(tmp_path / "a.jsonl", GOOD)
    model = tiny_llama().bfloat16()
    manifest = {"model_fingerprint": model_fingerprint(model), "model_dtype": "bfloat16"}
    manifest_path(sixteen).write_text(
        json.dumps({"model": "m", "model_revision": "1a", **manifest})
    )
    assert other_model_note(sixteen, tiny_llama()) is None
    assert "another model or revision, m (revision 1a)" in other_model_note(
        sixteen, tiny_llama(seed=1)
    )
    assert other_model_note(write(tmp_path / "b.jsonl", GOOD), tiny_llama(seed=1)) is None


def test_the_commands_refuse_bad_rows_or_skip_them_by_choice(folder, tmp_path):
    rows = (folder / "answers.jsonl").read_text().splitlines()
    answers = write(tmp_path / "answers.jsonl", *rows, "{}")
    output = tmp_path / "out"
    command = ["train", folder / "mine", answers, output, "--held_out", 2, "--leap_offsets", 2, 3]
    assert "answers.jsonl:6: expected text in the field 'prompt'" in error_of(*command)
    assert not output.exists()
    assert lmtp(*command, "--bad_rows", "skip").exit_code == 0
    record = json.loads((output / "provenance.json").read_text())
    assert record["examples"] == 3
    assert record["answers_notes"][0].startswith("1 bad rows skipped")
    joint = [
        "joint",
        output,
        answers,
        tmp_path / "j",
        "--held_out",
        2,
        "--lora_r",
        2,
        "--num_train_epochs",
        1,
    ]
    assert "answers.jsonl:6" in error_of(*joint)
    assert lmtp(*joint, "--bad_rows", "skip").exit_code == 0
    few = ["--num_answers", 2, "--marginalize_positions", 0, "--nodes", 2]
    analyze = ["analyze", output, "--answers", answers, "--output", tmp_path / "a", *few]
    assert "answers.jsonl:6" in error_of(*analyze)
    assert lmtp(*analyze, "--bad_rows", "skip").exit_code == 0


def test_answers_are_cut_where_the_positions_of_the_model_end(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD)
    whole = load_answers(path, tiny_llama(), tiny_tokenizer()).examples[0]
    model = tiny_llama(max_position_embeddings=len(whole.input_ids) - 2)
    assert load_answers(path, model, tiny_tokenizer()).examples[0].input_ids == whole.input_ids[:-2]
