"""Heads that see every token up to their target, drafted ones included (`head_context="path"`)."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from architectures import tiny_causal_lm
from naive_heads import naive_logits, states_of
from torch.nn.functional import cross_entropy

from modeling_lmtp import LMTPConfig, LMTPForCausalLM
from modeling_lmtp.leap_drafter_lmtp import LeapHeadDrafter
from modeling_lmtp.leaps_lmtp import context_widths, drafts
from modeling_lmtp.path_drafter_lmtp import MAX_PARENTS, PathDrafter, ProposingPathDrafter
from modeling_lmtp.settings_lmtp import LMTPSettings
from modeling_lmtp.support_lmtp import Tier
from modeling_lmtp.training.evaluation import draft_ranks, simulated_steps, tokens_per_step
from modeling_lmtp.training.examples import Example
from modeling_lmtp.tree_lmtp import DraftTree

OFFSETS = [(2, 3, 4), (3, 5, 7), (2, 3, 5)]
PATHS = [(0,), (1,), (2,), (0, 0), (0, 1), (2, 0), (2, 3), (0, 0, 0), (2, 3, 1), (2, 3, 1, 0)]
DRAFT_IDS = (2, 3, 5, 7, 11)
PROMPT = torch.tensor([[3, 7, 5, 9, 4, 3, 7]])
BATCH = torch.tensor([[0, 0, 3, 11, 5], [8, 4, 8, 4, 8]])
BATCH_MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
GREEDY = {"do_sample": False, "max_new_tokens": 40}

every_offsets = pytest.mark.parametrize("offsets", OFFSETS, ids=str)
every_vocabulary = pytest.mark.parametrize(
    "settings",
    [{}, {"share_lm_head": False}, {"draft_token_ids": DRAFT_IDS}],
    ids=["shared", "own", "draft vocabulary"],
)


def wrapped(
    offsets=(2, 3, 5), architecture: str = "llama", scale: float = 0.2, **settings
) -> LMTPForCausalLM:
    """Random heads over twelve tokens, so that they are right now and then."""
    settings = {"head_context": "path", "num_head_layers": 2, **settings}
    model = LMTPForCausalLM.from_backbone(
        tiny_causal_lm(architecture, vocab_size=12), leap_offsets=offsets, **settings
    )
    generator = torch.Generator().manual_seed(6)
    for parameter in model.leap_heads.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * scale
    return model.eval()


def drafter_of(model, **settings) -> LeapHeadDrafter:
    return model.new_drafter(LMTPSettings(**settings), Tier.TREE)


def proposed(model, num_nodes: int, input_ids: torch.Tensor, depth: int, min_value: float = 0.0):
    """What the heads propose, and for each row the value of each path."""
    drafter = ProposingPathDrafter(model.draft_heads(), num_nodes)
    with torch.no_grad():
        states = states_of(model, input_ids)[:, :-1][:, -drafter.num_states :]
    rows = drafter.propose(input_ids, states, depth, min_value)
    values = []
    for row in rows:
        value = {(): 1.0}
        for path, _, probability in row:
            value[path] = value[path[:-1]] * probability
        del value[()]
        values.append(value)
    return rows, values


def token_of(model, row: int) -> int:
    """The token that a row of the heads' logits stands for."""
    ids = model.config.draft_token_ids
    return row if ids is None else ids[row]


# What the heads see


@every_offsets
def test_a_head_is_as_wide_as_the_way_to_its_target(offsets):
    assert context_widths(offsets, "path") == tuple(offset - 1 for offset in offsets)


