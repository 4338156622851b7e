"""Verification: one backbone pass over the root and all candidates of a draft tree.

Shapes: `B` batch, `L` known tokens, root included, `N` candidates, `V` vocabulary size.
"""

from typing import Any

import torch
from transformers import Cache, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import ModelOutput

from .tree_lmtp import DraftTree


def verify(
    backbone: PreTrainedModel,
    input_ids: torch.Tensor,
    tree: DraftTree,
    candidate_ids: torch.Tensor,
    model_kwargs: dict[str, Any],
) -> ModelOutput:
    """Run the backbone on the root and the candidates, appending `1 + N` slots to the cache.

    A chain is an ordinary continuation. In a tree each node sees the cached tokens and its own
    ancestors, and has the position of its depth.

    Args:
        backbone: the model; its cache, in `model_kwargs`, holds all known tokens but the root.
        input_ids: `(B, L)`.
        tree: the tree's structure.
        candidate_ids: `(B, N)`.
        model_kwargs: as `generate` keeps them, covering the `L` known tokens.

    Returns:
        The backbone's output; `logits[:, n]` follows node `n`: `(B, 1 + N, V)`.
    """
    model_kwargs = backbone._update_model_kwargs_for_generation(
        ModelOutput(), dict(model_kwargs), num_new_tokens=tree.num_nodes
    )
    inputs = backbone.prepare_inputs_for_generation(
        torch.cat([input_ids, candidate_ids], dim=-1),
        next_sequence_length=1 + tree.num_nodes,
        **model_kwargs,
    )
    if not tree.is_chain:
        depths = torch.tensor(tree.depths, device=input_ids.device)
        inputs["position_ids"] = inputs["position_ids"][..., :1] + depths
        inputs["attention_mask"] = tree_attention_mask(
            backbone,
            tree.visible(input_ids.device),
            inputs["position_ids"],
            model_kwargs["past_key_values"],
            model_kwargs.get("attention_mask"),
        )
    return backbone(**inputs, return_dict=True)


def tree_attention_mask(
    backbone: PreTrainedModel,
    visible: torch.Tensor,
    position_ids: torch.Tensor,
    cache: Cache,
    attention_mask: torch.Tensor | None,
) -> Any:
    """Build the mask, in whatever form the backbone's attention takes, by which nodes see ancestors.

    Args:
        backbone: the model; its own mask-building function is used if it has one.
        visible: `(1 + N, 1 + N)`, see `DraftTree.visible`.
        position_ids: `(B, 1 + N)`.
        cache: what the tree is appended to.
        attention_mask: `(B, slots + 1 + N)`, 0 at padding, or None.
    """
    prefix = cache.get_seq_length()
    batch_size, num_queries = position_ids.shape[-2], position_ids.shape[-1]

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
