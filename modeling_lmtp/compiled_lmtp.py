"""A compiled backbone pass that also returns the states that leap heads read.

Transformers compiles a model's forward to decode over a static cache. `head_states` registers new hooks in
each block, and compiled code would keep calling the hooks of the block that it was traced in. So each
backbone has one collector for all compiled passes, and its states are an output of the compiled function.

Shapes: `B` batch, `Q` nodes, `H` hidden size, `K` states per token.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from transformers import CompileConfig, GenerationConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_lmtp import HEAD_INPUTS
from .states_lmtp import StateCollector
from .transformers_lmtp import would_compile

_collectors: "weakref.WeakKeyDictionary[PreTrainedModel, dict[str, StateCollector]]" = (
    weakref.WeakKeyDictionary()
)
# By configuration, so that models share a compiled function as far as torch allows
_compiled: dict[str, Callable[..., tuple[ModelOutput, torch.Tensor | None]]] = {}


def _run(
    backbone: PreTrainedModel, collector: StateCollector, inputs: dict[str, Any]
) -> tuple[ModelOutput, torch.Tensor | None]:
    # Dynamo does not guard on hooks, but on what is read here. Without this, code traced for one head_input
    # would run for another model with the other one
    assert collector.head_input in HEAD_INPUTS
    outputs = backbone(**inputs, return_dict=True)
    # Popped, because a list of another length in the next call would be compiled anew
    return outputs, collector.states.pop() if collector.states else None


def compiled_pass(
    backbone: PreTrainedModel,
    head_input: str,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> "CompiledPass | None":
    """Return a compiled pass if Transformers would decode this call with one, else None.

    Args:
        backbone: the model.
        head_input: see `LMTPConfig`.
        generation_config: of this call. Its `disable_compile` is set, because a chunked prefill would
            otherwise be compiled with the hooks of `head_states` in it.
        model_kwargs: as `generate` prepared them, with the cache.
    """
    if not would_compile(backbone, model_kwargs, generation_config):
        return None
    generation_config.disable_compile = True
    return CompiledPass(backbone, head_input, generation_config.compile_config or CompileConfig())


class CompiledPass:
    """Runs the backbone compiled, like `states_lmtp.run_pass`.

    Args:
        backbone: the model.
        head_input: see `LMTPConfig`.
        config: the arguments of `torch.compile`.
    """

    def __init__(self, backbone: PreTrainedModel, head_input: str, config: CompileConfig) -> None:
        self.backbone = backbone
        settings = config.to_dict()
        if repr(settings) not in _compiled:
            _compiled[repr(settings)] = torch.compile(_run, **settings)
        self._run = _compiled[repr(settings)]
        collectors = _collectors.setdefault(backbone, {})
        if head_input not in collectors:
            collectors[head_input] = StateCollector(head_input)
        self._collector = collectors[head_input]

    def __call__(self, inputs: dict[str, Any]) -> tuple[ModelOutput, torch.Tensor]:
        """Return the backbone's output and the heads' input, `(B, Q, H)` or `(B, Q, K·H)`.

        Raises:
            RuntimeError: code was run that had been compiled without the collector.
        """
        with self._collector.attached(self.backbone):
            outputs, states = self._run(self.backbone, self._collector, inputs)
        if states is None:
            raise RuntimeError(
                f"The compiled {type(self.backbone).__name__} returned no states for the leap heads. "
                "Pass disable_compile=True."
            )
        if outputs.get("hidden_states") is not None:  # a CUDA graph would overwrite them
            outputs.hidden_states = tuple(layer.clone() for layer in outputs.hidden_states)
        return outputs, states
