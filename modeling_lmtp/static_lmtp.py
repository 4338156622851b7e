"""A static cache: the room it must have, and where the tokens of each row lie in it.

Rows lie from the left, where plain decoding would have them. A pass writes its nodes behind the longest
row, and the accepted slots are copied from there to the end of its own row; no tensor moves:

    row 0   p p p a . . . │ r n n n      p prompt, a accepted, r root, n candidate
    row 1   p p p a a a a │ r n n n
                          W

Shapes: `B` rows of the call, `A` of them still generating, `C` slots of the cache, `Q = 1 + N` nodes of
every pass, `N` the most candidates that are ever drafted, `W` the slot of the roots.
"""

from collections.abc import Sequence

import torch
from transformers import Cache, GenerationConfig, PreTrainedModel, StaticCache

from .cache_lmtp import new_cache
from .rollback_lmtp import CacheSlots
from .transformers_lmtp import StaticLayer


def why_not_static(cache: StaticCache, generation_config: GenerationConfig) -> str:
    """Say why drafts cannot be verified over a static cache; nothing if they can."""
    others = {type(layer).__name__ for layer in cache.layers if type(layer) is not StaticLayer}
    if others:
        return (
            f"static cache layers of the kind {', '.join(sorted(others))} cannot be rolled back (leave out "
            "cache_implementation, or pass 'dynamic')"
        )
    if cache.offloading:
        return "an offloaded static cache is not supported (pass cache_implementation='static')"
    if generation_config.return_dict_in_generate and generation_config.output_attentions:
        return (
            "output_attentions=True is not supported with a static cache (leave out "
            "cache_implementation, or pass 'dynamic')"
        )
    return ""


def why_no_room(cache: StaticCache, num_tokens: int, max_nodes: int) -> str:
    """Say what a static cache lacks to hold a text, and as many candidates behind it; nothing if it can."""
    capacity, needed = cache.get_max_length(), num_tokens + max_nodes
    if capacity >= needed:
        return ""
    return (
        f"the static cache has {capacity} slots, and {needed} are needed: one for each token of prompt and "
        f"text, and {max_nodes} for a draft (pass StaticCache(config, max_cache_len={needed}), or a "
        "smaller max_new_tokens)"
    )


def enlarge(cache: StaticCache, backbone: PreTrainedModel, max_nodes: int) -> None:
    """Give an empty cache, which `generate` has made, room for a draft behind the text.

    It becomes larger always by as much: Transformers lets caches keep their size from call to call, so
    that compiled code fits the next one. In place, because Transformers keeps its cache throughout the
    call, and has allocated it already for a prefill in chunks.
    """
    cache.layers = new_cache(backbone.config, cache.get_max_length() + 1 + max_nodes).layers


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
        super().__init__(cache, int(cache.get_seq_length()))
        self.num_nodes = num_nodes
        self.start = self.num_prompt_slots - 1  # the prompt's last token is the first root
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
        self.forget_after(max(self.lengths))

    def take_back(self, num_slots: int) -> None:
        """Forget the last pass's slots."""
        self.forget_after(self.start)

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

    def forget_after(self, length: int) -> None:
        """Let the next pass write behind the first `length` slots."""
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
