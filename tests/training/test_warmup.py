import json
from contextlib import contextmanager

import pytest
import torch
from architectures import tiny_causal_lm
from safetensors.torch import load_file
from tiny import tiny_llama
from tiny_training import examples, new_model, settings, warm_up
from transformers import TrainerCallback

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.training.examples import Example
from modeling_lmtp.training.leap_trainer import LeapTrainer

pytestmark = [
    # Trainer resumes with torch.load of its own files, optimizer state among them
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_learn_and_the_backbone_stays_frozen(tmp_path, dtype):
    model = new_model(dtype)
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    report = warm_up(model, examples(), examples(4, 1), tmp_path, settings(num_train_epochs=6))
    losses = [entry["loss_head_2"] for entry in report.state.log_history if "loss_head_2" in entry]
    assert losses[-1] < losses[0]
    assert all(
        torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items()
    )
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    epochs = [entry for entry in report.state.log_history if "eval_tokens_per_step" in entry]
    assert len(epochs) == 6
    assert epochs[-1]["eval_tokens_per_step"] >= 1


def test_checkpoints_of_a_run_contain_only_the_heads(tmp_path):
    warm_up(new_model(), examples(), [], tmp_path, settings())
    saved = load_file(tmp_path / "checkpoint-12" / "model.safetensors")
    assert saved
    assert all(name.startswith("leap_heads.") for name in saved)


PACKED = {
    "packing": True,
    "max_length": 50,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
}


@contextmanager
def killed_after(step):
    """Stop the run inside, as a kill would."""

    class KilledError(Exception):
        pass

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise KilledError

    original = LeapTrainer.__init__

    def with_kill(self, *args, **kwargs):
        original(self, *args, callbacks=[Kill()], **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LeapTrainer, "__init__", with_kill)
        with pytest.raises(KilledError):
            yield


@pytest.mark.parametrize("step", [5, 8], ids=["within an epoch", "after an epoch"])
@pytest.mark.parametrize(
    ("heads", "changes"),
    [
        ({}, {}),
        ({"leap_offsets": (3, 5), "head_context": 2}, {"distillation_weight": 0.5}),
        ({"dtype": torch.bfloat16, "share_lm_head": False}, {"weight_decay": 0.1}),
        ({}, PACKED),
        ({"lm_head_rank": 2}, {"curriculum": "reverse", "eval_strategy": "steps", "eval_steps": 1}),
    ],
    ids=["plain", "grounded", "bfloat16, own unembedding", "packed", "curriculum"],
)
def test_a_stopped_run_resumes_to_the_same_weights(tmp_path, heads, changes, step):
    whole, stopped, resumed = (new_model(**heads) for _ in range(3))
    answers = [examples(), examples(2, 1)]
    warm_up(whole, *answers, tmp_path / "whole", settings(**changes))
    with killed_after(step):
        warm_up(stopped, *answers, tmp_path / "stopped", settings(**changes))
    report = warm_up(resumed, *answers, tmp_path / "stopped", settings(**changes))
    torch.testing.assert_close(
        resumed.leap_heads.state_dict(), whole.leap_heads.state_dict(), rtol=0, atol=0
    )
    start = new_model(**heads).leap_heads.state_dict()
    assert any(not torch.equal(start[n], v) for n, v in whole.leap_heads.state_dict().items())
    held_out = [
        entry["step"] for entry in report.state.log_history if "eval_top1_distance_1" in entry
    ]
    assert held_out[-1] == report.state.max_steps
    assert len(held_out) == len(set(held_out)) >= 2


def test_the_folder_of_another_run_is_refused_and_unchanged(tmp_path):
    warm_up(new_model(), examples(), [], tmp_path, settings())
    record = (tmp_path / "run.json").read_text()
    with pytest.raises(ValueError, match="another learning_rate"):
        warm_up(new_model(), examples(), [], tmp_path, settings(learning_rate=0.5))
    with pytest.raises(ValueError, match="another examples_sha256"):
        warm_up(new_model(), examples(seed=5), [], tmp_path, settings())
    other = new_model()
    with torch.no_grad():
        other.backbone.model.norm.weight.mul_(2)
    with pytest.raises(ValueError, match="another checkpoint"):
        warm_up(other, examples(), [], tmp_path, settings())
    assert (tmp_path / "run.json").read_text() == record
    assert json.loads(record)["learning_rate"] == 1e-3


def test_a_run_resumes_only_with_the_same_global_batch_size(tmp_path):
    warm_up(new_model(), examples(), [], tmp_path, settings())
    again = settings(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    warm_up(new_model(), examples(), [], tmp_path, again)
    with pytest.raises(ValueError, match="another global_batch_size"):
        warm_up(new_model(), examples(), [], tmp_path, settings(per_device_train_batch_size=8))


def test_accumulated_gradients_equal_those_of_one_batch(tmp_path):
    answers = [Example(row.input_ids[: 12 + i % 9], 2) for i, row in enumerate(examples(count=21))]
    runs = []
    for batch_size, steps in [(8, 1), (2, 4)]:
        model = new_model()
        shared = settings(
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            logging_steps=1,
        )
        report = warm_up(model, answers, [], tmp_path / str(steps), shared)
        losses = [entry["loss"] for entry in report.state.log_history if "loss" in entry]
        runs.append((torch.tensor(losses), model.leap_heads.state_dict()))
    assert len(runs[0][0]) == 2 * 3  # the third step of an epoch has five answers
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-4, atol=1e-5)


def test_heads_learn_from_states_without_dropout(tmp_path):
    model = LMTPForCausalLM.from_backbone(
        tiny_llama(vocab_size=64, attention_dropout=0.5), leap_offsets=(2, 3)
    )
    tokens = torch.tensor([example.input_ids for example in examples()])
    labels = tokens.clone()
    labels[:, :2] = -100
    expected = model.eval()(tokens, labels=labels, num_items_in_batch=(labels != -100).sum()).loss
    once = settings(num_train_epochs=1, per_device_train_batch_size=24, logging_steps=1)
    report = warm_up(model, examples(), [], tmp_path, once)
    assert report.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_backbone_that_does_not_isolate_packed_answers_is_refused_first(tmp_path):
    model = LMTPForCausalLM.from_backbone(tiny_causal_lm("mamba"), leap_offsets=(2, 3))
    with pytest.raises(ValueError, match="does not keep packed answers apart"):
        warm_up(model, examples(), [], tmp_path / "run", settings(packing=True, max_length=64))
    with pytest.raises(
        ValueError, match="pack_length must be at least the longest example's 20 tokens, got 10"
    ):
        warm_up(
            new_model(), examples(), [], tmp_path / "run", settings(packing=True, max_length=10)
        )
    assert not (tmp_path / "run").exists()


def test_packing_trains_on_fewer_rows(tmp_path):
    packed = settings(
        packing=True,
        max_length=64,
        per_device_train_batch_size=2,
        logging_steps=1,
        num_train_epochs=6,
        learning_rate=1e-2,
    )
    report = warm_up(new_model(), examples(), [], tmp_path, packed)
    losses = [entry["loss_head_2"] for entry in report.state.log_history if "loss_head_2" in entry]
    assert len(losses) == 6 * 4  # 24 answers, three a pack and two packs a step
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])


