"""Leap heads written out by their formulas: one state, one token and one matrix at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import rms_norm, silu

from modeling_lmtp import LMTPForCausalLM


def states_of(model: LMTPForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """The states `(B, L, H)` that the unembedding reads, for Llama's like."""
    return model.backbone.model(tokens).last_hidden_state


def layers_of(model: LMTPForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """All layers' states `(B, L, K, H)`, for Llama's like."""
    return torch.stack(model.backbone.model(tokens, output_hidden_states=True).hidden_states, dim=2)


def naive_logits(
    model: LMTPForCausalLM, index: int, state: torch.Tensor, following: Sequence[int] = ()
) -> torch.Tensor:
    """What a head holds of its target: `z' = z + SiLU(W z + b + Σ_g U_g e(x_{s+g}))`, unembedded.

    Args:
        model: has a backbone with a bias-free unembedding.
        index: the head's.
        state: `(H,)`, or `(K, H)` for `head_input="weighted"`.
        following: the tokens after the state that the head sees, in order.
    """
    head = model.leap_heads[index]
    layers = state.reshape(-1, state.shape[-1])
    z, context = layers[-1], torch.zeros_like(layers[-1])
    if head.layer_mix is not None:
        shares = head.layer_mix.weights.exp() / head.layer_mix.weights.exp().sum()
        for share, layer in zip(shares, layers, strict=True):
            size = layer.square().mean().sqrt().clamp(min=1e-6)  # a padding token's is 0
            context = context + share * (head.layer_mix.linear.weight @ layer / size)
    if head.context is not None:
        matrices = head.context.weight.split(model.get_input_embeddings().weight.shape[1], dim=1)
        for matrix, token in zip(matrices, following, strict=False):
            embedded = model.get_input_embeddings().weight[token]
            context = context + matrix @ rms_norm(embedded, embedded.shape, eps=1e-6)
    for block in head.blocks:
        z = z + silu(block.linear.weight @ z + block.linear.bias + context)
        context = torch.zeros_like(context)  # the first block alone sees it
    if head.lm_head is not None:
        return head.lm_head.weight @ z
    logits = model.get_output_embeddings().weight @ z
    if model.config.draft_token_ids is not None:
        logits = logits[list(model.config.draft_token_ids)]
    if head.lm_head_update is None:
        return logits
    return logits + head.lm_head_update.up.weight @ (head.lm_head_update.down.weight @ z)
