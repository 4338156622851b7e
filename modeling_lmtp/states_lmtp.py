"""The hidden states that leap heads read, collected while the backbone runs.

A forward pre-hook on the unembedding keeps its input, the last hidden states `h_s`. Neither the base
model's output nor the last entry of `hidden_states` is a substitute: some architectures normalise, project
or scale in between. With `head_input="weighted"`, heads also read the hidden states of all layers (arXiv
2502.09419), and a second pair of hooks, on the backbone, adds them.

Shapes: `B` batch, `L` length, `H` hidden size, `K` states per token: the embedding and each layer's output,
the last one as the unembedding reads it.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .backbone_lmtp import unembedding_device, unembedding_size
from .configuration_lmtp import LAST, WEIGHTED


def states_per_token(backbone: PreTrainedModel, head_input: str) -> int:
    """Return `K`, which is 1 for `head_input="last"`.

    Raises:
        ValueError: the layers' states and the unembedding's input differ in width.
    """
    if head_input == LAST:
        return 1
    config = backbone.config.get_text_config()
    _, hidden_size = unembedding_size(backbone)
    if config.hidden_size != hidden_size:
        raise ValueError(
            f"head_input={WEIGHTED!r} mixes the hidden states of all layers, but those of "
            f"{type(backbone).__name__} have size {config.hidden_size} and its unembedding reads size "
            f"{hidden_size}. Use head_input={LAST!r}."
        )
    return config.num_hidden_layers + 1


@contextmanager
def head_states(
    backbone: PreTrainedModel, head_input: str = LAST, num_logits: int | None = None
) -> Iterator[list[torch.Tensor]]:
    """Collect the heads' input in each forward pass of this thread inside the block.

    The pass itself returns what it returns outside the block.

    Args:
        backbone: the model.
        head_input: see `LMTPConfig`.
        num_logits: compute the logits of that many leading tokens only, for callers that need the states
            alone.

    Yields:
        A list to which each pass appends `(B, L, H)`, or `(B, L, K·H)` for `head_input="weighted"`.

    Raises:
        ValueError: during the pass, if the backbone does not return one state per layer and token.
        RuntimeError: on leaving the block, if no pass called the unembedding.
    """
    collector = StateCollector(head_input, num_logits, get_ident())
    with collector.attached(backbone):
        yield collector.states
    if not collector.has_collected:
        raise RuntimeError(
            f"{type(backbone).__name__} did not call the module that its get_output_embeddings() returns, "
            "so leap heads have no states to read. If it is compiled, it was compiled without them: "
            "compile the whole model (model.compile()), not model.backbone. A model that computes its "
            "logits in another way cannot have leap heads."
        )


class StateCollector:
    """The hooks that collect the heads' input.

    An object may be attached any number of times. Compiled code needs that: it keeps calling the hooks that
    it was traced with, so these must belong to one collector per backbone (see `compiled_lmtp`).

    Args:
        head_input: see `LMTPConfig`.
        num_logits: see `head_states`.
        thread: collect in this thread only, because others may run the same model; None for all.

    Attributes:
        states: one tensor per pass, in order.
        has_collected: whether any pass has been collected.
    """

    only_watches = True  # see `hooks_lmtp`

    def __init__(
        self, head_input: str, num_logits: int | None = None, thread: int | None = None
    ) -> None:
        self.head_input = head_input
        self.num_logits = num_logits
        self.thread = thread
        self.device = torch.device("meta")  # set when attached, because models move
        self.states: list[torch.Tensor] = []
        self.has_collected = False
        self._returns_layers: list[bool] = []  # for each pass in progress, whether its caller asked

    @contextmanager
    def attached(self, backbone: PreTrainedModel) -> Iterator[None]:
        """Collect in the passes of a model inside the block."""
        self.device = unembedding_device(backbone)  # where the heads are
        with ExitStack() as hooks:
            register = backbone.get_output_embeddings().register_forward_pre_hook
            hooks.callback(register(self._keep_input).remove)
            if self.head_input != LAST:
                before = backbone.register_forward_pre_hook(self._request_layers, with_kwargs=True)
                hooks.callback(before.remove)
                hooks.callback(backbone.register_forward_hook(self._join_layers).remove)
            yield

    def _is_other_thread(self) -> bool:
        # The thread that compiles is not the one that will run the code
        if torch.compiler.is_compiling():
            return False
        return self.thread is not None and get_ident() != self.thread

    def _keep_input(
        self, module: nn.Module, args: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...] | None:
        if self._is_other_thread():
            return None
        self.has_collected = True
        self.states.append(args[0] if self.device.type == "meta" else args[0].to(self.device))
        if self.num_logits is None:
            return None
        return (args[0][..., : self.num_logits, :], *args[1:])

    def _request_layers(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._is_other_thread():
            return None
        requested = kwargs.get("output_hidden_states")
        if requested is None:
            requested = module.config.output_hidden_states
        self._returns_layers.append(bool(requested))
        return args, {**kwargs, "output_hidden_states": True}

    def _join_layers(self, module: Any, args: tuple[Any, ...], outputs: Any) -> Any:
        """Put the other layers' states before the last one, and drop those that nobody asked for."""
        if self._is_other_thread():
            return None
        self.states[-1] = _join_states(module, outputs.hidden_states, self.states[-1])
        if self._returns_layers.pop():
            return outputs
        remaining = {name: value for name, value in outputs.items() if name != "hidden_states"}
        return type(outputs)(**remaining)


def _join_states(
    backbone: PreTrainedModel, layers: tuple[torch.Tensor, ...], last: torch.Tensor
) -> torch.Tensor:
    """Concatenate `(B, L, H)` of all layers, for the tokens that the unembedding reads.

    Args:
        backbone: the model.
        layers: its `hidden_states`, perhaps of more tokens than `last` (`logits_to_keep`).
        last: the unembedding's input, in place of the last layer's state.
    """
    length = last.shape[-2]
    others = [layer[..., -length:, :].to(last.device) for layer in layers[:-1]]
    expected = states_per_token(backbone, WEIGHTED)
    if len(others) + 1 != expected or any(layer.shape != last.shape for layer in others):
        raise ValueError(
            f"head_input={WEIGHTED!r} needs {expected} hidden states of shape {tuple(last.shape)}, but "
            f"{type(backbone).__name__} returns {[tuple(layer.shape) for layer in layers]}. Use "
            f"head_input={LAST!r}."
        )
    return torch.cat([*others, last], dim=-1)


def run_pass(
    backbone: PreTrainedModel,
    head_input: str,
    inputs: dict[str, Any],
    num_logits: int | None = None,
) -> tuple[ModelOutput, torch.Tensor]:
    """Run the backbone once; return its output and the heads' input, see `head_states`."""
    with head_states(backbone, head_input, num_logits) as states:
        outputs = backbone(**inputs, return_dict=True)
    return outputs, states[-1]
