"""The trainers as people use them who write their own script, and options that Transformers has."""

import json
import subprocess
import sys

import pytest
import torch
from commands import error_of, lmtp
from repositories import hub_in_use
from tiny import tiny_llama, tiny_tokenizer
from tiny_training import examples, new_model, settings

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.training import (
    JointTrainer,
    JointTrainingArguments,
    LeapTrainer,
    LeapTrainingArguments,
)
from modeling_lmtp.training.evaluation import evaluate_heads

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


def rows(answers):
    """Answers as tokenized datasets have them."""
    return [
        {
            "input_ids": answer.input_ids,
            "labels": [-100] * answer.answer_start + answer.input_ids[answer.answer_start :],
            "text": "left alone",
        }
        for answer in answers
    ]


def test_dataset_rows_train_like_examples(tmp_path):
    trained = []
    for answers in (examples(), rows(examples())):
        trainer = LeapTrainer(new_model(), settings(output_dir=str(tmp_path)), answers)
        trainer.train()
        trained.append(trainer.model.leap_heads.state_dict())
    torch.testing.assert_close(trained[1], trained[0], rtol=0, atol=0)


def test_a_datasets_dataset_is_accepted(tmp_path):
    datasets = pytest.importorskip("datasets")
    trainer = LeapTrainer(
        new_model(),
        settings(output_dir=str(tmp_path), max_steps=2),
        datasets.Dataset.from_list(rows(examples())),
        datasets.Dataset.from_list(rows(examples(2, 1))),
    )
    assert trainer.train().global_step == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "response": "b"}, "Row 0 must have input_ids, got prompt, response"),
        ({"input_ids": [5, 6, 7], "labels": [-100, 6, -100]}, "Row 0: labels must be -100 for"),
    ],
    ids=["text", "labels with a gap"],
)
def test_rows_that_are_not_answers_are_refused(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        LeapTrainer(new_model(), settings(output_dir=str(tmp_path)), [row] * 4)


@pytest.mark.parametrize("stage", ["leap", "joint"])
def test_the_tokenizer_changes_no_setting_of_the_model(tmp_path, stage):
    kinds = {
        "leap": (LeapTrainer, LeapTrainingArguments),
        "joint": (JointTrainer, JointTrainingArguments),
    }
    trainer_class, arguments_class = kinds[stage]
    model = new_model()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [7, 9], 9
    model.generation_config.bos_token_id = 8

    def special_ids():
        configs = model.config.get_text_config(), model.generation_config
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        return [getattr(config, name) for config in configs for name in names]

    before = special_ids()
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # its id is one past the vocabulary
    args = arguments_class(output_dir=str(tmp_path), max_steps=1, disable_tqdm=True)
    trainer = trainer_class(model, args, examples(4), processing_class=tokenizer)
    trainer.train()
    assert special_ids() == before == [1, 2, 2, 8, [7, 9], 9]
    [checkpoint] = tmp_path.glob("checkpoint-*")
    assert (checkpoint / "tokenizer.json").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_evaluate_and_predict_return_the_held_out_metrics(tmp_path, dtype):
    model, held_out = new_model(dtype), examples(4, 1)
    trainer = LeapTrainer(model, settings(output_dir=str(tmp_path)), examples(), held_out)
    before = trainer.evaluate()
    report, _ = evaluate_heads(model, held_out)
    assert before["eval_tokens_per_step"] == report.chain_tokens_per_step
    assert before["eval_top1_distance_1"] == report.accuracies[0][0]
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    predicted = trainer.predict(rows(held_out)).metrics
    assert predicted["test_loss"] == pytest.approx(after["eval_loss"], rel=1e-3)
    assert predicted["test_tokens_per_step"] == after["eval_tokens_per_step"]


def test_the_evaluation_loss_is_the_loss_of_the_heads(tmp_path):
    model, held_out = new_model(), examples(4, 1)
    trainer = LeapTrainer(model, settings(output_dir=str(tmp_path)), examples(), held_out)
    tokens = torch.tensor([example.input_ids for example in held_out])
    labels = tokens.clone()
    labels[:, :2] = -100
    with torch.no_grad():
        count = (labels != -100).sum()
        expected = model.eval()(tokens, labels=labels, num_items_in_batch=count).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_checkpoints_load_if_the_configuration_names_the_backbone(tmp_path):
    tiny_llama(vocab_size=64).save_pretrained(tmp_path / "backbone")
    model = LMTPForCausalLM.from_backbone(str(tmp_path / "backbone"), leap_offsets=(2, 3))
    args = settings(output_dir=str(tmp_path / "run"))
    trainer = LeapTrainer(model, args, examples(), processing_class=tiny_tokenizer())
    trainer.train()
    trainer.save_model(str(tmp_path / "heads"))
    for folder in (tmp_path / "heads", tmp_path / "run" / "checkpoint-12"):
        loaded = LMTPForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(
            loaded.leap_heads.state_dict(), model.leap_heads.state_dict(), rtol=0, atol=0
        )
        assert (folder / "tokenizer_config.json").exists()


def test_a_run_resumes_only_on_request(tmp_path):
    args = settings(output_dir=str(tmp_path), max_steps=4)
    assert LeapTrainer(new_model(), args, examples()).train().global_step == 4
    steps = []
    trainer = LeapTrainer(new_model(), args, examples())
    step = trainer.training_step
    trainer.training_step = lambda *a, **k: steps.append(1) or step(*a, **k)
    trainer.train()
    assert len(steps) == 4


def test_a_joint_trainer_adds_the_adapters_it_trains(tmp_path):
    args = JointTrainingArguments(output_dir=str(tmp_path), max_steps=2, disable_tqdm=True)
    trainer = JointTrainer(new_model(), args, rows(examples()), rows(examples(2, 1)))
    assert trainer.evaluate()["eval_kl"] == 0
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    assert isinstance(trainer.model.merge_and_unload(), LMTPForCausalLM)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("options")
    tiny_llama().save_pretrained(folder / "backbone")
    tiny_tokenizer().save_pretrained(folder / "backbone")
    text = [{"prompt": f"Question {i}?", "response": "The sea and the wind."} for i in range(8)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text))
    return folder


