"""Heads that the package does not have, to see what they would bring: wider blocks, and an attention layer.

`ablation.py` trains and evaluates them as it does others. They cannot be saved or decoded with.

Shapes: `B` batch, `L` length, `H` hidden size, `E` embedding size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

from modeling_lmtp.modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.training.objective import HeadObjective
from modeling_lmtp.unembeddings_lmtp import ZeroLinear

WIDTH = 4  # of a wide block, in hidden sizes
HEAD_SIZE = 64  # of the attention layer


class WideBlock(nn.Module):
    """`z' = z + V SiLU(W (z + others) + b)`, which starts at the identity because `V = 0`."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, WIDTH * hidden_size)
        self.down = ZeroLinear(WIDTH * hidden_size, hidden_size, bias=False)

    def forward(
        self, hidden_states: torch.Tensor, others: torch.Tensor | float = 0.0
    ) -> torch.Tensor:
        """Map `(…, H)` to `(…, H)`."""
        return hidden_states + self.down(nn.functional.silu(self.up(hidden_states + others)))


class AttentionLayer(nn.Module):
    """One causal decoder layer below all heads, as in EAGLE (arXiv 2401.15077).

    At each position it reads the backbone's states up to there and the embeddings of the tokens after them,
    and adds a vector to the state that heads read. It starts at zero.

    Args:
        embeddings: the backbone's, which stay as they are.
        hidden_size: `H`.
    """

    def __init__(self, embeddings: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.embed: Callable[[torch.Tensor], torch.Tensor] = embeddings.forward
        self.norm = nn.RMSNorm(hidden_size)
        self.join = nn.Linear(hidden_size + embeddings.weight.shape[1], hidden_size, bias=False)
        config = LlamaConfig(
            vocab_size=1,
            hidden_size=hidden_size,
            intermediate_size=8 * hidden_size // 3,
            num_hidden_layers=1,
            num_attention_heads=hidden_size // HEAD_SIZE,
            num_key_value_heads=hidden_size // HEAD_SIZE,
        )
        self.layer = LlamaModel(config)
        self.layer.set_input_embeddings(nn.Identity())  # unused, and not to be counted
        self.out = ZeroLinear(hidden_size, hidden_size, bias=False)

    def forward(self, states: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the states that heads read, `(B, L, H)`, from `(B, L, H)` and the tokens `(B, L)`."""
        following = self.embed(input_ids.roll(-1, dims=1))  # the last token's is no head's input
        joined = self.join(torch.cat([self.norm(states), following.to(states)], dim=-1))
        layer = self.layer(inputs_embeds=joined, use_cache=False).last_hidden_state
        return states + self.out(layer)


class AttentionObjective(HeadObjective):
    """The loss of heads that read what an attention layer returns."""

    def __call__(
        self,
        model: Any,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor | None,
        *others: Any,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the layer, then compute the loss, see `HeadObjective`."""
        assert input_ids is not None
        states = model.attention(hidden_states, input_ids)
        return super().__call__(model, states, input_ids, *others, **options)


def widen_blocks(model: LMTPForCausalLM) -> None:
    """Replace the blocks of all heads by wide ones."""
    for head in model.leap_heads:
        head.blocks = nn.ModuleList(WideBlock(head.hidden_size) for _ in head.blocks)


def add_attention(model: LMTPForCausalLM) -> None:
    """Put an attention layer below the heads."""
    hidden_size = model.leap_heads[0].hidden_size
    model.attention = AttentionLayer(model.backbone.get_input_embeddings(), hidden_size)


@dataclass(frozen=True)
class Trial:
    """What is changed about a model's heads, and the loss that they learn with."""

    change: Callable[[LMTPForCausalLM], None]
    objective: type[HeadObjective] = HeadObjective


TRIALS = {"wide": Trial(widen_blocks), "attention": Trial(add_attention, AttentionObjective)}
