"""Decoding over a static cache: all passes after the prefill have the same shapes.

A pass can therefore be compiled, or captured as a CUDA graph. Drafts are padded to `N` candidates, finished
rows stay in the batch, and masks span the whole cache. Rows are left-aligned, as in plain decoding. A pass
writes its nodes after the longest row, and the accepted slots are copied from there to the end of their own
row; no tensor moves:

    row 0   p p p a . . . │ r n n n      p prompt, a accepted, r root, n candidate
    row 1   p p p a a a a │ r n n n
                          W

Shapes: `B` rows of the call, `A` of them still generating, `C` slots of the cache, `Q = 1 + N` nodes of
every pass, `N` the largest number of candidates, `L` known tokens, `W` the slot of the roots.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import Cache, GenerationConfig, PreTrainedModel, StaticCache

from .cache_lmtp import new_cache
from .drafting_lmtp import Candidates
from .outputs_lmtp import EmittedTokens
from .rollback_lmtp import CacheSlots
from .transformers_lmtp import StaticLayer, cache_of, extend, next_inputs
from .tree_lmtp import DraftTree
from .verification_lmtp import RunPass, Verification, Verifier


def reason_not_static(cache: StaticCache, generation_config: GenerationConfig) -> str | None:
    """Return why drafts cannot be verified over a static cache, or None if they can."""
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
    return None


def reason_no_room(cache: StaticCache, num_tokens: int, max_nodes: int) -> str | None:
    """Return why a static cache cannot hold a text and `max_nodes` candidates, or None if it can."""
    capacity, needed = cache.get_max_length(), num_tokens + max_nodes
    if capacity >= needed:
        return None
    return (
        f"the static cache has {capacity} slots, and {needed} are needed: one for each token of prompt and "
        f"text, and {max_nodes} for a draft (pass StaticCache(config, max_cache_len={needed}), or a "
        "smaller max_new_tokens)"
    )


def enlarge(cache: StaticCache, backbone: PreTrainedModel, max_nodes: int) -> None:
    """Make room for drafts in an empty cache that `generate` has made.

    It always grows by the same number of slots: Transformers keeps the size of such caches from call to
        call,
    so that compiled code can be used again. It grows in place, because Transformers holds on to its
    cache, and has already allocated it for a chunked prefill.
    """
    cache.layers = new_cache(backbone.config, cache.get_max_length() + 1 + max_nodes).layers


class StaticSlots(CacheSlots):
    """The slots of each row's tokens in a static cache.

    Args:
        cache: holds the prompts.
        num_rows: `B`.
        attention_mask: of the prompts, `(B, L)`, 0 at padding, or None.

    Attributes:
        start: `W`.
        lengths: how many slots each of the `B` rows has used, padding included.
        active_rows: the indices of the rows that are still generating.
    """

    def __init__(
        self,
        cache: Cache,
        num_rows: int,
        attention_mask: torch.Tensor | None = None,
    ) -> None:
        super().__init__(cache, int(cache.get_seq_length()))
        self.start = self.num_prompt_slots - 1  # the prompt's last token is the first root
        self.lengths = [self.start] * num_rows
        self.active_rows = list(range(num_rows))
        device = cache.layers[0].keys.device
        self._slots = torch.arange(cache.get_max_length(), device=device)
        # True also for slots that have no token yet; `lengths` hides these
        self._is_token = torch.ones((num_rows, len(self._slots)), dtype=torch.bool, device=device)
        if attention_mask is not None:
            self._is_token[:, : attention_mask.shape[1]] = attention_mask.bool()

    def keep_paths(self, paths: Sequence[Sequence[int]], num_slots: int) -> None:
        """Copy the slots of each row's path to the end of the row, and drop the others."""
        longest = max(map(len, paths))
        sources, targets = [], []
        for row, path in zip(self.active_rows, paths, strict=True):
            # Shorter paths repeat their last copy, so that all rows make the same number
            nodes = [*path, *[path[-1]] * (longest - len(path))]
            depths = [min(depth, len(path) - 1) for depth in range(longest)]
            sources.append([self.start + node for node in nodes])
            targets.append([self.lengths[row] + depth for depth in depths])
            self.lengths[row] += len(path)
        if sources != targets:
            self._copy(sources, targets)
        self.set_length(max(self.lengths))

    def undo_pass(self, num_slots: int) -> None:
        """Drop the last pass's slots."""
        self.set_length(self.start)

    def _copy(self, sources: list[list[int]], targets: list[list[int]]) -> None:
        """Copy slots in the active rows; both arguments are `(A, longest path)`."""
        rows = [[row] * len(sources[0]) for row in self.active_rows]
        moves = torch.tensor([rows, sources, targets])
        on_device: dict[torch.device, torch.Tensor] = {}  # one transfer, not one per layer
        for layer in self.cache.layers:
            device = layer.keys.device
            if device not in on_device:
                on_device[device] = moves.to(device)
            row, source, target = on_device[device]
            for states in (layer.keys, layer.values):
                states[row, :, target] = states[row, :, source]

    def set_length(self, length: int) -> None:
        """Let the next pass write after the first `length` slots."""
        self.start = length
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(length)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keep only these of the active rows; the others stay in the passes, and are ignored."""
        self.active_rows = [self.active_rows[row] for row in rows]

    def drop_padding(self, num_slots: int) -> None:
        """Leave the slots where they are: a static cache gains nothing from dropping padding."""

    def scatter_rows(self, values: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """Scatter the `A` active rows among all `B`, with 0 in finished ones."""
        if len(self.active_rows) == len(self.lengths):
            return values
        shape = list(values.shape)
        shape[dim] = len(self.lengths)
        index = torch.tensor(self.active_rows, device=values.device)
        return values.new_zeros(shape).index_copy_(dim, index, values)

    def gather_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Select the active rows from `(B, …)`."""
        return values if len(self.active_rows) == len(self.lengths) else values[self.active_rows]

    def visible(self, visible_nodes: torch.Tensor) -> torch.Tensor:
        """Return which slots each node sees, `(B, Q, C)`, given which nodes it sees, `(B, Q, Q)`."""
        lengths = torch.tensor(self.lengths, device=self._slots.device)
        known = self._is_token & (self._slots < lengths[:, None])
        num_nodes = visible_nodes.shape[1]
        visible = known[:, None].repeat(1, num_nodes, 1)
        visible[..., self.start : self.start + num_nodes] = visible_nodes
        return visible


