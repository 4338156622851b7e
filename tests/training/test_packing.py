"""Packed answers learn what they learn alone, or are refused."""

import pytest
import torch
from architectures import tiny_causal_lm

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.training.examples import AnswerDataset, Example
from modeling_lmtp.training.objective import HeadObjective
from modeling_lmtp.training.packing import (
    PackedDataset,
    check_isolation,
    collate_packs,
    max_relative_difference,
    pack,
)

OFFSETS = (2, 3, 5)


def answers(lengths=(9, 21, 14, 6, 18)):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 90, (length,), generator=generator).tolist() for length in lengths]
    return [Example(row, answer_start=3) for row in rows]


def new_model(architecture="llama", attention="sdpa", **options):
    backbone = tiny_causal_lm(architecture)
    backbone.set_attn_implementation(attention)
    model = LMTPForCausalLM.from_backbone(backbone, leap_offsets=OFFSETS, **options).eval()
    generator = torch.Generator().manual_seed(7)
    for parameter in model.leap_heads.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def summed(model, batches, weight=0.0):
    """The sum of all token losses of the batches, its gradients, and what was counted."""
    objective = HeadObjective(len(OFFSETS), weight)
    loss = sum(
        model(**batch, num_items_in_batch=1, leap_objective=objective).loss for batch in batches
    )
    gradients = torch.autograd.grad(loss, list(model.leap_heads.parameters()))
    return loss, gradients, objective.take_tally()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "options",
    [{}, {"head_context": 2}, {"head_context": "path"}, {"draft_token_ids": range(0, 90, 2)}],
    ids=["paper's", "grounded", "path", "draft vocabulary"],
)
@pytest.mark.parametrize("train_on_prompts", [False, True], ids=["answers", "with prompts"])
def test_the_loss_of_packs_is_the_sum_over_the_answers(options, attention, train_on_prompts):
    model = new_model(attention=attention, **options)
    rows = AnswerDataset(answers(), train_on_prompts=train_on_prompts)
    packs = PackedDataset(rows, 36)
    batch = collate_packs([packs[i] for i in range(len(packs))])
    assert batch["input_ids"].shape[0] == len(packs) < len(rows)
    alone = [
        {"input_ids": torch.tensor([row["input_ids"]]), "labels": torch.tensor([row["labels"]])}
        for row in (rows[i] for i in range(len(rows)))
    ]
    torch.testing.assert_close(
        summed(model, [batch], weight=0.4), summed(model, alone, weight=0.4), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral", "qwen3_moe", "gpt_neox"])
def test_attention_isolates_the_parts(architecture, attention):
    backbone = tiny_causal_lm(architecture)
    backbone.set_attn_implementation(attention)
    assert max_relative_difference(backbone, 2) < 1e-5
    assert max_relative_difference(backbone.bfloat16(), 2) < 0.03
    check_isolation(backbone, batch_size=4)


@pytest.mark.parametrize(
    "architecture", ["mamba", "qwen3_next", "lfm2", "opt", "bloom", "falcon_h1"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_that_do_not_isolate_the_parts_are_refused(architecture, dtype):
    backbone = tiny_causal_lm(architecture).to(dtype)
    with pytest.raises(ValueError, match="does not keep packed answers apart in batches of 4"):
        check_isolation(backbone, batch_size=4)


def test_every_answer_is_in_one_pack_and_no_pack_is_too_long():
    lengths = torch.randint(1, 100, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    packs = pack(lengths, 100)
    assert sorted(row for rows in packs for row in rows) == list(range(500))
    filled = [sum(lengths[row] for row in rows) for rows in packs]
    assert max(filled) <= 100
    assert sum(filled) / (100 * len(packs)) > 0.97
    with pytest.raises(
        ValueError, match="pack_length must be at least the longest example's 99 tokens, got 50"
    ):
        pack(lengths, 50)


def test_a_pack_concatenates_its_parts_and_ends_in_padding_without_targets():
    packs = PackedDataset(AnswerDataset([Example([5, 6, 7, 8], 2), Example([9, 10, 11], 1)]), 7)
    assert packs[0] == {
        "input_ids": [5, 6, 7, 8, 9, 10, 11],
        "labels": [-100, -100, 7, 8, -100, 10, 11],
        "position_ids": [0, 1, 2, 3, 0, 1, 2],
    }
    assert packs[1] == {"input_ids": [0], "labels": [-100], "position_ids": [0]}
    batch = collate_packs([packs[0], packs[1]])
    assert set(batch) == {"input_ids", "labels", "position_ids"}  # a mask would hide the parts
    assert batch["labels"][1].tolist() == [-100] * 7
    assert batch["position_ids"][1].tolist() == [0, 0, 1, 2, 3, 4, 5]