def test_sharding_in_one_process_is_refused(tmp_path):
    with pytest.raises(ValueError, match="shard_backbone needs several processes, got one"):
        warm_up(new_model(), examples(), [], tmp_path, settings(shard_backbone=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_train_epochs": 0}, "num_train_epochs must be more than 0, got 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate must be more than 0, got -1.0"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"distillation_weight": 1.5}, "distillation_weight must be at least 0 and at most 1, got"),
        ({"distillation_temperature": 0}, "distillation_temperature must be more than 0, got 0"),
        ({"curriculum": "up"}, "curriculum must be one of none, forward, reverse; got 'up'"),
        ({"curriculum_share": 0}, "curriculum_share must be more than 0 and at most 1, got 0"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0, got 0.1"),
        ({"fsdp": "full_shard"}, "would shard the heads too. Pass shard_backbone"),
    ],
    ids=str,
)
def test_invalid_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        settings(**change)


def test_models_without_heads_or_with_a_training_backbone_are_refused(tmp_path):
    without = LMTPForCausalLM.from_backbone(tiny_llama(), num_leap_heads=0)
    with pytest.raises(ValueError, match="leap_offsets must not be empty"):
        warm_up(without, examples(), [], tmp_path, settings())
    joint = LMTPForCausalLM.from_backbone(tiny_llama(), train_backbone=True)
    with pytest.raises(ValueError, match="LeapTrainer freezes the backbone"):
        warm_up(joint, examples(), [], tmp_path, settings())
