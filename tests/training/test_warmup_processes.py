"""Two processes on the CPU (gloo), as `accelerate launch` starts them, train what one trains.

A launch takes longer than all that is done in it, so each has one test, which checks many things.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from warmup_runs import RUNS, run, save_sources, stopped, train

from modeling_lmtp import LMTPForCausalLM

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
WORKER = Path(__file__).parents[1] / "helpers" / "warmup_runs.py"


def launch(options, *arguments):
    """Run the worker in two processes, without an accelerator.

    (`accelerate launch --cpu --num_processes 2` would start one, unless MPI is there.)
    """
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    accelerate = shutil.which("accelerate", path=Path(sys.executable).parent)
    command = [accelerate, "launch", *options, "--num_processes", "2", "--main_process_port", "0"]
    result = subprocess.run(
        [*command, WORKER, *arguments], env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The runs in one process, and one that was stopped."""
    folder = tmp_path_factory.mktemp("alone")
    for name, changes in RUNS.items():
        model, _ = run(folder / name, 1, **changes)
        torch.save(model.leap_heads.state_dict(), folder / f"{name}.pt")
    run(folder / "bfloat16", 1, dtype=torch.bfloat16)
    with stopped():
        run(folder / "stopped_in_one", 1)
    save_sources(folder)
    train(folder, folder / "checkpoint", 1)
    return folder


def log_of(folder):
    return json.loads((folder / "log.json").read_text())


def figures(folder, prefix):
    """What the log says under names that start so, in order."""
    return [
        value
        for entry in log_of(folder)
        for name, value in sorted(entry.items())
        if name.startswith(prefix)
    ]


def assert_same_curves(actual_folder, expected_folder):
    for prefix in ("loss", "top1_head", "divergence_head", "eval_tokens_per_step", "epoch"):
        expected, actual = (figures(folder, prefix) for folder in (expected_folder, actual_folder))
        assert actual == pytest.approx(expected, rel=1e-5), f"{prefix} of {actual_folder.name}"
    assert len(figures(actual_folder, "loss_head")) >= 12


def assert_same_weights(actual, expected):
    torch.testing.assert_close(dict(actual), dict(expected), rtol=1e-4, atol=1e-5)


def assert_two_took_part_and_one_wrote(folder):
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    states = {path.name for path in last.glob("rng_state*")}
    assert states == {"rng_state_0.pth", "rng_state_1.pth"}
    saved = load_file(last / "model.safetensors")
    assert saved
    assert all(name.startswith("leap_heads.") for name in saved)
    files = {path.name for path in folder.iterdir() if path.is_file()}
    assert files == {"run.json", "log.json"}


def assert_same_checkpoint(actual_folder, expected_folder):
    """What `lmtp train` saves, in one piece and once."""
    record = json.loads((actual_folder / "provenance.json").read_text())
    assert record["processes"] == 2
    expected, actual = (
        LMTPForCausalLM.from_pretrained(folder).state_dict()
        for folder in (expected_folder, actual_folder)
    )
    assert_same_weights(actual, expected)
    files = {path.name for path in actual_folder.iterdir()}
    assert files == {path.name for path in expected_folder.iterdir()}
    assert files >= {"training_log.json", "model.safetensors", "tokenizer.json"}
    assert not list(actual_folder.parent.glob("*checkpoint.*"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_what_one_does(alone, tmp_path, kind):
    shutil.copytree(alone / "stopped_in_one", tmp_path / kind / "stopped_in_one")
    save_sources(tmp_path)
    launch(["--multi_gpu"], tmp_path, kind)
    together = tmp_path / kind
    for name in RUNS:
        assert_same_curves(together / name, alone / name)
        assert_same_weights(torch.load(together / f"{name}.pt"), torch.load(alone / f"{name}.pt"))
    assert_two_took_part_and_one_wrote(together / "plain")
    assert_same_checkpoint(together / "checkpoint", alone / "checkpoint")

    # A run goes on in another number of processes
    assert_same_curves(together / "stopped_in_one", alone / "plain")
    assert not (together / "stopped_in_two" / "log.json").exists()
    model, _ = run(together / "stopped_in_two", 1)
    assert_same_curves(together / "stopped_in_two", alone / "plain")
    assert_same_weights(model.leap_heads.state_dict(), torch.load(alone / "plain.pt"))

    # In 16 bits it differs by rounding
    expected, actual = (figures(folder / "bfloat16", "loss") for folder in (alone, together))
    assert actual == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
def test_accelerate_launch_asks_for_fsdp_as_the_runs_do(alone, tmp_path):
    launch(["--use_fsdp", "--fsdp_version", "2"], tmp_path, "as_launched")
    expected, actual = (
        figures(folder, "loss") for folder in (alone / "plain", tmp_path / "as_launched")
    )
    assert actual == pytest.approx(expected, rel=1e-5)
