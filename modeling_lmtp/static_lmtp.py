"""Decoding over a static cache: all passes after the prefill have the same shapes, and no tensor moves.

A row's tokens lie from the left, where plain decoding would have them. A pass writes its nodes behind the
longest row, and what a walk accepts is copied from there to the end of its own row:

    row 0   p p p a . . . │ r n n n      p prompt, a accepted, r root, n candidate
    row 1   p p p a a a a │ r n n n
                          W

Shapes: `B` rows of the call, `A` of them still generating, `C` slots of the cache, `Q = 1 + N` nodes of
every pass, `N` the most candidates that are ever drafted, `W` the slot of the roots.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import Cache, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.utils import ModelOutput

from .cache_lmtp import CacheSlots
from .compiled_lmtp import CompiledPass
from .drafting_lmtp import Candidates
from .texts_lmtp import Texts
from .tree_lmtp import DraftTree
from .verification_lmtp import Verifier


def check_static_cache(cache: StaticCache) -> None:
    """Raise a ValueError unless every layer of `cache` keeps all of its slots, on its own device."""
    others = {type(layer).__name__ for layer in cache.layers if type(layer) is not StaticLayer}
    if others:
        raise ValueError(
            f"use_lmtp=True does not support static caches with layers of the kind "
            f"{', '.join(sorted(others))}: they cannot be rolled back. Leave out "
            "cache_implementation, or pass 'dynamic'."
        )
    if cache.offloading:
        raise ValueError(
            "use_lmtp=True does not support static caches that are offloaded. Pass "
            "cache_implementation='static', or 'offloaded'."
        )


def check_room(cache: StaticCache, max_length: int, max_nodes: int) -> None:
    """Raise a ValueError unless `cache` has room for `max_length` tokens and as many candidates."""
    capacity, needed = cache.get_max_length(), max_length + max_nodes
    if capacity < needed:
        raise ValueError(
            f"past_key_values is a static cache of {capacity} slots, and use_lmtp=True needs {needed} "
            "here: one for each token up to max_length, and one for each candidate. Pass "
            f"StaticCache(config, max_cache_len={needed}), or a smaller max_new_tokens."
        )


def with_room(cache: StaticCache, backbone: PreTrainedModel, max_nodes: int) -> StaticCache:
    """Return a cache like one that `generate` has made, with room for a draft behind the text.

    It is larger always by as much: Transformers lets caches keep their size from call to call, so that
    compiled code fits the next one.
    """
    return StaticCache(
        config=backbone.config.get_text_config(decoder=True),
        max_cache_len=cache.get_max_length() + 1 + max_nodes,
    )


class StaticSlots(CacheSlots):
    """Where the tokens of each row lie in a static cache.

    Args:
        cache: holds the prompts.
        num_rows: `B`.
        num_nodes: `Q`.
        attention_mask: of the prompts, `(B, L)`, 0 at padding, or None.

    Attributes:
        start: `W`.
        lengths: how many slots each of the `B` rows has used, padding included.
        places: which rows are still generating.
    """

    def __init__(
        self,
        cache: Cache,
        num_rows: int,
        num_nodes: int,
        attention_mask: torch.Tensor | None = None,
    ) -> None:
        super().__init__(cache)
        self.num_nodes = num_nodes
        self.start = int(cache.get_seq_length()) - 1  # the prompt's last token is the first root
        self.lengths = [self.start] * num_rows
        self.places = list(range(num_rows))
        device = cache.layers[0].keys.device
        self._slots = torch.arange(cache.get_max_length(), device=device)
        self._is_token = torch.ones(
            (num_rows, len(self._slots)), dtype=torch.bool, device=device
        )  # or is yet to become one
        if attention_mask is not None:
            self._is_token[:, : attention_mask.shape[1]] = attention_mask.bool()

    def keep_paths(self, paths: Sequence[Sequence[int]], num_slots: int) -> None:
        """Copy the slots of each row's path to the row's end, and forget the others."""
        longest = max(map(len, paths))
        sources, targets = [], []
        for place, path in zip(self.places, paths, strict=True):
            nodes = [*path, *[path[-1]] * (longest - len(path))]
            depths = [min(depth, len(path) - 1) for depth in range(longest)]
            sources.append([self.start + node for node in nodes])
            targets.append([self.lengths[place] + depth for depth in depths])
            self.lengths[place] += len(path)
        if sources != targets:
            self._copy(sources, targets)
        self._forget_after(max(self.lengths))

    def _copy(self, sources: list[list[int]], targets: list[list[int]]) -> None:
        """Copy slots of the rows still generating, both `(A, longest path)`."""
        rows = [[place] * len(sources[0]) for place in self.places]
        moves = torch.tensor([rows, sources, targets])
        on_device: dict[torch.device, torch.Tensor] = {}  # the same in all layers
        for layer in self.cache.layers:
            device = layer.keys.device
            if device not in on_device:
                on_device[device] = moves.to(device)
            row, source, target = on_device[device]
            for states in (layer.keys, layer.values):
                states[row, :, target] = states[row, :, source]

    def _forget_after(self, length: int) -> None:
        self.start = length
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(length)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows only, by their place; the others go on in the passes, unheeded."""
        self.places = [self.places[row] for row in rows]

    def move_left(self, num_slots: int) -> None:
        """Leave the slots where they are: padding costs a place, and a place is there."""

    def among_all(self, values: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """Put `A` rows among the `B`, 0 in those that have ended."""
        if len(self.places) == len(self.lengths):
            return values
        shape = list(values.shape)
        shape[dim] = len(self.lengths)
        index = torch.tensor(self.places, device=values.device)
        return values.new_zeros(shape).index_copy_(dim, index, values)

    def of_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Pick from `(B, …)` the rows that are still generating."""
        return values if len(self.places) == len(self.lengths) else values[self.places]

    def seen(self, visible: torch.Tensor) -> torch.Tensor:
        """Return which slots each node sees, `(B, Q, C)`.

        Args:
            visible: `(B, Q, Q)`, which nodes each node sees.
        """
        lengths = torch.tensor(self.lengths, device=self._slots.device)
        known = self._is_token & (self._slots < lengths[:, None])
        sees = known[:, None].repeat(1, self.num_nodes, 1)
        sees[..., self.start : self.start + self.num_nodes] = visible
        return sees


class StaticVerifier(Verifier):
    """Verifies drafts over a static cache; each pass has `B` rows of `Q` nodes.

    Args:
        backbone: takes trees.
        max_nodes: `N`.
        compiled: the backbone's pass, compiled; None to run it as it is.
    """

    def __init__(
        self, backbone: PreTrainedModel, max_nodes: int, compiled: CompiledPass | None = None
    ) -> None:
        super().__init__(backbone)
        self.num_nodes = 1 + max_nodes
        self.compiled = compiled

    def slots(self, model_kwargs: dict[str, Any], num_rows: int) -> CacheSlots:
        """Return where the rows lie, and verify there from now on."""
        cache, mask = model_kwargs["past_key_values"], model_kwargs.get("attention_mask")
        self._slots = StaticSlots(cache, num_rows, self.num_nodes, mask)
        return self._slots

    def of_rows(self, states: torch.Tensor) -> torch.Tensor:
        """Pick the rows that are still generating."""
        return self._slots.of_rows(states)

    def verify(
        self,
        input_ids: torch.Tensor,
        candidates: Candidates,
        model_kwargs: dict[str, Any],
        num_replayed: int = 0,
    ) -> ModelOutput:
        """Run the backbone on `Q` nodes per row: the root, the candidates, and what fills them up.

        Args:
            input_ids: `(A, L)`, the roots last.
            candidates: for each row, at most `N`.
            model_kwargs: what `generate` keeps between steps; not changed.
            num_replayed: 0, as nothing lacks in a static cache.

        Returns:
            The backbone's output for the `A` rows, logits `(A, Q, V)`.

        Raises:
            ValueError: there are more candidates than the drafter said there would be.
        """
        if candidates.num_nodes >= self.num_nodes:
            raise ValueError(
                f"The drafter proposed {candidates.num_nodes} candidates, but its max_nodes is "
                f"{self.num_nodes - 1}, and a pass over a static cache has room for no more."
            )
        all_candidates = self._fill_up(candidates)
        roots = self._slots.among_all(input_ids[:, -1:])
        nodes = torch.cat([roots, all_candidates.token_ids], dim=-1)
        depths, visible = self._arrangement(all_candidates, nodes.device)
        inputs = self.backbone.prepare_inputs_for_generation(
            nodes,
            next_sequence_length=self.num_nodes,
            attention_mask=visible[:, None],  # in the place of ours, so that no other is made
            **self._of_all_rows(model_kwargs, depths),
        )
        inputs["attention_mask"] = self._masks.over_all_slots(
            self._slots.seen(visible), self._slots.cache
        )
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = 0  # those of every node
        outputs = (self.compiled or self.backbone)(**inputs, return_dict=True)
        outputs.logits = self.of_rows(outputs.logits)
        if outputs.get("hidden_states") is not None:
            outputs.hidden_states = tuple(map(self.of_rows, outputs.hidden_states))
        return outputs

    def _fill_up(self, candidates: Candidates) -> Candidates:
        """Make drafts for all `B` rows of what `A` rows have, `N` tokens each."""
        trees = [DraftTree()] * len(self._slots.lengths)
        for place, tree in zip(self._slots.places, candidates.trees, strict=True):
            trees[place] = tree
        missing = self.num_nodes - 1 - candidates.num_nodes
        token_ids = self._slots.among_all(pad(candidates.token_ids, (0, missing)))
        return Candidates(tuple(trees), token_ids)

    def _of_all_rows(self, model_kwargs: dict[str, Any], depths: torch.Tensor) -> dict[str, Any]:
        """Return what `generate` keeps, with a value for each of the nodes `(B, Q)`."""
        kept = {}
        for name, value in model_kwargs.items():
            if name == "position_ids" and value is not None:
                kept[name] = self._slots.among_all(value, dim=-2) + depths
            elif name.endswith("token_type_ids") and value is not None:  # new ones are as the last
                kept[name] = self._slots.among_all(value[:, -1:]).expand(-1, self.num_nodes)
            elif torch.is_tensor(value) and value.ndim > 1:
                kept[name] = self._slots.among_all(value)
            else:
                kept[name] = value
        kept.pop("attention_mask", None)
        return kept


class ReturnedStaticCache:
    """Gives rows of a batch that ended early what plain decoding has behind them: an end and padding.

    Args:
        verifier: knows where the rows lie.
        model_kwargs: what `generate` keeps, for the prompts.
        texts: what has been emitted.
    """

    def __init__(
        self, verifier: StaticVerifier, model_kwargs: dict[str, Any], texts: Texts
    ) -> None:
        self.verifier = verifier
        self.model_kwargs = dict(model_kwargs)
        self.texts = texts
        self.prompt_slots = int(model_kwargs["past_key_values"].get_seq_length())

    def take(self, places: Sequence[int], rows: Sequence[int]) -> None:
        """Leave rows that have ended where they are."""

    def put_together(self) -> None:
        """Run the tokens that the shortest row lacks, in all rows."""
        slots, backbone = self.verifier._slots, self.verifier.backbone
        num_new = len(self.texts.padded()) - 1
        missing = self.prompt_slots + num_new - min(slots.lengths)
        slots._forget_after(min(slots.lengths))
        if missing == 0:
            return
        model_kwargs = backbone._update_model_kwargs_for_generation(
            ModelOutput(), self.model_kwargs, num_new_tokens=num_new
        )
        inputs = backbone.prepare_inputs_for_generation(
            self.texts.sequences()[:, :-1], next_sequence_length=missing, **model_kwargs
        )
        backbone(**inputs, return_dict=True)
