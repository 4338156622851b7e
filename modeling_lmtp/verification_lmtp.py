"""Verification: one backbone pass over the root and all candidates of each row's draft tree.

The tree's nodes take consecutive cache slots, but a node of depth `a` has the position of the `a`-th token
after the root, and sees its ancestors only. So masks measure attention windows and chunks in positions.

Shapes: `B` batch, `L` known tokens, root included, `Q = 1 + N` nodes, root first, `W` cached slots before
the root's, `V` vocabulary size, `H` hidden size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad
from transformers import Cache, PreTrainedModel
from transformers.utils import ModelOutput

from .cache_lmtp import num_slots_of, visible_slots
from .drafting_lmtp import Candidates
from .rollback_lmtp import CacheSlots, slots_of
from .transformers_lmtp import (
    attention_implementation,
    cache_of,
    extend,
    mask_kinds,
    next_inputs,
)
from .tree_lmtp import DraftTree

# Runs a backbone on prepared inputs; returns its output and, if anything collects it, the heads' input
RunPass = Callable[[dict[str, Any]], tuple[ModelOutput, torch.Tensor | None]]


class Verification(NamedTuple):
    """The result of a verification pass.

    Args:
        outputs: the backbone's output for the nodes, logits `(B, Q, V)`.
        states: the leap heads' input at the nodes, `(B, Q, H)`; None if nothing collects it.
    """

    outputs: ModelOutput
    states: torch.Tensor | None


class TreeLayout(NamedTuple):
    """The depth and the view of each node, for a batch of trees that are padded to the same size."""

    depths: torch.Tensor  # (B, Q); padding has the depth of the tree's deepest node
    visible: torch.Tensor  # (B, Q, Q): which nodes each node sees


class Verifier:
    """Verifies drafts with one backbone.

    Args:
        backbone: the model.
        takes_trees: whether it verifies trees exactly, see `support_lmtp`.
        run: runs the backbone; by default, no states are collected.
    """

    def __init__(
        self, backbone: PreTrainedModel, takes_trees: bool = True, run: RunPass | None = None
    ) -> None:
        self.backbone = backbone
        self.takes_trees = takes_trees
        self.masks = TreeMasks(backbone)
        self.run = run or self._run_without_states
        self._last_layout: tuple[tuple[DraftTree, ...], TreeLayout] | None = None

    def _run_without_states(self, inputs: dict[str, Any]) -> tuple[ModelOutput, None]:
        return self.backbone(**inputs, return_dict=True), None

    def slots(self, model_kwargs: dict[str, Any], num_rows: int, num_tokens: int) -> CacheSlots:
        """Return the cache slots of a batch whose prompts, `num_tokens` long, have been run."""
        return slots_of(cache_of(model_kwargs), num_tokens)

    def verify(
        self,
        input_ids: torch.Tensor,
        candidates: Candidates,
        model_kwargs: dict[str, Any],
        num_replayed: int = 0,
    ) -> Verification:
        """Run the backbone on the roots and the candidates, which appends `Q` slots to the cache.

        Args:
            input_ids: `(B, L)`, the roots last.
            candidates: for each row.
            model_kwargs: what `generate` keeps between steps, for the `L` known tokens; not modified.
            num_replayed: how many known tokens before the roots the cache lacks; the pass includes them.

        Raises:
            ValueError: a candidate tree is no chain, and the backbone cannot verify trees.
        """
        if not (self.takes_trees or candidates.is_chain):
            paths = next(tree.paths for tree in candidates.trees if not tree.is_chain)
            raise ValueError(
                f"{type(self.backbone).__name__} cannot verify a draft tree exactly, only a chain; "
                f"the drafter proposed the paths {paths}."
            )
        model_kwargs = extend(model_kwargs, candidates.num_nodes)
        if num_replayed and model_kwargs.get("position_ids") is not None:
            positions = model_kwargs["position_ids"]
            earlier = torch.arange(-num_replayed, 0, device=positions.device) + positions[..., :1]
            model_kwargs["position_ids"] = torch.cat([earlier, positions], dim=-1)
        tokens = torch.cat([input_ids, candidates.token_ids], dim=-1)
        num_tokens = num_replayed + 1 + candidates.num_nodes
        inputs = next_inputs(self.backbone, tokens, num_tokens, model_kwargs)
        if not (candidates.is_chain and candidates.is_shared):  # else an ordinary continuation
            self._arrange(inputs, candidates, model_kwargs)
        outputs, states = self.run(inputs)
        if num_replayed == 0:
            return Verification(outputs, states)
        return Verification(
            _drop_replayed(outputs, num_replayed),
            None if states is None else states[:, num_replayed:],
        )

    def _arrange(
        self, inputs: dict[str, Any], candidates: Candidates, model_kwargs: dict[str, Any]
    ) -> None:
        """Set the nodes' positions by depth and, in a tree, a mask that shows them their ancestors only."""
        depths, visible = self.layout(candidates, inputs["input_ids"].device)
        if inputs.get("position_ids") is not None:
            known = inputs["position_ids"][..., : -candidates.num_nodes]  # up to the root
            inputs["position_ids"] = torch.cat([known[..., :-1], known[..., -1:] + depths], dim=-1)
        if not candidates.is_chain:
            cache = cache_of(model_kwargs)
            attention_mask = model_kwargs.get("attention_mask")
            inputs["attention_mask"] = self.masks(visible, depths, cache, attention_mask)

    def layout(self, candidates: Candidates, device: torch.device) -> TreeLayout:
        """Return the layout of these trees; static trees have the same one in every step."""
        if self._last_layout is None or self._last_layout[0] != candidates.trees:
            size = 1 + candidates.num_nodes
            depths = [
                tree.depths + tree.depths[-1:] * (size - 1 - tree.num_nodes)
                for tree in candidates.trees
            ]
            layout = TreeLayout(
                torch.tensor(depths, device=device),
                torch.stack([_padded_view(tree, size) for tree in candidates.trees]).to(device),
            )
            self._last_layout = candidates.trees, layout
        return self._last_layout[1]


