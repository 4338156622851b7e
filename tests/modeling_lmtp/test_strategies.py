"""Ways to draft: planned drafts, prompt lookup, drafters merged, forward decoding, typical acceptance."""

from __future__ import annotations

import itertools

import pytest
import torch
from architectures import tiny_causal_lm
from drafters import CHAIN, TREE, Oracle
from round_trips import count_round_trips
from transformers import GenerationConfig
from transformers.utils import logging
from twelve_tokens import BATCH, BATCH_MASK, wrapped

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.drafting_lmtp import (
    Candidates,
    Drafter,
    ForwardDrafter,
    MergedDrafter,
    PromptLookupDrafter,
    merge_trees,
)
from modeling_lmtp.leap_drafter_lmtp import ProposingLeapHeadDrafter
from modeling_lmtp.selection_lmtp import TypicalRule
from modeling_lmtp.settings_lmtp import LMTPSettings
from modeling_lmtp.support_lmtp import Tier
from modeling_lmtp.tree_lmtp import MAX_NODES, DraftTree

PROMPT = torch.tensor([[3, 17, 5, 9, 44, 3, 17, 5]])
GREEDY = {"do_sample": False, "max_new_tokens": 40}


def small(tokens: torch.Tensor) -> torch.Tensor:
    return tokens % 12


def generate(model, prompt: torch.Tensor = PROMPT, mask: torch.Tensor | None = None, **options):
    mask = torch.ones_like(prompt) if mask is None else mask
    torch.manual_seed(4)
    return model.generate(
        small(prompt), attention_mask=mask, return_dict_in_generate=True, **options
    )


