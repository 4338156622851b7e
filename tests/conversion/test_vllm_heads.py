"""Drafting as vLLM asks for it, without vLLM: the same drafts as the package's own chain."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
import torch
from architectures import tiny_causal_lm
from torch._subclasses.fake_tensor import FakeTensorMode
from vllm_passes import first_runner, second_runner, shared_logits

from modeling_lmtp import LMTPConfig, LMTPForCausalLM
from modeling_lmtp.conversion import vllm_tickets as tickets
from modeling_lmtp.conversion.vllm_config import (
    LMTPDraftConfig,
    check_servable,
    check_target,
    reasons_against,
)
from modeling_lmtp.conversion.vllm_heads import ChainHeads
from modeling_lmtp.settings_lmtp import LMTPSettings
from modeling_lmtp.support_lmtp import Tier

DRAFT_IDS = (2, 3, 5, 7, 11)
KINDS = {
    "path-grounded": {"head_context": "path"},
    "Medusa's": {"head_context": 0},
    "grounded": {"head_context": 1},
    "grounded, more than is known": {"head_context": 5},
    "three blocks": {"head_context": "path", "num_head_layers": 3},
    "own unembeddings": {"head_context": "path", "share_lm_head": False},
    "low rank": {"head_context": "path", "lm_head_rank": 3},
    "draft vocabulary": {"head_context": "path", "draft_token_ids": DRAFT_IDS},
    "own, of a draft vocabulary": {"share_lm_head": False, "draft_token_ids": DRAFT_IDS},
    "low rank, of a draft vocabulary": {"lm_head_rank": 3, "draft_token_ids": DRAFT_IDS},
    "two heads": {"head_context": "path", "leap_offsets": (2, 3)},
    "one head": {"head_context": "path", "leap_offsets": (2,)},
}
every_kind = pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS.keys())


def wrapped(architecture: str = "llama", **settings) -> LMTPForCausalLM:
    model = LMTPForCausalLM.from_backbone(
        tiny_causal_lm(architecture, vocab_size=12), **{"leap_offsets": (2, 3, 4), **settings}
    )
    generator = torch.Generator().manual_seed(6)
    for parameter in model.leap_heads.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


def chain_heads(model: LMTPForCausalLM) -> ChainHeads:
    heads = ChainHeads(model.config, max_rows=32)
    loaded = heads.load(model.state_dict().items())
    assert loaded == {name for name, _ in heads.named_parameters()}
    return heads.to(model.dtype)


@torch.no_grad()
def requests(model: LMTPForCausalLM) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(12, (length,), generator=generator) for length in (7, 2, 4, 11)]
    states = [
        model.backbone.model(text[None, :-1], use_cache=False).last_hidden_state[0]
        for text in texts
    ]
    return texts, states


@every_kind
@pytest.mark.parametrize("runner", [first_runner, second_runner], ids=["V1", "V2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_drafts_are_those_of_our_own_chain(settings, runner, dtype):
    model = wrapped(**settings).to(dtype)
    depth = model.config.num_leap_heads
    texts, states = requests(model)
    drafter = model.new_drafter(LMTPSettings(draft_length=depth), Tier.CHAIN)
    with torch.no_grad():
        expected = torch.cat([
            drafter.draft(text[None], state[None], depth).token_ids
            for text, state in zip(texts, states, strict=True)
        ])  # fmt: skip
        heads = chain_heads(model)
        logits = runner(heads, model, texts, states, expected)
        again = runner(heads, model, texts[::-1], states[::-1], expected.flip(0))
        free = runner(heads, model, texts, states).argmax(dim=-1)
    # Drafted row by row there and together here, so two tokens may be equally likely but for rounding
    for passed, drafts in ((logits, expected), (again, expected.flip(0))):
        drafted = passed.gather(-1, drafts[..., None])[..., 0]
        torch.testing.assert_close(drafted, passed.amax(dim=-1))
    if dtype == torch.float32:
        assert free.tolist() == expected.tolist()
    assert len(set(map(tuple, expected.tolist()))) > 1


def test_biases_of_own_unembeddings_are_loaded():
    model = wrapped("phi", share_lm_head=False)  # Phi's unembedding has a bias
    model.leap_heads[1].lm_head.bias.data += 1
    heads = chain_heads(model)
    torch.testing.assert_close(heads.leap_heads[1].lm_head.bias, model.leap_heads[1].lm_head.bias)


def test_other_tensors_than_the_configuration_describes_are_refused():
    model = wrapped(num_head_layers=2)
    tensors = model.state_dict()
    del tensors["leap_heads.1.blocks.0.linear.weight"]
    with pytest.raises(ValueError, match=r"1\.blocks\.0\.linear\.weight is missing or unexpected"):
        ChainHeads(model.config, max_rows=1).load(tensors.items())


@every_kind
def test_a_pass_copies_nothing_to_the_host_and_has_static_shapes(settings):
    """Fake tensors have no values: whatever asks for one raises."""
    config = wrapped(**settings).config
    with FakeTensorMode(), torch.no_grad():
        heads = ChainHeads(config, max_rows=16)
        embeddings = torch.nn.Embedding(12, heads.hidden_size)
        unembedding = torch.nn.Linear(heads.hidden_size, 12)
        model = types.SimpleNamespace(get_output_embeddings=lambda: unembedding)
        passed = torch.empty(8, heads.hidden_size)
        for step in range(config.num_leap_heads):
            passed = heads(torch.empty(8, dtype=torch.int32), passed)
            features = heads.features(passed[:3], step, embeddings)
            logits = heads.draft_logits(features, step, shared_logits(heads, model))
            assert heads.logits(logits).shape == (3, 12)
            assert heads.top_tokens(logits).shape == (3,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_tickets_are_exact_in_every_precision(dtype):
    generator = torch.Generator().manual_seed(0)
    states = (torch.randn(70_000, 24, generator=generator) * 100).to(dtype)
    first = torch.randint(256**3, (70_000,), generator=generator)
    second = torch.tensor([0, 255, 256, 65_535, 65_536, 256**3 - 1])
    rows = torch.tensor([0, 1, 255, 256, 65_535, 69_999])
    assert not tickets.are_tickets(states).any()
    passed = tickets.issue(states, first, num_tokens=2)
    assert tickets.are_tickets(passed).all()
    assert passed.dtype is dtype
    fields = tickets.read(tickets.issue(passed[rows], second, num_tokens=2), num_tokens=2)
    assert fields.steps.tolist() == [1] * 6
    assert fields.rows.tolist() == rows.tolist()
    assert fields.tokens.tolist() == torch.stack([first[rows], second], dim=1).tolist()


REFUSED = {
    "leaps": ({"leap_offsets": (3, 5, 7)}, r"leap_offsets=\(3, 5, 7\).*\(2, 3, 4\) can be served"),
    "a gap": ({"leap_offsets": (2, 4)}, r"--leap_offsets 2 3"),
    "weighted states": ({"head_input": "weighted"}, "head_input='last' can be served"),
    "no heads": ({"leap_offsets": ()}, "no leap heads"),
    "a narrow backbone": (
        {"leap_offsets": tuple(range(2, 14)), "head_context": "path"},
        "hidden size of at least 44, the backbone's is 32",
    ),
}


@pytest.mark.parametrize(("settings", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_vllm_cannot_draft_with_is_refused_by_name(settings, reason):
    config = wrapped(**settings).config
    with pytest.raises(ValueError, match=reason):
        check_servable(config)
    with pytest.raises(ValueError, match="use_lmtp=True"):
        LMTPDraftConfig.from_dict(config.to_dict())


@every_kind
def test_what_vllm_can_draft_with_is_not_refused(settings):
    assert reasons_against(wrapped(**settings).config) == []


def test_another_backbone_and_too_many_tokens_are_refused():
    config = wrapped().config
    target = config.get_text_config()
    check_target(config, target, 3)
    with pytest.raises(ValueError, match=r"num_speculative_tokens=4.*at most 3"):
        check_target(config, target, 4)
    other = tiny_causal_lm("llama", vocab_size=13, num_hidden_layers=3).config
    with pytest.raises(ValueError, match="vocab_size 13 instead of 12, num_hidden_layers 3"):
        check_target(config, other, 3)


def test_vllm_sees_a_configuration_in_its_own_terms(tmp_path):
    wrapped(head_context="path").config.save_pretrained(tmp_path)
    config = LMTPDraftConfig.from_pretrained(tmp_path)
    assert config.model_type == "mtp"
    assert config.architectures == ["LMTPDraftModel"]
    assert config.num_nextn_predict_layers == 3
    assert LMTPConfig.from_pretrained(tmp_path).model_type == "lmtp"


PLUGIN = """
import sys, types
import modeling_lmtp
assert "vllm" not in sys.modules
registered = {}
vllm = types.ModuleType("vllm")
vllm.ModelRegistry = types.SimpleNamespace(register_model=registered.__setitem__)
sys.modules["vllm"] = vllm
from importlib.metadata import EntryPoint
entry = EntryPoint("lmtp", "modeling_lmtp.conversion.vllm_plugin:register", "vllm.general_plugins")
for _ in range(2):
    entry.load()()
assert registered == {"LMTPDraftModel": "modeling_lmtp.conversion.vllm_draft_model:LMTPDraftModel"}
assert "modeling_lmtp.conversion.vllm_draft_model" not in sys.modules
assert "modeling_lmtp.conversion.vllm_heads" not in sys.modules
from transformers import AutoConfig
config = AutoConfig.from_pretrained(sys.argv[1])
assert config.model_type == "mtp", config
"""


def test_the_plugin_registers_by_name_and_importing_the_package_needs_no_vllm(tmp_path):
    wrapped().config.save_pretrained(tmp_path)
    subprocess.run([sys.executable, "-c", PLUGIN, str(tmp_path)], check=True)
