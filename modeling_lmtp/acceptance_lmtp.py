"""Acceptance: which drafted tokens plain decoding would have generated itself.

Each row starts at the root of its verified tree and selects the token that plain decoding would select
there. If a child of that node proposes the same token, the child is accepted and the row continues from it.
Otherwise the selected token is the bonus token, which becomes the root of the next tree.

Shapes: `A` rows still generating, `R` rows of the call, `L` known tokens, `Q = 1 + N` nodes,
`V` vocabulary size.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .drafting_lmtp import Candidates
from .selection_lmtp import TokenSelector, TypicalRule
from .tree_lmtp import DraftTree


@dataclass
class AcceptedPath:
    """The path that one row accepted in one step.

    Args:
        nodes: the root and the accepted candidates, in order; the cache keeps their slots.
        tokens: the tokens emitted, one selected at each of these nodes.
        finished: whether the row ends with the last token.
    """

    nodes: list[int] = field(default_factory=lambda: [0])
    tokens: list[int] = field(default_factory=list)
    finished: bool = False


class RecordedSteps(NamedTuple):
    """Per-step tensors `(R, V)`, 0 in finished rows; None where the call does not ask for them.

    Args:
        scores: the processed scores.
        logits: the unprocessed logits.
    """

    scores: tuple[torch.Tensor, ...] | None = None
    logits: tuple[torch.Tensor, ...] | None = None


class Acceptor(ABC):
    """Accepts candidates for all rows that are still generating."""

    @abstractmethod
    def accept(
        self, candidates: Candidates, logits: torch.Tensor, rows: Sequence[int]
    ) -> list[AcceptedPath]:
        """Return the path that each row accepts.

        Args:
            candidates: the verified candidates of `A` rows.
            logits: `(A, Q, V)`.
            rows: the indices of these rows in the call's batch.
        """

    @property
    def recorded(self) -> RecordedSteps:
        """What has been recorded; nothing unless a subclass records."""
        return RecordedSteps()


def new_acceptor(
    input_ids: torch.Tensor,
    selector: TokenSelector,
    rows_are_independent: bool,
    keep_scores: bool = False,
    keep_logits: bool = False,
    rule: TypicalRule | None = None,
) -> Acceptor:
    """Return the fastest acceptor that selects the tokens of plain decoding.

    Args:
        input_ids: the prompts, `(R, L)`.
        selector: selects the tokens.
        rows_are_independent: whether rows may accept different numbers of tokens per step.
        keep_scores, keep_logits: whether to record them.
        rule: accepts further candidates.

    Raises:
        ValueError: `rule` needs rows to be processed one at a time, and they cannot be.
    """
    num_rows, length = input_ids.shape
    if rule is not None and num_rows > 1 and not (rows_are_independent and selector.is_row_wise):
        raise ValueError(
            "acceptance_rule='typical' processes each row separately. This model, streamer, logits "
            "processor or stopping criterion does not allow that. Pass one prompt at a time, or set "
            "acceptance_rule='exact'."
        )
    if num_rows == 1 or rows_are_independent:
        if selector.is_plain_greedy and not (keep_scores or keep_logits or rule):
            return GreedyAcceptor([length] * num_rows, selector)
        if num_rows > 1 and selector.is_row_wise:
            return RowWiseAcceptor([
                LockstepAcceptor(row[None], selector.for_row(n), keep_scores, keep_logits, rule)
                for n, row in enumerate(input_ids)
            ])  # fmt: skip
    return LockstepAcceptor(input_ids, selector, keep_scores, keep_logits, rule)


class GreedyAcceptor(Acceptor):
    """Accepts argmaxes of unprocessed logits, with a single transfer to the host per step.

    Args:
        lengths: the length of each row, padding included.
        selector: must be `is_plain_greedy`.
    """

    def __init__(self, lengths: Sequence[int], selector: TokenSelector) -> None:
        self.lengths = list(lengths)
        self.selector = selector

    def accept(
        self, candidates: Candidates, logits: torch.Tensor, rows: Sequence[int]
    ) -> list[AcceptedPath]:
        """Follow the argmaxes of each row on the host."""
        most_likely = logits.max(dim=-1).indices  # the argmax, several times faster on CPU
        num_nodes = most_likely.shape[1]
        both = torch.cat([most_likely, candidates.token_ids.to(most_likely.device)], dim=1).tolist()
        paths = []
        for place, (row, tokens) in enumerate(zip(rows, both, strict=True)):
            room = self.selector.max_length - self.lengths[row]
            path = self._follow(
                candidates.trees[place], tokens[:num_nodes], tokens[num_nodes:], room
            )
            self.lengths[row] += len(path.tokens)
            paths.append(path)
        return paths

    def _follow(
        self, tree: DraftTree, most_likely: list[int], candidate_ids: list[int], room: int
    ) -> AcceptedPath:
        path = AcceptedPath()
        while True:
            token = most_likely[path.nodes[-1]]
            path.tokens.append(token)
            path.finished = token in self.selector.eos_token_ids or len(path.tokens) >= room
            node = tree.child(path.nodes[-1], token, candidate_ids)
            if path.finished or node is None:
                return path
            path.nodes.append(node)


class LockstepAcceptor(Acceptor):
    """Selects one token for every row at a time, and stops when any row has no matching candidate.

    Logits processors, stopping criteria and the random generator see exactly the calls of plain decoding.

    Args:
        input_ids: the prompts, `(R, L)`.
        selector: selects the tokens.
        keep_scores, keep_logits: whether to record them.
        rule: accepts candidates before the selector is asked; requires `R = 1`.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        selector: TokenSelector,
        keep_scores: bool = False,
        keep_logits: bool = False,
        rule: TypicalRule | None = None,
    ) -> None:
        self.input_ids = input_ids
        self.selector = selector
        self.rule = rule
        self.unfinished = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        self._scores: list[torch.Tensor] | None = [] if keep_scores else None
        self._logits: list[torch.Tensor] | None = [] if keep_logits else None

    @property
    def recorded(self) -> RecordedSteps:
        """What has been recorded so far."""
        scores, logits = self._scores, self._logits
        return RecordedSteps(
            None if scores is None else tuple(scores), None if logits is None else tuple(logits)
        )

    def accept(
        self, candidates: Candidates, logits: torch.Tensor, rows: Sequence[int]
    ) -> list[AcceptedPath]:
        """Follow the trees until a row has no matching candidate, or all rows are finished."""
        candidate_ids = candidates.on_host()
        paths = [AcceptedPath() for _ in rows]
        can_continue = True
        while can_continue:
            nodes = [path.nodes[-1] for path in paths]
            children = [] if self.rule is None else candidates.trees[0].children[nodes[0]]
            proposed = [candidate_ids[0][child - 1] for child in children]
            tokens, unfinished = self._step(_logits_at(logits, nodes), rows, proposed)
            for row, path in zip(rows, paths, strict=True):
                if not path.finished:
                    path.tokens.append(tokens[row])
                    path.finished = not unfinished[row] and self.selector.pads_finished_rows
            if not any(unfinished):
                for path in paths:
                    path.finished = True
                return paths
            can_continue = _descend(candidates, candidate_ids, paths)
        return paths

    def _step(
        self, logits: torch.Tensor, rows: Sequence[int], proposed: Sequence[int]
    ) -> tuple[list[int], list[bool]]:
        """Select a token for each of the `R` rows; return the tokens, and which rows are unfinished."""
        logits = _scatter_rows(logits, rows, len(self.input_ids))
        # A copy, because processors may write in place and other nodes' logits are still needed
        logits = logits.to(copy=True, dtype=torch.float32, device=self.input_ids.device)
        scores = self.selector.logits_processor(self.input_ids, logits)
        if self._scores is not None:
            self._scores.append(self._mask_finished(scores))
        if self._logits is not None:
            self._logits.append(self._mask_finished(logits))
        typical = None if self.rule is None else self.rule.select(scores, proposed)
        tokens = (
            self.selector.select(scores)
            if typical is None
            else self.input_ids.new_tensor([typical])
        )
        if self.selector.pads_finished_rows:
            tokens = torch.where(self.unfinished, tokens, self.selector.pad_token_id)
        self.input_ids = torch.cat([self.input_ids, tokens[:, None]], dim=-1)
        finished = self.selector.stopping_criteria(self.input_ids, self.recorded.scores)
        self.unfinished = self.unfinished & ~finished
        return tokens.tolist(), self.unfinished.tolist()

    def _mask_finished(self, scores: torch.Tensor) -> torch.Tensor:
        if self.selector.pads_finished_rows:
            return scores.masked_fill(~self.unfinished[:, None], 0.0)
        return scores


