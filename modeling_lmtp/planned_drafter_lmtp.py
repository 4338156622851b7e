"""Planned drafts: of all candidates that are proposed, those that are worth their cost.

A step over a draft of `N` candidates per row emits `B + Σ p` tokens on average, where `p` is the
probability that a candidate is accepted, and costs a pass over `1 + N` tokens per row. Where `ρ` tokens
are emitted in the time of a plain step, the best draft is the one that maximizes

    B + Σ p - ρ · cost(1 + N).

Where no draft is better than none, the step is plain. `p` and the costs are learned, see `planner_lmtp`.
Costs beyond those of a plain pass count for `MARGIN` times as much, because the draft that looks best of
many often looks better than it is. A small share of the steps goes to larger drafts than the best one, to
learn what they cost. What a call may lose by drafting is bounded, see `planner_lmtp.Allowance`.

Shapes: `B` batch, `L` known tokens, `S` known states, `H` hidden size, `N` candidates.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch

from .drafting_lmtp import (
    HEAD,
    LOOKUP,
    Candidates,
    Drafter,
    Proposal,
    ProposingDrafter,
    tree_from_paths,
)
from .planner_lmtp import MAX_RATE, PASS_SIZES, BatchMemory, DraftPlanner, TextRates
from .tree_lmtp import MAX_NODES

MARGIN = 1.2  # what a draft must be expected to gain, for each token that its time is worth

Path = tuple[int, ...]


class Draft(NamedTuple):
    """The candidates of one step and what they are worth.

    Args:
        rows: per row, the paths of the candidates to verify, and the probability that each is accepted.
        expected: how many of them will be accepted.
        worth: `B + Σ p - ρ · cost` of the best draft.
        is_trial: whether this is another one, to show what a pass over so many tokens costs.
    """

    rows: list[list[tuple[Path, float]]]
    expected: float
    worth: float
    is_trial: bool = False


@dataclass
class PlannedStep:
    """A step that is being verified.

    Args:
        memory: of batches of its size.
        proposals: per row.
        draft: what is verified of them.
        size: the tokens per row of its pass.
        draft_seconds: that drafting took.
        began: when drafting had ended.
    """

    memory: BatchMemory
    proposals: list[list[Proposal]]
    draft: Draft
    size: int
    draft_seconds: float
    began: float


class PlannedDrafter(Drafter):
    """Verifies as many of the proposed candidates as pay for themselves, perhaps none.

    Args:
        planner: what the model's earlier drafts have shown.
        heads: proposes by the leap heads, if there are any.
        lookup: proposes by prompt lookup, if that is on.
        max_nodes: the largest number of candidates per row.
        takes_trees: whether trees can be verified, or chains only.
    """

    def __init__(
        self,
        planner: DraftPlanner,
        heads: ProposingDrafter | None,
        lookup: ProposingDrafter | None,
        max_nodes: int = MAX_NODES - 1,
        takes_trees: bool = True,
    ) -> None:
        self.planner = planner
        self.heads = heads
        self.lookup = lookup
        self.max_nodes = max_nodes
        self.takes_trees = takes_trees
        self.num_states = 1 if heads is None else heads.num_states
        self._step: PlannedStep | None = None
        self._texts: list[TextRates] = []  # one per row

    def reset(self) -> None:
        """Begin new texts; what earlier ones have shown stays known."""
        self._step = None
        self._texts = []
        self.planner.allowance.begin_call()

    def draft(
        self, input_ids: torch.Tensor, hidden_states: torch.Tensor, max_depth: int
    ) -> Candidates:
        """Propose what is worth its cost."""
        start = self.planner.clock()
        conditions = hidden_states.device, hidden_states.dtype, self.max_nodes, self.takes_trees
        memory = self.planner.batch(input_ids.shape[0], conditions)
        proposals: list[list[Proposal]] = [[] for _ in range(input_ids.shape[0])]
        draft = Draft([[] for _ in proposals], 0.0, 0.0)
        if max_depth > 0 and not memory.must_be_plain:
            proposals, draft = self._plan(memory, input_ids, hidden_states, max_depth)
        candidates = _candidates(draft.rows, proposals, input_ids)
        end = self.planner.clock()
        size = 1 + candidates.num_nodes
        self._step = PlannedStep(memory, proposals, draft, size, end - start, end)
        return candidates

    def observe(self, tokens: Sequence[Sequence[int]]) -> None:
        """Learn how long the pass took, and which proposals were right."""
        if self._step is None:
            return
        step, self._step = self._step, None
        num_tokens = sum(map(len, tokens))
        cost = step.memory.observe_step(
            step.size,
            self.planner.clock() - step.began,
            step.draft_seconds,
            num_tokens,
            step.draft.is_trial,
        )
        self.planner.allowance.observe(cost, num_tokens / len(tokens))
        texts = self._rates_of_texts(len(tokens))
        for rates, proposals, emitted in zip(texts, step.proposals, tokens, strict=True):
            _count(rates, proposals, tuple(emitted))

    def _rates_of_texts(self, num_rows: int) -> list[TextRates]:
        """Return the rates in each row's text; they begin anew when rows have left the batch."""
        if len(self._texts) != num_rows:
            self._texts = [TextRates(self.planner.rates) for _ in range(num_rows)]
        return self._texts

    def _plan(
        self,
        memory: BatchMemory,
        input_ids: torch.Tensor,
        hidden_states: torch.Tensor,
        max_depth: int,
    ) -> tuple[list[list[Proposal]], Draft]:
        """Return each row's proposals, and the best draft of them."""
        num_rows = input_ids.shape[0]
        proposals: list[list[Proposal]] = [[] for _ in range(num_rows)]
        if self.lookup is not None:
            proposals = self.lookup.propose(input_ids, hidden_states, max_depth)
        draft = self._best(memory, proposals)
        if self.heads is None or not self.planner.allowance.covers(memory.costs.cost(2)):
            return proposals, draft
        use = memory.head_use(draft.expected)
        if not use.begin_step():
            return proposals, draft
        start = self.planner.clock()
        # A row's candidate must be worth its share of the cost of a token in every row
        least = memory.rate * memory.costs.cost_per_token(self.max_nodes)
        by_heads = self.heads.propose(
            input_ids, hidden_states, max_depth, min(0.5, 0.5 * least / num_rows)
        )
        proposals = [[*row, *more] for row, more in zip(proposals, by_heads, strict=True)]
        with_heads = self._best(memory, proposals)
        seconds = self.planner.clock() - start
        spent = memory.rate * seconds / (memory.costs.seconds or seconds)
        use.observe(with_heads.worth - draft.worth - spent)
        return proposals, with_heads

    def _best(self, memory: BatchMemory, proposals: list[list[Proposal]]) -> Draft:
        """Return the draft that is worth most, of these proposals per row."""
        texts = self._rates_of_texts(len(proposals))
        rows = [self._ranked(row, rates) for row, rates in zip(proposals, texts, strict=True)]
        longest = min(self.max_nodes, max(map(len, rows)), memory.costs.largest - 1)
        gains = [0.0] * (1 + longest)
        for row in rows:
            sums = [0.0, *accumulate(value for _, value in row)]
            for count in range(1, 1 + longest):
                gains[count] += sums[min(count, len(row))]
        counts = {size - 1 for size in PASS_SIZES if size <= longest} | {longest}
        costs = {count: memory.costs.cost(1 + count) for count in sorted(counts)}
        worths = {
            count: memory.num_rows + gains[count] - memory.rate * (1 + MARGIN * (cost - 1))
            for count, cost in costs.items()
            if count == 0 or self.planner.allowance.covers(cost)
        }
        best = max(worths, key=lambda count: (worths[count], -count))
        trial = (memory.costs.uncertain(1 + best) or 1 + best) - 1
        is_trial = (
            trial != best
            and trial in worths
            and memory.may_try((worths[best] - worths[trial]) / memory.rate)
        )
        count = trial if is_trial else best
        return Draft([row[:count] for row in rows], gains[count], worths[best], is_trial)

    def _ranked(self, proposals: Sequence[Proposal], rates: TextRates) -> list[tuple[Path, float]]:
        """Return a row's paths and their values, the best first; each comes after its parent."""
        values = path_values(rates, proposals)
        if not self.takes_trees:
            values = best_chain(values)
        # No path is likelier than its parent
        return sorted(values.items(), key=lambda item: (-item[1], len(item[0])))