@pytest.mark.parametrize("look_back", [0, 1])
@every_vocabulary
@every_offsets
def test_logits_are_those_of_the_formula_whatever_the_look_back(offsets, settings, look_back):
    model = wrapped(offsets, **settings)
    [states] = states_of(model, PROMPT)
    for head, offset in enumerate(offsets):
        logits = model.leap_logits(head, states[None], PROMPT, look_back)[0]
        for s in range(len(states)):
            following = PROMPT[0, s + 1 : s + offset].tolist()
            torch.testing.assert_close(
                logits[s], naive_logits(model, head, states[s], following), rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@every_vocabulary
@every_offsets
def test_loss_is_the_naive_sum_over_positions_in_training_as_in_evaluation(
    offsets, settings, training
):
    model = wrapped(offsets, **settings).train(training)
    tokens = torch.randint(12, (2, 14), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[0, :4] = labels[1, 9] = -100
    states = states_of(model, tokens)
    expected = []
    for head, offset in enumerate(offsets):
        losses = []
        for row, s in itertools.product(range(2), range(14 - offset)):
            target = int(labels[row, s + offset])
            ids = model.config.draft_token_ids or range(12)
            if target not in ids:
                continue
            following = tokens[row, s + 1 : s + offset].tolist()
            logits = naive_logits(model, head, states[row, s], following)
            losses.append(cross_entropy(logits, torch.tensor(ids.index(target))))
        expected.append(torch.stack(losses).mean())
    output = model(tokens, labels=labels)
    torch.testing.assert_close(output.leap_losses, torch.stack(expected).detach())
    trained = list(model.leap_heads.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(output.loss, trained),
        torch.autograd.grad(sum(expected), trained),
        rtol=1e-4,
        atol=1e-5,
    )


# What is drafted


@torch.no_grad()
def candidates_by_text(model, input_ids, text: tuple[int, ...]) -> torch.Tensor | None:
    """The logits of what follows the known tokens and a drafted text, or None without a state."""
    draft = drafts(model.config.leap_offsets)[len(text)]
    t = input_ids.shape[1] - 1  # the root is x_{t+1}; h_s is states[s - 1]
    if t - draft.look_back < 1:
        return None
    state = states_of(model, input_ids)[0, t - draft.look_back - 1]
    # x_{s+1} … x_{t+1}, then the text
    following = [*input_ids[0, t - draft.look_back :].tolist(), *text]
    assert len(following) == model.config.leap_offsets[draft.head] - 1
    return naive_logits(model, draft.head, state, following)


def naive_candidates(model, input_ids, tree: DraftTree, max_depth: int) -> dict[tuple, int]:
    """The token of each node that can be drafted, by its path of ranks."""
    texts = {(): ()}
    for path in tree.paths:
        if len(path) > max_depth or path[:-1] not in texts:
            continue
        logits = candidates_by_text(model, input_ids, texts[path[:-1]])
        if logits is not None:
            row = int(logits.argsort(descending=True)[path[-1]])
            texts[path] = (*texts[path[:-1]], token_of(model, row))
    return {path: text[-1] for path, text in texts.items() if path}


@pytest.mark.parametrize("length", [2, 3, 7])
@pytest.mark.parametrize("shape", ["tree", "chain"])
@every_vocabulary
@every_offsets
def test_every_candidate_is_the_formula_s_on_its_own_path(offsets, settings, shape, length):
    model = wrapped(offsets, **settings)
    horizon = offsets[-1] - 1
    tree = DraftTree.chain(horizon)
    if shape == "tree":
        tree = DraftTree.from_paths(PATHS).truncate(horizon)
    drafter = drafter_of(model, draft_tree=tree.paths)
    assert type(drafter) is PathDrafter
    rows = [PROMPT[:, :length], PROMPT[:, -length:] + 2]
    input_ids = torch.cat(rows)
    with torch.no_grad():
        states = states_of(model, input_ids)[:, :-1][:, -drafter.num_states :]
    for max_depth in (1, 2, horizon):
        candidates = drafter.draft(input_ids, states, max_depth)
        for row, drafted in enumerate(candidates.trees):
            expected = naive_candidates(model, rows[row], tree, max_depth)
            tokens = candidates.token_ids[row].tolist()
            assert dict(zip(drafted.paths, tokens, strict=True)) == expected


def texts_of(tree: DraftTree, token_ids: list[int]) -> list[tuple[int, ...]]:
    texts: list[tuple[int, ...]] = [()]
    for parent, token in zip(tree.parents, token_ids, strict=False):
        texts.append((*texts[parent], token))
    return texts[1:]


def best_texts(model, input_ids, depth: int, num_nodes: int) -> dict[tuple[int, ...], float]:
    """The likeliest texts among all there are, best first, and their log-probabilities."""
    ids = model.config.draft_token_ids
    value = {(): 0.0}
    for length in range(depth):
        for text in itertools.product(ids, repeat=length):
            chances = candidates_by_text(model, input_ids, text).log_softmax(-1).tolist()
            value |= {(*text, t): value[text] + v for t, v in zip(ids, chances, strict=True)}
    del value[()]
    best = sorted(value, key=value.__getitem__, reverse=True)[:num_nodes]
    return {text: value[text] for text in best}


@pytest.mark.parametrize(
    ("ids", "num_nodes", "depth"),
    [
        ((2, 3, 5, 7, 11), 1, 4),
        ((2, 3, 5, 7, 11), 2, 4),
        ((2, 3, 5, 7, 11), 4, 4),
        ((2, 3, 5, 7, 11), MAX_PARENTS, 4),  # none of so few goes on from any other level's ninth
        ((3, 8), 20, 4),  # no level but the last has more paths than it may go on from
        ((3, 8), 20, 2),  # fewer texts than nodes
    ],
    ids=["one node", "two nodes", "four nodes", "few nodes", "two tokens", "little room"],
)
@every_offsets
def test_proposals_hold_the_likeliest_of_all_texts(offsets, ids, num_nodes, depth):
    model = wrapped(offsets, draft_token_ids=ids)
    depth = min(depth, offsets[-1] - 1)
    input_ids = torch.cat([PROMPT, PROMPT.flip(1)])
    rows, values = proposed(model, num_nodes, input_ids, depth)
    for row, value in enumerate(values):
        assert len(rows[row]) == len(value)  # no text twice
        best = best_texts(model, input_ids[row : row + 1], depth, num_nodes)
        likeliest = sorted(value, key=value.__getitem__, reverse=True)[:num_nodes]
        assert set(likeliest) == best.keys()
        for text in likeliest:
            assert math.log(value[text]) == pytest.approx(best[text], abs=1e-4)


@pytest.mark.parametrize(
    ("num_nodes", "paths_per_level"),
    [(1, [1]), (2, [1, 1]), (4, [1, 3, 3, 3]), (9, [1, 8, 8, 8]), (30, [1, 8, 8, 8])],
    ids=str,
)
def test_no_head_is_asked_for_more_than_may_become_nodes(monkeypatch, num_nodes, paths_per_level):
    model, asked, level_logits = wrapped(), [], PathDrafter._level_logits

    def noting(self, distance, input_ids, hidden_states, paths):
        asked.append(paths.shape[1])
        return level_logits(self, distance, input_ids, hidden_states, paths)

    monkeypatch.setattr(PathDrafter, "_level_logits", noting)
    proposed(model, num_nodes, PROMPT, 9)
    assert asked == paths_per_level


def test_no_head_is_asked_for_what_follows_an_unlikely_path(monkeypatch):
    model, asked, level_logits = wrapped(), [], PathDrafter._level_logits

    def noting(self, distance, input_ids, hidden_states, paths):
        asked.append(paths[0].tolist())
        return level_logits(self, distance, input_ids, hidden_states, paths)

    monkeypatch.setattr(PathDrafter, "_level_logits", noting)
    _, [value] = proposed(model, 8, PROMPT, 9)
    bound = sorted(v for path, v in value.items() if len(path) == 1)[-2]
    asked.clear()
    proposed(model, 8, PROMPT, 9, min_value=bound)
    assert [len(paths) for paths in asked[:2]] == [1, 2]
    assert all(value[tuple(path)] >= bound for paths in asked[1:] for path in paths)
    asked.clear()
    proposed(model, 8, PROMPT, 9, min_value=0.999)
    assert len(asked) == 1


@pytest.mark.parametrize("room", [0, 1, 3, 9])
def test_proposals_are_no_deeper_than_there_is_room(room):
    _, [value] = proposed(wrapped(), 20, PROMPT, room)
    assert max(map(len, value), default=0) == min(room, 4)


# What is generated

DRAFTS = {
    "chain": {"draft_length": 4},
    "tree": {"draft_tree": PATHS},
    "planned": {},
    "planned, heads alone": {"draft_nodes": 12, "prompt_lookup_num_tokens": 0},
    "lookup": {"prompt_lookup_num_tokens": 4, "draft_tree": PATHS},
}


def generate(model, batch: bool = False, **options):
    prompt, mask = (BATCH, BATCH_MASK) if batch else (PROMPT, torch.ones_like(PROMPT))
    torch.manual_seed(4)
    return model.generate(prompt, attention_mask=mask, return_dict_in_generate=True, **options)


@pytest.mark.parametrize("batch", [False, True], ids=["one", "batch"])
@pytest.mark.parametrize("draft", DRAFTS.values(), ids=DRAFTS.keys())
@every_vocabulary
def test_greedy_text_is_plain_decoding_s(settings, draft, batch):
    model = wrapped(**settings)
    plain = generate(model, batch, **GREEDY)
    output = generate(model, batch, use_lmtp=True, **draft, **GREEDY)
    assert output.sequences.tolist() == plain.sequences.tolist()
    assert max(itertools.chain(*output.acceptance_lengths)) > 1


@pytest.mark.parametrize("batch", [False, True], ids=["one", "batch"])
@pytest.mark.parametrize("architecture", ["bloom", "lfm2", "gemma2"])
def test_greedy_text_is_plain_decoding_s_where_only_some_drafts_can_be_verified(
    architecture, batch
):
    model = wrapped(architecture=architecture, scale=0.05)
    plain = generate(model, batch, **GREEDY)
    for draft in ({}, {"draft_nodes": 12}):
        output = generate(model, batch, use_lmtp=True, **draft, **GREEDY)
        assert output.sequences.tolist() == plain.sequences.tolist()
        assert max(itertools.chain(*output.acceptance_lengths)) > 1


@pytest.mark.parametrize("draft", DRAFTS.values(), ids=DRAFTS.keys())
def test_the_same_seed_samples_the_same_text(draft):
    model = wrapped()
    options = {"do_sample": True, "max_new_tokens": 40, "temperature": 0.7, "top_k": 5}
    plain = generate(model, **options)
    output = generate(model, use_lmtp=True, **draft, **options)
    assert output.sequences.tolist() == plain.sequences.tolist()


@pytest.mark.parametrize("length", [1, 2])
@every_offsets
def test_a_prompt_too_short_for_its_look_backs_is_no_error(offsets, length):
    model = wrapped(offsets)
    prompt = PROMPT[:, :length]
    plain = model.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY)
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), use_lmtp=True, draft_nodes=9, **GREEDY
    )
    assert output.tolist() == plain.tolist()


