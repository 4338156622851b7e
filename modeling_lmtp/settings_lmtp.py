"""The settings of L-MTP decoding, from a call of `generate` and from `generation_config`.

Each shape of draft is a class here, which knows the name of its setting, checks its values and makes its
drafter.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar

from transformers import GenerationConfig

from .drafting_lmtp import PromptLookupDrafter
from .leap_drafter_lmtp import DraftHeads, DynamicLeapHeadDrafter, LeapHeadDrafter
from .path_drafter_lmtp import DynamicPathDrafter, PathDrafter
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
    """How many candidates a draft has, and how they hang together.

    Attributes:
        setting: the name that users know.
        options: the names of further settings that only this shape reads.
        num_nodes: the largest number of candidates of a row.
        is_chain: whether there is at most one candidate per distance.
    """

    setting: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()
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
    """The most likely token for each distance; without any setting, for all that the heads draft.

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


@dataclass(frozen=True)
class DynamicTree(DraftShape):
    """A tree that is grown anew for every state, from the heads' probabilities.

    Args:
        num_nodes: at most that many candidates.
        threshold: draft no path that is less probable.
    """

    setting = "draft_nodes"
    options = ("draft_threshold",)
    num_nodes: int
    threshold: float = 0.0

    def __post_init__(self) -> None:
        """Check the values."""
        check_integer(self.setting, self.num_nodes, MAX_NODES - 1)
        check_number("draft_threshold", self.threshold)
        if not 0 <= self.threshold < 1:
            raise ValueError(
                f"draft_threshold must be at least 0 and below 1, got {self.threshold!r}."
            )

    @property
    def is_chain(self) -> bool:  # type: ignore[override]
        """Whether it has no room for branches."""
        return self.num_nodes <= 1

    def check(self, horizon: int, vocab_size: int | None = None) -> None:
        """Accept any heads: the tree grows as far as they draft."""

    def to_chain(self, horizon: int) -> "Chain":
        """Return a chain of as many candidates, as far as the heads draft."""
        return Chain(min(horizon, self.num_nodes))

    def new_drafter(self, heads: DraftHeads) -> LeapHeadDrafter:
        """Return a drafter that grows a tree per row and step."""
        drafter = DynamicPathDrafter if heads.is_path_grounded else DynamicLeapHeadDrafter
        return drafter(heads, self.num_nodes, self.threshold)


def _check_depth(depth: int, horizon: int) -> None:
    if depth > horizon:
        raise ValueError(
            f"The draft is {depth} tokens deep, but these leap heads can draft {horizon} (their largest "
            "offset minus 1). Shorten draft_tree or draft_length."
        )


SHAPES: tuple[type[DraftShape], ...] = (StaticTree, Chain, DynamicTree)
SHAPE_SETTINGS = tuple(shape.setting for shape in SHAPES)
SHAPE_OPTIONS = tuple(option for shape in SHAPES for option in shape.options)
# Only one of these may be set in one place
DRAFT_SHAPES = (*SHAPE_SETTINGS, "draft_by_batch_size")
# What a caller's own drafter replaces
DRAFT_SOURCES = (*DRAFT_SHAPES, *SHAPE_OPTIONS, *PROMPT_LOOKUP)


