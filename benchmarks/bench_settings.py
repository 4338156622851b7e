"""What `lmtp bench` is to measure."""

from dataclasses import dataclass

from modeling_lmtp.conversion.loading import check_dtype
from modeling_lmtp.tree_lmtp import MAX_NODES

from .bench import GREEDY_MODE, MODES

SWEEPS = ("context", "output", "batch", "heads", "nodes")  # see `bench_sweeps`


@dataclass(frozen=True)
class BenchSettings:
    """What to measure.

    Args:
        batch_sizes, dtypes, modes: each with each.
        max_new_tokens: per answer.
        rounds: how often each answer is decoded in each way.
        per_kind: use so many prompts of each kind, the first ones; None is all.
        draft_nodes, lookup_tokens: see `methods_to_compare`.
        only: ways of decoding to measure beside plain decoding, by name; None is all. Sweeps over heads
            and nodes measure their own way alone.
        stop_at_end: end where the model ends.
        seed: for every call.
        sweep, at: vary one thing over some values, see `bench_sweeps`.
    """

    batch_sizes: tuple[int, ...] = (1,)
    dtypes: tuple[str, ...] = ("bfloat16",)
    modes: tuple[str, ...] = (GREEDY_MODE,)
    max_new_tokens: int = 128
    rounds: int = 3
    per_kind: int | None = None
    draft_nodes: int = 8
    lookup_tokens: int = 10
    only: tuple[str, ...] | None = None
    stop_at_end: bool = True
    seed: int = 0
    sweep: str | None = None
    at: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check the ranges, and that there is a sweep for its values."""
        for dtype in self.dtypes:
            check_dtype(dtype)
        for mode in self.modes:
            if mode not in MODES:
                raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}.")
        if self.sweep is not None and self.sweep not in SWEEPS:
            raise ValueError(f"sweep must be one of {', '.join(SWEEPS)}, got {self.sweep!r}.")
        if self.at is not None and self.sweep is None:
            raise ValueError(
                f"at={self.at} are values of a sweep, and sweep is None. Say what to sweep, one of "
                f"{', '.join(SWEEPS)}, or leave them out."
            )
        if min(self.batch_sizes) < 1:
            raise ValueError(f"A batch size must be 1 or more, got {min(self.batch_sizes)}.")
        if not 0 <= self.draft_nodes < MAX_NODES:
            raise ValueError(
                f"draft_nodes must be from 0 to {MAX_NODES - 1}, got {self.draft_nodes}."
            )