def train(folder, output, *options):
    arguments = ["train", folder / "backbone", folder / "answers.jsonl", output, "--held_out", 2]
    return [*arguments, "--leap_offsets", 2, 3, *options]


def test_options_of_transformers_are_accepted(folder, tmp_path):
    output = tmp_path / "out"
    options = ["--optim", "adafactor", "--max_grad_norm", 0.5, "--lr_scheduler_type", "linear"]
    result = lmtp(*train(folder, output, *options, "--max_steps", 3))
    assert result.exit_code == 0, result.output
    settings_of_run = json.loads((output / "provenance.json").read_text())["settings"]
    assert settings_of_run["optim"] == "adafactor"
    assert settings_of_run["max_grad_norm"] == 0.5
    assert (settings_of_run["lr_scheduler_type"], settings_of_run["max_steps"]) == ("linear", 3)
    assert "hub_token" not in settings_of_run


def test_reports_are_saved_with_the_checkpoint(folder, tmp_path):
    pytest.importorskip("tensorboard")
    output = tmp_path / "out"
    result = lmtp(*train(folder, output, "--report_to", "tensorboard"))
    assert result.exit_code == 0, result.output
    assert list((output / "runs").rglob("events.out.*"))


@pytest.mark.slow
def test_heads_are_pushed_to_the_hub_as_a_checkpoint(folder, tmp_path):
    with hub_in_use(tmp_path) as hub:
        command = train(folder, tmp_path / "heads", "--push_to_hub")
        # In a process of its own, which finds that Hub when it imports huggingface_hub
        subprocess.run([sys.executable, "-m", "modeling_lmtp", *map(str, command)], check=True)
        files = hub.files("me/heads")
    assert json.loads(files["config.json"])["heads_only"]
    assert {"model.safetensors", "modeling_lmtp.py", "tokenizer.json"} < files.keys()
    assert f"base_model: {folder / 'backbone'}" in files["README.md"].decode()
    assert (tmp_path / "heads" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--output_dir", "elsewhere"],
            "--output_dir must be left out, got elsewhere: the third argument of lmtp train",
        ),
        (["--label_smoothing_factor", 0.1], "label_smoothing_factor must be 0, got 0.1"),
        (["--num_train_epoch", 2], "did you mean --num_train_epochs?"),
        (["--per_device_train_batch_size", 0], "per_device_train_batch_size must be at least 1"),
        (["--lr_scheduler_type", "sideways"], "sideways is not a valid SchedulerType"),
    ],
    ids=str,
)
def test_invalid_options_are_one_line_errors(folder, tmp_path, options, message):
    assert message in error_of(*train(folder, tmp_path / "out", *options))
    assert not list(tmp_path.iterdir())


def test_arguments_are_checked_in_a_script_too():
    with pytest.raises(ValueError, match="curriculum must be one of none, forward, reverse"):
        LeapTrainingArguments(curriculum="sideways")
