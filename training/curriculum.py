"""Curricula: leap heads that join one after another, the nearest or the furthest first.

In warm-up the backbone is frozen and no two heads share a trained weight, so a head learns the same
with others or without, but for the clipping of their joint gradient: a curriculum saves the time of
the heads that have not joined, and gives them fewer steps. It is there to compare.

differs: in arXiv 2505.22757 the reverse curriculum begins with all heads and drops the furthest, which
is then of no use for drafting; here both add heads, and the reverse one begins with the furthest.
"""

from typing import Literal

Curriculum = Literal["none", "forward", "reverse"]


def active_heads(
    curriculum: Curriculum, num_heads: int, step: int, num_steps: int, share: float
) -> tuple[bool, ...]:
    """Return which heads take part in an optimizer step.

    The head that is number `i` in line (from 0) joins at step `⌊i · share · num_steps / m⌋`, so that
    all have joined before `share` of the steps are done.

    Args:
        curriculum: `"none"` (all, from the start), `"forward"` (the nearest offset first) or
            `"reverse"` (the furthest first).
        num_heads: `m`.
        step: optimizer steps done.
        num_steps: those of the whole run.
        share: of the steps, over which the heads join.
    """
    if curriculum == "none":
        return (True,) * num_heads
    joined = tuple(step >= int(i * share * num_steps / num_heads) for i in range(num_heads))
    return joined if curriculum == "forward" else joined[::-1]
