"""Turns the figures of an analysis into advice on the schedule of leaps to use."""

from collections.abc import Mapping
from math import hypot

from modeling_lmtp.leaps_lmtp import evenly_spaced_offsets

from .analysis import CHAIN, HeadAnalysis
from .attenuation import (
    Attenuation,
    expected_tokens_per_step,
    leap_break_even,
)
from .resampling import Estimate

NUM_HEADS = 3  # the paper's number, for a backbone without heads
CERTAIN = 2.0  # a difference of so many standard errors counts


def advise(heads: Mapping[str, HeadAnalysis], model: tuple[Attenuation, Attenuation] | None) -> str:
    """Write the advice.

    Args:
        heads: the analyses of the checkpoints, by name; may be empty.
        model: the attenuation of the model itself, by probability and by top-1 accuracy, if it was
            measured.

    Returns:
        One paragraph; empty if nothing was measured.
    """
    sentences = []
    num_heads = NUM_HEADS
    if heads:
        best = max(heads, key=lambda name: most_tokens_per_step(heads[name])[1].value)
        num_heads = len(heads[best].leap_offsets)
        sentences += _ranking(heads, best)
        sentences.append(_of_heads(best, heads[best], num_heads))
    if model is not None:
        sentences.append(_of_model(model, num_heads))
    return " ".join(sentences)


def most_tokens_per_step(analysis: HeadAnalysis) -> tuple[str, Estimate]:
    """Return the draft with the most tokens per step, and their number."""
    return max(analysis.tokens_per_step.items(), key=lambda item: item[1].value)


def leap_verdict(probability: Attenuation, top1: Attenuation, num_heads: int) -> str:
    """Return `pays`, `does not pay` or `is undecided`: whether leap 2 pays by both fits of γ."""
    limit = leap_break_even(num_heads)
    sides = {_side(fit, limit) for fit in (probability, top1)}
    if sides == {-1}:
        return "pays"
    return "does not pay" if sides == {1} else "is undecided"


def _side(fit: Attenuation, limit: float) -> int:
    """Return -1 or 1 for γ below or above a limit, 0 if the standard error leaves it open."""
    distance = fit.gamma - limit
    if abs(distance) <= CERTAIN * (fit.standard_error or 0.0):
        return 0
    return 1 if distance > 0 else -1


def _ranking(heads: Mapping[str, HeadAnalysis], best: str) -> list[str]:
    draft, most = most_tokens_per_step(heads[best])
    sentences = [
        f"{best} is predicted to emit the most: {most} tokens per step with {_named(draft)}, "
        f"{heads[best].tokens_per_step[CHAIN]} with the chain (plain decoding: 1)."
    ]
    others = {
        name: most_tokens_per_step(analysis)[1] for name, analysis in heads.items() if name != best
    }
    if others:
        second = max(others, key=lambda name: others[name].value)
        error = hypot(most.standard_error or 0.0, others[second].standard_error or 0.0)
        apart = most.value - others[second].value > CERTAIN * error
        verdict = "clearly fewer" if apart else "too close to call on these answers"
        sentences.append(f"Next is {second} with {others[second]}, {verdict}.")
    return sentences


def _of_heads(name: str, analysis: HeadAnalysis, num_heads: int) -> str:
    gammas = _gammas(analysis.attenuation, analysis.top1_attenuation)
    verdict = leap_verdict(analysis.attenuation, analysis.top1_attenuation, num_heads)
    leap = _of_leap(verdict, analysis.top1_attenuation.gamma, num_heads)
    return f"The certainty of {name}'s heads falls with {gammas}; {leap}."


def _of_model(model: tuple[Attenuation, Attenuation], num_heads: int) -> str:
    leap = _of_leap(leap_verdict(*model, num_heads), model[1].gamma, num_heads)
    return (
        f"The certainty of the model itself, by numerical marginalization, falls with {_gammas(*model)}: "
        f"for heads of the paper's kind that knew as much, {leap}."
    )


def _gammas(probability: Attenuation, top1: Attenuation) -> str:
    by_probability = Estimate(probability.gamma, probability.standard_error)
    by_top1 = Estimate(top1.gamma, top1.standard_error)
    return f"γ = {by_probability} per position (by top-1 accuracy {by_top1})"


def _of_leap(verdict: str, gamma: float, num_heads: int) -> str:
    limit = leap_break_even(num_heads)
    near = expected_tokens_per_step(evenly_spaced_offsets(num_heads, 1), gamma)
    far = expected_tokens_per_step(evenly_spaced_offsets(num_heads, 2), gamma)
    subject = "whether leap 2 pays" if verdict == "is undecided" else "leap 2"
    return (
        f"{subject} {verdict} (break-even with {num_heads} heads: γ = {limit:.3f}; by the top-1 curve "
        f"leap 1 would emit {near:.2f} tokens per step and leap 2 {far:.2f})"
    )


def _named(draft: str) -> str:
    return "the chain" if draft == CHAIN else f"a tree of {draft} candidates"