def _padded_view(tree: DraftTree, size: int) -> torch.Tensor:
    """Return which nodes each node sees, `(size, size)`; padding sees itself, so that softmax is finite."""
    missing = size - 1 - tree.num_nodes
    visible = pad(tree.visible, (0, missing, 0, missing))
    visible.diagonal().fill_(True)
    return visible


def _drop_replayed(outputs: ModelOutput, num_replayed: int) -> ModelOutput:
    """Drop the replayed tokens, which come before the nodes, from a backbone's output."""
    outputs.logits = outputs.logits[:, num_replayed:]
    if outputs.get("hidden_states") is not None:
        outputs.hidden_states = tuple(h[:, num_replayed:] for h in outputs.hidden_states)
    if outputs.get("attentions") is not None:
        outputs.attentions = tuple(
            a if a is None else a[:, :, num_replayed:] for a in outputs.attentions
        )
    return outputs


class TreeMasks:
    """Builds attention masks in the form that one backbone takes: a tensor, or a dict by kind of layer.

    Args:
        backbone: a model with eager or sdpa attention.

    Raises:
        NotImplementedError: on use, for an unknown kind of layer.
    """

    def __init__(self, backbone: PreTrainedModel) -> None:
        self.config = backbone.config.get_text_config(decoder=True)
        self.dtype = backbone.dtype
        self.is_additive = attention_implementation(backbone.config) == "eager"
        self.backbone = backbone
        self._kinds: list[str] | None = None

    def __call__(
        self,
        visible: torch.Tensor,
        depths: torch.Tensor,
        cache: Cache,
        attention_mask: torch.Tensor | None,
    ) -> Any:
        """Return the mask, or one by kind of layer, each `(B, 1, Q, …)` over the layer's slots.

        Args:
            visible: `(B, Q, Q)`, which nodes each node sees.
            depths: `(B, Q)`.
            cache: that the trees are appended to.
            attention_mask: `(B, W + Q)`, 0 at padding, or None.
        """
        prefix = num_slots_of(cache)
        in_prefix = _prefix_mask(attention_mask, visible.shape[0], prefix, visible.device)
        full = torch.cat([in_prefix[:, None].expand(-1, visible.shape[1], -1), visible], dim=-1)
        kinds = self._layer_kinds(cache, visible.shape[0])
        masks = {
            kind: self._crop(self._restrict(full, kind, in_prefix, depths), kind, cache)
            for kind in kinds or [self._only_kind()]
        }
        return masks if kinds else next(iter(masks.values()))

    def from_slots(self, visible: torch.Tensor, cache: Cache) -> Any:
        """Return the mask, or one by kind of layer, for layers that all keep every slot.

        Args:
            visible: `(B, Q, C)`, which of the cache's slots each node sees.
            cache: has `C` slots.
        """
        kinds = self._layer_kinds(cache, visible.shape[0])
        mask = self._to_backbone(visible)
        return dict.fromkeys(kinds, mask) if kinds else mask

    def _restrict(
        self, full: torch.Tensor, kind: str, in_prefix: torch.Tensor, depths: torch.Tensor
    ) -> torch.Tensor:
        """Restrict a mask `(B, Q, W + Q)` to the window or chunk of a kind of layer.

        Args:
            full: the mask of full attention.
            kind: of the layer.
            in_prefix: `(B, W)`, false at padding.
            depths: `(B, Q)`.
        """
        if kind == "full_attention":
            return full
        prefix = in_prefix.shape[1]
        # The slot in which plain decoding would have the node
        nodes = prefix + depths
        slots = torch.arange(prefix, device=depths.device).expand(len(depths), -1)
        queries, keys = nodes[:, :, None], torch.cat([slots, nodes], dim=-1)[:, None, :]
        if kind == "sliding_attention":
            return full & (queries - keys < self.config.sliding_window)
        if kind == "chunked_attention":
            size = self.config.attention_chunk_size
            padding = (~in_prefix).cumprod(dim=-1).sum(dim=-1)[:, None, None]
            return full & ((queries - padding) // size == (keys - padding) // size)
        raise NotImplementedError(f"No tree mask is known for layers of the kind {kind!r}.")

    def _crop(self, mask: torch.Tensor, kind: str, cache: Cache) -> torch.Tensor:
        """Crop `(B, Q, W + Q)` to the slots that this kind of layer still has."""
        length = visible_slots(cache, mask.shape[1], is_sliding=kind != "full_attention")
        if length is not None:
            mask = mask[..., -length:]
        return self._to_backbone(mask)

    def _to_backbone(self, mask: torch.Tensor) -> torch.Tensor:
        if self.is_additive:
            lowest = torch.finfo(self.dtype).min
            mask = torch.zeros_like(mask, dtype=self.dtype).masked_fill(~mask, lowest)
        return mask[:, None]

    def _layer_kinds(self, cache: Cache, batch_size: int) -> list[str]:
        """Return the keys of the backbone's dict of masks; empty if it takes a single mask."""
        if self._kinds is None:
            self._kinds = mask_kinds(self.backbone, cache, batch_size)
        return self._kinds

    def _only_kind(self) -> str:
        if getattr(self.config, "sliding_window", None) is not None:
            return "sliding_attention"
        if getattr(self.config, "attention_chunk_size", None) is not None:
            return "chunked_attention"
        return "full_attention"


def _prefix_mask(
    attention_mask: torch.Tensor | None, batch_size: int, prefix: int, device: torch.device
) -> torch.Tensor:
    if attention_mask is None:
        return torch.ones((batch_size, prefix), dtype=torch.bool, device=device)
    return attention_mask[:, :prefix].bool().to(device)
