"""`lmtp joint`, as a user types it, on a tiny model in a folder."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from commands import error_of, lmtp
from peft import PeftModel
from tiny import tiny_llama, tiny_tokenizer

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.conversion.loading import load_lmtp
from modeling_lmtp.conversion.saving import file_sha256

# PEFT asks for what Transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
SHORT = [
    "--held_out",
    2,
    "--per_device_train_batch_size",
    2,
    "--num_train_epochs",
    1,
    "--lora_r",
    4,
]
PROMPT = torch.tensor([[5, 17, 60, 33, 41, 9]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("joint_cli")
    model = LMTPForCausalLM.from_backbone(tiny_llama(), leap_offsets=(2, 3, 5))
    model.config.base_model_name_or_path = "some/backbone"
    model.config.base_model_revision = "abc123"
    model.save_pretrained(folder / "checkpoint")
    tiny_llama().save_pretrained(folder / "backbone")
    for name in ("checkpoint", "backbone"):
        tiny_tokenizer().save_pretrained(folder / name)
    rows = [{"prompt": f"Question {i}?", "response": "The sea and the wind."} for i in range(8)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_joint_saves_only_an_adapter_with_its_record(folder, tmp_path):
    output = tmp_path / "adapter"
    options = ["--learning_rate", "1e-2", "--kl_weight", "0.1", "--leap_loss_weight", "0.2"]
    answers = folder / "answers.jsonl"
    result = lmtp("joint", folder / "checkpoint", answers, output, *SHORT, *options)
    assert result.exit_code == 0, result.output
    told = " ".join(result.output.split())
    assert re.search(r"Drift from the original backbone: KL 0\.\d+ nats per token", told)
    assert "Heads before: top-1" in told
    assert "Heads after: top-1" in told
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]

    record = json.loads((output / "provenance.json").read_text())
    assert record["command"] == "lmtp joint"
    assert record["checkpoint"] == str(folder / "checkpoint")
    assert (record["base_model"], record["base_model_revision"]) == ("some/backbone", "abc123")
    assert record["answers_sha256"] == file_sha256(answers)
    assert (record["examples"], record["merged"]) == (6, False)
    assert (record["settings"]["kl_weight"], record["settings"]["leap_loss_weight"]) == (0.1, 0.2)
    assert record["held_out"]["drift"]["kl"] > 0
    assert len(record["held_out"]["heads_after"]["accuracies"]) == 4
    assert any("eval_kl" in entry for entry in record["log"])

    log = json.loads((output / "training_log.json").read_text())
    assert log == {"leap_offsets": [2, 3, 5], "log": record["log"]}

    loaded = load_lmtp(output)
    assert not loaded.config.train_backbone
    base = LMTPForCausalLM.from_pretrained(folder / "checkpoint")
    plain = base(PROMPT).logits
    adapted = PeftModel.from_pretrained(base, output)
    assert not torch.allclose(adapted(input_ids=PROMPT).logits, plain, atol=1e-3)
    torch.testing.assert_close(
        loaded(PROMPT, output_leap_logits=True).leap_logits,
        adapted(input_ids=PROMPT, output_leap_logits=True).leap_logits,
        rtol=1e-4,
        atol=1e-4,
    )

    plain = lmtp("generate", output, "The sea", "--max_new_tokens", 12, "--plain")
    fast = lmtp("generate", output, "The sea", "--max_new_tokens", 12)
    assert plain.exit_code == 0, plain.output
    assert fast.stdout == plain.stdout
    short = ["--num_prompts", 1, "--max_new_tokens", 6]
    verified = lmtp("verify", output, "--prompts", answers, *short)
    assert verified.exit_code == 0, verified.output
    refused = error_of("joint", output, answers, tmp_path / "again", *SHORT)
    assert f"got the adapter {str(output)!r}, without which" in refused


@pytest.mark.parametrize("merge", [[], ["--merge"]], ids=["adapter", "merged"])
def test_the_command_resumes_after_the_disk_was_full_in_the_last_step(
    folder, tmp_path, monkeypatch, merge
):
    arguments = [folder / "checkpoint", folder / "answers.jsonl", tmp_path / "out", *SHORT, *merge]

    def no_room(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("modeling_lmtp.training.training_run.save_training_log", no_room)
        assert "No space left on device" in error_of("joint", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["out.training"]
    with monkeypatch.context() as patch:
        patch.setattr("modeling_lmtp.training.training_run.shutil", SimpleNamespace(rmtree=no_room))
        assert "No space left on device" in error_of("joint", *arguments)
    assert (tmp_path / "out" / "training_log.json").exists()
    message = error_of("joint", *arguments)
    assert f"{tmp_path / 'out.training'} is left over from that run: delete it" in message


def test_merge_saves_a_checkpoint_that_generates_and_verifies(folder, tmp_path):
    output = tmp_path / "tuned"
    arguments = [folder / "checkpoint", folder / "answers.jsonl", output, *SHORT]
    result = lmtp(
        "joint", *arguments, "--merge", "--learning_rate", "1e-2", "--head_training", "full"
    )
    assert result.exit_code == 0, result.output
    assert "Saved the tuned checkpoint" in result.output
    assert json.loads((output / "provenance.json").read_text())["merged"] is True
    assert not (output / "adapter_config.json").exists()
    before = LMTPForCausalLM.from_pretrained(folder / "checkpoint")
    after = LMTPForCausalLM.from_pretrained(output)
    assert after.config.leap_offsets == (2, 3, 5)
    assert not after.config.train_backbone
    assert not any(parameter.requires_grad for parameter in after.backbone.parameters())
    assert not torch.allclose(after(PROMPT).logits, before(PROMPT).logits, atol=1e-3)
    plain = lmtp("generate", output, "The sea", "--max_new_tokens", 12, "--plain")
    fast = lmtp("generate", output, "The sea", "--max_new_tokens", 12)
    assert (plain.exit_code, fast.exit_code) == (0, 0)
    assert fast.stdout == plain.stdout


def test_without_held_out_answers_joint_reports_no_metrics(folder, tmp_path):
    arguments = [folder / "checkpoint", folder / "answers.jsonl", tmp_path / "out", *SHORT[2:]]
    result = lmtp("joint", *arguments, "--held_out", 0, "--leap_loss_weight", 0)
    assert result.exit_code == 0, result.output
    assert "Drift" not in result.output
    assert "Heads" not in result.output


def test_errors_are_one_line_with_a_remedy(folder, tmp_path):
    output = tmp_path / "out"
    arguments = [folder / "checkpoint", folder / "answers.jsonl", output]
    assert "invalid choice: 'some'" in error_of("joint", *arguments, "--head_training", "some")
    assert "lora_r must be at least 1, got 0" in error_of("joint", *arguments, "--lora_r", 0)
    plain = error_of("joint", folder / "backbone", folder / "answers.jsonl", output)
    assert "has no leap heads" in plain
    assert not any(tmp_path.iterdir())
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    assert "already holds something" in error_of("joint", *arguments)
