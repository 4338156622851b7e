"""How far a tuned backbone has moved from the original one, which its adapters keep at hand.

With the adapters disabled the model is the original: no second copy of it is needed.

Shapes: `B` batch, `L` length, `V` vocabulary size, `N` tokens that count.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from modeling_lmtp.losses_lmtp import leap_positions

from .examples import AnswerDataset, Example, collate

CHUNK_SIZE = 256  # tokens whose float32 distributions exist at a time


@contextmanager
def original_model(model: PeftModel) -> Iterator[None]:
    """Make `model` what it was before its adapters, inside the block: no gradients, no dropout."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), model.disable_adapter():
            yield
    finally:
        model.train(was_training)


def next_token_kl(
    original_logits: torch.Tensor, tuned_logits: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """Sum `KL(original ‖ tuned)` of the next-token distributions over the labels that count.

    Distributions are recomputed for backward, chunk by chunk, and never kept.

    Args:
        original_logits: `(B, L, V)`, without gradient.
        tuned_logits: `(B, L, V)`.
        labels: `(B, L)`, not shifted; the distribution at `s` counts if `labels[s + 1]` does.

    Returns:
        The float32 sum in nats, a scalar, and `N`.
    """
    rows, positions = leap_positions(labels, 1)
    total = tuned_logits.new_zeros((), dtype=torch.float32)
    for chunk in zip(rows.split(CHUNK_SIZE), positions.split(CHUNK_SIZE), strict=True):
        total = total + checkpoint(_kl, original_logits, tuned_logits, chunk, use_reentrant=False)
    return total, rows.numel()


def _kl(
    original_logits: torch.Tensor,
    tuned_logits: torch.Tensor,
    where: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    original = original_logits[where].float().log_softmax(dim=-1)
    tuned = tuned_logits[where].float().log_softmax(dim=-1)
    return nn.functional.kl_div(tuned, original, reduction="sum", log_target=True)


@torch.no_grad()
def next_token_nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum `-log p(label)` over the labels that count, in chunks: `(B, L, V)`, `(B, L)` to a scalar."""
    total = logits.new_zeros((), dtype=torch.float32)
    rows, positions = leap_positions(labels, 1)
    for row, position in zip(rows.split(CHUNK_SIZE), positions.split(CHUNK_SIZE), strict=True):
        targets = labels[row, position + 1]
        total += nn.functional.cross_entropy(
            logits[row, position].float(), targets, reduction="sum"
        )
    return total


@dataclass(frozen=True)
class DriftReport:
    """What held-out answers say of the tuned backbone beside the original.

    Args:
        kl: the mean of `KL(original ‖ tuned)` per answer token, in nats.
        perplexity_original: the original backbone's on the answers.
        perplexity_tuned: the tuned one's.
        top1_agreement: how often both think the same token the most likely.
        tokens: answer tokens looked at.
    """

    kl: float
    perplexity_original: float
    perplexity_tuned: float
    top1_agreement: float
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON-serialisable values."""
        return asdict(self)

    def summary(self) -> str:
        """Return the report in a sentence."""
        return (
            f"KL {self.kl:.4f} nats per token, top-1 agreement {self.top1_agreement:.2%}, perplexity "
            f"{self.perplexity_original:.3f} -> {self.perplexity_tuned:.3f}"
        )


@torch.no_grad()
def measure_drift(
    model: PeftModel, examples: Sequence[Example], *, progress: bool = False
) -> DriftReport:
    """Compare a model with what it is without its adapters, on the answers of `examples`.

    Args:
        model: `LMTPForCausalLM` in PEFT's wrapper.
        examples: at least one.
        progress: show a progress bar.

    Raises:
        ValueError: there are no examples.
    """
    if not examples:
        raise ValueError("examples is empty: hold out at least one answer to measure drift on.")
    was_training = model.training
    model.eval()
    sums = torch.zeros(5, dtype=torch.float64)
    data = AnswerDataset(examples)
    for index in tqdm(range(len(data)), desc="drift", unit="answer", disable=not progress):
        batch = {name: value.to(model.device) for name, value in collate([data[index]]).items()}
        sums += torch.tensor(_drift_sums(model, **batch), dtype=torch.float64)
    model.train(was_training)
    kl, nll_original, nll_tuned, agreeing, tokens = sums.tolist()
    return DriftReport(
        kl=kl / tokens,
        perplexity_original=math.exp(nll_original / tokens),
        perplexity_tuned=math.exp(nll_tuned / tokens),
        top1_agreement=agreeing / tokens,
        tokens=int(tokens),
    )


def _drift_sums(
    model: PeftModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
) -> list[float]:
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    with original_model(model):
        original = model(**inputs).logits
    tuned = model(**inputs).logits
    kl, tokens = next_token_kl(original, tuned, labels)
    where = leap_positions(labels, 1)
    agreeing = (original.argmax(dim=-1) == tuned.argmax(dim=-1))[where].sum()
    nlls = (next_token_nll(logits, labels) for logits in (original, tuned))
    return [float(value) for value in (kl, *nlls, agreeing, tokens)]
