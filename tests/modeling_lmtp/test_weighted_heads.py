"""Heads that read the states of all layers (`head_input="weighted"`)."""

from __future__ import annotations

import itertools

import pytest
import torch
from architectures import REPRESENTATIVE, tiny_causal_lm
from huggingface_hub.errors import StrictDataclassError
from naive_heads import layers_of, naive_logits
from tiny import tiny_llama
from torch.nn.functional import cross_entropy

from modeling_lmtp import LMTPConfig, LMTPForCausalLM
from modeling_lmtp.heads_lmtp import LayerMix
from modeling_lmtp.states_lmtp import head_states
from modeling_lmtp.training.evaluation import draft_ranks, simulated_steps
from modeling_lmtp.training.examples import Example
from modeling_lmtp.tree_lmtp import DraftTree

TOKENS = torch.tensor([[3, 7, 5, 9, 4, 3, 7, 2, 11, 10], [8, 1, 3, 9, 7, 4, 0, 5, 5, 6]])
BATCH = torch.tensor([[0, 0, 3, 11, 5], [8, 4, 8, 4, 8]])
BATCH_MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
PATHS = [(0,), (1,), (2,), (0, 0), (0, 1), (2, 0), (0, 0, 0), (0, 0, 0, 0)]
GREEDY = {"do_sample": False, "max_new_tokens": 30}

# How else heads may differ; the formula is the same
SETTINGS = {
    "the paper's": {},
    "grounded": {"head_context": 2},
    "path-grounded": {"head_context": "path", "num_head_layers": 2},
    "draft vocabulary": {"draft_token_ids": tuple(range(0, 12, 2)), "lm_head_rank": 3},
    "own": {"share_lm_head": False},
}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())


def wrapped(architecture="llama", offsets=(2, 3, 5), *, scale=0.15, backbone=None, **settings):
    """Random heads over few tokens, so that they are right now and then."""
    if backbone is None:
        backbone = tiny_causal_lm(architecture, vocab_size=12)
    model = LMTPForCausalLM.from_backbone(
        backbone, leap_offsets=offsets, head_input="weighted", **settings
    )
    generator = torch.Generator().manual_seed(6)
    for parameter in model.leap_heads.parameters():
        parameter.data += (torch.randn(parameter.shape, generator=generator) * scale).to(
            parameter.dtype
        )
    return model.eval()


def generate(model, prompt=TOKENS[:1, :5], mask=None, **options):
    mask = torch.ones_like(prompt) if mask is None else mask
    torch.manual_seed(4)
    return model.generate(prompt, attention_mask=mask, return_dict_in_generate=True, **options)


# The start


@pytest.mark.parametrize("architecture", [a for a in REPRESENTATIVE if a != "opt"])
def test_heads_start_exactly_as_those_that_read_the_last_state(architecture):
    backbone = tiny_causal_lm(architecture)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, 96, (2, 7), generator=generator)
    weighted, last = (
        LMTPForCausalLM.from_backbone(backbone, 2, head_input=head_input, head_context=1)
        for head_input in ("weighted", "last")
    )
    with torch.no_grad():
        for head in weighted.leap_heads:
            head.layer_mix.weights.normal_(generator=generator)  # whatever the weights are
        ours, theirs = (model(tokens, output_leap_logits=True) for model in (weighted, last))
    assert torch.equal(ours.logits, theirs.logits)
    for one, other in zip(ours.leap_logits, theirs.leap_logits, strict=True):
        assert torch.equal(one, other)


def test_every_head_has_weights_of_its_own_that_start_equal():
    model = LMTPForCausalLM.from_backbone(tiny_llama(), head_input="weighted")
    mixes = [head.layer_mix.weights for head in model.leap_heads]
    assert len({weights.data_ptr() for weights in mixes}) == 3
    assert all(weights.tolist() == [0.0] * 3 for weights in mixes)  # embeddings and two layers


def test_the_last_tokens_alone_give_the_same_logits():
    model = wrapped()
    every = model(TOKENS, output_leap_logits=True).leap_logits
    last = model(TOKENS, logits_to_keep=3, output_leap_logits=True).leap_logits
    for ours, theirs in zip(last, every, strict=True):
        torch.testing.assert_close(ours, theirs[:, -3:])


# What the heads read


