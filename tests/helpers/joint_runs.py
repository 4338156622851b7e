"""Tiny models, answers and settings for the tests of joint tuning."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from tiny import tiny_llama
from torch.nn.functional import cross_entropy

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.training.arguments import JointTrainingArguments
from modeling_lmtp.training.examples import Example
from modeling_lmtp.training.joint_trainer import JointTrainer

PROMPT = torch.tensor([[5, 17, 60, 33, 41, 9]])
OFFSETS = (2, 3)
ANSWER_START = 3  # no less than the offsets: every head has the same targets as the NTP loss


def new_model(dtype: torch.dtype = torch.float32, **options: Any) -> LMTPForCausalLM:
    """Return the same small model each time, with heads that are no longer the identity."""
    backbone = tiny_llama(vocab_size=64).to(dtype)
    model = LMTPForCausalLM.from_backbone(backbone, **{"leap_offsets": OFFSETS, **options})
    generator = torch.Generator().manual_seed(8)
    for parameter in model.leap_heads.parameters():
        parameter.data += (torch.randn(parameter.shape, generator=generator) * 0.2).to(dtype)
    return model.eval()


def examples(count: int = 24, seed: int = 0) -> list[Example]:
    """Return answers with something to learn: every other token repeats the one before."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, 60, (count, 20), generator=generator)
    rows[:, 1::2] = rows[:, ::2]
    lengths = torch.randint(12, 21, (count,), generator=generator).tolist()
    return [Example(row[:n].tolist(), ANSWER_START) for row, n in zip(rows, lengths, strict=True)]


def settings(**changes: Any) -> JointTrainingArguments:
    """Return arguments of a short run with large steps."""
    defaults = {
        "disable_tqdm": True,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-3,
        "lora_r": 4,
        "lora_alpha": 8,
        "logging_steps": 1,
    }
    return JointTrainingArguments(**{**defaults, **changes})


def joint_tune(model, rows, held_out, folder, args) -> JointTrainer:
    """Tune a model in `folder`, or resume there, and return the trainer."""
    trainer = JointTrainer(model, replace(args, output_dir=str(folder)), rows, held_out)
    trainer.train(resume_from_checkpoint=True)
    return trainer


def naive_sums(model: Any, example: Example) -> tuple[float, list[float], int]:
    """Return the summed cross-entropy of the NTP and of each head, and the number of targets."""
    ids = torch.tensor([example.input_ids])
    with torch.no_grad():
        outputs = model(input_ids=ids, output_leap_logits=True)
    targets = range(example.answer_start, len(example.input_ids))

    def loss(logits: torch.Tensor, offset: int) -> float:
        return sum(float(cross_entropy(logits[0, t - offset], ids[0, t])) for t in targets)

    leap_logits = zip(outputs.leap_logits, model.config.leap_offsets, strict=True)
    return loss(outputs.logits, 1), [loss(*pair) for pair in leap_logits], len(targets)