@dataclass
class LMTPSettings:
    """How to decode.

    Args:
        use_lmtp: draft with the leap heads; `"strict"` raises an error where the model or the installed
            libraries would make it plain decoding.
        draft_tree: draft a static tree, given as the paths of its nodes, see `DraftTree.from_paths`.
        draft_length: instead, draft a top-1 chain of that many candidates.
        draft_nodes: instead, draft up to that many candidates in a tree that is grown for every state.
        draft_threshold: in such a tree, draft no path that is less probable.
        draft_by_batch_size: instead, the draft settings for each batch size, as `lmtp tune` finds them; a
            size that is not listed gets those of the next larger one.
        prompt_lookup_num_tokens: also draft up to that many tokens that followed an earlier occurrence of
            the n-gram at the end of the text.
        max_matching_ngram_size: the longest n-gram to look for.
        acceptance_rule: `"exact"`, or `"typical"`, which changes the text: it accepts any candidate that
            the model considers typical (arXiv 2401.10774).
        posterior_threshold, posterior_alpha: ε and δ of the typical rule.
    """

    use_lmtp: bool | str = False
    draft_tree: Sequence[Sequence[int]] | None = None
    draft_length: int | None = None
    draft_nodes: int | None = None
    draft_threshold: float | None = None
    draft_by_batch_size: Mapping[str, Mapping[str, Any]] | None = None
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

        A shape of draft in one place hides all shapes, and their options, in later places. The settings
        that Transformers also knows stay in `kwargs` unless L-MTP is used.

        Raises:
            ValueError: one place sets two shapes, or `forward_decoding`, a setting of version 0.1.
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
            if chosen.keys() & set(DRAFT_SHAPES):
                for name in SHAPE_OPTIONS:
                    values.pop(name, None)
            else:
                chosen.update(shapes)
            chosen = {**values, **chosen}
        settings = cls(**chosen)
        for name in names:
            if settings.use_lmtp or name not in PROMPT_LOOKUP:
                kwargs.pop(name, None)
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
        for name in PROMPT_LOOKUP:
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name))
        self.prompt_lookup()
        if self.draft_by_batch_size is not None:
            for size in self._drafts_by_size(self.draft_by_batch_size):
                self.for_batch(size).check(horizon, vocab_size)
            return
        if self.draft_threshold is not None and self.draft_nodes is None:
            raise ValueError("draft_threshold has no effect without draft_nodes: set both.")
        self.shape(horizon).check(horizon, vocab_size)

    def _drafts_by_size(
        self, by_size: Mapping[str, Mapping[str, Any]]
    ) -> dict[int, Mapping[str, Any]]:
        """Return the draft settings by increasing batch size; JSON turns sizes into strings."""
        sizes = [str(size) for size in by_size] if isinstance(by_size, Mapping) else []
        if not sizes or not all(size.isdecimal() and int(size) > 0 for size in sizes):
            raise ValueError(
                "draft_by_batch_size must map batch sizes to draft settings, such as "
                f"{{'1': {{'draft_nodes': 8}}, '8': {{'draft_length': 0}}}}, got {by_size!r}."
            )
        for size, draft in by_size.items():
            if not _is_draft(draft):
                raise ValueError(
                    f"draft_by_batch_size[{size!r}] must be a dict with at most one of {SHAPE_SETTINGS}, "
                    f"and any of {PROMPT_LOOKUP} (draft_threshold beside draft_nodes only); got {draft!r}."
                )
        by_number = {int(size): draft for size, draft in by_size.items()}
        return {size: by_number[size] for size in sorted(by_number)}

    def for_batch(self, batch_size: int) -> "LMTPSettings":
        """Return the settings for that many rows; settings for all batch sizes take precedence."""
        if self.draft_by_batch_size is None:
            return self
        by_size = self._drafts_by_size(self.draft_by_batch_size)
        size = next((size for size in by_size if size >= batch_size), max(by_size))
        draft = {n: value for n, value in by_size[size].items() if getattr(self, n) is None}
        if "draft_nodes" not in draft:
            draft["draft_threshold"] = None  # only the sizes with a dynamic tree read it
        return replace(self, draft_by_batch_size=None, **draft)

    def shape(self, horizon: int) -> DraftShape:
        """Return the shape of draft, by default a chain of `horizon` candidates.

        Raises:
            ValueError: a value is of the wrong type or out of range.
        """
        if self.draft_nodes is not None:
            threshold = 0.0 if self.draft_threshold is None else self.draft_threshold
            return DynamicTree(self.draft_nodes, threshold)
        if self.draft_tree is not None:
            return StaticTree(self.draft_tree)
        return Chain(
            min(horizon, MAX_NODES - 1) if self.draft_length is None else self.draft_length
        )

    def drafts_nothing(self, horizon: int) -> bool:
        """Return whether no step would have candidates, so that decoding is plain."""
        return self.prompt_lookup_num_tokens is None and self.shape(horizon).num_nodes == 0

    def prompt_lookup(self) -> PromptLookupDrafter | None:
        """Return the drafter for prompt lookup, or None if it is off."""
        if self.prompt_lookup_num_tokens is None:
            return None
        return PromptLookupDrafter(self.prompt_lookup_num_tokens, self.max_matching_ngram_size)


def _is_draft(draft: Any) -> bool:
    """Return whether these may be the settings for one batch size."""
    if not isinstance(draft, Mapping):
        return False
    shapes = [shape for shape in SHAPES if shape.setting in draft]
    allowed = {*PROMPT_LOOKUP}.union(*({shape.setting, *shape.options} for shape in shapes))
    return len(shapes) <= 1 and draft.keys() <= allowed
