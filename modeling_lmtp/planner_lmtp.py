"""What a planned draft knows: how often candidates are accepted, and what verifying them costs.

Both are learned as decoding goes, and live with the model. Neither affects the text, only which candidates
are verified, see `planned_drafter_lmtp`.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Hashable
from itertools import pairwise
from time import perf_counter

# Tokens of a pass per row, root included. Few sizes, because each has a cost of its own to learn, and
# because kernels and graphs are prepared for each of them
PASS_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
# Before anything is known: what one more token per row adds to a pass, in passes of one token
PRIOR_TOKEN_COST = 0.02
PRIOR_STRENGTH = 8.0  # how many observations a drafter's own probability counts for
MEMORY = 256  # observations after which an earlier one counts for a third
TEXT_STRENGTH = 4.0  # how many observations the rates of earlier texts count for in a new one
# Candidates of one source in one text, before each further one counts for less in the rates of all texts
TEXT_OBSERVATIONS = 8.0
EDGES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.96)  # of the buckets of probabilities
MAX_RATE = 0.98
# Of the logarithms of costs before any pass: the variances of the exponent with which costs grow with the
# sizes, of a step between one token and two, and of steps between further neighbours
EXPONENT, FIRST_STEP, STEP = 0.1, 0.1, 0.01
# Of the logarithm of a pass' time: the variance of its noise, and what a pass adds to the variances of the
# sizes' costs and of the level
PASS_NOISE = 0.02
DRIFTS = (0.0, *[1e-5] * (len(PASS_SIZES) - 1), 3e-4)
# At first, this many steps are plain; then one in so many until `KNOWN_PLAIN` are known, then one in ten
# times as many
MIN_PLAIN, PLAIN_INTERVAL, KNOWN_PLAIN = 3, 48, 9
MAX_REST = 32  # steps between two drafts of heads that do not pay
# Of the time so far, what may be lost by trying sizes that no plan would choose: their costs are only
# predicted, and a pass over more tokens may take less time than one over few
TRIED_SHARE = 0.01
SURE_PASSES = 4  # of one size, before what they took is trusted
# What drafting may lose in a call: plain steps, and a share of all steps; and how many steps of what it has
# gained in earlier calls it may lose instead of the first
LOST_STEPS, LOST_SHARE, KEPT_STEPS = 2.0, 0.03, 8.0
EXPECTED_EDGES = (0.3, 1.0, 3.0)  # of the buckets of what is accepted per row without heads


class AcceptanceRates:
    """Calibrated conditional acceptance rates: how often a candidate is right if its parent is.

    Candidates are counted by their source and by the bucket of the probability that it stated. The
    stated probability counts as `PRIOR_STRENGTH` observations, so that a rate is known from the start.
    """

    def __init__(self) -> None:
        self._counts: dict[tuple[Hashable, int], list[float]] = {}  # right ones, and all

    def rate(self, source: Hashable, probability: float) -> float:
        """Return the rate of a source's candidates to which it gives this probability."""
        right, total = self._counts.get((source, bisect_right(EDGES, probability)), (0.0, 0.0))
        rate = (right + PRIOR_STRENGTH * probability) / (total + PRIOR_STRENGTH)
        return min(rate, MAX_RATE)

    def observe(
        self, source: Hashable, probability: float, is_right: bool, weight: float = 1.0
    ) -> None:
        """Count a candidate whose parent was accepted, as `weight` observations."""
        counts = self._counts.setdefault((source, bisect_right(EDGES, probability)), [0.0, 0.0])
        counts[0] += weight * (is_right - counts[0] / MEMORY)
        counts[1] += weight * (1 - counts[1] / MEMORY)


class TextRates:
    """The acceptance rates in one text, whose tokens may be easier or harder to guess than most.

    The odds that a candidate is accepted are those in all texts, times how much better its source has done
    in this text than was expected of it. At first a text counts for `TEXT_STRENGTH` right candidates and as
    many wrong ones, all as expected.

    What one text shows is not expected of the others: there, its n-th candidate of a source counts for
    `TEXT_OBSERVATIONS / n`, and for no more than 1.

    Args:
        rates: in all texts.
    """

    def __init__(self, rates: AcceptanceRates) -> None:
        self._rates = rates
        # Of each source: right and wrong candidates, and how many of each were expected
        self._counts: dict[Hashable, list[float]] = {}

    def rate(self, source: Hashable, probability: float) -> float:
        """Return the rate of a source's candidates to which it gives this probability."""
        rate = self._rates.rate(source, probability)
        if source not in self._counts:
            return rate
        right, wrong, expected_right, expected_wrong = self._counts[source]
        odds = rate / (1 - rate) * (right / expected_right) / (wrong / expected_wrong)
        return min(odds / (1 + odds), MAX_RATE)

    def observe(self, source: Hashable, probability: float, is_right: bool) -> None:
        """Count a candidate whose parent was accepted, here and in all texts."""
        rate = self._rates.rate(source, probability)
        counts = self._counts.setdefault(source, [TEXT_STRENGTH] * 4)
        for i, count in enumerate((is_right, not is_right, rate, 1 - rate)):
            counts[i] += count
        num_observed = counts[0] + counts[1] - 2 * TEXT_STRENGTH
        weight = min(1.0, TEXT_OBSERVATIONS / num_observed)
        self._rates.observe(source, probability, is_right, weight)