def _logits_at(logits: torch.Tensor, nodes: list[int]) -> torch.Tensor:
    """Select one node per row from `(A, Q, V)`; return `(A, V)`."""
    if len(nodes) == 1:
        return logits[:, nodes[0]]
    return logits[torch.arange(len(nodes)), torch.tensor(nodes)]


def _scatter_rows(logits: torch.Tensor, rows: Sequence[int], num_rows: int) -> torch.Tensor:
    """Scatter `(A, V)` into `(R, V)`, with 0 in rows that have left the batch."""
    if len(rows) == num_rows:
        return logits
    scattered = logits.new_zeros((num_rows, logits.shape[-1]))
    scattered[list(rows)] = logits
    return scattered


def _descend(
    candidates: Candidates, candidate_ids: list[list[int]], paths: list[AcceptedPath]
) -> bool:
    """Move each unfinished row to the child with its last token, if every one of them has such a child."""
    unfinished = [n for n, path in enumerate(paths) if not path.finished]
    children = [
        candidates.trees[n].child(paths[n].nodes[-1], paths[n].tokens[-1], candidate_ids[n])
        for n in unfinished
    ]
    if None in children:
        return False
    for n, child in zip(unfinished, children, strict=True):
        paths[n].nodes.append(child)  # type: ignore[arg-type]
    return True