@pytest.mark.parametrize("shape", ["chain", "tree"])
@every_vocabulary
@every_offsets
def test_what_evaluation_simulates_is_what_decoding_accepts(offsets, settings, shape):
    model = wrapped(offsets, **settings)
    horizon = offsets[-1] - 1
    tree = DraftTree.chain(horizon)
    if shape == "tree":
        tree = DraftTree.from_paths(PATHS).truncate(horizon)
    output = generate(model, use_lmtp=True, draft_tree=tree.paths, **GREEDY)
    example = Example(output.sequences[0].tolist(), PROMPT.shape[1])
    ranks = draft_ranks(model, example)
    [lengths] = output.acceptance_lengths
    assert simulated_steps(ranks, tree, example.answer_start) == lengths
    simulated = tokens_per_step([ranks], [example], tree)
    assert math.isclose(simulated, sum(lengths) / len(lengths))
    assert max(lengths) > 1, "nothing was accepted, so this shows nothing"


def test_path_heads_survive_saving(tmp_path):
    model = wrapped()
    model.save_pretrained(tmp_path)
    loaded = LMTPForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.head_context == "path"
    expected = generate(model, use_lmtp=True, draft_nodes=9, **GREEDY)
    output = generate(loaded, use_lmtp=True, draft_nodes=9, **GREEDY)
    assert output.sequences.tolist() == expected.sequences.tolist()
    assert output.acceptance_lengths == expected.acceptance_lengths


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("paths", "head_context must be 0 .* or more, or 'path', got 'paths'"),
        ("0", "head_context must be 0 .* or more, or 'path', got '0'"),
        (-1, "head_context must be 0 .* or more, or 'path', got -1"),
        (1.5, "head_context"),
        (None, "head_context"),
    ],
    ids=repr,
)
def test_other_values_of_head_context_are_refused(value, message):
    with pytest.raises(Exception, match=message):
        LMTPConfig(backbone_config=tiny_causal_lm("llama").config, head_context=value)


def test_path_heads_say_that_they_need_token_ids():
    model = wrapped()
    embeds = model.get_input_embeddings()(PROMPT)
    with pytest.raises(ValueError, match="need input_ids"):
        model(inputs_embeds=embeds, labels=PROMPT)
    with pytest.raises(ValueError, match="need input_ids"):
        model(inputs_embeds=embeds, output_leap_logits=True)
