"""Forward hooks that others have put on a model: to steer it, to adapt single rows, to watch it.

A hook sees as many tokens as a pass has, so it may do to several tokens something else than to one after
the other. What a backbone can verify is therefore known only for the hooks that it was tried with.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from .states_lmtp import StateCollector


def _hooks(hooks: Mapping[int, Any]) -> tuple[int, ...]:
    """Return the ids of hooks, without those of other threads that collect states for the heads."""
    if not hooks:  # as in nearly all modules
        return ()
    items = tuple(hooks.items())  # at once, because another thread may add and remove its own
    return tuple(
        key
        for key, hook in items
        if not isinstance(getattr(hook, "__self__", None), StateCollector)
    )


def fingerprint(model: nn.Module) -> int:
    """Return a number that changes with a model's modules, their hooks and modes, not with its weights."""
    return hash(
        tuple(
            (
                type(module),
                module.training,
                id(vars(module).get("forward")),  # Accelerate and torch.compile replace it
                _hooks(module._forward_pre_hooks),
                _hooks(module._forward_hooks),
            )
            for module in model.modules()
        )
    )


def reason_hooked(model: nn.Module) -> str | None:
    """Return why hooks rule out drafts, whatever they do when tried, or None if none does.

    Arguments that hooks pass to layers belong to the rows and tokens of one call, such as the name of each
    row's adapter, or the token from which an adapter acts.
    """
    for module in model.modules():
        with_arguments = module._forward_pre_hooks_with_kwargs
        if with_arguments and set(_hooks(module._forward_pre_hooks)) & with_arguments.keys():
            return (
                f"a forward hook passes arguments to {type(module).__name__} layers, as PEFT does for "
                "adapter_names and activated LoRA, and they are for the rows and tokens of plain decoding"
            )
    return None
