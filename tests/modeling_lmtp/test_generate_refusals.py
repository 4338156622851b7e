"""Calls that contradict themselves are refused; what cannot be drafted for is decoded plainly."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from architectures import tiny_causal_lm
from peft import PromptTuningConfig, get_peft_model
from plain_decoding import assert_decoded_plainly
from transformers import DynamicCache, GenerationConfig
from transformers.generation import BaseStreamer
from transformers.utils import logging

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.drafting_lmtp import Candidates, Drafter
from modeling_lmtp.support_lmtp import Support, Tier, decoding_support
from modeling_lmtp.transformers_lmtp import with_cache
from modeling_lmtp.tree_lmtp import DraftTree
from modeling_lmtp.verification_lmtp import Verifier

PROMPT = torch.tensor([[3, 17, 5, 9, 44]])


@pytest.fixture(scope="module")
def model() -> LMTPForCausalLM:
    model = LMTPForCausalLM.from_backbone(tiny_causal_lm("llama"), leap_offsets=(2, 3, 5))
    model.generate(PROMPT, use_lmtp=True, max_new_tokens=2)  # finds out once what fits the backbone
    return model


REFUSED = {
    "beams": ({"num_beams": 2}, "supports greedy search and sampling, not 'beam_search'"),
    "beam sampling": (
        {"num_beams": 2, "do_sample": True},
        "supports greedy search and sampling, not 'beam_sample'",
    ),
    "assistant": ({"assistant_model": object()}, "cannot be combined with ['assistant_model']"),
    "custom generate": (
        {"custom_generate": "owner/repository"},
        "cannot be combined with ['custom_generate']",
    ),
    "token healing": ({"token_healing": True}, "cannot be combined with ['token_healing']"),
    "switch of another kind": (
        {"use_lmtp": "yes"},
        "use_lmtp must be True, False or 'strict', got 'yes'.",
    ),
    "empty prompt": (
        {"inputs": PROMPT[:, :0]},
        "The prompt is empty: input_ids has the shape (1, 0). Pass at least one token",
    ),
    "deep tree": (
        {"draft_tree": [(0,) * depth for depth in range(1, 6)]},
        "The draft is 5 tokens deep, but these leap heads can draft 4",
    ),
    "long chain": ({"draft_length": 5}, "The draft is 5 tokens deep, but these leap heads can"),
    "orphan": ({"draft_tree": [(0,), (1, 0)]}, "node (1, 0) has no parent: add the path (1,)"),
    "negative length": ({"draft_length": -1}, "draft_length must be from 0 to 63, got -1."),
    "length of another type": ({"draft_length": 2.0}, "draft_length must be an integer, got 2.0"),
    "nodes": ({"draft_nodes": 64}, "draft_nodes must be from 0 to 63, got 64."),
    "a setting of 0.1": (
        {"draft_nodes": 8, "draft_threshold": 0.1},
        "['draft_threshold'] are no longer settings. Drafts are now planned",
    ),
    "settings by batch size": (
        {"draft_by_batch_size": {"1": {"draft_length": 2}}},
        "['draft_by_batch_size'] are no longer settings. Drafts are now planned",
    ),
    "tree and length": (
        {"draft_tree": [(0,)], "draft_length": 1},
        "Pass only one of ('draft_tree', 'draft_length', 'draft_nodes'), got "
        "{'draft_tree': [(0,)], 'draft_length': 1}.",
    ),
    "tree of numbers": (
        {"draft_tree": [0, 1]},
        "A draft tree must be a list of paths, each a list",
    ),
    "rank beyond the vocabulary": (
        {"draft_tree": [(0,), (96,)]},
        "draft_tree has rank 96, but these leap heads choose among 96 tokens, so ranks go from 0 to 95",
    ),
    "look-up of a part": (
        {"prompt_lookup_num_tokens": 2.5},
        "prompt_lookup_num_tokens must be an integer, got 2.5.",
    ),
    "look-up of another type": (
        {"prompt_lookup_num_tokens": "4"},
        "prompt_lookup_num_tokens must be an integer, got '4'.",
    ),
    "n-grams of another type": (
        {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 2.0},
        "max_matching_ngram_size must be an integer, got 2.0.",
    ),
    "look-up of fewer than nothing": (
        {"prompt_lookup_num_tokens": -1},
        "prompt_lookup_num_tokens must be from 0 to 63, got -1.",
    ),
    "n-grams": (
        {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 0},
        "max_matching_ngram_size must be 1 or more, got 0.",
    ),
    "acceptance rule": (
        {"acceptance_rule": "lossless"},
        "acceptance_rule must be 'exact' or 'typical', got 'lossless'.",
    ),
    "threshold": (
        {"acceptance_rule": "typical", "posterior_threshold": 1.5},
        "posterior_threshold must be above 0 and at most 1, got 1.5.",
    ),
}


def test_a_rank_beyond_the_draft_vocabulary_is_refused():
    model = LMTPForCausalLM.from_backbone(tiny_causal_lm("llama"), draft_token_ids=(3, 5, 9))
    with pytest.raises(ValueError, match="has rank 3, but these leap heads choose among 3 tok"):
        model.generate(PROMPT, draft_tree=[[0], [3]], max_new_tokens=4, use_lmtp=True)


def test_settings_of_0_1_in_a_checkpoint_are_ignored():
    model = LMTPForCausalLM.from_backbone(tiny_causal_lm("llama"))
    options = {"do_sample": False, "max_new_tokens": 6, "use_lmtp": True}
    expected = model.generate(PROMPT, **options)
    model.generation_config.draft_by_batch_size = {"1": {"draft_length": 0}}
    model.generation_config.draft_threshold = 0.99
    model.generation_config.draft_conditions = {"device": "another"}
    assert model.generate(PROMPT, **options).tolist() == expected.tolist()


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_supported_is_refused_before_any_work(model, options, message):
    calls = []
    handle = model.backbone.register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        with pytest.raises(ValueError, match=re.escape(message)):
            model.generate(**{"inputs": PROMPT, "use_lmtp": True, **options}, max_new_tokens=4)
    finally:
        handle.remove()
    assert not calls


class CacheOfAnotherKind(DynamicCache):
    """Might do anything with what it is given."""


PLAIN = {
    "no cache": ({"use_cache": False}, "no key-value cache that can be rolled back"),
    "embeddings": (
        {"inputs": None, "inputs_embeds": torch.ones(1, 5, 32)},
        "drafts need input_ids, and the call passes inputs_embeds",
    ),
    "an unknown cache": (
        lambda: {"inputs": PROMPT, **with_cache({}, CacheOfAnotherKind())},
        "a CacheOfAnotherKind is not known to roll back; pass a DynamicCache or a StaticCache",
    ),
}


@pytest.mark.parametrize(("options", "match"), PLAIN.values(), ids=PLAIN.keys())
def test_what_cannot_be_drafted_for_is_decoded_plainly(model, options, match):
    if isinstance(options, dict):
        options = {"inputs": PROMPT, **options}
    assert_decoded_plainly(model, match, options)


def test_heads_in_another_precision_than_the_backbone_are_decoded_plainly():
    model = LMTPForCausalLM.from_backbone(tiny_causal_lm("llama").bfloat16(), leap_offsets=(2, 3))
    model.leap_heads.float()  # as to train them
    assert_decoded_plainly(
        model, "heads are in torch.float32 and its backbone in torch.bfloat16", {"inputs": PROMPT}
    )
    with torch.autocast("cpu", torch.bfloat16):
        plain = model.generate(PROMPT, max_new_tokens=6, do_sample=False)
        fast = model.generate(PROMPT, max_new_tokens=6, do_sample=False, use_lmtp="strict")
    assert torch.equal(fast, plain)


def test_processes_that_go_in_step_decode_plainly(model):
    with pytest.raises(ValueError, match=r"processes run in step \(synced_gpus=True\)"):
        model.generate(PROMPT, max_new_tokens=4, use_lmtp="strict", synced_gpus=True)


def test_plain_decoding_instead_tells_its_acceptance_lengths_and_streams_once(model):
    class Recorder(BaseStreamer):
        """Keeps what it is given."""

        def __init__(self) -> None:
            self.given = []

        def put(self, value):
            self.given.append(value.tolist())

        def end(self):
            self.given.append("end")

    plain, ours = Recorder(), Recorder()
    options = {"max_new_tokens": 4, "do_sample": False, "use_cache": False}
    model.backbone.generate(PROMPT, streamer=plain, **options)
    options |= {"use_lmtp": True, "return_dict_in_generate": True}
    output = model.generate(PROMPT, streamer=ours, **options)
    assert ours.given == plain.given
    assert output.acceptance_lengths == [[1, 1, 1]]
    assert output.num_candidates == [[0, 0, 0]]
    assert output.token_sources == [["plain"] * 4]


@pytest.mark.parametrize(
    ("architecture", "match"),
    [
        ("minimax", "no key-value cache that can be rolled back"),
        (
            "jamba",
            r"out of the cache of JambaForCausalLM exactly \(several tokens at once give other",
        ),
    ],
)
def test_a_model_that_cannot_roll_back_decodes_plainly(architecture, match):
    model = LMTPForCausalLM.from_backbone(tiny_causal_lm(architecture))
    assert_decoded_plainly(model, match, {"inputs": PROMPT})


def test_a_model_that_verifies_chains_only_drafts_a_chain_and_says_so(caplog):
    model = LMTPForCausalLM.from_backbone(tiny_causal_lm("bloom"), leap_offsets=(2, 3, 4))
    plain = model.generate(PROMPT, max_new_tokens=9, do_sample=False)
    paths = [(0,), (1,), (0, 0)]
    ours = model.generate(
        PROMPT, max_new_tokens=9, do_sample=False, use_lmtp=True, draft_tree=paths
    )
    assert ours.tolist() == plain.tolist()
    assert "cannot verify a draft tree exactly; a chain of 2 candidates is drafted" in caplog.text


@pytest.mark.parametrize(
    ("settings", "num_candidates"),
    [
        ({"draft_length": 0, "prompt_lookup_num_tokens": 2}, 2),
        ({"draft_nodes": 1}, 1),
        ({"draft_nodes": 2}, 2),
        ({"draft_length": 6}, 6),
        ({"draft_tree": [(0,), (1,), (0, 0)]}, 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("context", [0, "path"])
def test_a_chain_is_no_longer_than_the_draft_that_was_asked_for(
    caplog, monkeypatch, context, settings, num_candidates
):
    logging.warning_once.cache_clear()  # another test may have been warned
    model = LMTPForCausalLM.from_backbone(
        tiny_causal_lm("bloom"), leap_offsets=(2, 4, 7), head_context=context
    )
    sizes, verify = [], Verifier.verify

    def noting(self, input_ids, candidates, *args):
        sizes.append(candidates.num_nodes)
        return verify(self, input_ids, candidates, *args)

    monkeypatch.setattr(Verifier, "verify", noting)
    prompt = torch.tensor([[3, 1, 5, 9, 4, 3, 1, 5]])
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "do_sample": False}
    plain = model.generate(prompt, **options)
    decoding_support(model.backbone)  # tried once, with passes of its own
    sizes.clear()
    assert model.generate(prompt, use_lmtp=True, **settings, **options).tolist() == plain.tolist()
    assert max(sizes) == num_candidates
    cut = "draft_tree" in settings
    warning = (
        f"cannot verify a draft tree exactly; a chain of {num_candidates} candidates is drafted"
    )
    assert (warning in caplog.text) == cut


class TreeDrafter(Drafter):
    """Proposes two candidates for the next token."""

    def draft(self, input_ids, hidden_states, max_depth):
        return Candidates((DraftTree.from_paths([(0,), (1,)]),), torch.tensor([[5, 6]]))


def test_a_drafter_may_not_propose_trees_to_a_model_that_verifies_chains_only():
    model = LMTPForCausalLM.from_backbone(tiny_causal_lm("bloom"))
    with pytest.raises(ValueError, match=r"only a chain; the drafter proposed the paths \(\(0,\)"):
        model.generate(PROMPT, max_new_tokens=9, use_lmtp=True, drafter=TreeDrafter())


def test_a_drafter_of_ones_own_is_no_way_around_plain_decoding():
    model = LMTPForCausalLM.from_backbone(tiny_causal_lm("jamba"))
    with pytest.raises(ValueError, match="use_lmtp='strict' would decode plainly"):
        model.generate(PROMPT, max_new_tokens=9, use_lmtp="strict", drafter=TreeDrafter())


class Silent(Drafter):
    """Proposes nothing."""

    def draft(self, input_ids, hidden_states, max_depth):
        return Candidates.none(input_ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"drafter": Silent()},
            "['drafter'] have no effect without use_lmtp=True. Pass it as well",
        ),
        ({"draft_nodes": 8}, "['draft_nodes'] have no effect without use_lmtp=True."),
        (
            {"draft_length": 2, "acceptance_rule": "typical", "use_lmtp": None},
            "['draft_length', 'acceptance_rule'] have no effect without use_lmtp=True.",
        ),
        (
            {"use_lmtp": True, "drafter": Silent(), "draft_nodes": 5, "acceptance_rule": "exact"},
            "drafter supplies every candidate, so ['draft_nodes'] would be ignored.",
        ),
        (
            {"use_lmtp": True, "drafter": Silent(), "prompt_lookup_num_tokens": 4},
            "so ['prompt_lookup_num_tokens'] would be ignored. Pass one or the other",
        ),
    ],
    ids=["drafter", "nodes", "two settings", "drafter and nodes", "drafter and lookup"],
)
def test_what_a_call_asks_for_in_vain_is_refused(model, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        model.generate(PROMPT, max_new_tokens=4, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"use_lmtp": False, "draft_nodes": 8, "acceptance_rule": "typical"},
        {"use_lmtp": False, "drafter": Silent()},
        {"prompt_lookup_num_tokens": 4},
        {"draft_nodes": None, "forward_decoding": False},
        {"use_lmtp": True, "drafter": Silent(), "draft_tree": None},
        {"generation_config": GenerationConfig(draft_nodes=8)},
        {
            "generation_config": GenerationConfig(
                draft_nodes=8, prompt_lookup_num_tokens=4, use_lmtp=True
            ),
            "drafter": Silent(),
        },
    ],
    ids=["switch", "switch and drafter", "lookup", "none", "drafter", "config", "config, drafter"],
)
def test_what_is_turned_off_or_saved_stays_silent(model, options):
    plain = model.backbone.generate(PROMPT, max_new_tokens=4, do_sample=False)
    output = model.generate(PROMPT, max_new_tokens=4, do_sample=False, **options)
    assert output.tolist() == plain.tolist()


def test_lookup_of_a_configuration_is_turned_off_with_the_rest(model):
    config = GenerationConfig(prompt_lookup_num_tokens=4)
    batch = PROMPT.repeat(2, 1)
    options = {"max_new_tokens": 4, "do_sample": False}
    plain = model.backbone.generate(batch, **options)
    # Transformers' own, which takes no batches, is what such a configuration says of a plain call
    with pytest.raises(ValueError, match="batch_size = 1"):
        model.generate(batch, generation_config=config, **options)
    output = model.generate(batch, generation_config=config, use_lmtp=False, **options)
    assert output.tolist() == plain.tolist()


# PEFT asks whether gradients are checkpointed by a name that Transformers has deprecated
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("use_lmtp", [False, True])
def test_a_learned_prompt_is_refused_and_leaves_no_trace(use_lmtp):
    model = LMTPForCausalLM.from_backbone(tiny_causal_lm("llama"), leap_offsets=(2, 3))
    plain = model.generate(PROMPT, max_new_tokens=4, do_sample=False)
    sizes = {"num_layers": 2, "token_dim": 32, "num_attention_heads": 4}
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, **sizes)
    learned = get_peft_model(model, config).eval()
    with pytest.raises(ValueError, match=r"A learned prompt .* Use LoRA"):
        learned.generate(input_ids=PROMPT, max_new_tokens=4, use_lmtp=use_lmtp)
    again = model.generate(PROMPT, max_new_tokens=4, do_sample=False, use_lmtp=use_lmtp)
    assert again.tolist() == plain.tolist()


def test_a_refusal_is_not_remembered(model, monkeypatch):
    backbone = tiny_causal_lm("llama")
    forward = backbone.forward

    def fail(*args, **kwargs):
        raise RuntimeError("Something passing.")

    fail.__signature__ = inspect.signature(forward)
    with monkeypatch.context() as patch:
        patch.setattr(backbone, "forward", fail)
        assert decoding_support(backbone) == Support(Tier.PLAIN, "Something passing.")
    assert backbone.forward == forward
    assert decoding_support(backbone).tier is Tier.TREE
