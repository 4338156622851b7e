"""The settings of L-MTP decoding, from a call of `generate` and from `generation_config`.

Each shape of draft is a class here, which knows the name of its setting, checks its values and makes its
drafter.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

from transformers import GenerationConfig

from .drafting_lmtp import PromptLookupDrafter
from .leap_drafter_lmtp import DraftHeads, LeapHeadDrafter
from .path_drafter_lmtp import PathDrafter
from .tree_lmtp import MAX_NODES, DraftTree

STRICT = "strict"  # a value of `use_lmtp`: raise instead of decoding plainly
# Transformers' own names. With L-MTP, prompt lookup is a part of the draft and no strategy of its own
PROMPT_LOOKUP = ("prompt_lookup_num_tokens", "max_matching_ngram_size")


def check_integer(name: str, value: Any, maximum: int | None = None) -> None:
    """Raise a ValueError unless a setting is an integer, and from 0 to `maximum` if that is given."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an integer, got {value!r}.")
    if maximum is not None and not 0 <= value <= maximum:
        raise ValueError(f"{name} must be from 0 to {maximum}, got {value}.")


def check_number(name: str, value: Any) -> None:
    """Raise a ValueError unless a setting is a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, got {value!r}.")


class DraftShape(ABC):
    """How many candidates a draft has, and how they hang together, if a call pins that.

    Attributes:
        setting: the name that users know.
        num_nodes: the largest number of candidates of a row.
        is_chain: whether there is at most one candidate per distance.
    """

    setting: ClassVar[str]
    num_nodes: int
    is_chain: bool

    @abstractmethod
    def check(self, horizon: int, vocab_size: int | None = None) -> None:
        """Raise a ValueError if heads cannot draft this shape.

        Args:
            horizon: the largest distance that the heads can draft.
            vocab_size: the number of tokens that they choose from; None skips that check.
        """

    @abstractmethod
    def to_chain(self, horizon: int) -> "Chain":
        """Return the chain to draft for a backbone that verifies chains only."""

    @abstractmethod
    def new_drafter(self, heads: DraftHeads) -> LeapHeadDrafter:
        """Return a drafter of this shape."""


@dataclass(frozen=True)
class StaticTree(DraftShape):
    """A tree with the same structure for every state.

    Args:
        paths: see `DraftTree.from_paths`.
    """

    setting = "draft_tree"
    paths: Sequence[Sequence[int]]

    @cached_property
    def tree(self) -> DraftTree:
        """The tree.

        Raises:
            ValueError: it is malformed.
        """
        return DraftTree.from_paths(self.paths)

    @property
    def num_nodes(self) -> int:  # type: ignore[override]
        """The number of candidates."""
        return self.tree.num_nodes

    @property
    def is_chain(self) -> bool:  # type: ignore[override]
        """Whether the tree has no branches."""
        return self.tree.is_chain

    def check(self, horizon: int, vocab_size: int | None = None) -> None:
        """Raise a ValueError if the tree is deeper than the heads draft, or has ranks that they lack."""
        _check_depth(self.tree.depth, horizon)
        highest = max(self.tree.ranks, default=0)
        if vocab_size is not None and highest >= vocab_size:
            raise ValueError(
                f"draft_tree has rank {highest}, but these leap heads choose among {vocab_size} tokens, "
                f"so ranks go from 0 to {vocab_size - 1}. Drop the paths with higher ranks."
            )

    def to_chain(self, horizon: int) -> "Chain":
        """Return a chain as deep as the tree."""
        return Chain(self.tree.depth)

    def new_drafter(self, heads: DraftHeads) -> LeapHeadDrafter:
        """Return a drafter that fills the tree."""
        return (PathDrafter if heads.is_path_grounded else LeapHeadDrafter)(heads, self.tree)


@dataclass(frozen=True)
class Chain(DraftShape):
    """The most likely token for each distance.

    Args:
        length: the number of candidates.
    """

    setting = "draft_length"
    is_chain = True
    length: int

    def __post_init__(self) -> None:
        """Check the values."""
        check_integer(self.setting, self.length, MAX_NODES - 1)

    @property
    def num_nodes(self) -> int:  # type: ignore[override]
        """The number of candidates."""
        return self.length

    def check(self, horizon: int, vocab_size: int | None = None) -> None:
        """Raise a ValueError if the chain is longer than the heads draft."""
        _check_depth(self.length, horizon)

    def to_chain(self, horizon: int) -> "Chain":
        """Return the chain itself."""
        return self

    def new_drafter(self, heads: DraftHeads) -> LeapHeadDrafter:
        """Return a drafter of the chain."""
        tree = DraftTree.chain(self.length)
        return (PathDrafter if heads.is_path_grounded else LeapHeadDrafter)(heads, tree)


def _check_depth(depth: int, horizon: int) -> None:
    if depth > horizon:
        raise ValueError(
            f"The draft is {depth} tokens deep, but these leap heads can draft {horizon} (their largest "
            "offset minus 1). Shorten draft_tree or draft_length."
        )


SHAPES: tuple[type[DraftShape], ...] = (StaticTree, Chain)
# Only one of these may be set in one place
DRAFT_SHAPES = (*(shape.setting for shape in SHAPES), "draft_nodes")
# What a caller's own drafter replaces
DRAFT_SOURCES = (*DRAFT_SHAPES, *PROMPT_LOOKUP)
# Settings of version 0.1 that affect the speed only. Where a checkpoint still has them, they are ignored
FORMER_SETTINGS = ("draft_threshold", "draft_by_batch_size", "draft_conditions")
# Integers, and the largest value
INTEGERS = {
    "draft_nodes": MAX_NODES - 1,
    "prompt_lookup_num_tokens": MAX_NODES - 1,
    "max_matching_ngram_size": None,
}
DEFAULT_NODES = 31  # with the root, a pass over 32 tokens
DEFAULT_LOOKUP_TOKENS = 16


@dataclass
class LMTPSettings:
    """How to decode.

    Args:
        use_lmtp: draft with the leap heads; `"strict"` raises an error where the model or the installed
            libraries would make it plain decoding.
        draft_nodes: draft at most that many candidates per row and step, 31 by default. The draft is
            planned: it has the candidates that are worth their cost, see `planned_drafter_lmtp`.
        draft_tree: instead, pin a static tree, given as the paths of its nodes, see `DraftTree.from_paths`.
        draft_length: instead, pin a top-1 chain of that many candidates.
        prompt_lookup_num_tokens: also draft up to that many tokens that followed an earlier occurrence of
            the n-gram at the end of the text; 0 turns that off. By default 16, and 0 beside a pinned draft.
        max_matching_ngram_size: the longest n-gram to look for.
        acceptance_rule: `"exact"`, or `"typical"`, which changes the text: it accepts any candidate that
            the model considers typical (arXiv 2401.10774).
        posterior_threshold, posterior_alpha: ε and δ of the typical rule.
    """

    use_lmtp: bool | str = False
    draft_nodes: int | None = None
    draft_tree: Sequence[Sequence[int]] | None = None
    draft_length: int | None = None
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int | None = None
    acceptance_rule: str = "exact"
    posterior_threshold: float = 0.09
    posterior_alpha: float = 0.3

    @classmethod
    def take_from(
        cls, kwargs: dict[str, Any], *generation_configs: GenerationConfig | None
    ) -> "LMTPSettings":
        """Remove the settings from `kwargs`, and read those that are not there from the configurations.

        A shape of draft in one place hides all shapes in later places. The settings that Transformers
        also knows stay in `kwargs` unless L-MTP is used.

        Raises:
            ValueError: one place sets two shapes, or a setting of version 0.1 that is no longer one.
        """
        names = [field.name for field in fields(cls)]
        configs = [config for config in generation_configs if config is not None]
        places = [{name: kwargs[name] for name in names if name in kwargs}]
        places += [{name: getattr(config, name, None) for name in names} for config in configs]
        chosen: dict[str, Any] = {}
        for place in places:
            values = {name: value for name, value in place.items() if value is not None}
            shapes = {name: values.pop(name) for name in DRAFT_SHAPES if name in values}
            if len(shapes) > 1:
                raise ValueError(f"Pass only one of {DRAFT_SHAPES}, got {shapes}.")
            if not chosen.keys() & set(DRAFT_SHAPES):
                chosen.update(shapes)
            chosen = {**values, **chosen}
        settings = cls(**chosen)
        for name in names:
            if settings.use_lmtp or name not in PROMPT_LOOKUP:
                kwargs.pop(name, None)
        former = [name for name in FORMER_SETTINGS if kwargs.pop(name, None) is not None]
        if former:
            raise ValueError(
                f"{former} are no longer settings. Drafts are now planned from what the model accepts and "
                "what the device takes; draft_nodes bounds them, draft_tree or draft_length pins them."
            )
        stored = [getattr(config, "forward_decoding", None) for config in configs]
        if kwargs.pop("forward_decoding", None) or (settings.use_lmtp and any(stored)):
            raise ValueError(
                "forward_decoding=True is no longer a setting. Pass drafter=ForwardDrafter("
                "model.new_drafter()), with ForwardDrafter from modeling_lmtp.drafting_lmtp, and remove "
                "forward_decoding from the call or the generation_config."
            )
        return settings

    def check(self, horizon: int, vocab_size: int | None = None) -> None:
        """Raise a ValueError for a value of the wrong type or out of range.

        Args:
            horizon: the largest distance that the heads can draft.
            vocab_size: the number of tokens that they choose from; None skips that check.
        """
        if self.use_lmtp not in (True, False, STRICT):
            raise ValueError(f"use_lmtp must be True, False or {STRICT!r}, got {self.use_lmtp!r}.")
        if self.acceptance_rule not in ("exact", "typical"):
            raise ValueError(
                f"acceptance_rule must be 'exact' or 'typical', got {self.acceptance_rule!r}."
            )
        for name in ("posterior_threshold", "posterior_alpha"):
            value = getattr(self, name)
            check_number(name, value)
            if not 0 < value <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {value!r}.")
        for name, maximum in INTEGERS.items():
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), maximum)
        self.prompt_lookup()
        shape = self.shape()
        if shape is not None:
            shape.check(horizon, vocab_size)

    def shape(self) -> DraftShape | None:
        """Return the draft that is pinned, or None if drafts are planned.

        Raises:
            ValueError: a value is of the wrong type or out of range.
        """
        if self.draft_tree is not None:
            return StaticTree(self.draft_tree)
        return None if self.draft_length is None else Chain(self.draft_length)

    @property
    def max_nodes(self) -> int:
        """The largest number of candidates of a planned draft."""
        return DEFAULT_NODES if self.draft_nodes is None else self.draft_nodes

    def drafts_nothing(self) -> bool:
        """Return whether no step would have candidates, so that decoding is plain."""
        shape = self.shape()
        if shape is None:
            return self.max_nodes == 0
        return shape.num_nodes == 0 and self.prompt_lookup() is None

    def prompt_lookup(self) -> PromptLookupDrafter | None:
        """Return the drafter for prompt lookup, or None if it is off."""
        num_tokens = self.prompt_lookup_num_tokens
        if num_tokens is None:
            num_tokens = DEFAULT_LOOKUP_TOKENS if self.shape() is None else 0
        return PromptLookupDrafter(num_tokens, self.max_matching_ngram_size) if num_tokens else None
