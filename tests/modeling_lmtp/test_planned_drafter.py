"""Planned drafts: which candidates are verified, and that they never slow decoding down."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
import torch
from architectures import tiny_causal_lm

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.drafting_lmtp import LOOKUP, Proposal, ProposingDrafter
from modeling_lmtp.planned_drafter_lmtp import MARGIN, PlannedDrafter, best_chain, path_values
from modeling_lmtp.planner_lmtp import (
    LOST_SHARE,
    LOST_STEPS,
    PASS_SIZES,
    AcceptanceRates,
    DraftPlanner,
    TextRates,
)

PROMPT = torch.tensor([[3, 17, 5, 9, 44, 3, 17, 5]])


# Values


def test_a_path_s_value_is_the_product_of_its_rates():
    proposals = [
        Proposal((5,), 1, 0.6),
        Proposal((7,), 1, 0.3),
        Proposal((5, 1), 2, 0.5),
        Proposal((5, 1, 4), 3, 0.9),
    ]
    values = path_values(TextRates(AcceptanceRates()), proposals)
    expected = {(5,): 0.6, (7,): 0.3, (5, 1): 0.3, (5, 1, 4): 0.27}
    assert values == pytest.approx(expected)


def test_what_two_sources_propose_is_likelier_than_each_of_them_says():
    proposals = [Proposal((5,), "lookup", 0.4), Proposal((5,), 1, 0.7), Proposal((5, 2), 2, 0.5)]
    values = path_values(TextRates(AcceptanceRates()), proposals)
    assert values == pytest.approx({(5,): 1 - 0.6 * 0.3, (5, 2): 0.41})


def test_tokens_after_one_path_exclude_each_other():
    proposals = [Proposal((5,), "lookup", 0.9), Proposal((6,), 1, 0.6)]
    values = path_values(TextRates(AcceptanceRates()), proposals)
    assert values == pytest.approx({(5,): 0.6, (6,): 0.4})


def test_the_best_chain_is_the_one_with_most_tokens_to_come():
    values = {(5,): 0.6, (6,): 0.4, (6, 1): 0.35, (6, 1, 2): 0.3, (5, 3): 0.1}
    assert list(best_chain(values)) == [(6,), (6, 1), (6, 1, 2)]
    assert best_chain({}) == {}


# A text that is decoded without a model


class Clock:
    """Seconds that pass only where a test lets them."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Guesser(ProposingDrafter):
    """Knows the texts, and proposes the right token with a probability that it states.

    Args:
        texts: one per row.
        stated: the probability that it states for each token.
        real: how often it is right.
        clock, seconds: what a draft takes.
    """

    num_states = 1

    def __init__(self, texts, stated, real, clock=None, seconds=0.0, depth=3, source="head"):
        self.texts, self.stated, self.real = texts, stated, real
        self.clock, self.seconds, self.depth, self.source = clock, seconds, depth, source
        self.generator, self.asked = random.Random(2), 0

    def draft(self, input_ids, hidden_states, max_depth):
        raise NotImplementedError

    def propose(self, input_ids, hidden_states, max_depth, min_value=0.0):
        self.asked += 1
        if self.clock is not None:
            self.clock.seconds += self.seconds
        rows = []
        for row, text in zip(input_ids.tolist(), self.texts, strict=True):
            path, proposals = (), []
            for distance in range(min(self.depth, max_depth)):
                token = text[len(row) + distance]
                is_right = self.generator.random() < self.real
                path = (*path, token if is_right else token + 1000)
                # Copies are one source, each level of heads is one of its own
                source = LOOKUP if self.source == LOOKUP else (self.source, distance)
                proposals.append(Proposal(path, source, self.stated))
            rows.append(proposals)
        return rows


LENGTH = 600


def decode(drafter: PlannedDrafter, texts, clock: Clock, seconds, length: int = LENGTH):
    """Decode texts of equal length in lockstep with what is accepted in all rows; return the steps."""
    known, steps = 2, []
    while known < length:
        input_ids = torch.tensor([text[:known] for text in texts])
        room = length - known - 1
        candidates = drafter.draft(input_ids, torch.zeros(len(texts), 1, 4), room)
        tokens = []
        for text, tree, row in zip(
            texts, candidates.trees, candidates.token_ids.tolist(), strict=True
        ):
            emitted, node = [text[known]], tree.child(0, text[known], row)
            while node is not None:
                emitted.append(text[known + len(emitted)])
                node = tree.child(node, emitted[-1], row)
            tokens.append(emitted)
        clock.seconds += seconds(len(texts), 1 + candidates.num_nodes)
        shortest = min(map(len, tokens))
        drafter.observe([emitted[:shortest] for emitted in tokens])
        steps.append((candidates.num_nodes, shortest))
        known += shortest
    return steps


