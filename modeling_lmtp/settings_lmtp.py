"""What `generate` and `generation_config` say about L-MTP."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from transformers import GenerationConfig

from .lookup_lmtp import PromptLookupDrafter
from .tree_lmtp import MAX_NODES, DraftTree

DRAFT_SHAPES = ("draft_tree", "draft_length", "draft_nodes", "draft_by_batch_size")
# Transformers' own names, for what is here part of the draft instead of another strategy
PROMPT_LOOKUP = ("prompt_lookup_num_tokens", "max_matching_ngram_size")
BESIDE_A_SHAPE = ("draft_threshold", *PROMPT_LOOKUP)
STRICT = "strict"  # a value of `use_lmtp`: an error where it would be plain decoding instead
# What says where candidates come from, as a drafter of one's own does
DRAFT_SOURCES = (*DRAFT_SHAPES, *BESIDE_A_SHAPE, "forward_decoding")


@dataclass
class LMTPSettings:
    """How to decode.

    Args:
        use_lmtp: draft with the leap heads; `"strict"`, an error where the model or the installed libraries
            would make it plain decoding.
        draft_tree: a static draft tree as the paths of its nodes, see `DraftTree.from_paths`.
        draft_length: instead, a top-1 chain of that many candidates.
        draft_nodes: instead, up to that many candidates in a tree grown for every state by itself.
        draft_threshold: in such a tree, draft no path that the heads hold less probable.
        draft_by_batch_size: instead, what is drafted (settings of the draft, by name) for each batch
            size, as `lmtp tune` finds them; a size between two of them gets the larger one's.
        forward_decoding: run the backbone once more before each draft, the paper's ablation F-MTP.
        prompt_lookup_num_tokens: draft as well up to so many tokens that followed the longest n-gram in
            which the text ends.
        max_matching_ngram_size: the longest one looked for.
        acceptance_rule: `"exact"`, or `"typical"`, which changes the text: any candidate is taken
            that the model holds typical (arXiv 2401.10774).
        posterior_threshold, posterior_alpha: ε and δ of the typical rule.
    """

    use_lmtp: bool | str = False
    draft_tree: Sequence[Sequence[int]] | None = None
    draft_length: int | None = None
    draft_nodes: int | None = None
    draft_threshold: float | None = None
    draft_by_batch_size: Mapping[str, Mapping[str, Any]] | None = None
    forward_decoding: bool = False
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int | None = None
    acceptance_rule: str = "exact"
    posterior_threshold: float = 0.09
    posterior_alpha: float = 0.3

    @classmethod
    def take_from(
        cls, kwargs: dict[str, Any], *generation_configs: GenerationConfig | None
    ) -> "LMTPSettings":
        """Take the settings out of `kwargs`, and what they leave open from the configurations.

        A tree, a length or a number of nodes in one place hides any of them in the places after it, and
        its threshold.
        The settings that Transformers knows as well stay in `kwargs` unless L-MTP is used.

        Raises:
            ValueError: two of them in one place.
        """
        names = [f.name for f in fields(cls)]
        places = [{name: kwargs[name] for name in names if name in kwargs}]
        places += [
            {name: getattr(config, name, None) for name in names}
            for config in generation_configs
            if config is not None
        ]
        chosen: dict[str, Any] = {}
        for place in places:
            given = {name: value for name, value in place.items() if value is not None}
            shapes = {name: given.pop(name) for name in DRAFT_SHAPES if name in given}
            if len(shapes) > 1:
                raise ValueError(f"Pass only one of {DRAFT_SHAPES}, got {shapes}.")
            if chosen.keys() & set(DRAFT_SHAPES):
                given.pop("draft_threshold", None)  # says how the hidden one grows
            else:
                chosen.update(shapes)
            chosen = {**given, **chosen}
        settings = cls(**chosen)
        for name in names:
            if settings.use_lmtp or name not in PROMPT_LOOKUP:
                kwargs.pop(name, None)
        return settings

    def check(self, horizon: int, vocab_size: int | None = None) -> None:
        """Raise a ValueError for what is of the wrong kind or out of range.

        Args:
            horizon: the furthest distance that the heads draft.
            vocab_size: how many tokens they choose among; None if it does not matter.
        """
        self._check_kinds()
        self.prompt_lookup()
        for name in ("draft_length", "draft_nodes"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < MAX_NODES:
                raise ValueError(f"{name} must be from 0 to {MAX_NODES - 1}, got {value}.")
        if self.acceptance_rule not in ("exact", "typical"):
            raise ValueError(
                f"acceptance_rule must be 'exact' or 'typical', got {self.acceptance_rule!r}."
            )
        for name in ("posterior_threshold", "posterior_alpha"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {value!r}.")
        if self.draft_threshold is not None and not 0 <= self.draft_threshold < 1:
            raise ValueError(
                f"draft_threshold must be at least 0 and below 1, got {self.draft_threshold!r}."
            )
        if self.draft_by_batch_size is None:
            if self.draft_threshold is not None and self.draft_nodes is None:
                raise ValueError(
                    "draft_threshold says where a tree that is grown for every state ends: set "
                    "draft_nodes as well."
                )
            highest = max(self.tree(horizon).ranks, default=0)
            if vocab_size is not None and highest >= vocab_size:
                raise ValueError(
                    f"draft_tree has the rank {highest}, but these leap heads choose among "
                    f"{vocab_size} tokens: ranks go from 0 to {vocab_size - 1}. Drop the paths with "
                    "higher ones."
                )
            return
        for size in self._batch_sizes(self.draft_by_batch_size):
            self.for_batch(size).check(horizon, vocab_size)

    def _check_kinds(self) -> None:
        """Raise a ValueError for what is no number where one is needed."""
        if self.use_lmtp not in (True, False, STRICT):
            raise ValueError(f"use_lmtp must be True, False or {STRICT!r}, got {self.use_lmtp!r}.")
        integers = ("draft_length", "draft_nodes", *PROMPT_LOOKUP)
        for name in (*integers, "draft_threshold", "posterior_threshold", "posterior_alpha"):
            value = getattr(self, name)
            kind = int if name in integers else (int, float)
            if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
                wanted = "an integer" if name in integers else "a number"
                raise ValueError(f"{name} must be {wanted}, got {value!r}.")

    def _batch_sizes(
        self, by_size: Mapping[str, Mapping[str, Any]]
    ) -> dict[int, Mapping[str, Any]]:
        """What is drafted by size, the sizes increasing; JSON has made strings of them."""
        sizes = [str(size) for size in by_size] if isinstance(by_size, Mapping) else []
        if not sizes or not all(size.isdecimal() and int(size) > 0 for size in sizes):
            raise ValueError(
                "draft_by_batch_size must say for some batch sizes what is drafted, such as "
                f"{{'1': {{'draft_nodes': 8}}, '8': {{'draft_length': 0}}}}, got {by_size!r}."
            )
        for size, draft in by_size.items():
            if not _is_draft(draft):
                raise ValueError(
                    f"draft_by_batch_size[{size!r}] must be a dict that may name one of "
                    f"{DRAFT_SHAPES[:-1]}, and any of {BESIDE_A_SHAPE} (a threshold beside draft_nodes "
                    f"only); got {draft!r}."
                )
        by_number = {int(size): draft for size, draft in by_size.items()}
        return {size: by_number[size] for size in sorted(by_number)}

    def for_batch(self, batch_size: int) -> "LMTPSettings":
        """Return the settings for that many rows; what is set for all sizes goes before."""
        if self.draft_by_batch_size is None:
            return self
        by_size = self._batch_sizes(self.draft_by_batch_size)
        chosen = next((size for size in by_size if size >= batch_size), max(by_size))
        draft = {n: v for n, v in by_size[chosen].items() if getattr(self, n) is None}
        if "draft_nodes" not in draft:
            draft["draft_threshold"] = (
                None  # what is set for all sizes is for those that grow trees
            )
        return replace(self, draft_by_batch_size=None, **draft)

    def drafts_nothing(self, horizon: int) -> bool:
        """Whether there is nothing to verify, ever, so that decoding is plain."""
        if self.prompt_lookup_num_tokens is not None or self.draft_nodes:
            return False
        return self.draft_nodes == 0 or self.tree(horizon).num_nodes == 0

    def tree(self, horizon: int) -> DraftTree:
        """Return the draft tree for heads that draft up to distance `horizon`.

        Raises:
            ValueError: the tree is malformed, or deeper than the heads can draft.
        """
        if self.draft_length is not None:
            tree = DraftTree.chain(self.draft_length)
        elif self.draft_tree is not None:
            tree = DraftTree.from_paths(self.draft_tree)
        else:
            tree = DraftTree.chain(horizon)
        if tree.depth > horizon:
            raise ValueError(
                f"The draft is {tree.depth} tokens deep, but these leap heads can draft {horizon} "
                "(their largest offset minus 1). Shorten draft_tree or draft_length."
            )
        return tree

    def prompt_lookup(self) -> PromptLookupDrafter | None:
        """Return the drafter that looks n-grams up, if it is wanted."""
        if self.prompt_lookup_num_tokens is None:
            return None
        return PromptLookupDrafter(self.prompt_lookup_num_tokens, self.max_matching_ngram_size)


def _is_draft(draft: Any) -> bool:
    """Whether this may stand for one batch size in `draft_by_batch_size`."""
    if not isinstance(draft, Mapping):
        return False
    shapes = draft.keys() & set(DRAFT_SHAPES[:-1])
    beside = BESIDE_A_SHAPE if "draft_nodes" in shapes else PROMPT_LOOKUP
    return len(shapes) <= 1 and draft.keys() <= {*shapes, *beside}
