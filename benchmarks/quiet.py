"""Is the machine quiet enough to time anything?"""

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .pass_clock import synchronize

SIZE = 512  # of the matrices: some milliseconds on a CPU core
REPEATS = 30
MAX_SPREAD = 1.25  # the upper quartile over the lower one
MAX_LOAD = 0.5  # waiting processes per core, before anything has begun


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the lower and the upper quartile, the value itself where there is only one."""
    if len(values) == 1:
        return values[0], values[0]
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, upper


@dataclass(frozen=True)
class Quietness:
    """How busy the machine was at one moment.

    Args:
        load: the load average of the last minute, None where the system keeps none.
        matmul_ms: a fixed product of matrices, the median.
        matmul_spread: the upper quartile of its times over the lower one.
    """

    load: float | None
    matmul_ms: float
    matmul_spread: float

    def complaints(self, is_start: bool = True) -> list[str]:
        """Say what speaks against timing now; the load only counts before own work began."""
        found = []
        cores = os.cpu_count() or 1
        if is_start and self.load is not None and self.load > MAX_LOAD * cores:
            found.append(f"the load average is {self.load:.2f} on {cores} cores")
        if self.matmul_spread > MAX_SPREAD:
            found.append(f"the same product takes up to {self.matmul_spread:.2f} times as long")
        return found


def measure_quietness(device: torch.device) -> Quietness:
    """Time a product of matrices over and over, and ask for the load."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    matrix = torch.ones(SIZE, SIZE, device=device)
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        for _ in range(4):
            matrix @ matrix
        synchronize(device)
        times.append(time.perf_counter() - started)
    lower, upper = quartiles(times[REPEATS // 5 :])  # the first ones wake the processor
    return Quietness(
        None if load is None else round(load, 2),
        round(1e3 * statistics.median(times), 4),
        round(upper / lower, 3),
    )


def quiet_record(before: Quietness, after: Quietness) -> dict[str, Any]:
    """Return what the result file says of the machine, JSON-serialisable."""
    slower = after.matmul_ms / before.matmul_ms
    complaints = [f"before: {text}" for text in before.complaints()]
    complaints += [f"after: {text}" for text in after.complaints(is_start=False)]
    if not 1 / MAX_SPREAD <= slower <= MAX_SPREAD:
        complaints.append(f"after the run the same product takes {slower:.2f} times as long")
    return {
        "quiet": not complaints,
        "complaints": complaints,
        "load": [before.load, after.load],
        "matmul_ms": [before.matmul_ms, after.matmul_ms],
        "matmul_spread": [before.matmul_spread, after.matmul_spread],
    }