def texts_of(num_rows: int, length: int = LENGTH):
    generator = random.Random(3)
    return [[generator.randrange(1000) for _ in range(length + 70)] for _ in range(num_rows)]


def linear(num_rows: int, size: int) -> float:
    return 0.04 + 0.001 * num_rows * (size - 1)


def dear(num_rows: int, size: int) -> float:
    return 0.04 * size


def flat(num_rows: int, size: int) -> float:
    return 0.04


def speed_up(stated, real, seconds, num_rows=1, length=LENGTH, draft_seconds=0.004, lookup=None):
    clock, texts = Clock(), texts_of(num_rows, length)
    heads = Guesser(texts, stated, real, clock, draft_seconds)
    drafter = PlannedDrafter(DraftPlanner(clock), heads, lookup)
    steps = decode(drafter, texts, clock, seconds, length)
    plain = (length - 2) * seconds(num_rows, 1)
    return plain / clock.seconds, steps, heads


@pytest.mark.parametrize("num_rows", [1, 4])
@pytest.mark.parametrize("seconds", [linear, dear, flat], ids=["linear", "dear tokens", "flat"])
@pytest.mark.parametrize(
    ("stated", "real"), [(0.002, 0.001), (0.05, 0.0), (0.3, 0.02)], ids=["random", "wrong", "vain"]
)
def test_heads_that_are_seldom_right_cost_next_to_nothing(stated, real, seconds, num_rows):
    ratio, _, heads = speed_up(stated, real, seconds, num_rows)
    assert ratio > 0.97
    assert heads.asked < 60


@pytest.mark.parametrize("seconds", [linear, flat], ids=["linear", "flat"])
def test_heads_that_are_sure_and_wrong_are_found_out(seconds):
    ratio, steps, _ = speed_up(0.95, 0.0, seconds)
    assert ratio > 0.97
    assert sum(nodes for nodes, _ in steps[300:]) <= 30


def test_a_first_short_call_with_random_heads_is_no_slower():
    ratio, _, _ = speed_up(0.002, 0.001, linear, length=64)
    assert ratio > 0.97


def test_heads_that_are_right_are_verified_as_deep_as_they_draft():
    ratio, steps, _ = speed_up(0.95, 0.98, linear)
    assert ratio > 2.9
    assert statistics_of(steps[50:-3]) == 3


