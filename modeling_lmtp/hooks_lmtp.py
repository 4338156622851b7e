"""Forward hooks that others have put on a model: to steer it, to adapt single rows, to watch it.

A hook sees as many tokens as a pass has, so it may do to several tokens something else than to one after
the other. What a backbone can verify is therefore known only for the hooks that it was tried with.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from .transformers_lmtp import hooks_of


def _identity(function: Any) -> tuple[int, str]:
    """Identify a function, or the function of a bound method: the same for each object that has it."""
    function = getattr(function, "__func__", function)
    return id(function), getattr(function, "__qualname__", "")


def _hooks(hooks: Mapping[int, Any]) -> dict[int, Any]:
    """Return hooks by key, without those that only watch, as ours do that collect states for the heads.

    Methods of an object with an attribute `only_watches` do.
    """
    if not hooks:  # as in nearly all modules
        return {}
    items = tuple(hooks.items())  # at once, because another thread may add and remove its own
    return {
        key: hook
        for key, hook in items
        if not getattr(getattr(hook, "__self__", None), "only_watches", False)
    }


def fingerprint(model: nn.Module) -> int:
    """Return a number that changes with a model's modules, their hooks and modes, not with its weights.

    A hook that is removed and added again for each call changes nothing.
    """
    return hash(
        tuple(
            (
                type(module),
                module.training,
                # Accelerate and torch.compile replace it
                _identity(vars(module).get("forward")),
                *map(_identity, _hooks(hooks_of(module).before).values()),
                None,
                *map(_identity, _hooks(hooks_of(module).after).values()),
            )
            for module in model.modules()
        )
    )


def reason_hooked(backbone: nn.Module) -> str | None:
    """Return why hooks rule out drafts, whatever they do when tried, or None if none does.

    Arguments that hooks pass to layers belong to the rows and tokens of one call, such as the name of each
    row's adapter, or the token from which an adapter acts. The backbone itself takes all arguments by
    name, so a hook on it that looks at a pass gets them too.
    """
    for module in backbone.modules():
        hooks = hooks_of(module)
        if module is not backbone and {*_hooks(hooks.before)} & {*hooks.with_arguments}:
            return (
                f"a forward hook passes arguments to {type(module).__name__} layers, as PEFT does for "
                "adapter_names and activated LoRA, and they are for the rows and tokens of plain decoding"
            )
    return None