class PassCosts:
    """What a pass over several tokens per row costs, in passes of one token.

    The logarithm of a pass' time is the sum of a level, which drifts with the context and with what else
    the machine does, of the logarithm of its size's cost, and of noise. A Kalman filter follows them all:
    a slow pass counts against its size where the level was seen a moment ago, and against the level where
    the size is known. Neighbouring sizes are assumed to cost about alike, so that a size that was tried
    says something of those that were not.

    Args:
        num_rows: `B`, for the costs before any pass.
    """

    def __init__(self, num_rows: int = 1) -> None:
        token_cost = PRIOR_TOKEN_COST * num_rows**0.7
        # Per size, and last the level; the cost of one token is 1 by definition
        self._means = [math.log(1 + token_cost * (size - 1)) for size in PASS_SIZES] + [0.0]
        places = range(len(PASS_SIZES))
        self._covariances = [[*(_prior_covariance(i, j) for j in places), 0.0] for i in places]
        self._covariances.append([*(0.0 for _ in places), PASS_NOISE])
        self._counts = [0] * len(PASS_SIZES)

    @property
    def seconds(self) -> float | None:
        """The seconds of a pass of one token; None before the first pass."""
        return math.exp(self._means[-1]) if any(self._counts) else None

    def num_passes(self, size: int) -> int:
        """Return how many passes had this size."""
        return self._counts[_place(size)]

    def observe(self, size: int, seconds: float) -> None:
        """Record a pass over `size` tokens per row."""
        place, observed = _place(size), math.log(max(seconds, 1e-9))
        if self.seconds is None:
            self._means[-1] = observed - self._means[place]
        self._counts[place] += 1
        error = observed - self._means[place] - self._means[-1]
        # The first pass of a size may have prepared kernels for it
        if self._counts[place] > 1 or error <= 0:
            self._correct(place, error)

    def _correct(self, place: int, error: float) -> None:
        """Update the filter with how much slower a pass of one size was than expected."""
        for i, drift in enumerate(DRIFTS):
            self._covariances[i][i] += drift
        shares = [
            a + b for a, b in zip(self._covariances[place], self._covariances[-1], strict=True)
        ]
        variance = shares[place] + shares[-1] + PASS_NOISE
        # Much may slow a pass down by chance, but nothing speeds it up
        error = min(error, 2 * math.sqrt(variance))
        for i, share in enumerate(shares):
            self._means[i] += share / variance * error
            for j, other in enumerate(shares):
                self._covariances[i][j] -= share * other / variance

    def cost(self, size: int) -> float:
        """Return the cost of a pass over `size` tokens per row, 1 for one token."""
        return max(1.0, math.exp(self._means[_place(size)]))

    @property
    def largest(self) -> int:
        """The largest size to try: twice the largest that is known.

        Tokens may cost far more than was assumed, such as in batches, or in bfloat16 on a CPU without
        instructions for it.
        """
        return 2 * max((size for size in PASS_SIZES if self.num_passes(size) > 1), default=1)

    def uncertain(self, size: int) -> int | None:
        """Return the smallest size above this one that had few passes, if any.

        The first of them may have prepared kernels for it.
        """
        larger = PASS_SIZES[bisect_right(PASS_SIZES, size) :]
        return next((size for size in larger if self.num_passes(size) < SURE_PASSES), None)

    def cost_per_token(self, num_tokens: int) -> float:
        """Return the least that one more token per row costs, up to `num_tokens`."""
        sizes = [size for size in PASS_SIZES if size <= max(2, num_tokens)]
        return min(
            (self.cost(larger) - self.cost(size)) / (larger - size)
            for size, larger in pairwise(sizes)
        )


def _place(size: int) -> int:
    """Return the place in `PASS_SIZES` of the smallest size that is no smaller, or of the largest."""
    return min(bisect_left(PASS_SIZES, size), len(PASS_SIZES) - 1)


def _prior_covariance(place: int, other: int) -> float:
    """Return the covariance of the logarithms of two sizes' costs before any pass; 0 for one token."""
    if not (num_steps := min(place, other)):
        return 0.0
    grown = EXPONENT * math.log(PASS_SIZES[place]) * math.log(PASS_SIZES[other])
    return grown + FIRST_STEP + STEP * (num_steps - 1)


