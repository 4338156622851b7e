"""What stays of a run that goes wrong: a loss that is no number, a full disk, a kill while saving."""

import re
import resource
import shutil
from contextlib import contextmanager, nullcontext
from pathlib import Path

import joint_runs
import pytest
import torch
import warmup_runs
from safetensors.torch import load_file
from tiny import tiny_tokenizer
from tiny_training import warm_up
from transformers import Trainer

from modeling_lmtp.conversion.saving import save_checkpoint
from modeling_lmtp.training.answer_trainer import last_whole_checkpoint
from modeling_lmtp.training.examples import Example

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
POISONED = 62  # a token whose embedding is no number
STAGES = {"warm-up": (warm_up, warmup_runs), "joint": (joint_runs.joint_tune, joint_runs)}


def run(stage, folder, model=None, rows=None, **changes):
    """Train the model of a stage's tests on their answers, four a step."""
    train, module = STAGES[stage]
    model = module.new_model() if model is None else model
    rows = module.examples(20) if rows is None else rows
    options = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "save_steps": 2, **changes}
    chosen = module.settings(1, **options) if stage == "warm-up" else module.settings(**options)
    train(model, rows, [], folder, chosen)
    return model


def trained(model):
    return {name: value for name, value in model.state_dict().items() if "leap_heads" in name}


def kept(folder):
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_no_number_stops_the_run_and_its_batch_is_kept(tmp_path, stage):
    model = STAGES[stage][1].new_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[POISONED] = float("nan")
    rows = [*STAGES[stage][1].examples(19), Example([5, 6, 7, POISONED, 8, 9], 3)]
    with pytest.raises(RuntimeError, match=r"The loss is nan at step \d") as raised:
        run(stage, tmp_path, model, rows, save_steps=1)
    told = re.match(r".* at step (\d+). Its batch is in (\S+) \(.*input_ids", str(raised.value))
    step = int(told[1])
    assert step > 1, "the row was in the first batch: nothing is saved before it"
    assert f"{tmp_path / f'checkpoint-{step - 1}'}, is from before" in str(raised.value)
    assert not (tmp_path / f"checkpoint-{step}").exists()
    batch = load_file(told[2])
    assert set(batch) >= {"input_ids", "attention_mask", "labels"}
    assert POISONED in batch["input_ids"]
    assert batch["input_ids"].shape[0] == 4
    assert all(value.isfinite().all() for value in trained(model).values())


def test_a_loss_that_is_no_number_in_the_first_step_is_said_to_leave_nothing(tmp_path):
    model = warmup_runs.new_model()
    with torch.no_grad():
        model.leap_heads[0].blocks[0].linear.bias.fill_(float("nan"))
    with pytest.raises(RuntimeError, match=r"nan at step 1\..*Nothing is saved"):
        run("warm-up", tmp_path, model)
    assert kept(tmp_path) == {"run.json", "bad_batch_step_1.safetensors"}


@contextmanager
def files_of_at_most(room):
    """Let no file grow beyond `room` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def full_disk(step, room):
    """Leave room for files of at most `room` bytes while the checkpoint of `step` is saved."""
    save = Trainer._save_checkpoint

    def with_limit(self, *args, **kwargs):
        with files_of_at_most(room) if self.state.global_step == step else nullcontext():
            save(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_save_checkpoint", with_limit)
        yield


@pytest.mark.parametrize("room", [0, 12_000], ids=["for nothing", "for the weights alone"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_spares_the_checkpoint_before_and_the_run_goes_on_from_it(
    tmp_path, stage, room
):
    with full_disk(4, room), pytest.raises(OSError, match="could not be saved") as raised:
        run(stage, tmp_path / "full")
    message = str(raised.value)
    assert message.startswith("The checkpoint of step 4 could not be saved in")
    assert f"{tmp_path / 'full' / 'checkpoint-2'} is whole: the run goes on from there" in message
    assert kept(tmp_path / "full") == {"run.json", "checkpoint-2"}
    resumed, whole = run(stage, tmp_path / "full"), run(stage, tmp_path / "whole")
    torch.testing.assert_close(trained(resumed), trained(whole), rtol=0, atol=0)


@pytest.mark.parametrize("room", [0, 30_000], ids=["for nothing", "for all but the weights"])
def test_a_full_disk_leaves_nothing_of_the_finished_checkpoint(tmp_path, room):
    model, tokenizer = warmup_runs.new_model(), tiny_tokenizer()
    with files_of_at_most(room), pytest.raises(OSError, match=r"File too large|could not be saved"):
        save_checkpoint(model, tokenizer, tmp_path / "out", {})
    assert not kept(tmp_path)
    save_checkpoint(model, tokenizer, tmp_path / "out", {})
    assert "model.safetensors" in kept(tmp_path / "out")


def cut_state(checkpoint):
    file = checkpoint / "trainer_state.json"
    file.write_bytes(file.read_bytes()[:40])


@pytest.mark.parametrize(
    "damage",
    [cut_state, lambda folder: (folder / "trainer_state.json").unlink()],
    ids=["state cut off", "state missing"],
)
def test_what_a_kill_left_half_written_is_no_checkpoint(tmp_path, damage):
    whole = run("warm-up", tmp_path)
    last = Path(last_whole_checkpoint(tmp_path))
    assert last.name == "checkpoint-10"
    damage(last)
    assert Path(last_whole_checkpoint(tmp_path)).name == "checkpoint-8"
    (last / "optimizer.pt").unlink()
    torch.testing.assert_close(trained(run("warm-up", tmp_path)), trained(whole), rtol=0, atol=0)
    for folder in tmp_path.glob("checkpoint-*"):
        shutil.rmtree(folder)
    assert last_whole_checkpoint(tmp_path) is None


@pytest.mark.parametrize("stage", STAGES)
def test_after_sixteen_bits_the_model_is_in_no_autocast(tmp_path, stage):
    model = STAGES[stage][1].new_model(torch.bfloat16)
    forward = model.forward
    run(stage, tmp_path, model, num_train_epochs=1)
    assert model.forward == forward
    assert "_original_forward" not in vars(model)
    tokens = torch.tensor([[5, 6, 7]])
    assert model(tokens).logits.dtype == torch.bfloat16
    assert isinstance(model(tokens, return_dict=False), tuple)
