"""The backbone's pass, compiled, with the states that leap heads read among what it returns.

Transformers compiles a model's forward for decoding over a static cache. Hooks that collect states, new in
each call of `generate`, have no place in compiled code: it goes on to call the ones it was traced with.

Shapes: `B` batch, `Q` nodes, `H` hidden size, `K` states per token.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import CompileConfig, GenerationConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_lmtp import LAST
from .states_lmtp import join_states
from .transformers_lmtp import would_compile


class _Sink:
    """Where one backbone's unembedding leaves its input; one object for all passes."""

    def __init__(self) -> None:
        self.states: torch.Tensor | None = None

    def collect(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.states = args[0]


_sinks: "weakref.WeakKeyDictionary[PreTrainedModel, _Sink]" = weakref.WeakKeyDictionary()
# By configuration
_compiled: dict[str, Callable[..., tuple[ModelOutput, torch.Tensor | None]]] = {}


def _run(
    backbone: PreTrainedModel, sink: _Sink, head_input: str, inputs: dict[str, Any]
) -> tuple[ModelOutput, torch.Tensor | None]:
    if head_input != LAST:
        inputs = {**inputs, "output_hidden_states": True}
    outputs = backbone(**inputs)
    states, sink.states = sink.states, None
    if head_input != LAST and states is not None:
        states = join_states(backbone, outputs.hidden_states, states)
    return outputs, states


def compiled_pass(
    backbone: PreTrainedModel,
    head_input: str,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> "CompiledPass | None":
    """Return a compiled call of the backbone where Transformers would decode with one.

    Args:
        backbone: the model.
        head_input: what heads read, see `LMTPConfig`.
        generation_config: of this call; a prefill in chunks is told not to be compiled, hooks and all.
        model_kwargs: as `generate` prepared them, the cache among them.
    """
    if not would_compile(backbone, model_kwargs, generation_config):
        return None
    generation_config.disable_compile = True
    return CompiledPass(backbone, head_input, generation_config.compile_config or CompileConfig())


class CompiledPass:
    """A compiled call of the backbone.

    Args:
        backbone: the model.
        head_input: what heads read, see `LMTPConfig`.
        config: how to compile.
    """

    def __init__(self, backbone: PreTrainedModel, head_input: str, config: CompileConfig) -> None:
        self.backbone = backbone
        self.head_input = head_input
        settings = config.to_dict()
        if repr(settings) not in _compiled:
            _compiled[repr(settings)] = torch.compile(_run, **settings)
        self._run = _compiled[repr(settings)]
        self._sink = _sinks.setdefault(backbone, _Sink())
        self._states: list[torch.Tensor] = []

    @contextmanager
    def head_states(self) -> Iterator[list[torch.Tensor]]:
        """Collect what heads read in each call inside the block, `(B, Q, H)` or `(B, Q, K·H)`."""
        handle = self.backbone.get_output_embeddings().register_forward_pre_hook(self._sink.collect)
        try:
            yield self._states
        finally:
            handle.remove()

    def __call__(self, **inputs: Any) -> ModelOutput:
        """Run the backbone.

        Raises:
            RuntimeError: code compiled before, without the states, was run instead.
        """
        outputs, states = self._run(self.backbone, self._sink, self.head_input, inputs)
        if states is None:
            raise RuntimeError(
                f"The compiled {type(self.backbone).__name__} returned no states for the leap heads. "
                "Pass disable_compile=True."
            )
        self._states.append(states)
        if inputs.get("output_hidden_states"):  # they are kept, and a CUDA graph writes over them
            outputs.hidden_states = tuple(layer.clone() for layer in outputs.hidden_states)
        return outputs
