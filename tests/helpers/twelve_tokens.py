"""Models of twelve tokens, whose random heads are right now and then, and a batch of two prompts."""

import torch
from architectures import tiny_causal_lm

from modeling_lmtp import LMTPForCausalLM

BATCH = torch.tensor([[0, 0, 3, 17, 5], [8, 31, 8, 31, 8]])
BATCH_MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def wrapped(architecture: str = "llama", **settings) -> LMTPForCausalLM:
    """Random heads over twelve tokens, so that they are right now and then."""
    model = LMTPForCausalLM.from_backbone(
        tiny_causal_lm(architecture, vocab_size=12), **{"leap_offsets": (2, 3, 5), **settings}
    )
    generator = torch.Generator().manual_seed(6)
    for parameter in model.leap_heads.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    return model