def statistics_of(steps) -> float:
    return sorted(nodes for nodes, _ in steps)[len(steps) // 2]


def test_where_tokens_are_far_dearer_than_assumed_few_are_tried():
    """As in bfloat16 on a CPU without instructions for it, where 32 tokens took 12 plain passes."""
    clock, texts = Clock(), texts_of(1)
    copies = Guesser(texts, 0.9, 0.3, clock, depth=30, source=LOOKUP)
    drafter = PlannedDrafter(DraftPlanner(clock), None, copies)

    def seconds(num_rows: int, size: int) -> float:
        return 0.04 * (1 + 0.35 * (size - 1))

    steps = decode(drafter, texts, clock, seconds)
    assert max(nodes for nodes, _ in steps) <= 11
    assert sum(nodes > 7 for nodes, _ in steps) <= 2
    assert (LENGTH - 2) * 0.04 / clock.seconds > 0.97


def uneven(num_rows: int, size: int) -> float:
    """As in float32 on a CPU whose products of few rows are slow: six tokens take less than four."""
    sizes = {1: 1.0, 2: 1.67, 4: 1.95, 6: 1.6, 8: 1.75, 16: 1.92, 32: 3.3}
    return 0.117 * next(cost for most, cost in sizes.items() if size <= most)


def test_larger_drafts_are_tried_where_smaller_ones_are_too_dear():
    clock, texts = Clock(), texts_of(1)
    copies = Guesser(texts, 0.85, 0.85, clock, depth=15, source=LOOKUP)
    drafter = PlannedDrafter(DraftPlanner(clock), None, copies)
    steps = decode(drafter, texts, clock, uneven)
    assert statistics_of(steps[-60:]) == 15
    assert (LENGTH - 2) * uneven(1, 1) / clock.seconds > 2.1


def test_a_size_whose_first_passes_were_slow_is_tried_again():
    """As where kernels are prepared for each size: the first passes say little about the later ones."""
    clock, texts, passes = Clock(), texts_of(1, 1500), Counter()

    def seconds(num_rows: int, size: int) -> float:
        passes[size] += 1
        return 0.04 * (1 + 0.2 * (size - 1)) * (2 if size > 1 and passes[size] <= 2 else 1)

    copies = Guesser(texts, 0.6, 0.6, clock, depth=1, source=LOOKUP)
    steps = decode(PlannedDrafter(DraftPlanner(clock), None, copies), texts, clock, seconds, 1500)
    assert statistics_of(steps[-60:]) == 1


@pytest.mark.parametrize("seconds", [linear, dear, uneven], ids=["linear", "dear", "uneven"])
def test_trying_costs_next_to_nothing_where_it_finds_nothing(seconds):
    clock, texts = Clock(), texts_of(1)
    copies = Guesser(texts, 0.2, 0.05, clock, depth=30, source=LOOKUP)
    drafter = PlannedDrafter(DraftPlanner(clock), None, copies)
    decode(drafter, texts, clock, seconds)
    assert (LENGTH - 2) * seconds(1, 1) / clock.seconds > 0.97


def test_a_first_short_call_of_a_batch_is_hardly_slower_where_tokens_are_dear():
    """As in bfloat16 on a CPU without instructions for it: two tokens in four rows take 1.7 passes."""

    def seconds(num_rows: int, size: int) -> float:
        return 0.1 * (1 + 0.7 * (size - 1))

    ratio, steps, _ = speed_up(0.45, 0.45, seconds, num_rows=4, length=64, draft_seconds=0.005)
    assert ratio > 0.94
    assert max(nodes for nodes, _ in steps) == 1


@pytest.mark.parametrize("seed", range(6))
def test_a_machine_that_is_now_fast_and_now_slow_drafts_what_pays(seed):
    clock, texts, generator = Clock(), texts_of(1), random.Random(seed)

    def noisy(num_rows: int, size: int) -> float:
        return here(num_rows, size) * generator.lognormvariate(0, 0.15)

    copies = Guesser(texts, 0.9, 0.9, clock, depth=7, source=LOOKUP)
    steps = decode(PlannedDrafter(DraftPlanner(clock), None, copies), texts, clock, noisy)
    assert statistics_of(steps) > 1
    assert (LENGTH - 2) * 0.05 / clock.seconds > 1.2


def here(num_rows: int, size: int) -> float:
    """As in bfloat16 on a CPU without instructions for it."""
    return 0.05 * {1: 1.0, 2: 1.9, 3: 1.95, 4: 2.5}.get(size, 0.45 * size)


def test_what_one_text_copies_is_not_expected_of_the_next():
    clock, texts, others = Clock(), texts_of(1), texts_of(1, 100)
    copies = Guesser(texts, 0.9, 0.95, clock, depth=7, source=LOOKUP)
    drafter = PlannedDrafter(DraftPlanner(clock), None, copies)
    decode(drafter, texts, clock, here)
    drafter.reset()
    copies.texts, copies.real, before = others, 0.05, clock.seconds
    decode(drafter, others, clock, here, 100)
    assert 98 * here(1, 1) / (clock.seconds - before) > 0.95


class Impostor(Guesser):
    """Is sure and wrong in every step, each time as a source of which nothing is known."""

    def propose(self, input_ids, hidden_states, max_depth, min_value=0.0):
        rows = super().propose(input_ids, hidden_states, max_depth, min_value)
        return [
            [proposal._replace(source=(LOOKUP, self.asked)) for proposal in row] for row in rows
        ]


@pytest.mark.parametrize("num_rows", [1, 4])
@pytest.mark.parametrize("seconds", [here, linear, dear, flat], ids=lambda curve: curve.__name__)
def test_a_call_loses_no_more_than_its_allowance_whatever_is_expected(seconds, num_rows):
    clock, length = Clock(), 150
    texts = texts_of(num_rows, length)
    impostor = Impostor(texts, 0.95, 0.0, clock, depth=15, source=LOOKUP)
    drafter = PlannedDrafter(DraftPlanner(clock), None, impostor)
    for call in range(4):
        drafter.reset()
        before = clock.seconds
        steps = decode(drafter, texts, clock, seconds, length)
        lost = (clock.seconds - before) / seconds(num_rows, 1) - (length - 2)
        assert call > 0 or sum(nodes for nodes, _ in steps) > 0
        # Costs are not known yet in the first call
        assert lost < LOST_STEPS + LOST_SHARE * length + (3.0 if call == 0 else 0.5)


def test_candidates_are_dropped_where_a_pass_over_them_is_dear():
    _, cheap, _ = speed_up(0.5, 0.5, flat)
    _, expensive, _ = speed_up(0.5, 0.5, dear)
    assert sum(nodes for nodes, _ in cheap) > 5 * sum(nodes for nodes, _ in expensive)


def test_heads_that_become_right_are_used_again():
    clock, texts = Clock(), texts_of(1, 1500)
    heads = Guesser(texts, 0.6, 0.0, clock, 0.004)
    drafter = PlannedDrafter(DraftPlanner(clock), heads, None)
    decode(drafter, [text[:700] for text in texts], clock, linear, 600)
    heads.real = 1.0
    steps = decode(drafter, texts, clock, linear, 1500)
    assert sum(nodes for nodes, _ in steps[-100:]) > 200


def test_without_heads_copies_alone_are_planned():
    clock, texts = Clock(), texts_of(1)
    copies = Guesser(texts, 0.8, 1.0, clock, depth=12, source=LOOKUP)
    drafter = PlannedDrafter(DraftPlanner(clock), None, copies)
    steps = decode(drafter, texts, clock, linear)
    assert max(tokens for _, tokens in steps) >= 12


def test_a_draft_has_at_most_the_nodes_that_are_allowed():
    clock, texts = Clock(), texts_of(1)
    copies = Guesser(texts, 0.9, 1.0, clock, depth=30)
    drafter = PlannedDrafter(DraftPlanner(clock), None, copies, max_nodes=5)
    assert max(nodes for nodes, _ in decode(drafter, texts, clock, flat)) == 5


def test_what_is_drafted_is_worth_most_of_all_prefixes_by_value():
    generator = random.Random(5)
    for _ in range(30):
        clock = Clock()
        planner = DraftPlanner(clock)
        memory = planner.batch(2)
        token_cost = generator.choice([0.01, 0.05, 0.2])
        for size in [*PASS_SIZES] * 2:  # so that no size is too large to try
            memory.costs.observe(size, 1 + token_cost * (size - 1))
        drafter = PlannedDrafter(planner, None, None)
        rows = [
            [
                Proposal((first, second)[:depth], depth, generator.random())
                for first in range(3)
                for depth, second in ((1, 0), (2, 0), (2, 1))
                if depth == 2 or second == 0
            ]
            for _ in range(2)
        ]
        draft = drafter._best(memory, rows)
        values = [path_values(TextRates(planner.rates), row) for row in rows]

        def worth(chosen, values=values, memory=memory):
            size = 1 + max(map(len, chosen))
            gain = sum(v[path] for v, paths in zip(values, chosen, strict=True) for path in paths)
            cost = 1 + MARGIN * (memory.costs.cost(size) - 1)
            return 2 + gain - memory.rate * cost

        chosen = [[path for path, _ in row] for row in draft.rows]
        assert draft.worth == pytest.approx(worth(chosen))
        ranked = [sorted(v, key=v.__getitem__, reverse=True) for v in values]
        for counts in itertools.product(range(10), repeat=2):
            other = [paths[:count] for paths, count in zip(ranked, counts, strict=True)]
            assert worth(other) <= draft.worth + 1e-9


# In a model


def model_of(architecture: str = "llama", **settings) -> LMTPForCausalLM:
    model = LMTPForCausalLM.from_backbone(tiny_causal_lm(architecture), **settings)
    return model.eval()


def test_what_is_learned_lives_with_the_model():
    model, other = model_of(), model_of()
    options = {"do_sample": False, "max_new_tokens": 30, "use_lmtp": True}
    model.generate(PROMPT, **options)
    [memory] = model.draft_planner._batches.values()
    assert memory.costs.num_passes(1) > 0
    assert not other.draft_planner._batches
    assert "_draft_planner" not in model.state_dict()


def test_by_default_heads_and_copies_are_planned_together():
    drafter = model_of().new_drafter()
    assert isinstance(drafter, PlannedDrafter)
    assert drafter.heads is not None
    assert drafter.lookup is not None


@pytest.mark.parametrize("architecture", ["llama", "bloom", "lfm2"])
def test_heads_without_any_offsets_leave_the_copies(architecture):
    model = model_of(architecture, leap_offsets=())
    prompt = torch.tensor([[3, 4, 5, 6] * 4])
    options = {"do_sample": False, "max_new_tokens": 30}
    output = model.generate(prompt, use_lmtp=True, return_dict_in_generate=True, **options)
    assert output.sequences.tolist() == model.backbone.generate(prompt, **options).tolist()