class HeadUse:
    """Whether drafting with heads pays; while it does not, they are asked ever more seldom."""

    def __init__(self) -> None:
        self._gain = 0.0
        self._rest = self._waited = 0

    def begin_step(self) -> bool:
        """Begin a step, and return whether heads should draft in it."""
        self._waited += 1
        return self._waited > self._rest

    def observe(self, gain: float) -> None:
        """Record a draft that is expected to improve its step by `gain` tokens, its cost subtracted."""
        self._gain += (0.1 if self._rest == 0 else 0.5) * (gain - self._gain)
        self._waited = 0
        self._rest = 0 if self._gain >= 0 else min(MAX_REST, 2 * self._rest + 1)


class Allowance:
    """The time that drafting may still lose in a call, in plain steps.

    Rates and costs are estimates, so drafts may lose time although they are expected to gain some. A call
    starts with what the last one has left, but with `LOST_STEPS` at least and `KEPT_STEPS` at most. Each of
    its steps adds `LOST_SHARE` and what drafting gained in it. Once the costs of passes are known, no call
    loses more than that, whatever was expected.
    """

    def __init__(self) -> None:
        self._steps = LOST_STEPS

    def begin_call(self) -> None:
        """Forgive what earlier calls have lost, and forget most of what they have gained."""
        self._steps = min(max(self._steps, LOST_STEPS), KEPT_STEPS)

    def covers(self, cost: float) -> bool:
        """Return whether a pass of that cost may turn out to be in vain."""
        return cost - 1 <= self._steps

    def observe(self, cost: float, num_tokens: float) -> None:
        """Record a step that took the time of `cost` plain steps and emitted `num_tokens` per row."""
        self._steps += LOST_SHARE + num_tokens - cost


class BatchMemory:
    """What is known of the steps of batches of one size.

    Args:
        num_rows: `B`.

    Attributes:
        costs: of passes.
        head_uses: whether heads pay, by how many candidates are expected to be accepted without them.
        rate: emitted tokens per plain step's time; the speed that a further candidate must not lower.
    """

    def __init__(self, num_rows: int) -> None:
        self.costs = PassCosts(num_rows)
        self.num_rows = num_rows
        self.head_uses = [HeadUse() for _ in range(1 + len(EXPECTED_EDGES))]
        self._tokens = self._cost = 0.0
        self._since_plain = 0
        self._time = self._lost = 0.0  # in plain steps, of all steps and by trying

    @property
    def rate(self) -> float:
        """The emitted tokens per plain step's time, at least those of plain decoding."""
        if self._cost == 0:
            return float(self.num_rows)
        return max(self._tokens / self._cost, float(self.num_rows))

    @property
    def must_be_plain(self) -> bool:
        """Whether too little is known of plain steps, with which all others are compared."""
        num_passes = self.costs.num_passes(1)
        interval = PLAIN_INTERVAL if num_passes < KNOWN_PLAIN else 10 * PLAIN_INTERVAL
        return num_passes < MIN_PLAIN or self._since_plain > interval

    def may_try(self, loss: float) -> bool:
        """Return whether a step may lose the time of that many plain steps to show what its size costs."""
        return self._lost + loss <= TRIED_SHARE * self._time

    def head_use(self, expected: float) -> HeadUse:
        """Return whether heads pay where that many candidates would be accepted without them."""
        return self.head_uses[bisect_right(EXPECTED_EDGES, expected / self.num_rows)]

    def observe_step(
        self,
        size: int,
        pass_seconds: float,
        draft_seconds: float,
        num_tokens: int,
        is_trial: bool = False,
    ) -> float:
        """Record a step, and return its cost in plain steps.

        Args:
            size: the tokens per row of its pass.
            pass_seconds, draft_seconds: that verifying and drafting took.
            num_tokens: that all rows emitted.
            is_trial: whether the step was to show what its size costs.
        """
        plain_seconds = self.costs.seconds
        self.costs.observe(size, pass_seconds)
        self._since_plain = 0 if size == 1 else self._since_plain + 1
        keep = 1 - 1 / 32
        cost = self.costs.cost(size) + draft_seconds / (self.costs.seconds or draft_seconds or 1)
        self._time += cost
        if is_trial and plain_seconds:
            self._lost += max(0.0, pass_seconds / plain_seconds - num_tokens / self.rate)
        self._tokens = keep * self._tokens + num_tokens
        self._cost = keep * self._cost + cost
        return cost


class DraftPlanner:
    """What drafting has learned on one model.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self.clock = clock
        self.rates = AcceptanceRates()
        self.allowance = Allowance()
        self._batches: dict[Hashable, BatchMemory] = {}

    def batch(self, num_rows: int, conditions: Hashable = None) -> BatchMemory:
        """Return what is known of batches of that many rows under the same conditions."""
        key = (num_rows, conditions)
        if key not in self._batches:
            self._batches[key] = BatchMemory(num_rows)
        return self._batches[key]
