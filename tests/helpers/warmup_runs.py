"""Warm-up runs for the tests of several processes; run as a script, it is one of the processes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from tiny import tiny_llama, tiny_tokenizer
from tiny_training import warm_up
from transformers import TrainerCallback

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.training.arguments import HeadOptions, LeapTrainingArguments
from modeling_lmtp.training.examples import Example
from modeling_lmtp.training.leap_trainer import LeapTrainer
from modeling_lmtp.training.sharding import USE_FSDP, is_sharded
from modeling_lmtp.training.train_command import train as train_command
from modeling_lmtp.training.training_run import RunOptions

ROWS_PER_STEP = 4
STOP_AFTER = 8  # steps; the last checkpoint is that of step 6, at the end of the first epoch

# Each differs from the plain run in what could go wrong with several processes.
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "packed": {"packing": True, "max_length": 40, "distillation_weight": 0.4},
    "accumulated": {"gradient_accumulation_steps": 2, "curriculum": "reverse"},
}


class StoppedError(Exception):
    """Stands for a kill."""


def new_model(dtype: torch.dtype = torch.float32) -> LMTPForCausalLM:
    """Return the same small model each time."""
    model = LMTPForCausalLM.from_backbone(tiny_llama(vocab_size=64).to(dtype), leap_offsets=(2, 3))
    generator = torch.Generator().manual_seed(8)
    for parameter in model.leap_heads.parameters():
        parameter.data += (torch.randn(parameter.shape, generator=generator) * 0.2).to(dtype)
    return model


def examples(count: int = 22, seed: int = 0) -> list[Example]:
    """Return answers of different lengths; their number is no multiple of a global batch."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, 60, (count, 20), generator=generator)
    rows[:, 1::2] = rows[:, ::2]
    lengths = torch.randint(8, 21, (count,), generator=generator).tolist()
    return [Example(row[:n].tolist(), 2) for row, n in zip(rows, lengths, strict=True)]


def settings(num_processes: int, **changes: Any) -> LeapTrainingArguments:
    """Return settings whose global batch is the same for any number of processes."""
    steps = changes.get("gradient_accumulation_steps", 1)
    return LeapTrainingArguments(
        **{
            "disable_tqdm": True,
            "num_train_epochs": 2,
            "per_device_train_batch_size": ROWS_PER_STEP // num_processes // steps,
            "logging_steps": 1,
            "save_steps": 3,
            **changes,
        }
    )


def run(
    folder: Path, num_processes: int, *, dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[LMTPForCausalLM, LeapTrainer]:
    """Train a new model, or go on with what `folder` holds."""
    model = new_model(dtype)
    chosen = settings(num_processes, **changes)
    trainer = warm_up(model, examples(), examples(4, 1), folder, chosen)
    if PartialState().is_main_process:
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history))
    return model, trainer


@contextmanager
def stopped() -> Iterator[None]:
    """Stop the run inside after `STOP_AFTER` steps."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == STOP_AFTER:
                raise StoppedError

    original = LeapTrainer.__init__

    def with_stop(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, callbacks=[Stop()], **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LeapTrainer, "__init__", with_stop)
        with pytest.raises(StoppedError):
            yield


def save_sources(folder: Path) -> None:
    """Write what `train` reads: a backbone with its tokenizer, and answers."""
    tiny_llama().save_pretrained(folder / "backbone")
    tiny_tokenizer().save_pretrained(folder / "backbone")
    texts = ["The sea and the wind.", "Eight legs.", "Paris", "Turn by turn", "A poem", "How many?"]
    rows = [{"prompt": text, "response": text * 2, "finished": True} for text in texts]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(sources: Path, output: Path, num_processes: int) -> None:
    """Do what `lmtp train` does."""
    train_command(
        RunOptions(
            str(sources / "backbone"),
            sources / "answers.jsonl",
            output,
            held_out=1,
            dtype="float32",
        ),
        HeadOptions(leap_offsets=[2, 3], draft_vocab_size=100),
        settings(num_processes, max_length=64),
    )


def main() -> None:
    """Do all runs of a test in one launch, which takes longer than they do."""
    for kind in sys.argv[2:]:
        folder = Path(sys.argv[1]) / kind
        if kind == "as_launched":
            model, _ = run(folder, 2)
            assert is_sharded(model)
            continue
        for name, changes in RUNS.items():
            ask_for(kind)
            model, _ = run(folder / name, 2, **changes)
            if torch.distributed.get_rank() == 0:
                torch.save(model.leap_heads.state_dict(), folder / f"{name}.pt")
        ask_for(kind)
        run(folder / "bfloat16", 2, dtype=torch.bfloat16)
        ask_for(kind)
        with stopped():
            run(folder / "stopped_in_two", 2)
        ask_for(kind)
        model, _ = run(folder / "stopped_in_one", 2)
        assert is_sharded(model) == (kind == "fsdp")
        ask_for(kind)
        train(folder.parent, folder / "checkpoint", 2)


def ask_for(kind: str) -> None:
    """Ask for FSDP as `accelerate launch --use_fsdp` does."""
    os.environ[USE_FSDP] = str(kind == "fsdp").lower()


if __name__ == "__main__":
    main()
