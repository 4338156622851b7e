"""Several processes that share one job, as `accelerate launch` and `torchrun` start them.

Only small Python objects travel between them; what they make goes to files.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

T = TypeVar("T")


class MainProcessFailed(RuntimeError):  # noqa: N818
    """Raised by `on_main` on the other processes when the main one failed; that one says why."""


def processes(**options: Any) -> PartialState:
    """Return which of how many processes this is: one of one unless it was launched otherwise.

    Args:
        options: for `torch.distributed.init_process_group`; they count in the first call only, and
            only where there are several processes.

    Raises:
        RuntimeError: several processes were launched, but each would take itself for the only one.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    # Without an accelerator, PartialState joins processes only if told that the CPU is meant.
    on_cpu = not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, **(options if launched > 1 else {}))
    if launched > 1 and state.num_processes != launched:
        raise RuntimeError(
            f"{launched} processes were launched, but they are not joined: PartialState was made "
            f"for {state.num_processes} before, or accelerate can't join processes on "
            f"{state.device.type!r}. Launch one process."
        )
    return state


def on_main(work: Callable[[], T]) -> T:
    """Call `work` on the main process alone and return its result on every process.

    Raises:
        Exception: on the main process, what `work` raised.
        MainProcessFailed: on the others, where `work` raised on the main process.
    """
    outcome: list[Any] = [None, None]
    error: Exception | None = None
    if processes().is_main_process:
        try:
            outcome[0] = work()
        except Exception as caught:
            error = caught
            outcome[1] = f"{type(caught).__name__}: {caught}"
    broadcast_object_list(outcome)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise MainProcessFailed(f"the main process failed: {outcome[1]}")
    return outcome[0]
