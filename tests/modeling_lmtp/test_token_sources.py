"""An output says what proposed each of its tokens, and how many candidates each pass verified."""

from __future__ import annotations

import itertools

import pytest
import torch
from batches import (
    GREEDY,
    LENGTH,
    OwnProcessor,
    generate,
    leap,
    num_emitted,
    plain_texts,
    tokens_that_end,
    wrapped,
)
from drafters import CHAIN, RULES, TREE
from twelve_tokens import BATCH, BATCH_MASK
from twelve_tokens import wrapped as twelve

from modeling_lmtp.drafting_lmtp import (
    Candidates,
    ForwardDrafter,
    MergedDrafter,
    PromptLookupDrafter,
    Proposal,
    ProposingDrafter,
)
from modeling_lmtp.planned_drafter_lmtp import PlannedDrafter
from modeling_lmtp.planner_lmtp import DraftPlanner
from modeling_lmtp.tree_lmtp import DraftTree

REPEATING = {"input_ids": torch.tensor([[3, 4, 5, 6] * 3]), "attention_mask": torch.ones(1, 12)}


def assert_consistent(output) -> None:
    """The last token of each pass is its own; the others were candidates."""
    for lengths, counts, sources in zip(
        output.acceptance_lengths, output.num_candidates, output.token_sources, strict=True
    ):
        assert len(sources) == 1 + sum(lengths)
        assert len(counts) == len(lengths)
        lasts = [0, *itertools.accumulate(lengths)]
        assert [n for n, source in enumerate(sources) if source == "plain"] == lasts
        assert all(count >= length - 1 for count, length in zip(counts, lengths, strict=True))


@pytest.mark.parametrize("right", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("tree", [CHAIN, TREE], ids=["chain", "tree"])
@pytest.mark.parametrize("in_step", [False, True], ids=["apart", "in step"])
@pytest.mark.parametrize("ends", [[], [(0, 4), (1, 11)]], ids=["to the length", "with ends"])
def test_rows_that_end_apart_say_it_each_for_itself(ends, in_step, tree, right):
    options = {**GREEDY, "pad_token_id": 95}
    model, whole = wrapped("llama"), plain_texts("llama")
    if in_step:
        options["logits_processor"] = [OwnProcessor()]
        whole = generate(model.backbone, **options).sequences
    options["eos_token_id"] = tokens_that_end(whole[:, LENGTH:], ends) or None
    output = leap(model, whole, tree, right, **options)
    assert_consistent(output)
    lengths = num_emitted(output.sequences[:, LENGTH:], options["eos_token_id"] or ())
    assert list(map(len, output.token_sources)) == lengths
    assert len(set(lengths)) == (3 if ends else 1)
    assert set(itertools.chain(*output.token_sources)) <= {"plain", "drafter"}
    for accepted, counts in zip(output.acceptance_lengths, output.num_candidates, strict=True):
        known = [1, *itertools.accumulate(accepted, initial=1)][1:-1]
        rooms = [GREEDY["max_new_tokens"] - emitted - 1 for emitted in known]
        assert counts == [tree.truncate(room).num_nodes for room in rooms]


HEADS = {
    "chain": {"draft_length": 3, "prompt_lookup_num_tokens": 0},
    "tree": {"draft_tree": [(0,), (1,), (0, 0), (0, 1)], "prompt_lookup_num_tokens": 0},
    "planned": {"prompt_lookup_num_tokens": 0},
    "static shapes": {"prompt_lookup_num_tokens": 0, "cache_implementation": "static"},
}


@pytest.mark.parametrize("context", [0, "path"], ids=["leap heads", "path heads"])
@pytest.mark.parametrize("settings", HEADS.values(), ids=HEADS.keys())
def test_heads_are_named(settings, context):
    options = {"do_sample": False, "max_new_tokens": 40}
    batch = {"input_ids": BATCH % 12, "attention_mask": BATCH_MASK}
    output = generate(twelve(head_context=context), batch, use_lmtp=True, **settings, **options)
    assert_consistent(output)
    assert set(itertools.chain(*output.token_sources)) == {"plain", "head"}


COPIES = {
    "alone": PromptLookupDrafter(4),
    "after a forward pass": ForwardDrafter(PromptLookupDrafter(4)),
    "merged": MergedDrafter([PromptLookupDrafter(4)]),
    "merged chains": MergedDrafter([PromptLookupDrafter(4)], takes_trees=False),
    "planned": None,
}


@pytest.mark.parametrize("drafter", COPIES.values(), ids=COPIES.keys())
def test_copies_are_named(drafter):
    model = twelve() if drafter else twelve(leap_offsets=())
    options = {"do_sample": False, "max_new_tokens": 60}
    output = generate(model, REPEATING, use_lmtp=True, drafter=drafter, **options)
    assert_consistent(output)
    assert set(itertools.chain(*output.token_sources)) == {"plain", "lookup"}


class Proposer(ProposingDrafter):
    """Is sure of one chain."""

    def __init__(self, tokens, source):
        self.tokens, self.source = tokens, source

    def draft(self, input_ids, hidden_states, max_depth):
        tree = DraftTree.chain(len(self.tokens))
        return Candidates.from_rows([tree], [self.tokens], input_ids, [[self.source] * 3])

    def propose(self, input_ids, hidden_states, max_depth, min_value=0.0):
        paths = [tuple(self.tokens[:n]) for n in range(1, 1 + len(self.tokens))]
        kind = "lookup" if self.source == "lookup" else 1
        return [[Proposal(path, kind, 0.95) for path in paths]]


def sources_by_path(candidates: Candidates) -> dict[tuple[int, ...], str]:
    paths: list[tuple[int, ...]] = [()]
    for parent, token in zip(candidates.trees[0].parents, candidates.on_host()[0], strict=True):
        paths.append((*paths[parent], token))
    return dict(zip(paths[1:], candidates.sources_of(0), strict=True))


def test_what_heads_and_copies_both_propose_is_the_heads():
    copies, heads = Proposer([1, 2, 3], "lookup"), Proposer([1, 5, 6], "head")
    seconds = [0.0]
    planned = PlannedDrafter(DraftPlanner(lambda: seconds[0]), heads, copies)
    arguments = torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 1, 4), 9
    found: dict[tuple[int, ...], str] = {}
    for _ in range(20):  # some are plain or of copies alone, to learn what pays
        drafted = sources_by_path(planned.draft(*arguments))
        if (1, 5) in drafted:
            found |= drafted
        seconds[0] += 1.0
        planned.observe([[1, 2, 3, 7]])
    own = {(1,): "head", (1, 5): "head", (1, 5, 6): "head"}
    assert found == {**own, (1, 2): "lookup", (1, 2, 3): "lookup"}


def test_what_several_drafters_propose_is_the_first_one_s():
    copies, heads = Proposer([1, 2, 3], "lookup"), Proposer([1, 5, 6], "head")
    arguments = torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 1, 4), 9
    found = sources_by_path(MergedDrafter([copies, heads]).draft(*arguments))
    copied = {(1,): "lookup", (1, 2): "lookup", (1, 2, 3): "lookup"}
    assert found == {**copied, (1, 5): "head", (1, 5, 6): "head"}
    cut = MergedDrafter([copies, heads]).draft(*arguments).truncate([1])
    assert list(cut.sources_of(0))[: cut.num_nodes] == ["lookup"]
