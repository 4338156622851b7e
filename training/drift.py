"""How far joint tuning has moved the backbone from the original.

Disabling the adapters gives the original model, so no second copy of it is needed.

Shapes: `B` batch, `L` length, `V` vocabulary size, `N` labels that are not -100.
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

CHUNK_SIZE = 256  # tokens per chunk; limits the memory for float32 distributions


@contextmanager
def original_model(model: PeftModel) -> Iterator[None]:
    """Disable the adapters, gradients and dropout of `model` inside the block."""
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
    """Sum `KL(original ‖ tuned)` of the next-token distributions over the labels.

    Backward recomputes the distributions chunk by chunk instead of keeping them.

    Args:
        original_logits: `(B, L, V)`, without gradient.
        tuned_logits: `(B, L, V)`.
        labels: `(B, L)`, not shifted; position `s` counts unless `labels[s + 1]` is -100.

    Returns:
        The float32 sum in nats, a scalar, and `N`.
    """
    rows, positions = leap_positions(labels, 1)
    total = tuned_logits.new_zeros((), dtype=torch.float32)
    # Selected once: otherwise each chunk would have a gradient of the size of all logits
    tuned_chunks = tuned_logits[rows, positions].split(CHUNK_SIZE)
    chunks = zip(tuned_chunks, rows.split(CHUNK_SIZE), positions.split(CHUNK_SIZE), strict=True)
    for tuned, *chunk in chunks:
        total = total + checkpoint(_kl, original_logits, tuned, tuple(chunk), use_reentrant=False)
    return total, rows.numel()


def _kl(
    original_logits: torch.Tensor,
    tuned: torch.Tensor,
    positions: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    original = original_logits[positions].float().log_softmax(dim=-1)
    tuned = tuned.float().log_softmax(dim=-1)
    return nn.functional.kl_div(tuned, original, reduction="sum", log_target=True)


@torch.no_grad()
def next_token_nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum `-log p(label)` in nats over the labels.

    Args:
        logits: `(B, L, V)`.
        labels: `(B, L)`, not shifted; -100 does not count.

    Returns:
        The float32 sum, a scalar.
    """
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
    """The tuned backbone compared with the original on held-out answers.

    Args:
        kl: mean `KL(original ‖ tuned)` per answer token, in nats.
        perplexity_original: perplexity of the original backbone on the answers.
        perplexity_tuned: perplexity of the tuned backbone on the answers.
        top1_agreement: share of the answer tokens for which both backbones agree on the top-1 token.
        tokens: number of answer tokens.
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
        """Return the report in one line."""
        return (
            f"KL {self.kl:.4f} nats per token, top-1 agreement {self.top1_agreement:.2%}, perplexity "
            f"{self.perplexity_original:.3f} -> {self.perplexity_tuned:.3f}"
        )


@torch.no_grad()
def measure_drift(
    model: PeftModel, examples: Sequence[Example], *, progress: bool = False
) -> DriftReport:
    """Compare a model with and without its adapters on the answers of `examples`.

    Args:
        model: an `LMTPForCausalLM` in PEFT's wrapper.
        examples: at least one answer.
        progress: show a progress bar.

    Raises:
        ValueError: there are no examples.
    """
    if not examples:
        raise ValueError(
            "examples must hold at least one answer to measure drift on, got none. Hold some out."
        )
    was_training = model.training
    model.eval()
    sums = torch.zeros(5, dtype=torch.float64)
    data = AnswerDataset(examples)
    for index in tqdm(range(len(data)), desc="drift", unit="answer", disable=not progress):
        batch = {name: value.to(model.device) for name, value in collate([data[index]]).items()}
        sums += torch.tensor(_drift_sums(model, **batch), dtype=torch.float64)
    model.train(was_training)
    kl, nll_original, nll_tuned, num_equal, tokens = sums.tolist()
    return DriftReport(
        kl=kl / tokens,
        perplexity_original=math.exp(nll_original / tokens),
        perplexity_tuned=math.exp(nll_tuned / tokens),
        top1_agreement=num_equal / tokens,
        tokens=int(tokens),
    )


def _drift_sums(
    model: PeftModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
) -> list[float]:
    """Return the sums over one batch: KL, both NLLs, equal top-1 tokens, and tokens."""
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    with original_model(model):
        original = model(**inputs).logits
    tuned = model(**inputs).logits
    kl, tokens = next_token_kl(original, tuned, labels)
    num_equal = (original.argmax(dim=-1) == tuned.argmax(dim=-1))[leap_positions(labels, 1)].sum()
    nlls = (next_token_nll(logits, labels) for logits in (original, tuned))
    return [float(value) for value in (kl, *nlls, num_equal, tokens)]
