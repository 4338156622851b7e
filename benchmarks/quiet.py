"""Checks whether the machine is quiet enough for timing."""

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .pass_clock import synchronize

SIZE = 512  # of the matrices; a product takes some milliseconds on a CPU core
REPEATS = 30
MAX_SPREAD = 1.25  # upper quartile over lower quartile
MAX_LOAD = 0.5  # load average per core before the measurement


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the lower and the upper quartile; of a single value, the value twice."""
    if len(values) == 1:
        return values[0], values[0]
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, upper


@dataclass(frozen=True)
class Quietness:
    """How busy the machine was at one moment.

    Args:
        load: the load average of the last minute, None if the system has none.
        matmul_ms: median time of a fixed product of matrices.
        matmul_spread: upper quartile of its times over the lower one.
    """

    load: float | None
    matmul_ms: float
    matmul_spread: float

    def complaints(self, is_start: bool = True) -> list[str]:
        """Return the reasons against timing now; after the start, the load is that of the measurement."""
        reasons = []
        cores = os.cpu_count() or 1
        if is_start and self.load is not None and self.load > MAX_LOAD * cores:
            reasons.append(f"the load average is {self.load:.2f} on {cores} cores")
        if self.matmul_spread > MAX_SPREAD:
            reasons.append(f"the same product takes up to {self.matmul_spread:.2f} times as long")
        return reasons


def measure_quietness(device: torch.device) -> Quietness:
    """Time a product of matrices repeatedly, and read the load average."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    matrix = torch.ones(SIZE, SIZE, device=device)
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        for _ in range(4):
            matrix @ matrix
        synchronize(device)
        times.append(time.perf_counter() - started)
    lower, upper = quartiles(times[REPEATS // 5 :])  # the first ones run before the clock speeds up
    return Quietness(
        None if load is None else round(load, 2),
        round(1e3 * statistics.median(times), 4),
        round(upper / lower, 3),
    )


def quiet_record(before: Quietness, after: Quietness) -> dict[str, Any]:
    """Return the entry of the result file on how quiet the machine was, JSON-serialisable."""
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
