"""Records when the passes of a backbone start and end: one clock for all decoding methods."""

import time
from itertools import pairwise
from typing import Any

import torch
from torch import nn


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has finished its work; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class PassClock:
    """Times one call of `generate` from the end of its first pass, the prefill, to its end.

    Drafting, verification and everything else up to the start of the next pass count towards a pass.

    Args:
        backbone: the model whose passes are counted; those of an assistant are not.

    Attributes:
        starts: the start of each pass after the prefill.
        rows: the number of rows in each of them.
        nodes: the number of tokens of each row in each of them: its last known one and its candidates.
    """

    only_watches = True  # see `hooks_lmtp`: drafts need not be tried again for its hooks

    def __init__(self, backbone: nn.Module) -> None:
        self.backbone = backbone
        self.starts: list[float] = []
        self.rows: list[int] = []
        self.nodes: list[int] = []
        self._positions: list[torch.Tensor | None] = []
        self._prefilled: float | None = None
        self._ended = 0.0

    def __enter__(self) -> "PassClock":
        """Register the hooks."""
        self._handles = [
            self.backbone.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.backbone.register_forward_hook(self._end),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        """Stop the clock and remove the hooks."""
        synchronize(self.device)
        self._ended = time.perf_counter()
        for handle in self._handles:
            handle.remove()

    @property
    def device(self) -> torch.device:
        """The device of the backbone."""
        return next(self.backbone.parameters()).device

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._prefilled is not None:
            self.starts.append(time.perf_counter())
            num_rows, num_nodes = kwargs["input_ids"].shape
            self.rows.append(num_rows)
            self.nodes.append(num_nodes)
            positions = kwargs.get("position_ids")
            # Reading it here would wait for the device; a view could change before it is read
            self._positions.append(None if positions is None else positions[..., 0, 0].clone())

    def _end(self, module: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
        if self._prefilled is None:
            synchronize(self.device)
            self._prefilled = time.perf_counter()

    @property
    def passes(self) -> int:
        """The number of passes after the prefill."""
        return len(self.starts)

    @property
    def seconds(self) -> float:
        """Seconds from the end of the prefill to the end of the call."""
        assert self._prefilled is not None
        return self._ended - self._prefilled

    @property
    def step_seconds(self) -> list[float]:
        """Seconds of each pass after the prefill, with everything up to the next one."""
        ends = [*self.starts[1:], self._ended]
        return [end - start for start, end in zip(self.starts, ends, strict=True)]

    def emitted_by_passes(self, length: int) -> list[int] | None:
        """Return how many tokens each pass after the prefill emitted, for a single row.

        Each pass must begin with the last known token, as in plain decoding and the speculation of
        Transformers. None if the model gets no positions, or others than those of the tokens.

        Args:
            length: of the prompt and the new tokens.
        """
        if any(position is None for position in self._positions):
            return None
        starts = [
            int(position.flatten()[0]) for position in self._positions if position is not None
        ]
        emitted = [end - start for start, end in pairwise([*starts, length - 1])]
        return emitted if min(emitted, default=1) > 0 else None

    def seconds_after(self, passes: int) -> float:
        """Return the seconds from the end of the prefill to the end of `passes` passes."""
        assert self._prefilled is not None
        ends = [*self.starts, self._ended]
        return ends[min(passes, len(ends) - 1)] - self._prefilled
