"""A tiny model with heads to train, answers that it can learn, and a short run."""

from dataclasses import replace

import torch
from tiny import tiny_llama

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.training.arguments import LeapTrainingArguments
from modeling_lmtp.training.examples import Example
from modeling_lmtp.training.leap_trainer import LeapTrainer


def examples(count=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, 60, (count, 20), generator=generator)
    rows[:, 1::2] = rows[:, ::2]  # something to learn: every other token repeats the one before
    return [Example(row.tolist(), 2) for row in rows]


def new_model(dtype=torch.float32, **heads):
    torch.manual_seed(1)
    backbone = tiny_llama(vocab_size=64).to(dtype)
    return LMTPForCausalLM.from_backbone(backbone, **{"leap_offsets": (2, 3), **heads})


def settings(**changes):
    defaults = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "logging_steps": 2,
        "save_steps": 3,
        "disable_tqdm": True,
    }
    return LeapTrainingArguments(**{**defaults, **changes})


def warm_up(model, rows, held_out, folder, args):
    """Train heads in `folder`, or resume there, and return the trainer."""
    args = replace(args, output_dir=str(folder))
    trainer = LeapTrainer(model, args, rows, held_out)
    trainer.train(resume_from_checkpoint=True)
    return trainer
