"""Choosing a draft tree: the most tokens per second that given heads and this device can give.

What a tree gains is simulated on held-out answers (`training.evaluation`); what its step costs, with
drafting, walk and all, is measured by decoding with it. Their ratio is the expected speed-up.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from modeling_lmtp.conversion.step_times import step_seconds
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.support_lmtp import Support, Tier, decoding_support
from modeling_lmtp.training.evaluation import HeadReport, simulated_steps
from modeling_lmtp.training.examples import Example
from modeling_lmtp.tree_lmtp import DraftTree, grow_tree

NODE_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24)
# A flatter tree of as many nodes is cheaper to draft, but cannot make up for more than this
SHALLOWER_LOSS = 0.05

StepTimer = Callable[[Sequence[DraftTree], int], Mapping[DraftTree, float]]


@dataclass(frozen=True)
class TunedTree:
    """A draft tree and what is expected of it.

    Args:
        tree: the tree; without nodes, drafting cannot win here.
        tokens_per_step: τ, simulated on held-out answers.
        step_cost: a step with it, drafting included, over a plain step.
    """

    tree: DraftTree
    tokens_per_step: float
    step_cost: float

    @property
    def speed_up(self) -> float:
        """The expected speed-up over plain decoding."""
        return self.tokens_per_step / self.step_cost


def candidate_trees(
    accuracies: Sequence[Sequence[float]],
    value: Callable[[DraftTree], float],
    takes_trees: bool = True,
    node_counts: Iterable[int] = NODE_COUNTS,
) -> list[DraftTree]:
    """List the trees worth timing: the chains, and of each size the best ones by depth.

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


def best_tree(
    trees: Iterable[DraftTree],
    value: Callable[[DraftTree], float],
    seconds: Mapping[DraftTree, float],
) -> TunedTree:
    """Pick the tree with the highest expected speed-up; drafting nothing is one of them.

    Args:
        trees: what there is to choose from.
        value: the tokens per step of a tree.
        seconds: what a step with each tree takes, with the empty one a plain step.
    """
    plain = seconds[DraftTree()]
    tuned = [TunedTree(tree, value(tree), seconds[tree] / plain) for tree in trees]
    return max(tuned, key=lambda choice: (choice.speed_up, -choice.tree.num_nodes))


def choose_trees(
    model: LMTPForCausalLM,
    report: HeadReport,
    ranks: Sequence[torch.Tensor],
    examples: Sequence[Example],
    batch_sizes: Sequence[int] = (1,),
    timer: StepTimer | None = None,
) -> dict[int, TunedTree]:
    """Pick the best tree for each batch size.

    Args:
        model: for timing on its device.
        report, ranks: what `evaluate_heads` returned for `examples`.
        examples: held-out answers.
        batch_sizes: rows decoded together.
        timer: returns the seconds of a step with each of some trees, at a batch size.
    """
    if timer is None:
        prompts = [example.input_ids[: example.answer_start] for example in examples]

        def timer(trees: Sequence[DraftTree], batch_size: int) -> Mapping[DraftTree, float]:
            return step_seconds(model, prompts, trees, batch_size)

    support = decoding_support(model.backbone)
    steps = _Steps(ranks, examples)
    trees = candidate_trees(report.accuracies, steps.mean, support.tier is Tier.TREE)
    return {
        size: best_tree(
            trees,
            lambda tree, size=size: steps.in_batch(tree, size, support),  # type: ignore[misc]
            timer(trees, size),
        )
        for size in batch_sizes
    }


def choose_tree(
    model: LMTPForCausalLM,
    report: HeadReport,
    ranks: Sequence[torch.Tensor],
    examples: Sequence[Example],
) -> TunedTree:
    """Pick the best tree for one prompt at a time, see `choose_trees`."""
    return choose_trees(model, report, ranks, examples)[1]


class _Steps:
    """The simulated steps of trees on held-out answers, each simulated once."""

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

    def in_batch(self, tree: DraftTree, batch_size: int, support: Support) -> float:
        """Return the tokens per step and row of a batch, whose rows go in step where they must."""
        return self.mean(tree) if support.ragged else steps_together(self.of(tree), batch_size)


def steps_together(steps: Sequence[int], batch_size: int) -> float:
    """Return the mean of the shortest of `batch_size` steps: `E[min] = Σ_k P(step ≥ k)^B`."""
    return sum(
        (sum(step >= k for step in steps) / len(steps)) ** batch_size
        for k in range(1, max(steps) + 1)
    )
