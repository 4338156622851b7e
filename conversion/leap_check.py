"""How far ahead do heads really look? Their accuracy on the backbone's own text tells.

A head that learned to predict the token `d` ahead is right there far more often than anywhere else. With
a wrong offset it would still decode without a mistake, and never be accepted.

Shapes: `m` heads, `D` offsets, `N` positions, `L` length.
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
BEYOND = 3  # offsets that are tried behind the largest one in question
SURE = 4.0  # standard errors of the difference between two offsets
TIMES = 1.5  # and how many times as often the better one must be right


@dataclass(frozen=True)
class LeapFit:
    """How often each head is right at each offset.

    Args:
        offsets: the offsets in question, one per head.
        hits: `(m, D, N)` booleans: head, offset 1 … D, position; the same positions for all.
    """

    offsets: tuple[int, ...]
    hits: torch.Tensor

    @property
    def accuracies(self) -> list[list[float]]:
        """For each head, its accuracy at the offsets 1 … D."""
        accuracies: list[list[float]] = self.hits.double().mean(dim=2).tolist()
        return accuracies

    def best(self, head: int) -> int:
        """Return the offset at which a head is right most often."""
        return int(self.hits[head].sum(dim=1).argmax()) + 1

    def is_better(self, head: int, offset: int, other: int) -> bool:
        """Tell whether a head is clearly right more often at one offset than at another."""
        ours, theirs = self.hits[head, offset - 1], self.hits[head, other - 1]
        gained, lost = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
        sure = gained - lost > SURE * (gained + lost) ** 0.5  # McNemar's test
        return sure and int(ours.sum()) > TIMES * int(theirs.sum())

    @property
    def wrong(self) -> tuple[int, ...]:
        """The heads that clearly fit another offset."""
        return tuple(
            head
            for head, offset in enumerate(self.offsets)
            if self.best(head) > 1 and self.is_better(head, self.best(head), offset)
        )

    @property
    def unclear(self) -> tuple[int, ...]:
        """The heads that fit no offset clearly, or the next token, as before any training."""
        return tuple(
            head
            for head in range(len(self.offsets))
            if self.best(head) == 1 or not self.is_better(head, self.best(head), self._usual(head))
        )

    def _usual(self, head: int) -> int:
        """Return the offset at which a head's accuracy is the median of all."""
        by_hits = self.hits[head].sum(dim=1).argsort(descending=True)
        return int(by_hits[len(by_hits) // 2]) + 1

    def describe(self) -> str:
        """Return, per head, its best offset and how often it is right there and as declared."""
        parts = []
        for head, offset in enumerate(self.offsets):
            accuracies = self.accuracies[head]
            best = self.best(head)
            parts.append(
                f"head {head}: {accuracies[offset - 1]:.1%} at {offset}"
                + ("" if best == offset else f", {accuracies[best - 1]:.1%} at {best}")
            )
        return "; ".join(parts)

    def check(self) -> str | None:
        """Raise a ValueError if the offsets are wrong; return a warning if nothing can be told.

        Raises:
            ValueError: a head clearly fits another offset; names those that fit.
        """
        if self.wrong:
            fitting = ",".join(str(self.best(head)) for head in range(len(self.offsets)))
            raise ValueError(
                f"leap_offsets {self.offsets} do not fit these heads. Accuracy on the backbone's own "
                f"text: {self.describe()}. Pass --leap-offsets {fitting} if that is how they were "
                "trained, or --no-check-leap to take your offsets all the same."
            )
        if self.unclear:
            names = ", ".join(map(str, self.unclear))
            return (
                f"The offset of head {names} could not be confirmed: on the backbone's own text no "
                f"offset of 2 or more stands out ({self.describe()}). Untrained heads, and those of "
                "another backbone, draft what will not be accepted."
            )
        return None


@torch.no_grad()
def fit_leaps(model: LMTPForCausalLM, texts: Sequence[Example]) -> LeapFit:
    """Measure each head at the offsets around its own, on texts of the backbone.

    Args:
        model: heads of the paper's kind (they see no token beyond their state).
        texts: prompt and answer; positions within answers count.

    Raises:
        ValueError: no text is long enough.
    """
    offsets = model.config.leap_offsets
    horizon = max(offsets) + BEYOND
    hits = [_hits(model, text, horizon) for text in texts]
    if not sum(part.shape[2] for part in hits):
        raise ValueError(
            f"The backbone's answers are shorter than {horizon + 1} tokens, so offsets cannot be "
            "checked. Pass other prompts with --prompts, or --no-check-leap."
        )
    return LeapFit(tuple(offsets), torch.cat(hits, dim=2))


def _hits(model: LMTPForCausalLM, text: Example, horizon: int) -> torch.Tensor:
    """Return `(m, D, n)` booleans for the positions from which all `D` targets lie in the answer."""
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


def own_texts(
    backbone: Any, tokenizer: Any, prompts: Sequence[str] = PROMPTS, new_tokens: int = NEW_TOKENS
) -> list[Example]:
    """Let the backbone answer prompts greedily."""
    stop_ids = end_ids(backbone, tokenizer)
    rendered = [render_prompt(tokenizer, prompt) for prompt in prompts]
    sampling = Sampling(max_new_tokens=new_tokens, temperature=0.0, top_p=1.0, seed=0)
    answers = generate_ids(backbone, tokenizer, rendered, sampling, stop_ids=stop_ids)
    pairs = zip(rendered, answers, strict=True)
    return [Example([*prompt, *answer], len(prompt)) for prompt, answer in pairs]
