"""Which schedule a model should use, in words, from the figures of an analysis."""

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

NUM_HEADS = 3  # of the paper, for a backbone that has no heads yet
CERTAIN = 2.0  # standard errors apart, to call one thing better than another


def advise(heads: Mapping[str, HeadAnalysis], model: tuple[Attenuation, Attenuation] | None) -> str:
    """Write the advice.

    Args:
        heads: the checkpoints' analyses by name; may be empty.
        model: what the model itself knows further ahead, by probability and by top-1 accuracy, if
            it was measured.

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
    """Return the draft that emits most per step, and what it emits."""
    return max(analysis.tokens_per_step.items(), key=lambda item: item[1].value)


def leap_verdict(probability: Attenuation, top1: Attenuation, num_heads: int) -> str:
    """Say whether leap 2 pays by both fits of γ: `pays`, `does not pay` or `cannot be told`."""
    limit = leap_break_even(num_heads)
    sides = {_side(fit, limit) for fit in (probability, top1)}
    if sides == {-1}:
        return "pays"
    return "does not pay" if sides == {1} else "cannot be told"


def _side(fit: Attenuation, limit: float) -> int:
    """On which side of a limit γ lies; 0 where the error leaves it open."""
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
        verdict = "clearly behind" if apart else "too close to tell apart on these answers"
        sentences.append(f"Next is {second} with {others[second]}, {verdict}.")
    return sentences


def _of_heads(name: str, analysis: HeadAnalysis, num_heads: int) -> str:
    faded = _gammas(analysis.attenuation, analysis.top1_attenuation)
    verdict = leap_verdict(analysis.attenuation, analysis.top1_attenuation, num_heads)
    leap = _of_leap(verdict, analysis.top1_attenuation.gamma, num_heads)
    return f"In {name}'s heads certainty fades by {faded}; {leap}."


def _of_model(model: tuple[Attenuation, Attenuation], num_heads: int) -> str:
    leap = _of_leap(leap_verdict(*model, num_heads), model[1].gamma, num_heads)
    return (
        f"In the model itself, by numerical marginalization, it fades by {_gammas(*model)}: with heads "
        f"of the paper's kind that knew as much, {leap}."
    )


def _gammas(probability: Attenuation, top1: Attenuation) -> str:
    by_probability = Estimate(probability.gamma, probability.standard_error)
    by_top1 = Estimate(top1.gamma, top1.standard_error)
    return f"γ = {by_probability} per position (by top-1 accuracy {by_top1})"


def _of_leap(verdict: str, gamma: float, num_heads: int) -> str:
    limit = leap_break_even(num_heads)
    near = expected_tokens_per_step(evenly_spaced_offsets(num_heads, 1), gamma)
    far = expected_tokens_per_step(evenly_spaced_offsets(num_heads, 2), gamma)
    subject = "whether leap 2 pays" if verdict == "cannot be told" else "leap 2"
    return (
        f"{subject} {verdict} (break-even with {num_heads} heads: γ = {limit:.3f}; by the top-1 curve "
        f"leap 1 promises {near:.2f} tokens per step and leap 2 {far:.2f})"
    )


def _named(draft: str) -> str:
    return "the chain" if draft == CHAIN else f"a tree of {draft} candidates"
