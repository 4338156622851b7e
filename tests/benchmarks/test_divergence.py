"""Where texts part is told by position, and a near-tie from an error."""

from __future__ import annotations

import pytest
import torch
from architectures import tiny_causal_lm

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.benchmarks.comparison import compare
from modeling_lmtp.benchmarks.divergence import NUM_ALONE, Divergence, judge
from modeling_lmtp.transformers_lmtp import cache_of

PROMPT = torch.tensor([[3, 17, 5, 9, 44]])
OPTIONS = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": None, "progress": False}


def model_that_errs(monkeypatch, positions: set[int], wrong: int = 1) -> LMTPForCausalLM:
    """L-MTP emits another token at these positions, and goes on from it."""
    model = LMTPForCausalLM.from_backbone(tiny_causal_lm("llama"), leap_offsets=(2, 3, 5))
    right = model.generate

    def generate(inputs, *, use_lmtp, **options):
        if not use_lmtp:
            return right(inputs, use_lmtp=False, **options)
        first = min((p for p in positions if p >= inputs.shape[1] - 5), default=None)
        output = right(inputs, use_lmtp=True, **options)
        tokens = output if torch.is_tensor(output) else output.sequences
        if first is not None:
            tokens[0, 5 + first] = (tokens[0, 5 + first] + wrong) % 96
        return output

    monkeypatch.setattr(model, "generate", generate)
    return model


@pytest.mark.parametrize("positions", [set(), {0}, {3, 4, 17}, {23}, {0, 23}], ids=str)
def test_every_token_decided_differently_is_found(monkeypatch, positions):
    model = model_that_errs(monkeypatch, positions)
    found = compare(model, [PROMPT], {"chain": {}}, **OPTIONS)["chain"]
    assert [divergence.position for divergence in found.divergences] == sorted(positions)
    assert found.num_errors == len(positions)
    summary = found.summary()
    assert summary["share_of_tokens_differing"] == len(positions) / 24
    assert summary["equal"] == (0 if positions else 1)
    assert all(difference["is_error"] for difference in summary["differences"])


def test_a_sampled_text_tells_its_first_difference(monkeypatch):
    model = model_that_errs(monkeypatch, {7, 9})
    options = {**OPTIONS, "do_sample": True, "seed": 1}
    found = compare(model, [PROMPT], {"chain": {}}, **options)["chain"]
    assert [divergence.position for divergence in found.divergences] == [7]


def test_a_gap_is_the_plain_model_s():
    model = LMTPForCausalLM.from_backbone(tiny_causal_lm("llama"))
    with torch.no_grad():
        best, second = model(PROMPT).logits[0, -1].topk(2).values.tolist()
    found = judge(model, PROMPT, 3)
    assert found.position == 3
    assert found.top_two_gap == pytest.approx(best - second, abs=1e-5)
    assert 0 <= found.rounding < 1e-4
    assert found.is_error


@pytest.mark.parametrize("architecture", ["llama", "mistral", "lfm2", "mpt"])
@pytest.mark.parametrize("length", [1, 5])
def test_a_gap_is_that_of_the_logits_that_plain_decoding_saw(architecture, length):
    model = LMTPForCausalLM.from_backbone(tiny_causal_lm(architecture)).eval()
    prompt = PROMPT[:, :length]
    plain = model.generate(
        prompt, do_sample=False, max_new_tokens=24, eos_token_id=None, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    for position in (0, 4, 23):
        best, second = plain.logits[position][0].topk(2).values.tolist()
        found = judge(model, plain.sequences[:, : length + position], position)
        assert found.top_two_gap == pytest.approx(best - second, abs=1e-5)


def test_two_tokens_with_the_same_logit_are_a_near_tie():
    backbone = tiny_causal_lm("llama", vocab_size=96)
    with torch.no_grad():
        best = int(backbone(PROMPT).logits[0, -1].argmax())
        backbone.lm_head.weight[(best + 1) % 96] = backbone.lm_head.weight[best]
    assert not judge(LMTPForCausalLM.from_backbone(backbone), PROMPT, 0).is_error


def test_a_logit_is_known_to_its_last_digit_even_where_two_passes_agree():
    backbone = tiny_causal_lm("llama", vocab_size=96).to(torch.bfloat16)
    with torch.no_grad():
        alone = backbone(PROMPT).logits[0, -1]
    found = judge(LMTPForCausalLM.from_backbone(backbone), PROMPT, 0)
    assert found.rounding >= alone.max().float() * 2.0**-7


def test_rounding_adds_up_over_tokens_that_are_read_one_by_one(monkeypatch):
    model = LMTPForCausalLM.from_backbone(tiny_causal_lm("llama"))
    right, num_alone = model.backbone.forward, 0

    def forward(*args, **kwargs):
        nonlocal num_alone
        output = right(*args, **kwargs)
        num_alone += kwargs["input_ids"].shape[1] == 1
        if kwargs["input_ids"].shape[1] == 1:
            output.logits = output.logits + 0.1 * num_alone
        return output

    monkeypatch.setattr(model.backbone, "forward", forward)
    known = torch.arange(20)[None]
    assert judge(model, known, 0).rounding == pytest.approx(0.1 * NUM_ALONE, rel=1e-3)
    num_alone = 0
    assert judge(model, known[:, :3], 0).rounding == pytest.approx(0.3, rel=1e-3)


def test_a_pass_over_several_tokens_that_is_wrong_excuses_nothing(monkeypatch):
    model = LMTPForCausalLM.from_backbone(tiny_causal_lm("llama"))
    right = model.backbone.forward

    def wrong(*args, **kwargs):
        output = right(*args, **kwargs)
        cache, new = cache_of(kwargs), kwargs["input_ids"].shape[1]
        if new > 1 and cache is not None and cache.get_seq_length() > new:
            output.logits = output.logits.flip(-1)
        return output

    monkeypatch.setattr(model.backbone, "forward", wrong)
    assert judge(model, torch.arange(20)[None], 0).rounding < 1e-4


def test_rounding_explains_a_gap_up_to_twice_as_large():
    assert not Divergence(0, top_two_gap=0.2, rounding=0.1).is_error
    assert Divergence(0, top_two_gap=0.21, rounding=0.1).is_error


def test_a_draw_is_an_error_only_where_nothing_is_rounded_much():
    assert not Divergence(0, top_two_gap=3.0, rounding=0.1, is_sampled=True).is_error
    assert Divergence(0, top_two_gap=3.0, rounding=1e-5, is_sampled=True).is_error
