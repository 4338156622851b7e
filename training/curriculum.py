"""Curricula, which add leap heads to training one by one, the nearest or the furthest first.

In warm-up the backbone is frozen and the heads share no trained weight, so apart from gradient clipping a
head learns the same with or without the others. A curriculum therefore saves the time of the heads not
yet added, at the price of fewer steps for them. It exists for comparison.

differs: the reverse curriculum of arXiv 2505.22757 starts with all heads and drops the furthest, which is
then useless for drafting. Here both curricula add heads, and the reverse one starts with the furthest.
"""

from typing import Literal

Curriculum = Literal["none", "forward", "reverse"]


def active_heads(
    curriculum: Curriculum, num_heads: int, step: int, num_steps: int, share: float
) -> tuple[bool, ...]:
    """Return for each head whether it trains in an optimizer step.

    Head `i` of the curriculum's order (from 0) starts at step `⌊i · share · num_steps / m⌋`, so all
    heads train before `share` of the steps are done.

    Args:
        curriculum: `"none"` (all heads from the start), `"forward"` (the nearest offset first) or
            `"reverse"` (the furthest first).
        num_heads: `m`.
        step: number of optimizer steps done.
        num_steps: number of optimizer steps of the run.
        share: share of the steps over which heads are added.
    """
    if curriculum == "none":
        return (True,) * num_heads
    active = tuple(step >= int(i * share * num_steps / num_heads) for i in range(num_heads))
    return active if curriculum == "forward" else active[::-1]