def path_values(rates: TextRates, proposals: Sequence[Proposal]) -> dict[Path, float]:
    """Return the probability that each proposed path is accepted.

    A path that several sources propose is wrong only if all of them are, as if they erred independently.
    The tokens after one path exclude each other, so their rates are scaled down to a sum of 1.

    Args:
        rates: in the row's text.
        proposals: of one row; with each path, its parent is among them.
    """
    conditional: dict[Path, float] = {}
    for path, source, probability in proposals:
        wrong = 1 - rates.rate(source, probability)
        conditional[path] = min(MAX_RATE, 1 - wrong * (1 - conditional.get(path, 0.0)))
    totals: dict[Path, float] = defaultdict(float)
    for path, rate in conditional.items():
        totals[path[:-1]] += rate
    values: dict[Path, float] = {(): 1.0}
    for path in sorted(conditional, key=len):
        parent = path[:-1]
        values[path] = values[parent] * conditional[path] / max(1.0, totals[parent])
    del values[()]
    return values


def best_chain(values: dict[Path, float]) -> dict[Path, float]:
    """Return the path along which most tokens are expected to be accepted, with its prefixes."""
    sums: dict[Path, float] = {(): 0.0}
    for path in sorted(values, key=len):
        sums[path] = sums[path[:-1]] + values[path]
    best = max(sums, key=lambda path: sums[path])
    prefixes = [best[:length] for length in range(1, 1 + len(best))]
    return {path: values[path] for path in prefixes}


def _count(rates: TextRates, proposals: Sequence[Proposal], emitted: Path) -> None:
    """Count the proposals whose parent was right, verified or not, given the tokens that followed."""
    for path, source, probability in proposals:
        depth = len(path)
        if depth <= len(emitted) and path[:-1] == emitted[: depth - 1]:
            rates.observe(source, probability, path[-1] == emitted[depth - 1])


def _candidates(
    rows: Sequence[Sequence[tuple[Path, float]]],
    proposals: Sequence[Sequence[Proposal]],
    input_ids: torch.Tensor,
) -> Candidates:
    """Return the paths to verify as candidates; what heads and lookup both propose counts as the heads'."""
    if not any(rows):
        return Candidates.none(input_ids)
    grown = []
    for row, proposed in zip(rows, proposals, strict=True):
        copied = {proposal.path for proposal in proposed if proposal.source == LOOKUP}
        copied -= {proposal.path for proposal in proposed if proposal.source != LOOKUP}
        grown.append(tree_from_paths({path: LOOKUP if path in copied else HEAD for path, _ in row}))
    trees, token_ids, sources = zip(*grown, strict=True)
    return Candidates.from_rows(trees, token_ids, input_ids, sources)