@every_setting
def test_logits_are_those_of_the_formula(settings):
    model = wrapped(**settings)
    layers = layers_of(model, TOKENS)
    output = model(TOKENS, output_leap_logits=True)
    for head, logits in enumerate(output.leap_logits):
        offset = model.config.leap_offsets[head]
        seen = {0: 0, 2: 1, "path": offset - 1}[model.config.head_context]
        for row, s in itertools.product(range(2), range(TOKENS.shape[1])):
            following = TOKENS[row, s + 1 : s + 1 + seen].tolist()
            expected = naive_logits(model, head, layers[row, s], following)
            torch.testing.assert_close(logits[row, s], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("train_backbone", [False, True], ids=["stage 1", "stage 2"])
def test_loss_and_gradients_are_the_naive_sum_s(train_backbone):
    model = wrapped(train_backbone=train_backbone, leap_loss_weight=1.0)
    labels = TOKENS.clone()
    labels[0, :4] = -100
    layers = layers_of(model, TOKENS)
    expected = 0.0
    if train_backbone:
        logits = model.backbone(TOKENS).logits[:, :-1]
        expected = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    for head, offset in enumerate(model.config.leap_offsets):
        losses = [
            cross_entropy(naive_logits(model, head, layers[row, s]), labels[row, s + offset])
            for row, s in itertools.product(range(2), range(TOKENS.shape[1] - offset))
            if labels[row, s + offset] >= 0
        ]
        expected = expected + torch.stack(losses).mean()
    output = model(TOKENS, labels=labels)
    torch.testing.assert_close(output.loss, expected)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert any(p is model.leap_heads[0].layer_mix.weights for p in trained)
    torch.testing.assert_close(
        torch.autograd.grad(output.loss, trained),
        torch.autograd.grad(expected, trained),
        rtol=1e-3,
        atol=1e-4,
    )


def test_a_frozen_backbone_has_no_graph():
    model = wrapped()
    in_graph = []
    model.backbone.model.requires_grad_(True)  # even if it asks for one
    for module in model.backbone.model.modules():
        module.register_forward_hook(
            lambda _module, _args, output: in_graph.extend(
                tensor.requires_grad for tensor in [output] if isinstance(tensor, torch.Tensor)
            )
        )
    model(TOKENS, labels=TOKENS).loss.backward()
    assert len(in_graph) > 10
    assert not any(in_graph)
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(p.grad.abs().max() > 0 for p in model.leap_heads.parameters())


def test_heads_that_read_all_layers_learn():
    model = wrapped(scale=0.0)
    optimizer = torch.optim.Adam(model.leap_heads.parameters(), lr=0.01)
    losses = []
    for _ in range(5):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert all(head.layer_mix.weights.abs().max() > 0 for head in model.leap_heads)


def test_the_size_of_a_layer_s_states_does_not_matter():
    mix = LayerMix(8, 3)
    torch.nn.init.normal_(mix.linear.weight)
    states = torch.randn(2, 5, 24)
    larger = (states.unflatten(-1, (3, 8)) * torch.tensor([1.0, 50.0, 0.02])[:, None]).flatten(-2)
    torch.testing.assert_close(mix(states), mix(larger))
    assert mix(torch.zeros(1, 24)).tolist() == [[0.0] * 8]


# What the backbone gives back


@pytest.mark.parametrize("asked", [None, False, True], ids=["unsaid", "no", "yes"])
@pytest.mark.parametrize("labels", [None, TOKENS], ids=["no labels", "labels"])
def test_a_pass_returns_the_hidden_states_that_were_asked_for(labels, asked):
    options = {} if asked is None else {"output_hidden_states": asked}
    weighted = wrapped()
    last = LMTPForCausalLM.from_backbone(weighted.backbone)
    ours, theirs = (model(TOKENS, labels=labels, **options) for model in (weighted, last))
    assert ours.keys() - {"loss", "leap_losses"} == theirs.keys() - {"loss", "leap_losses"}
    assert ("hidden_states" in ours) == bool(asked)
    if asked:
        torch.testing.assert_close(ours.hidden_states, theirs.hidden_states)


def test_a_configuration_that_asks_for_hidden_states_gets_them():
    model = wrapped()
    model.backbone.config.output_hidden_states = True
    assert len(model(TOKENS).hidden_states) == 3


def test_generation_returns_the_hidden_states_that_plain_decoding_returns():
    model = wrapped()
    options = {**GREEDY, "output_hidden_states": True}
    plain = generate(model, **options)
    output = generate(model, use_lmtp=True, draft_tree=PATHS, **options)
    torch.testing.assert_close(output.hidden_states, plain.hidden_states)
    assert generate(model, use_lmtp=True, **GREEDY).hidden_states is None


def test_collecting_leaves_no_hook_and_costs_nothing_where_the_last_state_will_do():
    backbone = tiny_llama()
    with head_states(backbone, "last"):
        backbone(TOKENS)
        assert not backbone._forward_hooks
        assert not backbone._forward_pre_hooks
    with head_states(backbone, "weighted") as states:
        assert len(backbone._forward_hooks) == 1
        backbone(TOKENS, logits_to_keep=4)
    assert [tuple(part.shape) for part in states] == [(2, 4, 3 * 32)]
    assert not backbone._forward_hooks
    assert not backbone._forward_pre_hooks


def test_a_pass_that_fails_spoils_no_later_one():
    backbone = tiny_llama()
    with head_states(backbone, "weighted") as states:
        with pytest.raises(IndexError):
            backbone(torch.tensor([[10_000]]))
        states.clear()
        backbone(TOKENS)
    assert states[0].shape == (2, 10, 3 * 32)


# Decoding

DRAFTS = {
    "chain": {},
    "tree": {"draft_tree": PATHS},
    "dynamic tree": {"draft_nodes": 10},
    "lookup": {"prompt_lookup_num_tokens": 4, "draft_tree": PATHS},
}


@pytest.mark.parametrize("batch", [False, True], ids=["one", "batch"])
@pytest.mark.parametrize("draft", DRAFTS.values(), ids=DRAFTS.keys())
@pytest.mark.parametrize(
    "settings", [SETTINGS["the paper's"], SETTINGS["path-grounded"]], ids=["paper's", "path"]
)
def test_greedy_text_is_plain_decoding_s(settings, draft, batch):
    model = wrapped(**settings)
    prompt, mask = (BATCH, BATCH_MASK) if batch else (TOKENS[:1, :5], None)
    plain = generate(model, prompt, mask, **GREEDY)
    output = generate(model, prompt, mask, use_lmtp=True, **draft, **GREEDY)
    assert output.sequences.tolist() == plain.sequences.tolist()
    assert max(itertools.chain(*output.acceptance_lengths)) > 1


@pytest.mark.parametrize("batch", [False, True], ids=["one", "batch"])
@pytest.mark.parametrize("architecture", ["bloom", "lfm2", "gemma2", "gpt2", "qwen3_next", "phi"])
def test_greedy_text_is_plain_decoding_s_on_other_backbones(architecture, batch):
    model = wrapped(architecture, scale=0.05, head_context=1)
    prompt, mask = (BATCH, BATCH_MASK) if batch else (TOKENS[:1, :5], None)
    plain = generate(model, prompt, mask, **GREEDY)
    output = generate(model, prompt, mask, use_lmtp=True, **GREEDY)
    assert output.sequences.tolist() == plain.sequences.tolist()


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 2}], ids=["whole", "in chunks"])
def test_the_same_seed_samples_the_same_text(options):
    model = wrapped(head_context=2)
    options = {**options, "do_sample": True, "temperature": 0.7, "max_new_tokens": 30}
    plain = generate(model, **options)
    output = generate(model, use_lmtp=True, draft_tree=PATHS, **options)
    assert output.sequences.tolist() == plain.sequences.tolist()


