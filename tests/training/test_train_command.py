"""`lmtp train`: its options reach the training, and its log lies beside the checkpoint."""

import json
from types import SimpleNamespace

import pytest
import torch
from commands import lmtp
from tiny import tiny_llama, tiny_tokenizer

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.conversion.saving import read_json

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
TEXTS = ["The sea and the wind.", "Eight legs.", "Paris", "Turn by turn", "A poem", "How many?"]


@pytest.fixture
def train(tmp_path):
    """Train on six answers, two of them held out; return the result and the output folder."""
    tiny_llama().save_pretrained(tmp_path / "backbone")
    tiny_tokenizer().save_pretrained(tmp_path / "backbone")
    rows = [{"prompt": text, "response": text * 3, "finished": True} for text in TEXTS]
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(*options):
        arguments = ["train", tmp_path / "backbone", answers, tmp_path / "out", "--held_out", 2]
        return lmtp(*arguments, *options), tmp_path / "out"

    return run


def test_the_log_is_saved_with_the_checkpoint(train):
    result, output = train(
        "--leap_offsets", 2, 3, "--per_device_train_batch_size", 2, "--logging_steps", 1
    )
    assert result.exit_code == 0, result.output
    record = json.loads((output / "training_log.json").read_text())
    assert record["leap_offsets"] == [2, 3]
    losses = [entry for entry in record["log"] if "loss" in entry]
    assert [entry["step"] for entry in losses] == [1, 2]
    assert {"loss_head_2", "loss_head_3", "top1_head_2", "top1_head_3"} < losses[0].keys()
    assert any("eval_tokens_per_step" in entry for entry in record["log"])
    assert LMTPForCausalLM.from_pretrained(output).config.leap_offsets == (2, 3)


def test_the_record_names_the_checkpoint_whose_heads_are_trained_further(train, tmp_path):
    result, first = train("--num_leap_heads", 1, "--max_steps", 1)
    assert result.exit_code == 0, result.output
    assert "checkpoint" not in read_json(first / "provenance.json")
    further = ["train", first, tmp_path / "answers.jsonl", tmp_path / "further"]
    assert lmtp(*further, "--held_out", 2, "--max_steps", 1).exit_code == 0
    record = read_json(tmp_path / "further" / "provenance.json")
    assert (record["checkpoint"], record["checkpoint_revision"]) == (str(first), None)