class StaticVerifier(Verifier):
    """Verifies drafts over a static cache; each pass has `B` rows of `Q` nodes, or of the root alone.

    Args:
        backbone: takes trees.
        max_nodes: `N`.
        run: see `Verifier`; may be compiled.
        has_one_size: whether passes without candidates are padded to `Q` nodes as well, so that a compiled
            pass has one shape.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        max_nodes: int,
        run: RunPass | None = None,
        has_one_size: bool = True,
    ) -> None:
        super().__init__(backbone, run=run)
        self.num_nodes = 1 + max_nodes
        self.has_one_size = has_one_size

    def slots(self, model_kwargs: dict[str, Any], num_rows: int, num_tokens: int) -> CacheSlots:
        """Return the slots of each row, which later passes verify in."""
        mask = model_kwargs.get("attention_mask")
        self.static_slots = StaticSlots(cache_of(model_kwargs), num_rows, mask)
        return self.static_slots

    def verify(
        self,
        input_ids: torch.Tensor,
        candidates: Candidates,
        model_kwargs: dict[str, Any],
        num_replayed: int = 0,
    ) -> Verification:
        """Run the backbone on `Q` nodes per row: the root, the candidates and padding.

        Args:
            input_ids: `(A, L)`, the roots last.
            candidates: for each row, at most `N`.
            model_kwargs: what `generate` keeps between steps; not modified.
            num_replayed: 0, because a static cache lacks no token.

        Returns:
            Output and states of the `A` rows.

        Raises:
            ValueError: there are more candidates than the drafter's `max_nodes`.
        """
        if candidates.num_nodes >= self.num_nodes:
            raise ValueError(
                f"The drafter proposed {candidates.num_nodes} candidates, but its max_nodes is "
                f"{self.num_nodes - 1}, and a pass over a static cache has room for no more."
            )
        slots = self.static_slots
        num_nodes = self.num_nodes if candidates.num_nodes or self.has_one_size else 1
        padded = self._pad(candidates, num_nodes)
        nodes = torch.cat([slots.scatter_rows(input_ids[:, -1:]), padded.token_ids], dim=-1)
        depths, visible = self.layout(padded, nodes.device)
        # A placeholder for the mask, so that Transformers does not make one
        all_kwargs = {
            **self._for_all_rows(model_kwargs, depths),
            "attention_mask": visible[:, None],
        }
        inputs = next_inputs(self.backbone, nodes, num_nodes, all_kwargs)
        inputs["attention_mask"] = self.masks.from_slots(slots.visible(visible), slots.cache)
        outputs, states = self.run(inputs)
        outputs.logits = slots.gather_rows(outputs.logits)
        if outputs.get("hidden_states") is not None:
            outputs.hidden_states = tuple(map(slots.gather_rows, outputs.hidden_states))
        return Verification(outputs, None if states is None else slots.gather_rows(states))

    def _pad(self, candidates: Candidates, num_nodes: int) -> Candidates:
        """Pad the candidates of `A` rows to `B` rows of `num_nodes` tokens, root included."""
        trees = [DraftTree()] * len(self.static_slots.lengths)
        for row, tree in zip(self.static_slots.active_rows, candidates.trees, strict=True):
            trees[row] = tree
        missing = num_nodes - 1 - candidates.num_nodes
        token_ids = self.static_slots.scatter_rows(pad(candidates.token_ids, (0, missing)))
        return Candidates(tuple(trees), token_ids)

    def _for_all_rows(self, model_kwargs: dict[str, Any], depths: torch.Tensor) -> dict[str, Any]:
        """Return what `generate` keeps between steps for all `B` rows, with a value per node `(B, Q)`."""
        scatter = self.static_slots.scatter_rows
        scattered = {}
        for name, value in model_kwargs.items():
            if name == "position_ids" and value is not None:
                scattered[name] = scatter(value, dim=-2) + depths
            elif name.endswith("token_type_ids") and value is not None:  # as the last token's
                scattered[name] = scatter(value[:, -1:]).expand(-1, depths.shape[1])
            elif torch.is_tensor(value) and value.ndim > 1:
                scattered[name] = scatter(value)
            else:
                scattered[name] = value
        return scattered


class StaticCacheRestorer:
    """Restores a static cache to what plain decoding leaves: after finished rows, an EOS token and padding.

    Args:
        backbone: the model.
        slots: of the rows.
        model_kwargs: what `generate` keeps between steps, for the prompts.
        emitted: the tokens of the call.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        slots: StaticSlots,
        model_kwargs: dict[str, Any],
        emitted: EmittedTokens,
    ) -> None:
        self.backbone = backbone
        self.slots = slots
        self.model_kwargs = dict(model_kwargs)
        self.emitted = emitted

    def save_rows(self, places: Sequence[int], rows: Sequence[int]) -> None:
        """Do nothing: finished rows stay in the cache."""

    def restore(self) -> None:
        """Run, in all rows, the tokens that the shortest row lacks."""
        num_new, shortest = len(self.emitted.steps()) - 1, min(self.slots.lengths)
        missing = self.slots.num_prompt_slots + num_new - shortest
        self.slots.set_length(shortest)
        if missing == 0:
            return
        model_kwargs = extend(self.model_kwargs, num_new)
        tokens = self.emitted.sequences()[:, :-1]
        inputs = next_inputs(self.backbone, tokens, missing, model_kwargs)
        self.backbone(**inputs, return_dict=True)
