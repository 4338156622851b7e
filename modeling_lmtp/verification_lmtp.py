"""Verification: one backbone pass over the root and all candidates of a draft tree.

Shapes: `B` batch, `L` known tokens, root included, `N` candidates, `V` vocabulary size.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad
from transformers import Cache, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import ModelOutput

from .tree_lmtp import DraftTree


class _TreeInputs(NamedTuple):
    """What depends on the tree alone: the depths `(1 + N,)` and the masks among its own nodes."""

    depths: torch.Tensor
    masks: Any  # a tensor or a dict of them; None if the form of mask cannot be kept


@dataclass
class Verifier:
    """Verifies drafts with one backbone; keeps what a tree needs from one step to the next.

    Args:
        backbone: the model.
        takes_trees: whether it verifies trees exactly, see `support_lmtp`.
    """

    backbone: PreTrainedModel
    takes_trees: bool = True
    _trees: dict[DraftTree, _TreeInputs] = field(default_factory=dict)

    def verify(
        self,
        input_ids: torch.Tensor,
        tree: DraftTree,
        candidate_ids: torch.Tensor,
        model_kwargs: dict[str, Any],
    ) -> ModelOutput:
        """Run the backbone on the root and the candidates, appending `1 + N` slots to the cache.

        A chain is an ordinary continuation. In a tree each node sees the cached tokens and its own
        ancestors, and has the position of its depth.

        Args:
            input_ids: `(B, L)`; the cache, in `model_kwargs`, holds all of them but the root.
            tree: the tree's structure.
            candidate_ids: `(B, N)`.
            model_kwargs: as `generate` keeps them, covering the `L` known tokens.

        Returns:
            The backbone's output; `logits[:, n]` follows node `n`: `(B, 1 + N, V)`.

        Raises:
            ValueError: a tree that is not a chain, for a backbone that does not take trees.
        """
        if not (self.takes_trees or tree.is_chain):
            raise ValueError(
                f"{type(self.backbone).__name__} cannot verify a draft tree exactly, only a chain; "
                f"the drafter proposed the paths {tree.paths}."
            )
        model_kwargs = self.backbone._update_model_kwargs_for_generation(
            ModelOutput(), dict(model_kwargs), num_new_tokens=tree.num_nodes
        )
        inputs = self.backbone.prepare_inputs_for_generation(
            torch.cat([input_ids, candidate_ids], dim=-1),
            next_sequence_length=1 + tree.num_nodes,
            **model_kwargs,
        )
        if not tree.is_chain:
            self._arrange_as_tree(inputs, tree, model_kwargs)
        return self.backbone(**inputs, return_dict=True)

    def _arrange_as_tree(
        self, inputs: dict[str, Any], tree: DraftTree, model_kwargs: dict[str, Any]
    ) -> None:
        """Give the nodes the positions of their depths, and show them their ancestors only."""
        cache, attention_mask = model_kwargs["past_key_values"], model_kwargs.get("attention_mask")
        if tree not in self._trees:
            depths = torch.tensor(tree.depths, device=inputs["position_ids"].device)
            self._trees[tree] = _TreeInputs(depths, None)
        depths, own_masks = self._trees[tree]
        inputs["position_ids"] = inputs["position_ids"][..., :1] + depths
        if own_masks is not None and attention_mask is None:
            inputs["attention_mask"] = _after_prefix(own_masks, cache.get_seq_length())
            return
        masks = tree_attention_mask(
            self.backbone, tree, inputs["position_ids"], cache, attention_mask
        )
        inputs["attention_mask"] = masks
        self._trees[tree] = _TreeInputs(depths, _among_nodes(masks, 1 + tree.num_nodes))


def _among_nodes(masks: Any, num_nodes: int) -> Any:
    """Cut masks `(…, slots + 1 + N)` to the tree's own slots; None for other forms of mask."""
    if isinstance(masks, dict):
        cut = {name: _among_nodes(mask, num_nodes) for name, mask in masks.items()}
        return None if any(mask is None for mask in cut.values()) else cut
    return masks[..., -num_nodes:] if isinstance(masks, torch.Tensor) else None


def _after_prefix(masks: dict[str, torch.Tensor] | torch.Tensor, prefix: int) -> Any:
    """Put `prefix` slots that every node sees before masks among the nodes.

    It spares a tree that is verified again the building of its mask. `True` is visible in a boolean
    mask, 0 in one that is added to the scores.
    """
    if isinstance(masks, dict):
        return {name: _after_prefix(mask, prefix) for name, mask in masks.items()}
    return pad(masks, (prefix, 0), value=1 if masks.dtype is torch.bool else 0)


def tree_attention_mask(
    backbone: PreTrainedModel,
    tree: DraftTree,
    position_ids: torch.Tensor,
    cache: Cache,
    attention_mask: torch.Tensor | None,
) -> Any:
    """Build the mask by which nodes see ancestors, in whatever form the backbone's attention takes.

    Args:
        backbone: the model; its own mask-building function is used if it has one.
        tree: the tree's structure.
        position_ids: `(B, 1 + N)`.
        cache: what the tree is appended to.
        attention_mask: `(B, slots + 1 + N)`, 0 at padding, or None.

    Returns:
        One mask, or a dict of masks by layer type; with sdpa and eager attention each is
        `(B, 1, 1 + N, slots + 1 + N)`.
    """
    prefix = cache.get_seq_length()
    batch_size, num_queries = position_ids.shape[-2], position_ids.shape[-1]
    visible = tree.visible(position_ids.device)

    def in_prefix_or_ancestor(
        batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        in_tree = visible[query - prefix, (key - prefix).clamp(min=0)]
        return (key < prefix) | in_tree

    create_masks = getattr(backbone, "create_masks_for_generate", create_masks_for_generate)
    return create_masks(
        config=backbone.config,
        inputs_embeds=torch.empty(
            (batch_size, num_queries, 0), dtype=backbone.dtype, device=position_ids.device
        ),
        attention_mask=attention_mask,
        past_key_values=cache,
        position_ids=position_ids,
        and_mask_function=in_prefix_or_ancestor,
    )
