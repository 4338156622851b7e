"""Heads that cannot learn, because the labels do not reach the model, are not silent about it."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_llama
from transformers import Trainer, TrainingArguments

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.losses_lmtp import logger

# Transformers has renamed it
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if hasattr(TrainingArguments, name)
)
ROWS = [{"input_ids": (ids := torch.arange(3 + i, 19 + i)), "labels": ids} for i in range(4)]
BATCH = torch.stack([row["labels"] for row in ROWS])


@pytest.fixture
def warnings(monkeypatch):
    found = []
    monkeypatch.setattr(logger, "warning_once", found.append)
    return found


def new_model(**options):
    return LMTPForCausalLM.from_backbone(
        tiny_llama(96), leap_offsets=(2, 3), train_backbone=True, **options
    ).train()


def train(folder, model, **options):
    settings = {"max_steps": 1, "report_to": [], "save_strategy": "no", "use_cpu": True}
    loss = options.pop("compute_loss_func", None)
    args = TrainingArguments(str(folder), disable_tqdm=True, **settings, **options)
    Trainer(model, args, train_dataset=ROWS, compute_loss_func=loss).train()


def own_loss(outputs, labels, num_items_in_batch=None):
    return outputs["logits"].float().logsumexp(-1).mean()


@pytest.mark.parametrize(
    "options",
    [{"label_smoothing_factor": 0.1}, {"compute_loss_func": own_loss}],
    ids=["label smoothing", "own loss"],
)
def test_options_that_take_the_labels_away_are_named(tmp_path, warnings, options):
    train(tmp_path, new_model(), **options)
    assert {*warnings} == {warnings[0]}
    [name] = options
    assert "do not learn" in warnings[0]
    assert name in warnings[0]
    warnings.clear()
    model = new_model()
    model.leap_heads.requires_grad_(False)  # as the warning says
    train(tmp_path, model, **options)
    assert warnings == []


def test_passes_that_need_no_labels_are_silent(tmp_path, warnings):
    model = new_model()
    train(tmp_path, model)
    train(tmp_path, model, **{CHECKPOINTING: True})
    model.train()
    model(BATCH, output_leap_logits=True)  # for a loss of one's own
    with torch.no_grad():
        model(BATCH)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 2}
    model.generate(BATCH, use_lmtp=True, **options)
    model.eval()(BATCH)
    LMTPForCausalLM.from_backbone(tiny_llama(96), num_leap_heads=0).train()(BATCH)
    assert warnings == []
