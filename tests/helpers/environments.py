"""Prompts, and one comparison with plain decoding, for the tests of where models are used."""

from __future__ import annotations

from typing import Any

import torch
from architectures import tiny_causal_lm
from drafters import TREE, Oracle, sometimes

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.tree_lmtp import DraftTree

# On matrices this small, more threads only wait for each other.
torch.set_num_threads(1)

PROMPT = {"input_ids": torch.tensor([[3, 17, 5, 9, 44]]), "attention_mask": torch.ones(1, 5).long()}
BATCH = {
    "input_ids": torch.tensor([[0, 0, 0, 0, 3, 17, 5], [4, 8, 2, 6, 90, 12, 7]]),
    "attention_mask": torch.tensor([[0, 0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]),
}
NEW_TOKENS = 30


def wrapped(architecture: str = "llama", **overrides: Any) -> LMTPForCausalLM:
    backbone = tiny_causal_lm(architecture, **overrides)
    return LMTPForCausalLM.from_backbone(backbone, leap_offsets=(2, 3, 5))


def generate(model: Any, inputs: dict[str, torch.Tensor] = PROMPT, **options: Any) -> Any:
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    return model.generate(**inputs, return_dict_in_generate=True, **options)


def assert_same_texts(
    model: Any,
    inputs: dict[str, torch.Tensor] = PROMPT,
    tree: DraftTree = TREE,
    plain: torch.Tensor | None = None,
    **options: Any,
) -> list[list[int]]:
    """Compare with plain decoding, drafting with an oracle and with the heads.

    Args:
        plain: plain decoding's texts, if they are not to be made by `model`.

    Returns:
        What the oracle's drafts got accepted, per row.
    """
    if plain is None:
        plain = generate(model, inputs, **options).sequences
    drafter = Oracle(plain, tree, sometimes)
    ours = generate(model, inputs, use_lmtp=True, drafter=drafter, **options)
    assert ours.sequences.tolist() == plain.tolist()
    assert set(ours.acceptance_lengths[0]) >= {1, 2}
    with_heads = generate(model, inputs, use_lmtp=True, **options)
    assert with_heads.sequences.tolist() == plain.tolist()
    return ours.acceptance_lengths