STRATEGIES = {
    "static tree": {"draft_tree": [(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]},
    "planned": {},
    "planned, heads alone": {"draft_nodes": 9, "prompt_lookup_num_tokens": 0},
    "lookup and chain": {"prompt_lookup_num_tokens": 5, "draft_length": 2},
    "lookup and chain of none": {"prompt_lookup_num_tokens": 5, "draft_length": 0},
    "planned, with short copies": {"prompt_lookup_num_tokens": 5, "draft_nodes": 9},
}


@pytest.mark.parametrize("batch", [False, True], ids=["one", "batch"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "bloom", "lfm2"])
@pytest.mark.parametrize("settings", STRATEGIES.values(), ids=STRATEGIES.keys())
def test_every_strategy_emits_plain_tokens(architecture, settings, batch):
    model = wrapped(architecture)
    prompt, mask = (BATCH, BATCH_MASK) if batch else (PROMPT, None)
    plain = generate(model.backbone, prompt, mask, **GREEDY).sequences
    output = generate(model, prompt, mask, use_lmtp=True, **settings, **GREEDY)
    assert output.sequences.tolist() == plain.tolist()
    assert max(itertools.chain(*output.acceptance_lengths)) > 1


@pytest.mark.parametrize("settings", STRATEGIES.values(), ids=STRATEGIES.keys())
def test_strategies_may_stand_in_the_generation_config(settings):
    model = wrapped()
    expected = generate(model, use_lmtp=True, **settings, **GREEDY)
    config = GenerationConfig(use_lmtp=True, **settings, **GREEDY)
    model._draft_planner = None  # or it would know more than in the call before
    in_call = generate(model, generation_config=config)
    for name, value in {"use_lmtp": True, **settings}.items():
        setattr(model.generation_config, name, value)
    model._draft_planner = None
    in_model = generate(model, **GREEDY)
    for output in (in_call, in_model):
        assert output.sequences.tolist() == expected.sequences.tolist()
        assert output.acceptance_lengths == expected.acceptance_lengths
    without = generate(model, use_lmtp=False, prompt_lookup_num_tokens=None, **GREEDY)
    assert without.sequences.tolist() == expected.sequences.tolist()


# Proposals


def proposals_of(model, num_nodes: int, depth: int, min_value: float = 0.0):
    drafter = ProposingLeapHeadDrafter(model.draft_heads(), num_nodes)
    hidden_states = torch.randn(3, 3, 32, generator=torch.Generator().manual_seed(1))
    input_ids = small(torch.arange(24).reshape(3, 8))
    with torch.no_grad():
        probabilities = drafter._logits(input_ids, hidden_states, 3).softmax(-1)
        return probabilities, drafter.propose(input_ids, hidden_states, depth, min_value)


@pytest.mark.parametrize("min_value", [0.0, 0.1, 0.99])
def test_heads_propose_the_paths_most_probable_for_this_state(min_value):
    probabilities, rows = proposals_of(wrapped(), 7, 3, min_value)
    for row, proposals in enumerate(rows):
        value = {
            tokens: torch.stack([probabilities[row, a, token] for a, token in enumerate(tokens)])
            .prod()
            .item()
            for depth in (1, 2, 3)
            for tokens in itertools.product(range(12), repeat=depth)
        }
        best = sorted(value, key=value.__getitem__, reverse=True)[:7]
        best = [tokens for tokens in best if value[tokens] >= min_value]
        assert {proposal.path for proposal in proposals} == set(best)
        for path, _, probability in proposals:
            expected = float(probabilities[row, len(path) - 1, path[-1]])
            assert probability == pytest.approx(expected)


def token_paths(tree: DraftTree, token_ids: list[int]) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = [()]
    for parent, token in zip(tree.parents, token_ids, strict=False):
        paths.append((*paths[parent], token))
    return paths[1:]


@pytest.mark.parametrize(("room", "depth"), [(0, 0), (1, 1), (2, 2), (9, 4)])
def test_proposals_are_no_deeper_than_there_is_room(room, depth):
    _, rows = proposals_of(wrapped(), 30, room)
    paths = [proposal.path for row in rows for proposal in row]
    assert max(map(len, paths), default=0) == depth


# Prompt lookup

LOOKUPS = {
    "the last n-gram's continuation": ([1, 2, 3, 4, 1, 2], [3, 4, 1]),
    "the latest of several": ([1, 2, 3, 1, 2, 5, 1, 2], [5, 1, 2]),
    "the longest n-gram first": ([7, 1, 2, 3, 1, 2, 5, 7, 1, 2], [3, 1, 2]),
    "a repeated token": ([6, 6, 6], [6, 6, 6]),
    "a period": ([9, 1, 2, 1, 2, 1, 2], [1, 2, 1]),
    "no match": ([1, 2, 3, 4], []),
    "one token alone": ([1, 2, 1], [2, 1, 2]),
    "a single token": ([1], []),
}


@pytest.mark.parametrize(("tokens", "expected"), LOOKUPS.values(), ids=LOOKUPS.keys())
def test_lookup_proposes(tokens, expected):
    candidates = PromptLookupDrafter(3).draft(torch.tensor([tokens]), torch.zeros(1, 1, 1), 9)
    assert candidates.is_chain
    assert candidates.token_ids[0].tolist() == expected


def looked_up(tokens: list[int], num_tokens: int, max_ngram_size: int) -> list[int]:
    """What prompt lookup proposes, naively."""
    for size in range(min(max_ngram_size, len(tokens) - 1), 0, -1):
        for start in range(len(tokens) - 1 - size, -1, -1):
            if tokens[start : start + size] == tokens[-size:]:
                text = list(tokens)
                for place in range(start + size, start + size + min(num_tokens, 3 * size)):
                    text.append(text[place])
                return text[len(tokens) :]
    return []


@pytest.mark.parametrize(("num_tokens", "max_ngram_size"), [(1, 1), (5, 2), (10, 3), (16, 6)])
def test_lookup_copies_after_the_longest_match_and_further_the_longer_it_is(
    num_tokens, max_ngram_size
):
    generator = torch.Generator().manual_seed(num_tokens)
    drafter = PromptLookupDrafter(num_tokens, max_ngram_size)
    lengths = set()
    for length in range(1, 40):
        rows = torch.randint(2, (3, length), generator=generator)
        rows[2] = torch.arange(length)  # nothing to find here
        candidates = drafter.draft(rows, torch.zeros(3, 1, 1), 99)
        for row, tree in enumerate(candidates.trees):
            expected = looked_up(rows[row].tolist(), num_tokens, max_ngram_size)
            assert candidates.token_ids[row].tolist()[: tree.num_nodes] == expected
            lengths.add(len(expected))
    assert lengths >= {0, min(num_tokens, 3), min(num_tokens, 3 * max_ngram_size)}


def test_rows_are_looked_up_apart_and_padded():
    tokens = torch.tensor([[1, 2, 3, 4, 1, 2], [1, 2, 3, 4, 5, 6], [6, 6, 6, 6, 6, 6]])
    candidates = PromptLookupDrafter(3).draft(tokens, torch.zeros(3, 1, 1), 2)
    assert [tree.num_nodes for tree in candidates.trees] == [2, 0, 2]
    assert candidates.token_ids[0].tolist() == [3, 4]
    assert candidates.token_ids[2].tolist() == [6, 6]


@pytest.mark.parametrize("settings", [{"draft_length": 3}, {}], ids=["chain", "planned"])
def test_lookup_makes_a_text_that_repeats_itself_cheaper(settings):
    model = wrapped()
    options = {**GREEDY, "max_new_tokens": 200, "use_lmtp": True, **settings}
    alone = generate(model, prompt_lookup_num_tokens=0, **options)
    together = generate(model, prompt_lookup_num_tokens=8, **options)
    assert together.sequences.tolist() == alone.sequences.tolist()
    assert len(together.acceptance_lengths[0]) < len(alone.acceptance_lengths[0])
    assert max(together.acceptance_lengths[0]) > 5  # deeper than the heads draft


# Drafters that are merged


def test_merged_trees_hold_all_paths_once_from_their_first_source():
    generator = torch.Generator().manual_seed(3)
    for _ in range(50):
        proposals = [random_proposal(generator) for _ in range(3)]
        names = [[name] * tree.num_nodes for name, (tree, _) in zip("abc", proposals, strict=True)]
        tree, token_ids, sources = merge_trees([
            (*proposal, own) for proposal, own in zip(proposals, names, strict=True)
        ])  # fmt: skip
        paths = [token_paths(*proposal) for proposal in proposals]
        wanted = set(itertools.chain(*paths))
        merged = token_paths(tree, token_ids)
        firsts = [next(n for n, own in zip("abc", paths, strict=True) if p in own) for p in merged]
        assert list(sources) == firsts
        assert len(merged) == len(set(merged)) == tree.num_nodes
        assert set(merged) == wanted
        assert list(tree.depths) == sorted(tree.depths)  # so that it can be cut
        for node, children in enumerate(tree.children):
            ranks = [tree.ranks[child - 1] for child in children]
            assert ranks == list(range(len(children))), (node, ranks)


def random_proposal(generator: torch.Generator) -> tuple[DraftTree, list[int]]:
    paths: list[tuple[int, ...]] = [()]
    for _ in range(6):
        parent = paths[int(torch.randint(len(paths), (), generator=generator))]
        rank = sum(1 for path in paths if path[:-1] == parent and len(path) == len(parent) + 1)
        paths.append((*parent, rank))
    tree = DraftTree.from_paths(paths[1:])
    return tree, torch.randint(4, (tree.num_nodes,), generator=generator).tolist()


def test_a_full_tree_takes_what_comes_first():
    first = (DraftTree.chain(60), list(range(60)), ["lookup"] * 60)
    second = (DraftTree.from_paths([(0,), (1,), (2,), (3,), (3, 0)]), [0, *range(80, 84)], "heads")
    tree, token_ids, _ = merge_trees([first, second])
    assert tree.num_nodes == MAX_NODES - 1
    paths = token_paths(tree, token_ids)
    assert tuple(range(60)) in paths
    assert {(80,), (81,), (82,)} <= set(paths)
    assert (82, 83) not in paths


class Fixed(Drafter):
    """Always proposes the same."""

    def __init__(self, *proposals: tuple[DraftTree, list[int]]) -> None:
        self.proposals = proposals

    def draft(self, input_ids, hidden_states, max_depth):
        trees, token_ids = zip(*self.proposals, strict=True)
        return Candidates.from_rows(trees, token_ids, input_ids)


def test_where_only_chains_can_be_verified_the_first_proposal_is_taken():
    nothing, some, more = ((DraftTree.chain(n), list(range(n))) for n in (0, 2, 3))
    merged = MergedDrafter([Fixed(nothing, some), Fixed(more, more)], takes_trees=False)
    candidates = merged.draft(torch.zeros(2, 4, dtype=torch.long), torch.zeros(2, 1, 1), 9)
    assert candidates.trees == (more[0], some[0])
    assert candidates.token_ids.tolist() == [[0, 1, 2], [0, 1, 0]]


def test_merged_drafters_see_all_the_states_they_ask_for():
    model = LMTPForCausalLM.from_backbone(tiny_causal_lm("llama"))
    plain = generate(model.backbone, **GREEDY).sequences
    oracle = Oracle(plain, TREE)
    merged = MergedDrafter([PromptLookupDrafter(4), oracle])
    assert merged.num_states == oracle.num_states
    output = generate(model, use_lmtp=True, drafter=merged, **GREEDY)
    assert output.sequences.tolist() == plain.tolist()
    assert min(output.acceptance_lengths[0][:-1]) == 5


@pytest.mark.parametrize("context", [0, "path"])
def test_merging_waits_for_the_device_no_more_than_its_drafters(monkeypatch, context):
    model = wrapped(head_context=context)
    apart = (
        LMTPSettings(draft_length=3),
        LMTPSettings(draft_length=0, prompt_lookup_num_tokens=5),
    )
    drafters = [model.new_drafter(own, Tier.TREE) for own in apart]
    together = LMTPSettings(draft_length=3, prompt_lookup_num_tokens=5)
    merged = model.new_drafter(together, Tier.TREE)
    prompt, hidden_states = small(PROMPT), torch.randn(1, 3, 32)
    trips = count_round_trips(monkeypatch)
    for drafter in drafters:
        assert drafter.draft(prompt, hidden_states, 9).num_nodes
    needed = len(trips) + 1  # a chain's tokens have not been on the host yet
    trips.clear()
    candidates = merged.draft(prompt, hidden_states, 9)
    assert len(trips) == needed
    assert candidates.on_host() == candidates.token_ids.tolist()


@pytest.mark.parametrize("depths", [(9, 9), (2, 3), (1, 0), (0, 0)], ids=str)
def test_candidates_made_on_the_host_stay_known_there(monkeypatch, depths):
    trees, rows = (DraftTree.chain(3), DraftTree.chain(5)), ([4, 5, 6], [7, 8, 9, 1, 2])
    made = Candidates.from_rows(trees, rows, torch.zeros(2, 4, dtype=torch.long))
    cut, device = made.truncate(depths), Candidates(made.trees, made.token_ids).truncate(depths)
    expected = device.token_ids.tolist()
    assert device.on_host() == cut.token_ids.tolist() == expected
    trips = count_round_trips(monkeypatch)
    assert cut.on_host() == expected
    assert not trips


# Forward decoding


def test_forward_decoding_runs_a_plain_pass_before_each_draft():
    model = wrapped()
    plain = generate(model.backbone, **GREEDY).sequences
    drafter = ForwardDrafter(Oracle(plain, CHAIN))
    for new_tokens, last in ((40, [1, 2]), (39, [1, 1]), (40, [1, 2])):  # it may end anywhere
        options = {**GREEDY, "max_new_tokens": new_tokens}
        output = generate(model, use_lmtp=True, drafter=drafter, **options)
        assert output.sequences.tolist() == plain[:, : 8 + new_tokens].tolist()
        assert output.acceptance_lengths[0] == [1, 5] * 6 + last


@pytest.mark.parametrize("batch", [False, True], ids=["one", "batch"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "bloom", "lfm2"])
@pytest.mark.parametrize("settings", [{"draft_length": 3}, {}], ids=["chain", "planned"])
def test_forward_decoding_with_the_model_s_own_heads_emits_plain_tokens(
    architecture, settings, batch
):
    model = wrapped(architecture)
    prompt, mask = (BATCH, BATCH_MASK) if batch else (PROMPT, None)
    plain = generate(model.backbone, prompt, mask, **GREEDY).sequences
    drafter = ForwardDrafter(model.new_drafter(LMTPSettings(**settings)))
    output = generate(model, prompt, mask, use_lmtp=True, drafter=drafter, **GREEDY)
    assert output.sequences.tolist() == plain.tolist()
    assert max(itertools.chain(*output.acceptance_lengths)) > 1


def test_forward_decoding_as_a_setting_is_refused_and_says_what_to_pass():
    model = wrapped()
    with pytest.raises(ValueError, match=r"Pass drafter=ForwardDrafter\(model.new_drafter\(\)\)"):
        generate(model, use_lmtp=True, forward_decoding=True, **GREEDY)
    model.generation_config.forward_decoding = True
    with pytest.raises(
        ValueError, match="remove forward_decoding from the call or the generation_"
    ):
        generate(model, use_lmtp=True, **GREEDY)
    plain = generate(model, use_lmtp=False, **GREEDY).sequences.tolist()
    for value in (False, None):
        model.generation_config.forward_decoding = value
        assert generate(model, use_lmtp=True, **GREEDY).sequences.tolist() == plain
        output = generate(model, use_lmtp=True, forward_decoding=value, **GREEDY)
        assert output.sequences.tolist() == plain


# Typical acceptance


def test_typical_acceptance_warns_that_it_is_lossy(caplog):
    logging.warning_once.cache_clear()  # another test may have been warned
    model = wrapped()
    generate(model, use_lmtp=True, acceptance_rule="typical", **GREEDY)
    assert "acceptance_rule='typical' is lossy" in caplog.text


def test_typical_acceptance_takes_what_the_formula_lets_pass():
    rule = TypicalRule(threshold=0.3, alpha=0.9)
    probabilities = torch.tensor([[0.5, 0.25, 0.15, 0.1]])
    entropy = -(probabilities * probabilities.log()).sum()
    bound = min(0.3, 0.9 * torch.exp(-entropy).item())
    assert 0.25 < bound < 0.5
    assert rule.select(probabilities.log(), [1, 0, 3]) == 0
    assert rule.select(probabilities.log(), [1, 3]) is None
    assert rule.select(probabilities.log(), []) is None
    assert TypicalRule(0.2, 0.9).select(probabilities.log(), [2, 1]) == 1


@pytest.mark.parametrize("batch", [False, True], ids=["one", "batch"])
def test_typical_acceptance_accepts_more_than_the_exact_rule(batch):
    model = wrapped()
    prompt, mask = (BATCH, BATCH_MASK) if batch else (PROMPT, None)
    options = {**GREEDY, "draft_tree": STRATEGIES["static tree"]["draft_tree"], "use_lmtp": True}
    exact = generate(model, prompt, mask, **options)
    typical = generate(
        model, prompt, mask, **options, acceptance_rule="typical", posterior_threshold=0.01
    )
    assert typical.sequences.shape == exact.sequences.shape
    assert typical.sequences.tolist() != exact.sequences.tolist()

    def num_passes(output) -> int:
        return sum(len(row) for row in output.acceptance_lengths)

    assert num_passes(typical) < num_passes(exact)


def test_typical_acceptance_where_nothing_is_offered_is_plain_decoding():
    model = wrapped()
    plain = generate(model.backbone, **GREEDY).sequences
    output = generate(model, use_lmtp=True, acceptance_rule="typical", draft_length=0, **GREEDY)
    assert output.sequences.tolist() == plain.tolist()


def test_typical_acceptance_needs_rows_that_are_judged_apart():
    model = wrapped()
    with pytest.raises(ValueError, match="acceptance_rule='typical' processes each row separately"):
        generate(
            model,
            BATCH,
            BATCH_MASK,
            use_lmtp=True,
            acceptance_rule="typical",
            prefix_allowed_tokens_fn=lambda _row, _tokens: [1, 2],
            **GREEDY,
        )
