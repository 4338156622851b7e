"""What leap heads read of each token: the state that the unembedding reads, or the states of all layers.

The later a layer of a frozen backbone, the more its states are about the next token alone. With
`head_input="weighted"` each head also reads a learned mean of all of them (*weighted hidden states*,
WHS, arXiv 2502.09419).

Shapes: `B` batch, `L` length, `H` hidden size, `K` states per token: the embedding, and each layer's
output, the last one as the unembedding reads it; `…` any leading dimensions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .backbone_lmtp import unembedding_inputs, unembedding_size
from .configuration_lmtp import LAST, WEIGHTED
from .zero_lmtp import ZeroLinear


def states_per_token(backbone: PreTrainedModel, head_input: str) -> int:
    """Return `K`, 1 for `head_input="last"`.

    Raises:
        ValueError: the layers' states are not as wide as what the unembedding reads.
    """
    if head_input == LAST:
        return 1
    config = backbone.config.get_text_config()
    _, hidden_size = unembedding_size(backbone)
    if config.hidden_size != hidden_size:
        raise ValueError(
            f"head_input={WEIGHTED!r} mixes the states of all layers, but those of "
            f"{type(backbone).__name__} have {config.hidden_size} numbers and its unembedding reads "
            f"{hidden_size}. Use head_input={LAST!r}."
        )
    return config.num_hidden_layers + 1


@contextmanager
def head_states(
    backbone: PreTrainedModel, head_input: str, num_logits: int | None = None
) -> Iterator[list[torch.Tensor]]:
    """Collect what heads read in each forward pass inside the block, `(B, L, H)` or `(B, L, K·H)`.

    The pass returns what it returns outside the block.

    Args:
        backbone: the model.
        head_input: see `LMTPConfig`.
        num_logits: see `unembedding_inputs`.

    Raises:
        ValueError: in the pass, if the backbone does not give a state per layer and token.
    """
    with unembedding_inputs(backbone, num_logits) as states:
        if head_input == LAST:
            yield states
            return
        with _all_layers(backbone, states):
            yield states


@contextmanager
def _all_layers(backbone: PreTrainedModel, states: list[torch.Tensor]) -> Iterator[None]:
    """Put the other layers' states before those that `unembedding_inputs` has collected."""
    asked: list[Any] = []  # whether the caller wants them
    own_thread = get_ident()  # others may be running the same model

    def is_other() -> bool:
        return not torch.compiler.is_compiling() and get_ident() != own_thread

    def ask(
        module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if is_other():
            return None
        wanted = kwargs.get("output_hidden_states")
        asked.append(module.config.output_hidden_states if wanted is None else wanted)
        return args, {**kwargs, "output_hidden_states": True}

    def collect(module: Any, args: tuple[Any, ...], outputs: Any) -> Any:
        if is_other():
            return None
        states[-1] = join_states(module, outputs.hidden_states, states[-1])
        if asked.pop():
            return outputs
        kept = {name: value for name, value in outputs.items() if name != "hidden_states"}
        return type(outputs)(**kept)

    handles = [
        backbone.register_forward_pre_hook(ask, with_kwargs=True),
        backbone.register_forward_hook(collect),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def join_states(
    backbone: PreTrainedModel, layers: tuple[torch.Tensor, ...], last: torch.Tensor
) -> torch.Tensor:
    """Join the layers' states of the tokens whose `last` state, `(B, L, H)`, the unembedding reads."""
    length = last.shape[-2]
    others = [layer[..., -length:, :].to(last.device) for layer in layers[:-1]]
    expected = states_per_token(backbone, WEIGHTED)
    if len(others) + 1 != expected or any(layer.shape != last.shape for layer in others):
        raise ValueError(
            f"head_input={WEIGHTED!r} needs {expected} hidden states of the shape "
            f"{tuple(last.shape)}, but {type(backbone).__name__} gives "
            f"{[tuple(layer.shape) for layer in layers]}. Use head_input={LAST!r}."
        )
    return torch.cat([*others, last], dim=-1)


class LayerMix(nn.Module):
    """`O Σ_l softmax(w)_l h_l / rms(h_l)`, what a head's first block adds to its `W h + b`.

    differs: in arXiv 2502.09419 the sum takes the place of `h`. Here the head starts as the identity,
    whatever the weights, because `O = 0`; and the unembedding goes on reading what it was trained to
    read. (One small trial, SmolLM2-135M, offset 2, 47K states: held-out cross-entropy 2.49 from `h`
    alone, 2.33 with this, 2.48 with the sum scaled by a gate and added to `h`, 2.90 in its place.)

    Args:
        hidden_size: `H`.
        num_states: `K`.
    """

    def __init__(self, hidden_size: int, num_states: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(num_states))
        self.linear = ZeroLinear(hidden_size, hidden_size, bias=False)

    def forward(self, states: torch.Tensor, at: Any = slice(None)) -> torch.Tensor:
        """Map `(…, K·H)`, or the sums at some indices of the leading dimensions, to `(…, H)`."""
        num_states, hidden_size = len(self.weights), self.linear.in_features
        if states.shape[-1] != num_states * hidden_size:
            raise ValueError(
                f"head_input={WEIGHTED!r} reads {num_states} states of {hidden_size} numbers per token, "
                f"got {states.shape[-1]} numbers. Collect them with model.head_states()."
            )
        layers = states.unflatten(-1, (num_states, hidden_size))
        dtype = torch.promote_types(states.dtype, torch.float32)
        norms = torch.linalg.vector_norm(layers, dim=-1, dtype=dtype)
        scales = hidden_size**0.5 / norms.clamp(min=1e-6)
        shares = (self.weights.to(dtype).softmax(dim=0) * scales).to(states.dtype)
        mixed = torch.einsum("...kh,...k->...h", layers, shares)
        return self.linear(mixed[at])
