"""Attention masks of draft trees, for every kind of layer that measures its view in tokens.

A node of depth `a` stands where plain decoding would have it: in the slot `a` after the root's,
whatever slot the tree gives it. Windows and chunks are measured from there.

Shapes: `B` batch, `Q = 1 + N` nodes, root first, `W` cached slots before the root's.
"""

from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from .cache_lmtp import num_slots_of, visible_slots
from .transformers_lmtp import attention_implementation, mask_kinds


class TreeMasks:
    """Builds masks in the form that one backbone takes: a tensor, or a dict of them by layer kind.

    Args:
        backbone: a model with eager or sdpa attention.

    Raises:
        NotImplementedError: on use, for a kind of layer that is not known.
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
        """Return the mask, or the masks by layer kind, each `(B, 1, Q, …)` over the layer's slots.

        Args:
            visible: `(B, Q, Q)`, which nodes each node sees, see `DraftTree.visible`.
            depths: `(B, Q)`.
            cache: what the trees are appended to.
            attention_mask: `(B, W + Q)`, 0 at padding, or None.
        """
        prefix = num_slots_of(cache)
        in_prefix = _prefix_mask(attention_mask, visible.shape[0], prefix, visible.device)
        sees = torch.cat([in_prefix[:, None].expand(-1, visible.shape[1], -1), visible], dim=-1)
        kinds = self._layer_kinds(cache, visible.shape[0])
        masks = {
            kind: self._finish(self._cut(sees, kind, in_prefix, depths), kind, cache)
            for kind in kinds or [self._only_kind()]
        }
        return masks if kinds else next(iter(masks.values()))

    def over_all_slots(self, sees: torch.Tensor, cache: Cache) -> Any:
        """Return the same, where every layer keeps all slots, and says nothing of what it sees.

        Args:
            sees: `(B, Q, C)`, which of the cache's slots each node sees.
            cache: has `C` slots.
        """
        kinds = self._layer_kinds(cache, sees.shape[0])
        mask = self._in_form(sees)
        return dict.fromkeys(kinds, mask) if kinds else mask

    def _cut(
        self, sees: torch.Tensor, kind: str, in_prefix: torch.Tensor, depths: torch.Tensor
    ) -> torch.Tensor:
        """Take out of `(B, Q, W + Q)` what a layer of this kind cannot see at all.

        Args:
            sees: what a layer sees that sees everything.
            kind: of the layer.
            in_prefix: `(B, W)`, false at padding.
            depths: `(B, Q)`.
        """
        if kind == "full_attention":
            return sees
        prefix = in_prefix.shape[1]
        places = prefix + depths
        slots = torch.arange(prefix, device=depths.device).expand(len(depths), -1)
        queries, keys = places[:, :, None], torch.cat([slots, places], dim=-1)[:, None, :]
        if kind == "sliding_attention":
            return sees & (queries - keys < self.config.sliding_window)
        if kind == "chunked_attention":
            size = self.config.attention_chunk_size
            padding = (~in_prefix).cumprod(dim=-1).sum(dim=-1)[:, None, None]
            return sees & ((queries - padding) // size == (keys - padding) // size)
        raise NotImplementedError(f"No tree mask is known for layers of the kind {kind!r}.")

    def _finish(self, mask: torch.Tensor, kind: str, cache: Cache) -> torch.Tensor:
        """Cut `(B, Q, W + Q)` to the slots that such a layer still has, in the backbone's form."""
        length = visible_slots(cache, mask.shape[1], is_sliding=kind != "full_attention")
        if length is not None:
            mask = mask[..., -length:]
        return self._in_form(mask)

    def _in_form(self, mask: torch.Tensor) -> torch.Tensor:
        if self.is_additive:
            lowest = torch.finfo(self.dtype).min
            mask = torch.zeros_like(mask, dtype=self.dtype).masked_fill(~mask, lowest)
        return mask[:, None]

    def _layer_kinds(self, cache: Cache, batch_size: int) -> list[str]:
        """The kinds of layer by which the backbone wants a dict of masks; none if it wants one mask."""
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
