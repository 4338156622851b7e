"""Walks down verified trees: which candidates plain decoding would have taken itself.

A walk starts at the root, takes there the token that plain decoding would take, and goes on at the
candidate that carries this token; where none does, the token taken is the next root.

Shapes: `A` rows still generating, `R` rows of the call, `L` known tokens, `Q = 1 + N` nodes,
`V` vocabulary size.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .choosing_lmtp import TokenChooser
from .drafting_lmtp import Candidates
from .tree_lmtp import DraftTree


@dataclass
class Walk:
    """What the walk of one row gave.

    Args:
        path: the nodes stood on, root first; the cache keeps them.
        tokens: the tokens emitted, one per node of the path.
        finished: whether the row ends here.
    """

    path: list[int] = field(default_factory=lambda: [0])
    tokens: list[int] = field(default_factory=list)
    finished: bool = False


@dataclass(frozen=True)
class TypicalRule:
    """Typical acceptance (Medusa, arXiv 2401.10774): any candidate is taken that is likely enough.

    A candidate `x` passes if `p(x) > min(ε, δ exp(-H(p)))`, `H` the entropy of the model's
    distribution `p`. It is lossy: the text is not plain decoding's.

    Args:
        threshold: ε.
        alpha: δ.
    """

    threshold: float
    alpha: float

    def take(self, scores: torch.Tensor, offered: Sequence[int]) -> int | None:
        """Return the likeliest of the offered tokens that pass by their scores `(1, V)`, or None."""
        if not offered:
            return None
        distribution = torch.distributions.Categorical(logits=scores[0])
        bound = min(self.threshold, self.alpha * float(torch.exp(-distribution.entropy())))
        likely = distribution.probs[list(offered)]
        best = int(likely.argmax())
        return offered[best] if float(likely[best]) > bound else None


class Walker(ABC):
    """Walks down the trees of all rows that are still generating."""

    @abstractmethod
    def walk(self, candidates: Candidates, logits: torch.Tensor, rows: Sequence[int]) -> list[Walk]:
        """Walk.

        Args:
            candidates: the verified candidates of `A` rows.
            logits: `(A, Q, V)`.
            rows: the numbers of these rows among all of the call.
        """

    @property
    def scores(self) -> tuple[torch.Tensor, ...] | None:
        """The processed scores of each step, `(R, V)`, if they were to be kept; 0 in finished rows."""
        return None

    @property
    def logits(self) -> tuple[torch.Tensor, ...] | None:
        """The raw logits of each step, like the scores."""
        return None


class GreedyWalker(Walker):
    """Does what the others do for bare argmaxes, with one transfer to the host in all.

    Args:
        lengths: the prompts' lengths, padding included.
        chooser: `is_plain_greedy`.
    """

    def __init__(self, lengths: Sequence[int], chooser: TokenChooser) -> None:
        self.lengths = list(lengths)
        self.chooser = chooser

    def walk(self, candidates: Candidates, logits: torch.Tensor, rows: Sequence[int]) -> list[Walk]:
        """Walk row by row, on the host."""
        most_likely = logits.max(dim=-1).indices  # argmax's, in a fraction of its time on CPU
        num_nodes = most_likely.shape[1]
        both = torch.cat([most_likely, candidates.token_ids.to(most_likely.device)], dim=1).tolist()
        walks = []
        for number, (row, on_host) in enumerate(zip(rows, both, strict=True)):
            walked = self._walk_row(
                candidates.trees[number], on_host[:num_nodes], on_host[num_nodes:], row
            )
            self.lengths[row] += len(walked.tokens)
            walks.append(walked)
        return walks

    def _walk_row(self, tree: DraftTree, tokens: list[int], token_ids: list[int], row: int) -> Walk:
        room = self.chooser.max_length - self.lengths[row]
        eos_token_ids = self.chooser.eos_token_ids
        walked = Walk()
        while True:
            token = tokens[walked.path[-1]]
            walked.tokens.append(token)
            walked.finished = token in eos_token_ids or len(walked.tokens) >= room
            node = tree.child(walked.path[-1], token, token_ids)
            if walked.finished or node is None:
                return walked
            walked.path.append(node)


class StepwiseWalker(Walker):
    """Walks all rows in step: one token each at a time, judged together as plain decoding does.

    Processors and criteria get exactly the calls of plain decoding, and so does the random
    generator. The walk of all ends where the first row finds no candidate for its token.

    Args:
        input_ids: the prompts, `(R, L)`.
        chooser: takes and judges tokens.
        keep_scores, keep_logits: record them.
        rule: takes candidates that pass it first; for one row alone.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        chooser: TokenChooser,
        keep_scores: bool = False,
        keep_logits: bool = False,
        rule: TypicalRule | None = None,
    ) -> None:
        self.input_ids = input_ids
        self.chooser = chooser
        self.rule = rule
        self.unfinished = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        self._scores: list[torch.Tensor] | None = [] if keep_scores else None
        self._logits: list[torch.Tensor] | None = [] if keep_logits else None

    @property
    def scores(self) -> tuple[torch.Tensor, ...] | None:
        """The processed scores of each step, `(R, V)`."""
        return None if self._scores is None else tuple(self._scores)

    @property
    def logits(self) -> tuple[torch.Tensor, ...] | None:
        """The raw logits of each step, `(R, V)`."""
        return None if self._logits is None else tuple(self._logits)

    def walk(self, candidates: Candidates, logits: torch.Tensor, rows: Sequence[int]) -> list[Walk]:
        """Walk until a row has no candidate, or all are finished."""
        token_ids = candidates.on_host()
        walks = [Walk() for _ in rows]
        going = True
        while going:
            nodes = [walked.path[-1] for walked in walks]
            offered = [] if self.rule is None else _offered(candidates, token_ids, nodes)
            tokens, unfinished = self._step(_at_nodes(logits, nodes), rows, offered)
            for row, walked in zip(rows, walks, strict=True):
                if not walked.finished:
                    walked.tokens.append(tokens[row])
                    walked.finished = not unfinished[row] and self.chooser.pads_finished_rows
            if not any(unfinished):
                for walked in walks:
                    walked.finished = True
                return walks
            going = _step_down(candidates, token_ids, walks)
        return walks

    def _step(
        self, logits: torch.Tensor, rows: Sequence[int], offered: Sequence[int]
    ) -> tuple[list[int], list[bool]]:
        """Take one token per row of the call; return the tokens and which rows go on."""
        logits = _for_all_rows(logits, rows, len(self.input_ids))
        logits = logits.to(copy=True, dtype=torch.float32, device=self.input_ids.device)
        scores = self.chooser.scores(self.input_ids, logits)
        if self._scores is not None:
            self._scores.append(self._of_unfinished(scores))
        if self._logits is not None:
            self._logits.append(self._of_unfinished(logits))
        tokens = self._choose(scores, offered)
        if self.chooser.pads_finished_rows:
            tokens = torch.where(self.unfinished, tokens, self.chooser.pad_token_id)
        self.input_ids = torch.cat([self.input_ids, tokens[:, None]], dim=-1)
        self.unfinished = self.unfinished & ~self.chooser.stops(self.input_ids, self.scores)
        return tokens.tolist(), self.unfinished.tolist()

    def _of_unfinished(self, scores: torch.Tensor) -> torch.Tensor:
        if self.chooser.pads_finished_rows:
            return scores.masked_fill(~self.unfinished[:, None], 0.0)
        return scores

    def _choose(self, scores: torch.Tensor, offered: Sequence[int]) -> torch.Tensor:
        token = None if self.rule is None else self.rule.take(scores, offered)
        if token is not None:
            return self.input_ids.new_tensor([token])
        return self.chooser.choose(scores)


