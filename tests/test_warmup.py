import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_llama
from transformers import TrainerCallback

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.training.examples import Example
from modeling_lmtp.training.warmup import LeapTrainer, WarmupSettings, warm_up

pytestmark = [
    # Trainer resumes with torch.load of its own files, optimizer state among them
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


def examples(count=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, 60, (count, 20), generator=generator)
    rows[:, 1::2] = rows[:, ::2]  # something to learn: every other token repeats the one before
    return [Example(row.tolist(), 2) for row in rows]


def new_model(dtype=torch.float32):
    torch.manual_seed(1)
    backbone = tiny_llama(vocab_size=64).to(dtype)
    return LMTPForCausalLM.from_backbone(backbone, leap_offsets=(2, 3))


def settings(**changes):
    return WarmupSettings(
        **{"epochs": 2, "batch_size": 4, "logging_steps": 2, "save_steps": 3, **changes}
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_learn_and_the_backbone_stays(tmp_path, dtype):
    model = new_model(dtype)
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    report = warm_up(
        model, examples(), examples(4, 1), tmp_path, settings(epochs=6), progress=False
    )
    losses = [entry["loss_head_2"] for entry in report.log if "loss_head_2" in entry]
    assert losses[-1] < losses[0]
    assert all(
        torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items()
    )
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    epochs = [entry for entry in report.log if "held_out_tokens_per_step" in entry]
    assert len(epochs) == 6
    assert report.held_out is not None
    assert epochs[-1]["held_out_tokens_per_step"] >= 1


def test_checkpoints_of_a_run_hold_the_heads_alone(tmp_path):
    warm_up(new_model(), examples(), [], tmp_path, settings(), progress=False)
    saved = load_file(tmp_path / "checkpoint-12" / "model.safetensors")
    assert saved
    assert all(name.startswith("leap_heads.") for name in saved)


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    whole = new_model()
    warm_up(whole, examples(), [], tmp_path / "whole", settings(), progress=False)

    class KilledError(Exception):
        pass

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 8:  # after the checkpoint of step 6
                raise KilledError

    stopped = new_model()
    original = LeapTrainer.__init__

    def with_kill(self, *args, callbacks, **kwargs):
        original(self, *args, callbacks=[*callbacks, Kill()], **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LeapTrainer, "__init__", with_kill)
        with pytest.raises(KilledError):
            warm_up(stopped, examples(), [], tmp_path / "stopped", settings(), progress=False)
    resumed = new_model()
    warm_up(resumed, examples(), [], tmp_path / "stopped", settings(), progress=False)
    for name, value in whole.leap_heads.state_dict().items():
        torch.testing.assert_close(resumed.leap_heads.state_dict()[name], value, rtol=0, atol=0)


def test_a_run_folder_of_another_run_is_refused_and_kept(tmp_path):
    warm_up(new_model(), examples(), [], tmp_path, settings(), progress=False)
    record = (tmp_path / "run.json").read_text()
    with pytest.raises(ValueError, match="another learning_rate"):
        warm_up(new_model(), examples(), [], tmp_path, settings(learning_rate=0.5), progress=False)
    with pytest.raises(ValueError, match="another examples_sha256"):
        warm_up(new_model(), examples(seed=5), [], tmp_path, settings(), progress=False)
    assert (tmp_path / "run.json").read_text() == record
    assert json.loads(record)["learning_rate"] == 1e-3


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model = new_model()
    with torch.no_grad():
        model.leap_heads[0].blocks[0].linear.bias.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="The loss is nan at step 2"):
        warm_up(model, examples(), [], tmp_path, settings(), progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs: expected more than 0, got 0"),
        ({"batch_size": 0}, "batch_size: expected 1 or more, got 0"),
        ({"learning_rate": -1.0}, "learning_rate: expected more than 0"),
        ({"warmup_share": 1.0}, "warmup_share: expected 0 or more, below 1"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        WarmupSettings(**change)


def test_models_without_heads_or_with_a_training_backbone_are_refused(tmp_path):
    without = LMTPForCausalLM.from_backbone(tiny_llama(), num_leap_heads=0)
    with pytest.raises(ValueError, match="no leap heads to train"):
        warm_up(without, examples(), [], tmp_path, settings())
    joint = LMTPForCausalLM.from_backbone(tiny_llama(), train_backbone=True)
    with pytest.raises(ValueError, match="Warm-up freezes the backbone"):
        warm_up(joint, examples(), [], tmp_path, settings())
