"""Processes that share one job, as `accelerate launch` and `torchrun` start them.

The processes exchange only small Python objects; their results go to files.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

T = TypeVar("T")


class MainProcessError(RuntimeError):
    """Raised by `on_main` on the other processes when the main process failed, with its error message."""


def process_state(**options: Any) -> PartialState:
    """Return Accelerate's state of this process: its index, and the number of processes.

    Args:
        options: passed to `torch.distributed.init_process_group`; they have an effect only in the first
            call, and only with several processes.

    Raises:
        RuntimeError: several processes were launched, but Accelerate does not connect them.
    """
    num_launched = int(os.environ.get("WORLD_SIZE", "1"))
    # Without an accelerator, PartialState connects processes only with `cpu=True`
    on_cpu = not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, **(options if num_launched > 1 else {}))
    if num_launched > 1 and state.num_processes != num_launched:
        raise RuntimeError(
            f"{num_launched} processes were launched, but they are not connected: PartialState was "
            f"created for {state.num_processes} before, or Accelerate does not support several processes "
            f"on {state.device.type!r}. Launch one process."
        )
    return state


def on_main(work: Callable[[], T]) -> T:
    """Call `work` on the main process only, and return its result on every process.

    Raises:
        Exception: on the main process, the exception of `work`.
        MainProcessError: on the other processes, if `work` raised an exception.
    """
    outcome: list[Any] = [None, None]
    error: Exception | None = None
    if process_state().is_main_process:
        try:
            outcome[0] = work()
        except Exception as caught:
            error = caught
            outcome[1] = f"{type(caught).__name__}: {caught}"
    broadcast_object_list(outcome)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise MainProcessError(f"the main process failed: {outcome[1]}")
    return outcome[0]
