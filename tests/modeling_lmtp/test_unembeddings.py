"""Unembeddings of leap heads: the backbone's, a low-rank step from it, or one of their own."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch
from architectures import tiny_causal_lm
from huggingface_hub.errors import StrictDataclassError
from naive_heads import naive_logits, states_of
from tiny import tiny_llama
from torch import nn
from torch.nn.functional import cross_entropy, kl_div

from modeling_lmtp import LMTPConfig, LMTPForCausalLM
from modeling_lmtp.losses_lmtp import CHUNK_SIZE
from modeling_lmtp.training.evaluation import draft_ranks, simulated_steps
from modeling_lmtp.training.examples import Example
from modeling_lmtp.training.objective import HeadObjective
from modeling_lmtp.tree_lmtp import DraftTree
from modeling_lmtp.unembeddings_lmtp import (
    HeadUnembedding,
    LowRankUpdate,
    logit_scale,
    unembed,
)

VOCAB_SIZE, HIDDEN_SIZE, RANK = 24, 32, 4
DRAFT_IDS = (*range(0, 24, 2), 23)
TREE = [(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (2, 0), (0, 0, 0), (0, 0, 1)]

KINDS = {
    "shared": {},
    "low rank": {"lm_head_rank": RANK},
    "own": {"share_lm_head": False},
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
every_vocabulary = pytest.mark.parametrize(
    "ids", [None, DRAFT_IDS], ids=["all tokens", "draft vocabulary"]
)


def wrapped(kind, ids=None, offsets=(2, 3, 5), *, random_heads=True, **settings):
    model = LMTPForCausalLM.from_backbone(
        tiny_llama(vocab_size=VOCAB_SIZE, eos_token_id=None),
        leap_offsets=offsets,
        draft_token_ids=ids,
        **kind,
        **settings,
    )
    generator = torch.Generator().manual_seed(7)
    for parameter in model.leap_heads.parameters() if random_heads else ():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    return model


def batch():
    tokens = torch.randint(VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[0, 5] = labels[1, :4] = -100
    return tokens, labels


@every_vocabulary
@every_kind
def test_heads_start_as_the_language_modeling_head(kind, ids):
    outputs = wrapped(kind, ids, random_heads=False)(batch()[0], output_leap_logits=True)
    expected = outputs.logits if ids is None else outputs.logits[..., list(ids)]
    for logits in outputs.leap_logits:
        torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)


@every_vocabulary
@every_kind
def test_a_head_has_the_parameters_of_its_kind(kind, ids):
    size = VOCAB_SIZE if ids is None else len(DRAFT_IDS)
    block = HIDDEN_SIZE * HIDDEN_SIZE + HIDDEN_SIZE
    own = {
        "shared": 0,
        "low rank": RANK * (HIDDEN_SIZE + size),
        "own": HIDDEN_SIZE * size,
    }[next(name for name, settings in KINDS.items() if settings == kind)]
    model = wrapped(kind, ids)
    assert sum(p.numel() for p in model.leap_heads.parameters()) == 3 * (block + own)
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    assert len(pointers) == len(set(pointers))


@pytest.mark.parametrize("train_backbone", [False, True], ids=["stage 1", "stage 2"])
@every_vocabulary
@every_kind
def test_loss_and_gradients_are_the_naive_sum_s(kind, ids, train_backbone):
    model = wrapped(kind, ids, train_backbone=train_backbone, leap_loss_weight=1.0)
    tokens, labels = batch()
    states = states_of(model, tokens)
    rows = ids or range(VOCAB_SIZE)
    expected = 0.0
    if train_backbone:
        logits = model.backbone(tokens).logits[:, :-1]
        expected = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    for head, offset in enumerate(model.config.leap_offsets):
        losses = [
            cross_entropy(
                naive_logits(model, head, states[row, s]),
                torch.tensor(rows.index(int(labels[row, s + offset]))),
            )
            for row, s in itertools.product(range(2), range(12 - offset))
            if labels[row, s + offset] in rows
        ]
        expected = expected + torch.stack(losses).mean()
    actual = model(tokens, labels=labels).loss
    torch.testing.assert_close(actual, expected)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.testing.assert_close(
        torch.autograd.grad(actual, trained),
        torch.autograd.grad(expected, trained),
        rtol=1e-4,
        atol=1e-5,
    )


class Kept:
    """Stands for a tensor that autograd keeps, for as long as it does."""

    def __init__(self, tensor):
        self.tensor = tensor


@every_vocabulary
def test_a_low_rank_update_keeps_no_logits_for_backward(ids):
    model = wrapped(KINDS["low rank"], ids, offsets=(3, 5))
    tokens = torch.arange(CHUNK_SIZE + 50)[None] % VOCAB_SIZE
    vocab_size = VOCAB_SIZE if ids is None else len(DRAFT_IDS)
    kept: weakref.WeakSet[Kept] = weakref.WeakSet()

    def pack(tensor):
        holder = Kept(tensor)
        kept.add(holder)
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        loss = model(tokens, labels=tokens).loss
    assert len(kept) > 0
    assert not [holder for holder in kept if holder.tensor.shape[-1] == vocab_size]
    loss.backward()
    assert model.leap_heads[1].lm_head_update.down.weight.grad.abs().max() > 0


@every_vocabulary
def test_a_low_rank_update_learns_from_its_start(ids):
    model = wrapped(KINDS["low rank"], ids, random_heads=False)
    tokens, labels = batch()
    optimizer = torch.optim.Adam(model.leap_heads.parameters(), lr=0.01)
    losses = []
    for _ in range(4):
        loss = model(tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert all(head.lm_head_update.up.weight.abs().max() > 0 for head in model.leap_heads)


@pytest.mark.parametrize(
    "draft", [{"draft_tree": TREE}, {"draft_nodes": 9}], ids=["tree", "planned"]
)
@every_vocabulary
@every_kind
def test_drafts_are_the_naive_heads_and_the_text_is_plain_decoding_s(kind, ids, draft):
    model = wrapped(kind, ids)
    prompt = batch()[0][:1, :6]
    options = {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True}
    plain = model.generate(prompt, **options)
    output = model.generate(prompt, use_lmtp=True, **draft, **options)
    assert torch.equal(output.sequences, plain.sequences)
    assert max(output.acceptance_lengths[0]) > 1
    if "draft_tree" in draft:
        ranks = draft_ranks(model, Example(plain.sequences[0].tolist(), 6))
        simulated = simulated_steps(ranks, DraftTree.from_paths(TREE), 6)
        assert output.acceptance_lengths[0] == simulated


@every_vocabulary
@every_kind
def test_logits_are_those_of_the_formula(kind, ids):
    model = wrapped(kind, ids)
    tokens = batch()[0]
    states = states_of(model, tokens)
    for head in range(3):
        logits = model.leap_logits(head, states)
        for row, s in itertools.product(range(2), range(12)):
            torch.testing.assert_close(logits[row, s], naive_logits(model, head, states[row, s]))


@pytest.mark.parametrize("bases", ["one", "two"])
@pytest.mark.parametrize("updated", [False, True], ids=["bare", "updated"])
def test_unembedding_together_is_unembedding_apart(bases, updated):
    shared = [nn.Linear(8, 12), nn.Linear(8, 12)]
    unembeddings = []
    for head in range(3):
        update = LowRankUpdate(8, 2, 12) if updated else None
        if update is not None:
            nn.init.normal_(update.up.weight)
        unembeddings.append(HeadUnembedding(shared[head % 2 if bases == "two" else 0], update))
    features = [torch.randn(2, 1 + head, 8) for head in range(3)]
    together = unembed(unembeddings, features)
    apart = [unembedding(part) for unembedding, part in zip(unembeddings, features, strict=True)]
    assert together.shape == (2, 6, 12)
    torch.testing.assert_close(together, torch.cat(apart, dim=1))


@every_vocabulary
@every_kind
def test_unembeddings_survive_saving(tmp_path, kind, ids):
    model = wrapped(kind, ids)
    model.save_pretrained(tmp_path)
    loaded = LMTPForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.lm_head_rank == model.config.lm_head_rank
    assert loaded.state_dict().keys() == model.state_dict().keys()
    tokens = batch()[0]
    ours, theirs = (m(tokens, output_leap_logits=True).leap_logits for m in (model, loaded))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("vocab_size", [30, 20], ids=["grow", "shrink"])
def test_a_low_rank_update_follows_the_vocabulary(vocab_size):
    model = wrapped(KINDS["low rank"])
    before = [head.lm_head_update.up.weight.clone() for head in model.leap_heads]
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    rows = min(VOCAB_SIZE, vocab_size)
    for head, old in zip(model.leap_heads, before, strict=True):
        new = head.lm_head_update.up.weight
        assert new.shape == (vocab_size, RANK)
        assert new.requires_grad
        assert torch.equal(new[:rows], old[:rows])
        assert not new[rows:].any()
    logits = model(batch()[0] % 20, output_leap_logits=True).leap_logits
    assert {part.shape for part in logits} == {(2, 12, vocab_size)}


def test_a_low_rank_update_of_a_draft_vocabulary_stays():
    model = wrapped(KINDS["low rank"], DRAFT_IDS)
    before = model.leap_heads[0].lm_head_update.up.weight.clone()
    model.resize_token_embeddings(30, mean_resizing=False)
    assert torch.equal(model.leap_heads[0].lm_head_update.up.weight, before)


@pytest.mark.parametrize("architecture", ["llama_tied", "gpt2", "phi", "gemma2"])
def test_a_low_rank_update_suits_other_backbones(architecture):
    model = LMTPForCausalLM.from_backbone(
        tiny_causal_lm(architecture, vocab_size=12), leap_offsets=(2, 3), lm_head_rank=3
    )
    generator = torch.Generator().manual_seed(7)
    for parameter in model.leap_heads.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
    prompt = torch.tensor([[3, 7, 5, 9]])
    model(prompt, labels=prompt).loss.backward()
    options = {"max_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    plain = model.generate(prompt, **options)
    assert model.generate(prompt, use_lmtp=True, **options).tolist() == plain.tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lm_head_rank": -1}, "lm_head_rank must be 0 .* or more, got -1"),
        (
            {"lm_head_rank": 8, "share_lm_head": False},
            "lm_head_rank=8 adapts the shared unembedding, but with share_lm_head=False",
        ),
        ({"lm_head_rank": 1.5}, "lm_head_rank"),
        ({"lm_head_rank": "8"}, "lm_head_rank"),
    ],
    ids=str,
)
def test_ranks_that_cannot_be_are_refused(settings, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        LMTPConfig(backbone_config=tiny_llama().config, **settings)


SCALED_PROMPT = torch.tensor([[3, 17, 5, 9, 44, 60, 2, 31, 8]])
SCALED = {"granite": {"logits_scaling": 8.0}, "cohere": {"logit_scale": 0.25}}


@pytest.mark.parametrize("kind", SCALED)
@pytest.mark.parametrize(
    "settings", [{}, {"share_lm_head": False}, {"lm_head_rank": 4}], ids=["shared", "own", "rank"]
)
def test_logits_of_heads_are_scaled_as_the_model_scales_its_own(kind, settings):
    backbone = tiny_causal_lm(kind, **SCALED[kind])
    model = LMTPForCausalLM.from_backbone(backbone, leap_offsets=(2, 3), **settings)
    output = model(input_ids=SCALED_PROMPT, output_leap_logits=True)
    for logits in output.leap_logits:
        torch.testing.assert_close(logits, output.logits)


@pytest.mark.parametrize("kind", SCALED)
def test_probabilities_of_drafts_and_of_the_teacher_are_scaled(kind):
    model = LMTPForCausalLM.from_backbone(
        tiny_causal_lm(kind, **SCALED[kind]), leap_offsets=(2,), draft_token_ids=tuple(range(96))
    )
    logits = model(input_ids=SCALED_PROMPT).logits
    states = model.run_pass({"input_ids": SCALED_PROMPT})[1]
    [unembedding] = model.draft_unembeddings()
    torch.testing.assert_close(unembed([unembedding], [states]), logits)
    # The untrained head says at s what the model says there; the teacher speaks one token later
    ours, teacher = (part.log_softmax(-1) for part in (logits[:, :-2], logits[:, 1:-1]))
    expected = kl_div(ours, teacher, reduction="sum", log_target=True) / ours[..., 0].numel()
    objective = HeadObjective(1, weight=1.0, temperature=1.0)
    loss, _ = objective(model, states, SCALED_PROMPT, SCALED_PROMPT)
    torch.testing.assert_close(loss, expected)


def test_a_soft_cap_is_no_scale():
    assert logit_scale(tiny_causal_lm("gemma2", final_logit_softcapping=3.0)) == 1
    assert logit_scale(tiny_causal_lm("llama")) == 1
