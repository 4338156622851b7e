"""Choosing a draft: the most tokens per second that given heads and this device can give.

What a draft gains is simulated on held-out answers; what its steps cost, with drafting, walk and all, is
measured by decoding, and depends on the batch size and the number of candidates. Their ratio is the
expected speed-up.

A draft is what `generate` is told, such as `{"draft_nodes": 16, "draft_threshold": 0.06}`. Three kinds
compete: static trees, chains among them; trees grown for every state, with several thresholds (a node is
worth its cost from some probability on, which depends on the device); and these with prompt lookup.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from modeling_lmtp.modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.settings_lmtp import LMTPSettings
from modeling_lmtp.support_lmtp import Support, Tier, decoding_support
from modeling_lmtp.training.evaluation import HeadReport, answer_states, simulated_steps
from modeling_lmtp.training.examples import Example, evenly
from modeling_lmtp.tree_lmtp import DraftTree, grow_tree

from .simulation import Step, simulate
from .step_times import step_seconds

NODE_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 32)
# A flatter tree of as many nodes is cheaper to draft, but cannot make up for more than this
SHALLOWER_LOSS = 0.05
THRESHOLDS = (0.03, 0.06, 0.12, 0.25)
MOST_NODES = 16  # of a tree with a threshold
LOOKUP_TOKENS = 16
SIMULATED_ANSWERS = 24  # by drafting again, which takes longer than counting ranks

NOTHING: dict[str, Any] = {"draft_length": 0}

StepTimer = Callable[[Sequence[DraftTree], int], Mapping[DraftTree, float]]


@dataclass(frozen=True)
class TunedDraft:
    """A draft and what is expected of it.

    Args:
        options: what `generate` is told.
        tokens_per_step: τ, simulated on held-out answers.
        step_cost: a step with it, drafting included, over a plain step.
    """

    options: Mapping[str, Any]
    tokens_per_step: float
    step_cost: float

    @property
    def speed_up(self) -> float:
        """The expected speed-up over plain decoding."""
        return self.tokens_per_step / self.step_cost


def of_tree(tree: DraftTree) -> dict[str, Any]:
    """Return what `generate` is told to draft a static tree."""
    if tree.is_chain:
        return {"draft_length": tree.depth}
    return {"draft_tree": [list(path) for path in tree.paths]}


def candidate_trees(
    accuracies: Sequence[Sequence[float]],
    value: Callable[[DraftTree], float],
    takes_trees: bool = True,
    node_counts: Iterable[int] = NODE_COUNTS,
) -> list[DraftTree]:
    """List the static trees worth timing: the chains, and of each size the best ones by depth.

    Args:
        accuracies: see `grow_tree`.
        value: the tokens per step of a tree.
        takes_trees: whether the backbone verifies more than chains.
        node_counts: the sizes of trees.
    """
    horizon = len(accuracies)
    found = dict.fromkeys(DraftTree.chain(length) for length in range(horizon + 1))
    for count in node_counts if takes_trees else ():
        grown = [grow_tree(accuracies[:depth], count) for depth in range(1, horizon + 1)]
        grown = [tree for tree in grown if tree.num_nodes == count]
        if grown:
            least = (1 - SHALLOWER_LOSS) * max(map(value, grown))
            found |= dict.fromkeys(tree for tree in grown if value(tree) >= least)
    return list(found)


def growing_drafts(horizon: int, takes_trees: bool = True) -> list[list[dict[str, Any]]]:
    """List the drafts that differ from state to state, by kind: grown trees, and with prompt lookup."""
    grown: list[dict[str, Any]] = [
        {"draft_nodes": MOST_NODES, "draft_threshold": threshold} for threshold in THRESHOLDS
    ]
    alone = grown if takes_trees else [{"draft_length": horizon}]
    looked_up = [{**draft, "prompt_lookup_num_tokens": LOOKUP_TOKENS} for draft in alone]
    return [alone, looked_up]


def best_drafts(
    kinds: Iterable[Iterable[TunedDraft]],
) -> list[TunedDraft]:
    """Return the best draft of each kind by expected speed-up, the best one first."""
    best = [max(kind, key=lambda tuned: tuned.speed_up) for kind in kinds]
    return sorted(best, key=lambda tuned: -tuned.speed_up)


def choose_drafts(
    model: LMTPForCausalLM,
    report: HeadReport,
    ranks: Sequence[torch.Tensor],
    examples: Sequence[Example],
    batch_sizes: Sequence[int] = (1,),
    timer: StepTimer | None = None,
    *,
    progress: bool = False,
) -> dict[int, list[TunedDraft]]:
    """Find the best draft of each kind for each batch size, the best one first.

    Args:
        model: for timing on its device.
        report, ranks: what `evaluate_heads` returned for `examples`.
        examples: held-out answers.
        batch_sizes: rows decoded together.
        timer: returns the seconds of a step with each of some trees, at a batch size.
        progress: show a progress bar.
    """
    if timer is None:
        prompts = [example.input_ids[: example.answer_start] for example in examples]

        def timer(trees: Sequence[DraftTree], batch_size: int) -> Mapping[DraftTree, float]:
            return step_seconds(model, prompts, trees, batch_size)

    support = decoding_support(model.backbone)
    takes_trees = support.tier is Tier.TREE
    steps = _StaticSteps(ranks, examples)
    trees = candidate_trees(report.accuracies, steps.mean, takes_trees)
    kinds = growing_drafts(len(report.accuracies), takes_trees)
    simulated = _simulate_all(
        model, support, [d for kind in kinds for d in kind], examples, progress
    )
    chosen = {}
    for size in batch_sizes:
        seconds = timer(trees, size)
        plain = seconds[DraftTree()]
        costs = _Costs({tree.num_nodes: time / plain for tree, time in seconds.items()})
        static = [
            TunedDraft(
                of_tree(tree), tokens_in_batch(steps.of(tree), size, support), seconds[tree] / plain
            )
            for tree in trees
        ]
        grown = [[_expected(draft, simulated, costs, size, support) for draft in k] for k in kinds]
        chosen[size] = best_drafts([static, *grown])
    return chosen


def _simulate_all(
    model: LMTPForCausalLM,
    support: Support,
    drafts: Sequence[dict[str, Any]],
    examples: Sequence[Example],
    progress: bool,
) -> dict[str, list[Step]]:
    bar = tqdm(
        evenly(examples, SIMULATED_ANSWERS),
        desc="simulate drafts",
        unit="answer",
        disable=not progress,
    )
    found: dict[str, list[Step]] = {str(draft): [] for draft in drafts}
    for example in bar:
        states = answer_states(model, example)
        for draft in drafts:
            drafter = model.new_drafter(LMTPSettings(use_lmtp=True, **draft), support.tier)
            found[str(draft)] += simulate(drafter, example, states)
    return found


def _expected(
    draft: dict[str, Any],
    simulated: Mapping[str, list[Step]],
    costs: "_Costs",
    batch_size: int,
    support: Support,
) -> TunedDraft:
    steps = simulated[str(draft)] or [Step(1, 0)]
    tokens = tokens_in_batch([step.tokens for step in steps], batch_size, support)
    return TunedDraft(draft, tokens, costs.mean([step.nodes for step in steps], batch_size))


class _Costs:
    """What a step costs over a plain one by its number of candidates, between measured numbers."""

    def __init__(self, measured: Mapping[int, float]) -> None:
        self.nodes, self.costs = zip(*sorted(measured.items()), strict=True)

    def mean(self, nodes: Sequence[int], batch_size: int) -> float:
        """Return the expected cost where the row of a batch with the most candidates counts."""
        counts, costs = np.sort(nodes), np.interp(np.sort(nodes), self.nodes, self.costs)
        at_most = (np.arange(1, len(counts) + 1) / len(counts)) ** batch_size
        return float(np.sum(costs * np.diff(at_most, prepend=0.0)))


class _StaticSteps:
    """The simulated steps of static trees on held-out answers, each simulated once."""

    def __init__(self, ranks: Sequence[torch.Tensor], examples: Sequence[Example]) -> None:
        self.answers = [(r, e.answer_start) for r, e in zip(ranks, examples, strict=True)]
        self._known: dict[DraftTree, list[int]] = {}

    def of(self, tree: DraftTree) -> list[int]:
        """Return the tokens that each step emits."""
        if tree not in self._known:
            found = [
                step
                for ranks, start in self.answers
                for step in simulated_steps(ranks, tree, start)
            ]
            self._known[tree] = found or [1]
        return self._known[tree]

    def mean(self, tree: DraftTree) -> float:
        """Return the tokens per step of a row by itself."""
        steps = self.of(tree)
        return sum(steps) / len(steps)


def tokens_in_batch(steps: Sequence[int], batch_size: int, support: Support) -> float:
    """Return the tokens per step and row of a batch, whose rows go in step where they must."""
    return sum(steps) / len(steps) if support.ragged else steps_together(steps, batch_size)


def steps_together(steps: Sequence[int], batch_size: int) -> float:
    """Return the mean of the shortest of `batch_size` steps: `E[min] = Σ_k P(step ≥ k)^B`."""
    return sum(
        (sum(step >= k for step in steps) / len(steps)) ** batch_size
        for k in range(1, max(steps) + 1)
    )