@pytest.mark.parametrize("length", [1, 5])
@every_setting
def test_what_evaluation_simulates_is_what_decoding_accepts(settings, length):
    model = wrapped(**settings)
    output = generate(model, TOKENS[:1, :length], use_lmtp=True, draft_tree=PATHS, **GREEDY)
    ranks = draft_ranks(model, Example(output.sequences[0].tolist(), length))
    [lengths] = output.acceptance_lengths
    assert simulated_steps(ranks, DraftTree.from_paths(PATHS), length) == lengths
    assert max(lengths) > 1 or length == 1, "nothing was accepted, so this shows nothing"


def test_heads_in_bfloat16_read_states_in_bfloat16():
    model = wrapped(backbone=tiny_causal_lm("llama", dtype=torch.bfloat16, vocab_size=12))
    assert model(TOKENS, output_leap_logits=True).leap_logits[0].dtype == torch.bfloat16
    model(TOKENS, labels=TOKENS).loss.backward()
    assert generate(model, use_lmtp=True, **GREEDY).sequences.shape == (1, 35)


# Saving, and what cannot be


def test_heads_that_read_all_layers_survive_saving(tmp_path):
    model = wrapped(head_context=1)
    model.save_pretrained(tmp_path)
    loaded = LMTPForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.head_input == "weighted"
    ours, theirs = (m(TOKENS, output_leap_logits=True).leap_logits for m in (model, loaded))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("value", ["all", "LAST", "", None, 1], ids=repr)
def test_other_values_of_head_input_are_refused(value):
    with pytest.raises((ValueError, StrictDataclassError), match="head_input"):
        LMTPConfig(backbone_config=tiny_llama().config, head_input=value)


def test_layers_that_are_wider_than_the_unembedding_are_refused():
    with pytest.raises(ValueError, match="have size 32 and its unembedding reads size 16"):
        LMTPForCausalLM.from_backbone(tiny_causal_lm("opt"), head_input="weighted")


def test_layers_with_states_of_another_shape_are_refused():
    model = LMTPForCausalLM.from_backbone(tiny_causal_lm("gemma3n_text"), head_input="weighted")
    with pytest.raises(ValueError, match=r"needs 3 hidden states of shape \(2, 10, 32\), but"):
        model(TOKENS)


def test_states_of_one_layer_are_refused():
    model = wrapped()
    with pytest.raises(ValueError, match=r"reads 3 states of size 32 .* got size 32"):
        model.leap_logits(0, torch.zeros(1, 4, 32))
