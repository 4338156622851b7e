"""Heads that see known tokens (`head_context`), and heads with a vocabulary of their own."""

import pytest
import torch
from tiny import tiny_llama
from torch import nn
from torch.nn.functional import cross_entropy, rms_norm, silu

from modeling_lmtp import LMTPConfig, LMTPForCausalLM
from modeling_lmtp.leaps_lmtp import context_widths
from modeling_lmtp.training.evaluation import draft_ranks, simulated_steps
from modeling_lmtp.training.examples import Example
from modeling_lmtp.tree_lmtp import DraftTree
from modeling_lmtp.unembeddings_lmtp import DraftUnembedding, draft_labels

TREE = [(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (2, 0), (0, 0, 0), (0, 0, 1)]
DRAFT_IDS = (*range(0, 24, 2), 23)


def wrapped(offsets=(2, 3, 5), **settings):
    backbone = tiny_llama(vocab_size=24, eos_token_id=None)
    model = LMTPForCausalLM.from_backbone(backbone, leap_offsets=offsets, **settings).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for head in model.leap_heads:
            for module in (head.context, head.blocks[0].linear):
                if module is not None:
                    module.weight.normal_(0, 0.2, generator=generator)
    return model


def naive_head(model, index, state, known_tokens):
    """`z' = z + SiLU(W z + b + Σ_g U_g e(x_{s+g}))`, one state and one token at a time."""
    head = model.leap_heads[index]
    block = head.blocks[0].linear
    total = block.weight @ state + block.bias
    if head.context is not None:
        matrices = head.context.weight.split(model.backbone.config.hidden_size, dim=1)
        for matrix, token in zip(matrices, known_tokens, strict=False):
            embedded = model.get_input_embeddings().weight[token]
            total = total + matrix @ rms_norm(embedded, embedded.shape, eps=1e-6)
    logits = model.get_output_embeddings().weight @ (state + silu(total))
    ids = model.config.draft_token_ids
    return logits if ids is None else logits[list(ids)]


def states_of(model, tokens):
    return model.backbone.model(tokens).last_hidden_state[0]


@pytest.mark.parametrize(
    ("offsets", "head_context", "widths"),
    [
        ((3, 5, 7), 0, (0, 0, 0)),
        ((3, 5, 7), 2, (2, 2, 2)),
        ((3, 5, 7), 9, (2, 2, 2)),
        ((2, 3, 4), 2, (1, 1, 1)),
        ((2, 3, 5), 2, (1, 1, 2)),
        ((4, 7), 2, (2, 2)),
    ],
    ids=str,
)
def test_a_head_is_as_wide_as_the_tokens_it_can_ever_know(offsets, head_context, widths):
    assert context_widths(offsets, head_context) == widths


@pytest.mark.parametrize("ids", [None, DRAFT_IDS], ids=["all tokens", "draft vocabulary"])
@pytest.mark.parametrize("head_context", [0, 1, 2])
@pytest.mark.parametrize("look_back", [0, 1])
def test_logits_are_those_of_the_formula(head_context, look_back, ids):
    model = wrapped((3, 5), head_context=head_context, draft_token_ids=ids)
    tokens = torch.tensor([[5, 7, 11, 13, 17, 19, 2, 3]])
    states = states_of(model, tokens)
    for head in range(2):
        logits = model.leap_logits(head, states[None], tokens, look_back)[0]
        for s in range(len(states)):
            known = tokens[0, s + 1 : s + 1 + min(head_context, look_back + 1)].tolist()
            torch.testing.assert_close(logits[s], naive_head(model, head, states[s], known))


@pytest.mark.parametrize("ids", [None, DRAFT_IDS], ids=["all tokens", "draft vocabulary"])
def test_loss_is_the_naive_sum_over_positions(ids):
    model = wrapped((2, 5), head_context=2, draft_token_ids=ids)
    tokens = torch.randint(0, 24, (1, 14), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[0, :4] = -100
    states = states_of(model, tokens)
    expected = []
    for head, offset in enumerate((2, 5)):
        losses = []
        for s in range(14 - offset):
            target = int(labels[0, s + offset])
            if target == -100 or (ids is not None and target not in ids):
                continue
            logits = naive_head(model, head, states[s], tokens[0, s + 1 : s + 2].tolist())
            row = target if ids is None else ids.index(target)
            losses.append(cross_entropy(logits, torch.tensor(row)))
        expected.append(torch.stack(losses).mean())
    output = model(tokens, labels=labels)  # in evaluation mode: the nearest look-back
    torch.testing.assert_close(output.leap_losses, torch.stack(expected).detach())
    torch.testing.assert_close(output.loss, torch.stack(expected).sum())


def test_training_shows_each_number_of_tokens_that_decoding_will():
    model = wrapped((5,), head_context=4).train()  # look-backs 0 to 3: 1 to 4 tokens known
    seen = set()
    model.leap_heads[0].context.register_forward_pre_hook(
        lambda module, args: seen.update(
            (args[0].reshape(-1, 4, 32).abs().sum(dim=-1) > 0).sum(dim=-1).tolist()
        )
    )
    tokens = torch.randint(3, 24, (4, 40), generator=torch.Generator().manual_seed(0))
    model(tokens, labels=tokens)
    assert seen == {1, 2, 3, 4}


@pytest.mark.parametrize("ids", [None, DRAFT_IDS], ids=["all tokens", "draft vocabulary"])
@pytest.mark.parametrize("share", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("offsets", [(2, 3, 4), (3, 5, 7), (2, 3, 5), (4, 7)], ids=str)
def test_evaluation_and_decoder_agree_on_what_is_accepted(offsets, share, ids):
    settings = {"head_context": 2, "share_lm_head": share, "draft_token_ids": ids}
    model = wrapped(offsets, **settings)
    prompt = torch.randint(3, 24, (1, 6), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 60, "do_sample": False}
    plain = model.generate(prompt, **options)
    decoded = model.generate(
        prompt, use_lmtp=True, draft_tree=TREE, return_dict_in_generate=True, **options
    )
    assert torch.equal(decoded.sequences, plain)
    ranks = draft_ranks(model, Example(plain[0].tolist(), 6))
    assert simulated_steps(ranks, DraftTree.from_paths(TREE), 6) == decoded.acceptance_lengths[0]
    assert max(decoded.acceptance_lengths[0]) > 1


def test_a_draft_vocabulary_needs_no_weights_of_its_own_and_survives_saving(tmp_path):
    model = wrapped(head_context=1, draft_token_ids=DRAFT_IDS)
    assert not any("lm_head" in name for name in model.leap_heads.state_dict())
    model.save_pretrained(tmp_path)
    loaded = LMTPForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.tensor([[5, 7, 11, 13]])
    for ours, theirs in zip(
        model(tokens, output_leap_logits=True).leap_logits,
        loaded(tokens, output_leap_logits=True).leap_logits,
        strict=True,
    ):
        assert ours.shape == (1, 4, len(DRAFT_IDS))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["frozen", "trained", "not a bare linear layer"])
def test_draft_unembedding_is_some_rows_of_the_whole(kind):
    source = nn.Linear(8, 24)
    source.requires_grad_(kind != "frozen")
    whole = source if kind != "not a bare linear layer" else nn.Sequential(source)
    if isinstance(whole, nn.Sequential):
        whole.weight = source.weight
    states = torch.randn(5, 8)
    logits = DraftUnembedding(whole, DRAFT_IDS)(states)
    torch.testing.assert_close(logits, source(states)[:, list(DRAFT_IDS)])
    if kind == "trained":
        logits.sum().backward()
        gradient, source.weight.grad = source.weight.grad, None
        source(states)[:, list(DRAFT_IDS)].sum().backward()
        torch.testing.assert_close(gradient, source.weight.grad)


@pytest.mark.parametrize("train_backbone", [False, True])
def test_decoding_picks_the_rows_of_the_draft_vocabulary_once(monkeypatch, train_backbone):
    model = wrapped(head_context="path", draft_token_ids=DRAFT_IDS, train_backbone=train_backbone)
    picked, rows = [], DraftUnembedding._rows
    monkeypatch.setattr(DraftUnembedding, "_rows", lambda own: picked.append(1) or rows(own))
    prompt = torch.tensor([[5, 7, 11, 13]])
    model.generate(prompt, attention_mask=torch.ones_like(prompt), use_lmtp=True, max_new_tokens=12)
    assert len(picked) == 1


def test_labels_outside_the_draft_vocabulary_are_no_targets():
    labels = torch.tensor([[0, 5, 9, -100, 7]])
    assert draft_labels(labels, (5, 7, 9), 10, -100).tolist() == [[-100, 0, 2, -100, 1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_context": -1}, "head_context must be 0"),
        ({"draft_token_ids": ()}, "draft_token_ids must be increasing"),
        ({"draft_token_ids": (3, 3)}, "draft_token_ids must be increasing"),
        ({"draft_token_ids": (-1, 3)}, "draft_token_ids must be increasing"),
        ({"draft_token_ids": (1, 24)}, "go up to 24, but the backbone's vocabulary has 24"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(Exception, match=message):
        LMTPConfig(backbone_config=tiny_llama(vocab_size=24).config, **change)


def test_grounded_heads_say_that_they_need_token_ids():
    model = wrapped(head_context=1)
    embeds = model.get_input_embeddings()(torch.tensor([[5, 7, 11, 13]]))
    with pytest.raises(ValueError, match="need input_ids"):
        model(inputs_embeds=embeds, labels=torch.tensor([[5, 7, 11, 13]]))


def test_logits_of_the_last_tokens_are_the_last_logits():
    model = wrapped((3, 5), head_context=2)
    tokens = torch.tensor([[5, 7, 11, 13, 17, 19]])
    everything = model(tokens, output_leap_logits=True)
    last = model(tokens, output_leap_logits=True, logits_to_keep=3)
    torch.testing.assert_close(last.logits, everything.logits[:, -3:])
    for ours, theirs in zip(last.leap_logits, everything.leap_logits, strict=True):
        torch.testing.assert_close(ours, theirs[:, -3:])


def test_a_vocabulary_that_cannot_hold_the_draft_vocabulary_is_refused_before_anything_changes():
    model = wrapped(draft_token_ids=DRAFT_IDS)
    with pytest.raises(ValueError, match="go up to 23, beyond a vocabulary of 20"):
        model.resize_token_embeddings(20)
    assert model.get_input_embeddings().weight.shape[0] == 24
    model.resize_token_embeddings(30)
    assert model(torch.tensor([[5, 7]]), output_leap_logits=True).leap_logits[0].shape[-1] == 13
