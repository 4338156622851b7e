"""Checks how far ahead heads look, by their accuracy on text that the backbone writes.

A head that learned to predict the token `d` ahead is right at `d` far more often than at any other offset.
Under a wrong offset it would still decode correctly, but its drafts would never be accepted.

Shapes: `m` heads, `D` offsets, `N` positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modeling_lmtp.modeling_lmtp import LMTPForCausalLM

from .batch_generation import Sampling, generate_ids
from .prompts import Example, end_ids, render_prompt

PROMPTS = (
    "Why is the sky blue?",
    "Write a short story about a lighthouse keeper.",
    "Explain how a bicycle stays upright.",
    "Write a Python function that reverses a list.",
    "What are the causes of inflation?",
    "Give me a recipe for vegetable soup.",
    "Describe the water cycle to a child.",
    "List five tips for sleeping well.",
)
NEW_TOKENS = 96
BEYOND = 3  # also measure so many offsets behind the largest declared one
# A head fits an offset better if its accuracy there is higher by MARGIN, and RATIO times as high.
# 0.05 is about four standard errors of a weak head's accuracy on 8 answers of 96 tokens.
MARGIN = 0.05
RATIO = 1.5
MIN_POSITIONS = 100  # accuracies over fewer positions decide nothing


@dataclass(frozen=True)
class LeapFit:
    """How often each head is right at each offset.

    Args:
        offsets: the declared offsets, one per head.
        accuracies: `(m, D)`, of head and offset 1 ... D, all over the same positions.
        num_positions: `N`, how many positions that is.
    """

    offsets: tuple[int, ...]
    accuracies: torch.Tensor
    num_positions: int

    def best(self, head: int) -> int:
        """Return the offset at which a head is right most often."""
        return int(self.accuracies[head].argmax()) + 1

    def fits_better(self, head: int, offset: int, accuracy: float) -> bool:
        """Return whether a head is clearly right more often at an offset than `accuracy`."""
        here = float(self.accuracies[head, offset - 1])
        is_clear = here - accuracy > MARGIN and here > RATIO * accuracy
        return is_clear and self.num_positions >= MIN_POSITIONS

    @property
    def wrong(self) -> tuple[int, ...]:
        """The heads that clearly fit another offset than the declared one."""
        return tuple(
            head
            for head, offset in enumerate(self.offsets)
            # Untrained heads repeat the next-token prediction: that is no sign of a wrong offset
            if (best := self.best(head)) > 1
            and self.fits_better(head, best, float(self.accuracies[head, offset - 1]))
        )

    @property
    def unclear(self) -> tuple[int, ...]:
        """The heads that fit no offset clearly, or that predict the next token as untrained heads do."""
        medians = self.accuracies.median(dim=1).values.tolist()
        return tuple(
            head
            for head in range(len(self.offsets))
            if self.best(head) == 1 or not self.fits_better(head, self.best(head), medians[head])
        )

    def describe(self) -> str:
        """Return each head's accuracy at its declared offset, and at its best one if that differs."""
        parts = []
        for head, offset in enumerate(self.offsets):
            accuracies = self.accuracies[head].tolist()
            best = self.best(head)
            parts.append(
                f"head {head}: {accuracies[offset - 1]:.1%} at {offset}"
                + ("" if best == offset else f", {accuracies[best - 1]:.1%} at {best}")
            )
        return "; ".join(parts)

    def check(self) -> str | None:
        """Raise a ValueError if an offset is wrong; return a warning if one cannot be confirmed.

        Raises:
            ValueError: a head clearly fits another offset; the message names those that fit.
        """
        if self.wrong:
            fitting = " ".join(str(self.best(head)) for head in range(len(self.offsets)))
            raise ValueError(
                f"leap_offsets {self.offsets} do not fit these heads. Accuracy on text that the backbone "
                f"wrote: {self.describe()}. Pass --leap_offsets {fitting} if that is how they were "
                "trained, or --no_check_leap to keep your offsets."
            )
        if self.unclear:
            names = ", ".join(map(str, self.unclear))
            return (
                f"The offset of head {names} could not be confirmed: on text that the backbone wrote, no "
                f"offset of 2 or more stands out ({self.describe()}). Drafts of untrained heads, or of "
                "heads for another backbone, are rarely accepted."
            )
        return None


@torch.no_grad()
def fit_leaps(model: LMTPForCausalLM, texts: Sequence[Example]) -> LeapFit:
    """Measure each head's accuracy at all offsets up to `BEYOND` the declared ones.

    Args:
        model: with heads of the paper's kind, which see no token after their state.
        texts: prompts with the backbone's answers; only positions within answers count.

    Raises:
        ValueError: no text is long enough.
    """
    offsets = model.config.leap_offsets
    horizon = max(offsets) + BEYOND
    hits = torch.cat([_hits(model, text, horizon) for text in texts], dim=2)
    num_positions = hits.shape[2]
    if not num_positions:
        raise ValueError(
            f"The backbone's answers are shorter than {horizon + 1} tokens, so offsets cannot be "
            "checked. Pass other prompts with --prompts, or --no_check_leap."
        )
    return LeapFit(tuple(offsets), hits.double().mean(dim=2), num_positions)


def _hits(model: LMTPForCausalLM, text: Example, horizon: int) -> torch.Tensor:
    """Return `(m, D, n)` booleans for the positions whose `D` targets all lie in the answer."""
    input_ids = torch.tensor([text.input_ids], device=model.device)
    first, length = text.answer_start, len(text.input_ids)
    count = max(0, length - horizon - first)
    with model.head_states(num_logits=1) as states:
        model.backbone(input_ids=input_ids, use_cache=False)
    targets = [input_ids[0, first + d : first + d + count] for d in range(1, horizon + 1)]
    rows = []
    for head in range(len(model.config.leap_offsets)):
        predicted = model.leap_logits(head, states[0][:, first : first + count])[0].argmax(dim=-1)
        rows.append(torch.stack([predicted == target for target in targets]))
    return torch.stack(rows).cpu()


def generated_texts(
    backbone: Any, tokenizer: Any, prompts: Sequence[str] = PROMPTS, new_tokens: int = NEW_TOKENS
) -> list[Example]:
    """Let the backbone answer prompts greedily."""
    stop_ids = end_ids(backbone, tokenizer)
    rendered = [render_prompt(tokenizer, prompt) for prompt in prompts]
    sampling = Sampling(max_new_tokens=new_tokens, temperature=0.0, top_p=1.0, seed=0)
    answers = generate_ids(backbone, tokenizer, rendered, sampling, stop_ids=stop_ids)
    pairs = zip(rendered, answers, strict=True)
    return [Example([*prompt, *answer], len(prompt)) for prompt, answer in pairs]
