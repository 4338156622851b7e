"""A clock that counts backbone passes, for drafts that are planned alike on every machine."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any


class PassCount:
    """Returns the passes so far as seconds."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def counting(self, verify: Callable[..., Any]) -> Callable[..., Any]:
        """Return a pass that takes a second."""

        @wraps(verify)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.seconds += 1.0
            return verify(*args, **kwargs)

        return timed