def test_heads_trained_further_can_draft_the_tokens_of_the_new_answers(train, tmp_path):
    result, first = train("--num_leap_heads", 1, "--draft_vocab_size", 4, "--max_steps", 1)
    assert result.exit_code == 0, result.output
    row = {"prompt": "Paris", "response": "zzz yyy xxx zzz yyy zzz", "finished": True}
    (tmp_path / "new.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"prompt": "a"}))
    further = ["train", first, tmp_path / "new.jsonl", tmp_path / "further", "--held_out", 0]
    result = lmtp(*further, "--draft_vocab_size", 6, "--max_steps", 1)
    assert result.exit_code == 0, result.output
    model = LMTPForCausalLM.from_pretrained(tmp_path / "further")
    assert len(model.config.draft_token_ids) == 6
    ids = tiny_tokenizer()(row["response"], add_special_tokens=False)["input_ids"]
    assert set(ids) <= {*model.config.draft_token_ids}
    prompt = torch.tensor([[5, 6, 7]])
    options = {"do_sample": False, "max_new_tokens": 12}
    fast = model.generate(prompt, use_lmtp=True, **options)
    assert fast.tolist() == model.generate(prompt, **options).tolist()


def test_heads_with_rows_of_their_own_keep_their_draft_vocabulary(train, tmp_path, monkeypatch):
    result, first = train("--no_share_lm_head", "--draft_vocab_size", 4, "--max_steps", 1)
    assert result.exit_code == 0, result.output
    monkeypatch.setattr("modeling_lmtp.training.train_command.load_tokenizer", None)  # before it
    further = ["train", first, tmp_path / "answers.jsonl", tmp_path / "further"]
    result = lmtp(*further, "--held_out", 2, "--draft_vocab_size", 6, "--max_steps", 1)
    assert result.exit_code == 1
    assert "Leave draft_vocab_size out" in " ".join(result.output.split())
    assert not (tmp_path / "further").exists()


@pytest.mark.parametrize("reporter", ["swanlab", "nonsense"])
def test_a_reporter_that_is_not_installed_is_refused_before_the_work(train, monkeypatch, reporter):
    monkeypatch.setattr("modeling_lmtp.training.train_command.load_tokenizer", None)
    result, output = train("--report_to", reporter)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: report_to: {reporter} cannot be used here. Install")
    assert result.stderr.count("\n") == 1
    assert not list(output.parent.glob("*out*"))


def no_room(*_):
    raise OSError(28, "No space left on device")


def test_the_command_resumes_after_the_disk_was_full_in_the_last_step(train, monkeypatch):
    options = ["--leap_offsets", 2, 3, "--per_device_train_batch_size", 2, "--save_steps", 1]
    with monkeypatch.context() as patch:
        patch.setattr("modeling_lmtp.training.training_run.save_training_log", no_room)
        result, output = train(*options)
    assert "No space left on device" in result.output
    assert [path.name for path in output.parent.glob("*out*")] == ["out.training"]
    with monkeypatch.context() as patch:
        # It goes on where it was: all steps are done
        patch.setattr("modeling_lmtp.training.leap_trainer.LeapTrainer.training_step", None)
        result, _ = train(*options)
    assert result.exit_code == 0, result.output
    assert (output / "training_log.json").exists()
    assert [path.name for path in output.parent.glob("*out*")] == ["out"]


def test_the_error_names_a_run_folder_that_a_kill_left_behind(train, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("modeling_lmtp.training.training_run.shutil", SimpleNamespace(rmtree=no_room))
        train("--leap_offsets", 2, 3)
    result, output = train("--leap_offsets", 2, 3)
    assert result.exit_code == 1
    message = " ".join(result.output.split())
    run_folder = output.with_name("out.training")
    assert f"{output} is finished, and" in message
    assert f"{run_folder} is left over from that run: delete it" in message
    run_folder.rename(output.with_name("away"))
    result, _ = train("--leap_offsets", 2, 3)
    assert f"{output} already holds something" in " ".join(result.output.split())


def test_options_reach_the_trainer(train):
    result, output = train(
        *(
            "--packing",
            "--max_length",
            60,
            "--train_on_prompts",
            "--num_train_epochs",
            2,
            "--per_device_train_batch_size",
            1,
        ),
        *("--distillation_weight", 0.5, "--distillation_temperature", 2),
        *(
            "--curriculum",
            "forward",
            "--curriculum_share",
            1,
            "--eval_strategy",
            "steps",
            "--eval_steps",
            1,
        ),
        *("--head_context", "path", "--head_input", "weighted", "--lm_head_rank", 2),
        *("--num_leap_heads", 2, "--leap_stride", 1, "--logging_steps", 1),
    )
    assert result.exit_code == 0, result.output
    settings = json.loads((output / "provenance.json").read_text())["settings"]
    expected = {
        "packing": True,
        "max_length": 60,
        "train_on_prompts": True,
        "distillation_weight": 0.5,
        "distillation_temperature": 2,
        "curriculum": "forward",
        "curriculum_share": 1,
        "eval_steps": 1,
        "logging_steps": 1,
    }
    assert {name: settings[name] for name in expected} == expected
    config = LMTPForCausalLM.from_pretrained(output).config
    assert (config.head_context, config.head_input, config.lm_head_rank) == ("path", "weighted", 2)
    log = json.loads((output / "training_log.json").read_text())["log"]
    first = next(entry for entry in log if "loss" in entry)
    assert "divergence_head_2" in first
    assert "loss_head_3" not in first
    assert log[-1]["step"] < 2 * 4  # packs, not answers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--distillation_weight", 2],
            "distillation_weight must be at least 0 and at most 1, got 2.0",
        ),
        (["--curriculum", "up"], "invalid choice: 'up'"),
        (["--head_context", "all"], "head_context must be a number of tokens or path, got 'all'"),
        (["--head_input", "first"], "head_input must be 'last'"),
        (["--shard_backbone"], "Launch more with `accelerate launch --num_processes`"),
    ],
    ids=str,
)
def test_errors_give_a_remedy_and_leave_no_files(train, options, message):
    result, output = train(*options)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())
    assert not output.exists()
    assert not output.with_name("out.training").exists()


def test_head_initialization_depends_only_on_the_seed(train, monkeypatch):
    started = []

    def note(model, *arguments, **options):
        started.append(model.state_dict())
        raise ValueError("Enough.")

    monkeypatch.setattr("modeling_lmtp.training.train_command.LeapTrainer", note)
    for drawn in (1, 2):
        torch.manual_seed(drawn)
        train("--leap_offsets", 2, 3, "--lm_head_rank", 4)
    first, second = started
    assert any("lm_head_update" in name for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_current_folder_is_refused_as_output(train, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    result = lmtp("train", tmp_path / "backbone", tmp_path / "answers.jsonl", ".")
    assert "is the current folder" in result.output


def test_float16_on_a_cpu_is_refused(train, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    result, output = train("--leap_offsets", 2, 3, "--dtype", "float16")
    assert "got float16. Load it with one" in " ".join(result.output.split())
    assert not [*output.parent.glob("out*")]