class RowWiseAcceptor(Acceptor):
    """Lets each row accept as many candidates as it can, independently of the others.

    Args:
        acceptors: one per row, each with a selector for that row (`TokenSelector.for_row`).
    """

    def __init__(self, acceptors: Sequence[LockstepAcceptor]) -> None:
        self.acceptors = list(acceptors)

    def accept(
        self, candidates: Candidates, logits: torch.Tensor, rows: Sequence[int]
    ) -> list[AcceptedPath]:
        """Follow the tree of each row in turn."""
        paths, candidate_ids = [], candidates.on_host()
        for place, row in enumerate(rows):
            here = slice(place, place + 1)
            of_row = Candidates(
                candidates.trees[here], candidates.token_ids[here], candidate_ids[here]
            )
            paths += self.acceptors[row].accept(of_row, logits[here], [0])
        return paths

    @property
    def recorded(self) -> RecordedSteps:
        """What the rows have recorded, step by step."""
        by_row = [acceptor.recorded for acceptor in self.acceptors]
        return RecordedSteps(
            _stack_rows([row.scores for row in by_row]), _stack_rows([row.logits for row in by_row])
        )


def _stack_rows(
    steps_by_row: Sequence[tuple[torch.Tensor, ...] | None],
) -> tuple[torch.Tensor, ...] | None:
    """Turn one tuple of steps `(1, V)` per row into one tuple of steps `(R, V)`."""
    recorded = [steps for steps in steps_by_row if steps is not None]
    if len(recorded) < len(steps_by_row):
        return None
    zeros = torch.zeros_like(recorded[0][0])
    return tuple(
        torch.cat([steps[t] if t < len(steps) else zeros for steps in recorded])
        for t in range(max(map(len, recorded)))
    )
