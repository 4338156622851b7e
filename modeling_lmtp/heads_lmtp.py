"""Leap heads: residual blocks on the backbone's last hidden state, then an unembedding.

Shapes: `…` any leading dimensions, `H` hidden size, `V` vocabulary size, `K` hidden states per token (see
`states_lmtp`), `E` embedding size, `c` context width.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .backbone_lmtp import copy_common_rows, copy_unembedding, unembedding_device, unembedding_size
from .configuration_lmtp import WEIGHTED
from .leaps_lmtp import context_widths
from .states_lmtp import states_per_token
from .unembeddings_lmtp import HeadUnembedding, LowRankUpdate, ZeroLinear


class ResidualBlock(nn.Module):
    """`z' = z + SiLU(W z + b)` (arXiv 2505.17505, as in Medusa); the identity while `W = 0, b = 0`."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = ZeroLinear(hidden_size, hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, others: torch.Tensor | float = 0.0
    ) -> torch.Tensor:
        """Map `(…, H)` to `(…, H)`; other inputs, mapped to `(…, H)`, are added before the activation."""
        return hidden_states + nn.functional.silu(self.linear(hidden_states) + others)


class LayerMix(nn.Module):
    """`O Σ_l softmax(w)_l h_l / rms(h_l)`, which a head's first block adds to its `W h + b`.

    The later a layer of a frozen backbone, the more its states are about the next token alone. So heads
    with `head_input="weighted"` also read a learned mean of all layers (*weighted hidden states*).

    differs: in arXiv 2502.09419 the sum replaces `h`. Here the head starts as the identity, because `O =
        0`,
    and the unembedding keeps reading what it was trained to read. (One small trial, SmolLM2-135M, offset 2,
    47K states: held-out cross-entropy 2.49 from `h` alone, 2.33 with this, 2.48 with the sum scaled by a
        gate
    and added to `h`, 2.90 in its place.)

    Args:
        hidden_size: `H`.
        num_states: `K`.
    """

    def __init__(self, hidden_size: int, num_states: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(num_states))
        self.linear = ZeroLinear(hidden_size, hidden_size, bias=False)

    def forward(self, states: torch.Tensor, at: Any = slice(None)) -> torch.Tensor:
        """Map `(…, K·H)` to `(…, H)`, for the states at some indices of the leading dimensions."""
        num_states, hidden_size = len(self.weights), self.linear.in_features
        if states.shape[-1] != num_states * hidden_size:
            raise ValueError(
                f"head_input={WEIGHTED!r} reads {num_states} states of size {hidden_size} per token, but "
                f"got size {states.shape[-1]}. Collect them with model.head_states()."
            )
        layers = states.unflatten(-1, (num_states, hidden_size))
        dtype = torch.promote_types(states.dtype, torch.float32)
        norms = torch.linalg.vector_norm(layers, dim=-1, dtype=dtype)
        scales = hidden_size**0.5 / norms.clamp(min=1e-6)
        shares = (self.weights.to(dtype).softmax(dim=0) * scales).to(states.dtype)
        mixed = torch.einsum("...kh,...k->...h", layers, shares)
        return self.linear(mixed[at])


