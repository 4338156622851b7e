"""Drafters: what a drafter is, and the drafters that need no leap heads.

Shapes: `B` batch, `L` known tokens, `S` known states, `H` hidden size, `N` candidates.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from .tree_lmtp import MAX_NODES, DraftTree

COPIED_PER_MATCH = (
    3  # prompt lookup: the longer the match, the further the copy is likely to be right
)

# What proposed a candidate; the last one is a drafter that does not say
HEAD, LOOKUP, OTHER = "head", "lookup", "drafter"


@dataclass(frozen=True)
class Candidates:
    """Candidates for each row of a batch.

    Args:
        trees: one tree per row; rows may differ in structure and size.
        token_ids: `(B, N)`, where `N` is the size of the largest tree. A smaller tree is padded with any
            valid token ids, which are never accepted.
        rows: the same ids as lists, if they were made on the host.
        sources: per row and node, what proposed it: `"head"` or `"lookup"`. None if the drafter does not
            say.
    """

    trees: tuple[DraftTree, ...]
    token_ids: torch.Tensor
    rows: list[list[int]] | None = field(default=None, repr=False, compare=False)
    sources: Sequence[Sequence[str]] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def none(cls, input_ids: torch.Tensor) -> "Candidates":
        """Return no candidates for each row of `input_ids` `(B, L)`."""
        num_rows = input_ids.shape[0]
        return cls((DraftTree(),) * num_rows, input_ids[:, :0], [[] for _ in range(num_rows)])

    @classmethod
    def from_rows(
        cls,
        trees: Sequence[DraftTree],
        token_ids: Sequence[Sequence[int]],
        input_ids: torch.Tensor,
        sources: Sequence[Sequence[str]] | None = None,
    ) -> "Candidates":
        """Make candidates from lists of different lengths.

        Args:
            trees: one per row.
            token_ids: per row, one token per node of its tree.
            input_ids: `(B, L)`, for its dtype and device.
            sources: per row, one per node.
        """
        longest = max(len(row) for row in token_ids)
        padded = [[*row, *[0] * (longest - len(row))] for row in token_ids]
        ids = torch.tensor(padded, dtype=input_ids.dtype, device=input_ids.device)
        return cls(tuple(trees), ids.reshape(len(padded), longest), padded, sources)

    def on_host(self) -> list[list[int]]:
        """Return the token ids as lists; waits for the device only if they were made there."""
        return self.token_ids.tolist() if self.rows is None else self.rows

    def sources_of(self, row: int) -> Sequence[str]:
        """Return what proposed each node of a row: `"head"`, `"lookup"`, or `"drafter"` if unknown."""
        return [OTHER] * self.num_nodes if self.sources is None else self.sources[row]

    @property
    def num_nodes(self) -> int:
        """The number of candidates `N` per row."""
        return self.token_ids.shape[1]

    @property
    def is_shared(self) -> bool:
        """Whether all rows have the same tree, with `N` nodes."""
        first = self.trees[0]
        same = all(tree is first or tree == first for tree in self.trees[1:])
        return same and first.num_nodes == self.num_nodes

    @property
    def is_chain(self) -> bool:
        """Whether no row has two candidates for one distance."""
        return all(tree.is_chain for tree in self.trees)

    def to(self, device: torch.device) -> "Candidates":
        """Return the candidates with `token_ids` on a device."""
        if self.token_ids.device == device:
            return self
        return replace(self, token_ids=self.token_ids.to(device))

    def truncate(self, depths: Sequence[int]) -> "Candidates":
        """Return the candidates without the nodes of row `b` that are deeper than `depths[b]`."""
        deepest = max(tree.depth for tree in self.trees)
        if all(depth >= deepest for depth in depths):
            return self
        trees = tuple(
            tree.truncate(max(depth, 0)) for tree, depth in zip(self.trees, depths, strict=True)
        )
        num_nodes = max(tree.num_nodes for tree in trees)
        rows = None if self.rows is None else [row[:num_nodes] for row in self.rows]
        # Nodes are ordered by depth, so the first sources remain right
        return replace(self, trees=trees, token_ids=self.token_ids[:, :num_nodes], rows=rows)


def tree_from_paths(
    sources: Mapping[tuple[int, ...], str],
) -> tuple[DraftTree, list[int], list[str]]:
    """Build a tree from paths of tokens; return it, each node's token and each node's source.

    Args:
        sources: what proposed each node, by the tokens from the root to it. The path of its parent is among
            them, and better nodes come before their siblings.
    """
    ordered = sorted(sources, key=len)
    number = {(): 0, **{path: node for node, path in enumerate(ordered, start=1)}}
    num_children: Counter[tuple[int, ...]] = Counter()
    ranks = []
    for path in ordered:
        ranks.append(num_children[path[:-1]])
        num_children[path[:-1]] += 1
    tree = DraftTree(tuple(number[path[:-1]] for path in ordered), tuple(ranks))
    return tree, [path[-1] for path in ordered], [sources[path] for path in ordered]


class Drafter(ABC):
    """Proposes candidates for the tokens that follow the last one emitted.

    Attributes:
        num_states: how many of the last hidden states `draft` reads.
        max_nodes: the largest number of candidates per row; with a static cache, each pass has room for
            that many.
    """

    num_states: int = 1
    max_nodes: int = MAX_NODES - 1

    def reset(self) -> None:  # noqa: B027 (most drafters keep nothing)
        """Forget earlier texts; runs once per call of `generate`, before the first draft."""

    def observe(self, tokens: Sequence[Sequence[int]]) -> None:  # noqa: B027 (most do not learn)
        """Learn from the step that verified the last draft.

        Args:
            tokens: what each row emitted: the accepted candidates, then the bonus token.
        """

    @abstractmethod
    def draft(
        self, input_ids: torch.Tensor, hidden_states: torch.Tensor, max_depth: int
    ) -> Candidates:
        """Propose candidates. They affect the speed only: the text stays that of plain decoding.

        Args:
            input_ids: `(B, L)`, all known tokens, left-padded with arbitrary tokens. The last token of each
                row is the root of its tree.
            hidden_states: `(B, S, H)`, the states of the tokens before the root, the latest last. `S` is
                `num_states`, or less right after a short prompt.
            max_depth: the largest distance, 0 or more, at which a token may still follow; no candidate may
                be deeper.
        """


class Proposal(NamedTuple):
    """A candidate, and how likely the drafter that proposes it considers it.

    Args:
        path: the tokens from the root to it.
        source: what proposes it; the candidates of one source are calibrated together.
        probability: that it is right if its parent is.
    """

    path: tuple[int, ...]
    source: Hashable
    probability: float


class ProposingDrafter(Drafter):
    """A drafter that says how likely each of its candidates is, so that the best ones can be verified."""

    @abstractmethod
    def propose(
        self,
        input_ids: torch.Tensor,
        hidden_states: torch.Tensor,
        max_depth: int,
        min_value: float = 0.0,
    ) -> list[list[Proposal]]:
        """Return each row's proposals, parents before their children.

        Args:
            input_ids, hidden_states, max_depth: see `draft`.
            min_value: leave out what hangs below paths that are less probable.
        """


class PromptLookupDrafter(ProposingDrafter):
    """Proposes the tokens that followed an earlier occurrence of the n-gram at the end of the text.

    This is prompt lookup decoding, or n-gram speculation. It runs no model, and pays off where the output
    quotes its input. It takes the longest n-gram that occurs before, and of several occurrences the latest.
    It copies `COPIED_PER_MATCH` tokens per token of that n-gram.

    Args:
        num_tokens: the largest number of candidates.
        max_ngram_size: the longest n-gram to look for, 6 by default.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(self, num_tokens: int, max_ngram_size: int | None = None) -> None:
        if not 1 <= num_tokens < MAX_NODES:
            raise ValueError(
                f"prompt_lookup_num_tokens must be from 1 to {MAX_NODES - 1}, got {num_tokens}."
            )
        max_ngram_size = 6 if max_ngram_size is None else max_ngram_size
        if max_ngram_size < 1:
            raise ValueError(f"max_matching_ngram_size must be 1 or more, got {max_ngram_size}.")
        self.num_tokens = self.max_nodes = num_tokens
        self.max_ngram_size = max_ngram_size

    def draft(
        self, input_ids: torch.Tensor, hidden_states: torch.Tensor, max_depth: int
    ) -> Candidates:
        """Propose one chain per row, empty where nothing matches."""
        chains = [
            tokens[: COPIED_PER_MATCH * size] for size, tokens in self._copies(input_ids, max_depth)
        ]
        trees = [DraftTree.chain(len(chain)) for chain in chains]
        sources = [[LOOKUP] * len(chain) for chain in chains]
        return Candidates.from_rows(trees, chains, input_ids, sources)

    def propose(
        self,
        input_ids: torch.Tensor,
        hidden_states: torch.Tensor,
        max_depth: int,
        min_value: float = 0.0,
    ) -> list[list[Proposal]]:
        """Propose one chain per row. A copy that is right so far is as good as a longer match."""
        return [
            [
                Proposal(tuple(tokens[: 1 + distance]), LOOKUP, _copy_probability(size + distance))
                for distance in range(len(tokens))
            ]
            for size, tokens in self._copies(input_ids, max_depth)
        ]

    def _copies(self, input_ids: torch.Tensor, max_depth: int) -> list[tuple[int, list[int]]]:
        """Return, per row, the size of the longest match and the tokens that followed it."""
        length = min(self.num_tokens, max_depth)
        if length == 0 or input_ids.shape[1] < 2:
            return [(0, [])] * input_ids.shape[0]
        sizes, tokens = self._continuations(input_ids, length)
        both = torch.cat([sizes, tokens], dim=1).tolist()  # one transfer to the host
        return [(row[0], row[1:] if row[0] else []) for row in both]

    def _continuations(
        self, input_ids: torch.Tensor, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the size of the longest match, `(B, 1)`, and what followed it, `(B, length)`.

        A copy that reaches the end of the text continues with itself, because the text may be periodic.
        """
        num_known = input_ids.shape[1]
        size = min(self.max_ngram_size, num_known - 1)
        # (B, L - 1, size): the tokens up to each one but the last
        ngrams = pad(input_ids[:, :-1], (size - 1, 0), value=-1).unfold(1, size, 1)
        agrees = ngrams == input_ids[:, None, -size:]
        sizes = agrees.flip(-1).cumprod(dim=-1).sum(dim=-1)
        ends = torch.arange(num_known - 1, device=input_ids.device)
        end = (sizes * num_known + ends).argmax(dim=1, keepdim=True)
        steps = torch.arange(length, device=input_ids.device) % (num_known - 1 - end)
        return sizes.gather(1, end), input_ids.gather(1, end + 1 + steps)


def _copy_probability(match: int) -> float:
    """Return how likely the token after a match of that many tokens is, before anything is observed."""
    return 1 - 0.7 / match


class MergedDrafter(Drafter):
    """Merges the candidates of several drafters into one tree, verified in one pass.

    Args:
        drafters: earlier ones take precedence where the tree is full.
        takes_trees: whether trees can be verified. If not, each row gets the chain of the first drafter
            that proposes any.
    """

    def __init__(self, drafters: Sequence[Drafter], takes_trees: bool = True) -> None:
        self.drafters = tuple(drafters)
        self.takes_trees = takes_trees
        self.num_states = max(drafter.num_states for drafter in drafters)
        self.max_nodes = min(MAX_NODES - 1, sum(drafter.max_nodes for drafter in drafters))

    def reset(self) -> None:
        """Reset every drafter."""
        for drafter in self.drafters:
            drafter.reset()

    def observe(self, tokens: Sequence[Sequence[int]]) -> None:
        """Let every drafter learn."""
        for drafter in self.drafters:
            drafter.observe(tokens)

    def draft(
        self, input_ids: torch.Tensor, hidden_states: torch.Tensor, max_depth: int
    ) -> Candidates:
        """Ask every drafter, and merge row by row."""
        drafts = [drafter.draft(input_ids, hidden_states, max_depth) for drafter in self.drafters]
        token_ids = [candidates.on_host() for candidates in drafts]
        merge = merge_trees if self.takes_trees else _first_chain
        merged = [
            merge([
                (c.trees[row], ids[row], c.sources_of(row))
                for c, ids in zip(drafts, token_ids, strict=True)
            ])
            for row in range(input_ids.shape[0])
        ]  # fmt: skip
        trees, ids, sources = zip(*merged, strict=True)
        return Candidates.from_rows(trees, ids, input_ids, sources)


# A tree, and one token and one source per node, perhaps padded
SourcedTree = tuple[DraftTree, Sequence[int], Sequence[str]]


def _first_chain(proposals: Sequence[SourcedTree]) -> SourcedTree:
    tree, token_ids, sources = next((p for p in proposals if p[0].num_nodes), proposals[-1])
    return tree, token_ids[: tree.num_nodes], sources


def merge_trees(proposals: Sequence[SourcedTree]) -> SourcedTree:
    """Merge trees of tokens: a path that several of them propose appears once, from its first source.

    Args:
        proposals: trees, with tokens and sources; later ones are cut where `MAX_NODES` is reached.
    """
    merged: dict[tuple[int, ...], str] = {}
    for tree, token_ids, sources in proposals:
        paths: list[tuple[int, ...]] = [()]
        for parent, token, source in zip(tree.parents, token_ids, sources, strict=False):
            path = (*paths[parent], token)
            paths.append(path)
            if len(merged) < MAX_NODES - 1 and (len(path) == 1 or path[:-1] in merged):
                merged.setdefault(path, source)
    return tree_from_paths(merged)


class ForwardDrafter(Drafter):
    """Forward decoding (F-MTP, the ablation of arXiv 2505.17505): a plain pass before every draft.

    The pass over the token just emitted computes its state, from which the heads then draft. L-MTP saves
    that pass by looking backward. To measure the difference:

        model.generate(**inputs, use_lmtp=True, drafter=ForwardDrafter(model.new_drafter()))

    Args:
        drafter: drafts after the pass.
    """

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.num_states, self.max_nodes = drafter.num_states, drafter.max_nodes
        self._has_forward_state = False

    def reset(self) -> None:
        """Start with a plain pass."""
        self._has_forward_state = False
        self.drafter.reset()

    def observe(self, tokens: Sequence[Sequence[int]]) -> None:
        """Let the drafter learn from the steps that it drafted for."""
        if not self._has_forward_state:
            self.drafter.observe(tokens)

    def draft(
        self, input_ids: torch.Tensor, hidden_states: torch.Tensor, max_depth: int
    ) -> Candidates:
        """Propose nothing, and what the drafter proposes, in turn."""
        self._has_forward_state = not self._has_forward_state
        if self._has_forward_state:
            return Candidates.none(input_ids)
        return self.drafter.draft(input_ids, hidden_states, max_depth)
