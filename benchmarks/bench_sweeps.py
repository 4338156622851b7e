"""What `lmtp bench --sweep` varies: one thing at a time, everything else as it is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, cycle, islice

from modeling_lmtp.leaps_lmtp import drafts
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.settings_lmtp import STRICT
from modeling_lmtp.tree_lmtp import MAX_NODES

from .bench_methods import Method
from .bench_settings import BenchSettings

Prompts = Mapping[str, Sequence[list[int]]]
LONG_PROMPTS = 2  # per length


@dataclass(frozen=True)
class Point:
    """One value of what is swept, and what is measured there.

    Args:
        at: the value, None without a sweep.
        methods: ways of decoding, plain decoding first.
        prompts: token ids by kind.
        settings: of the measurement.
    """

    at: int | None
    methods: Sequence[Method]
    prompts: Prompts
    settings: BenchSettings


def _context(point: Point, at: int) -> Point:
    """Prompts of that many tokens: the given ones, one after the other, again and again."""
    tokens = list(chain.from_iterable(chain.from_iterable(point.prompts.values())))
    starts = [number * len(tokens) // LONG_PROMPTS for number in range(LONG_PROMPTS)]
    long = [list(islice(cycle(tokens[start:] + tokens[:start]), at)) for start in starts]
    settings = replace(point.settings, stop_at_end=False)
    return replace(point, prompts={"long": long}, settings=settings)


def _output(point: Point, at: int) -> Point:
    """Answers of that many tokens, past any end."""
    return replace(point, settings=replace(point.settings, max_new_tokens=at, stop_at_end=False))


def _batch(point: Point, at: int) -> Point:
    return replace(point, settings=replace(point.settings, batch_sizes=(at,)))


def _heads(point: Point, at: int) -> Point:
    """The top-1 chain of that many candidates: as many heads as it takes."""
    model = point.methods[0].model
    if at > _horizon(model):
        raise ValueError(f"These heads draft {_horizon(model)} tokens, and not {at}.")
    method = Method("chain", model, {"use_lmtp": STRICT, "draft_length": at})
    return replace(point, methods=[point.methods[0], method])


def _nodes(point: Point, at: int) -> Point:
    model = point.methods[0].model
    if at >= MAX_NODES:
        raise ValueError(f"At most {MAX_NODES - 1} candidates are verified at once, and not {at}.")
    method = Method("dynamic tree", model, {"use_lmtp": STRICT, "draft_nodes": at})
    return replace(point, methods=[point.methods[0], method])


POINTS: dict[str, tuple[Callable[[Point, int], Point], tuple[int, ...]]] = {
    "context": (_context, (128, 512, 2048, 8000)),
    "output": (_output, (128, 512, 2048)),
    "batch": (_batch, (1, 2, 4, 8)),
    "heads": (_heads, (1, 2, 3, 4, 5, 6)),
    "nodes": (_nodes, (1, 2, 4, 8, 16, 32, 63)),
}


def points(start: Point, sweep: str | None, values: Sequence[int] | None = None) -> list[Point]:
    """Return what is measured: the starting point itself, or one point per value.

    Args:
        start: what does not vary.
        sweep: one of `SWEEPS`, or None.
        values: in place of the sweep's own; without them, chains stop where the heads do.

    Raises:
        ValueError: a value is out of range.
    """
    if sweep is None:
        return [start]
    make, usual = POINTS[sweep]
    if values is None and sweep == "heads":
        usual = usual[: _horizon(start.methods[0].model)]
    values = values or usual
    lowest = 2 if sweep == "output" else 1  # the first new token is the prefill's
    if min(values) < lowest:
        raise ValueError(f"at must be {lowest} or more for the sweep {sweep!r}, got {min(values)}.")
    return [replace(make(start, at), at=at) for at in values]


def _horizon(model: LMTPForCausalLM) -> int:
    return len(drafts(model.config.leap_offsets))