class LeapHead(nn.Module):
    """One leap head: residual blocks, and its own part of its unembedding.

    Args:
        hidden_size: `H`, the width of what the backbone's unembedding reads.
        num_layers: number of residual blocks, each with its own weights.
        num_states: `K`.
        context_size: `c·E`, the width of its embedded context (see `leaps_lmtp`); 0 for none.
        lm_head_update: a low-rank update of a shared unembedding, or None.

    Attributes:
        lm_head: the head's own unembedding, or None to share the backbone's.
    """

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        num_states: int = 1,
        context_size: int = 0,
        lm_head_update: LowRankUpdate | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.layer_mix = LayerMix(hidden_size, num_states) if num_states > 1 else None
        self.context = ZeroLinear(context_size, hidden_size, bias=False) if context_size else None
        self.blocks = nn.ModuleList(ResidualBlock(hidden_size) for _ in range(num_layers))
        self.lm_head: nn.Linear | None = None
        self.lm_head_update = lm_head_update

    def forward(
        self,
        states: torch.Tensor,
        context: torch.Tensor | None = None,
        at: Any = slice(None),
    ) -> torch.Tensor:
        """Map states and their context to the unembedding's input.

        Args:
            states: `(…, H)`, or `(…, K·H)` with the last layer's state at the end.
            context: `(…, c·E)`, for the states at `at`.
            at: indices of the states to run on; by default, all.

        Returns:
            `(…, H)`, for the states at `at`.
        """
        others: torch.Tensor | float = 0.0
        if self.layer_mix is not None:
            others = self.layer_mix(states, at)
        if self.context is not None:
            others = others + self.context(context)
        first, *later = self.blocks
        hidden_states = first(states[..., -self.hidden_size :][at], others)
        for block in later:
            hidden_states = block(hidden_states)
        return hidden_states


class LeapHeads(nn.Module):
    """The leap heads of a model, one per offset.

    Unlike a ModuleList, this module has a `forward`, so PEFT can train and save it as a whole
    (`modules_to_save=["leap_heads"]`). PEFT's wrapper forwards calls, methods and attributes, but not
    `len`, indices and iteration. So code that runs adapted models calls `heads(index, …)`.

    Args:
        heads: in the order of their offsets.
    """

    def __init__(self, heads: Iterable[LeapHead]) -> None:
        super().__init__()
        for index, head in enumerate(heads):
            self.add_module(str(index), head)

    def __len__(self) -> int:
        """Return the number of heads."""
        return len(self._modules)

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the heads."""
        return iter(self._modules.values())

    def __getitem__(self, index: int) -> Any:
        """Return one head."""
        return list(self)[index]

    def forward(self, index: int, states: torch.Tensor, *args: Any) -> torch.Tensor:
        """Run head `index`, see `LeapHead.forward`."""
        return self[index](states, *args)

    def unembeddings(self, shared: Any, scale: float = 1.0) -> list[HeadUnembedding]:
        """Return each head's unembedding, given the one that heads may share and `logit_scale`."""
        return [
            HeadUnembedding(head.lm_head or shared, head.lm_head_update, scale) for head in self
        ]

    def start_unembeddings(
        self, backbone: PreTrainedModel, token_ids: Sequence[int] | None
    ) -> None:
        """Give every head its own copy of the backbone's unembedding, or of its rows for some tokens."""
        for head in self:
            head.lm_head = copy_unembedding(backbone, token_ids)

    def resize_vocabulary(self, backbone: PreTrainedModel) -> None:
        """Resize the heads' own unembeddings to the backbone's vocabulary; they keep the rows they have."""
        for head in self:
            if head.lm_head is not None:
                trained, head.lm_head = head.lm_head, copy_unembedding(backbone)
                copy_common_rows(trained, head.lm_head)
            if head.lm_head_update is not None:
                head.lm_head_update.resize(unembedding_size(backbone)[0])


def new_leap_heads(config: Any, backbone: PreTrainedModel) -> LeapHeads:
    """Build the heads of an `LMTPConfig`, on their backbone's device and in its dtype."""
    vocab_size, hidden_size = unembedding_size(backbone)
    if config.draft_token_ids is not None:
        vocab_size = len(config.draft_token_ids)
    embedding_size = backbone.get_input_embeddings().weight.shape[1]
    num_states = states_per_token(backbone, config.head_input)

    def new_head(context_width: int) -> LeapHead:
        rank = config.lm_head_rank
        return LeapHead(
            hidden_size,
            config.num_head_layers,
            num_states,
            context_size=context_width * embedding_size,
            lm_head_update=LowRankUpdate(hidden_size, rank, vocab_size) if rank else None,
        )

    widths = context_widths(config.leap_offsets, config.head_context)
    with unembedding_device(backbone):
        heads = LeapHeads(new_head(width) for width in widths)
    return heads.to(backbone.dtype)