def _at_nodes(logits: torch.Tensor, nodes: list[int]) -> torch.Tensor:
    """Pick from `(A, Q, V)` one node of each row, `(A, V)`."""
    if len(nodes) == 1:
        return logits[:, nodes[0]]
    return logits[torch.arange(len(nodes)), torch.tensor(nodes)]


def _offered(candidates: Candidates, token_ids: list[list[int]], nodes: list[int]) -> list[int]:
    """The tokens that the only row's candidates propose after its node."""
    children = candidates.trees[0].children[nodes[0]]
    return [token_ids[0][child - 1] for child in children]


def _for_all_rows(logits: torch.Tensor, rows: Sequence[int], num_rows: int) -> torch.Tensor:
    """Put `(A, V)` into `(R, V)`, 0 in the rows that have finished."""
    if len(rows) == num_rows:
        return logits
    everywhere = logits.new_zeros((num_rows, logits.shape[-1]))
    everywhere[list(rows)] = logits
    return everywhere


def _step_down(candidates: Candidates, token_ids: list[list[int]], walks: list[Walk]) -> bool:
    """Take every unfinished row to the candidate for its last token, if all of them have one."""
    going = [number for number, walked in enumerate(walks) if not walked.finished]
    nodes = [
        candidates.trees[n].child(walks[n].path[-1], walks[n].tokens[-1], token_ids[n])
        for n in going
    ]
    if None in nodes:
        return False
    for number, node in zip(going, nodes, strict=True):
        walks[number].path.append(node)  # type: ignore[arg-type]
    return True


class RowByRowWalker(Walker):
    """Walks each row as far as it goes, judged by itself.

    Args:
        input_ids: the prompts, `(R, L)`.
        chooser: `is_row_wise`.
        keep_scores, keep_logits: record them.
        rule: takes candidates that pass it first; for one row alone.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        chooser: TokenChooser,
        keep_scores: bool = False,
        keep_logits: bool = False,
        rule: TypicalRule | None = None,
    ) -> None:
        self.walkers = [
            StepwiseWalker(row[None], chooser.of_row(number), keep_scores, keep_logits, rule)
            for number, row in enumerate(input_ids)
        ]

    def walk(self, candidates: Candidates, logits: torch.Tensor, rows: Sequence[int]) -> list[Walk]:
        """Walk each row."""
        walks, token_ids = [], candidates.on_host()
        for number, row in enumerate(rows):
            own = slice(number, number + 1)
            own_candidates = Candidates(
                candidates.trees[own], candidates.token_ids[own], token_ids[own]
            )
            walks += self.walkers[row].walk(own_candidates, logits[own], [0])
        return walks

    @property
    def scores(self) -> tuple[torch.Tensor, ...] | None:
        """The processed scores of each step, `(R, V)`; 0 where a row had finished."""
        return _by_step([walker.scores for walker in self.walkers])

    @property
    def logits(self) -> tuple[torch.Tensor, ...] | None:
        """The raw logits of each step, like the scores."""
        return _by_step([walker.logits for walker in self.walkers])


def _by_step(
    by_row: Sequence[tuple[torch.Tensor, ...] | None],
) -> tuple[torch.Tensor, ...] | None:
    """Turn a tuple of steps `(1, V)` per row into a tuple of steps `(R, V)`."""
    kept = [steps for steps in by_row if steps is not None]
    if len(kept) < len(by_row):
        return None
    nothing = torch.zeros_like(kept[0][0])
    return tuple(
        torch.cat([steps[t] if t < len(steps) else nothing for steps in kept])
        for t in range(max(len(steps) for steps in kept))
    )
