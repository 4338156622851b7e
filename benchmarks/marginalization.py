"""Numerical marginalization (arXiv 2502.09419): what a model knows about tokens further ahead.

A next-token model also predicts the token after next, by a sum over all next tokens:

    p(x_{t+2} | x_≤t) = Σ_v p(x_{t+2} | x_≤t, v) p(v | x_≤t)

differs: the sum is over the likeliest `v` only, and for `t + 3` over the likeliest pairs, so each value
is a lower bound; the covered probability is reported. Each `v` costs one row of a batch, so this is a
reference and not a way to draft.

It is the upper bound for heads that see only `x_≤t`, such as the paper's: on text sampled from the model
no head can know more. (A greedy answer follows from its prefix alone, so there a perfect head could reach
1.) A grounded head also sees tokens after its state: its bound is the marginal that many positions nearer,
and for the very next token the model's distribution.

Shapes: `V` vocabulary size, `K` likeliest continuations, `M` sampled positions, `D` distances.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import Cache

from modeling_lmtp.cache_lmtp import new_cache, select_rows, take_row
from modeling_lmtp.training.evaluation import MAX_RANK
from modeling_lmtp.training.examples import Example
from modeling_lmtp.transformers_lmtp import forward_with_cache

MAX_DISTANCE = 3


@dataclass(frozen=True)
class Marginals:
    """How the marginals rank the right token, at sampled positions.

    Args:
        ranks: `(M, D)`, `[:, d - 1]` the right token's rank at distance `d`, at most `MAX_RANK`.
        probabilities: `(M, D)`, the right token's probability.
        covered: `(M, D)`, the total probability of the continuations in the sum; 1 at `d = 1`.
        answers: `(M,)`, the answer of each position.
    """

    ranks: torch.Tensor
    probabilities: torch.Tensor
    covered: torch.Tensor
    answers: torch.Tensor

    def accuracy(self, distance: int, k: int) -> float:
        """Return how often the right token at a distance is among the first `k`."""
        return (self.ranks[:, distance - 1] < k).double().mean().item()


@torch.no_grad()
def marginals_after(
    model: Any, cache: Cache, logits: torch.Tensor, num_continuations: int, num_distances: int
) -> tuple[list[torch.Tensor], list[float]]:
    """Return the marginal distributions of the next tokens.

    Args:
        model: a causal language model.
        cache: of one row, with all known tokens; not changed.
        logits: `(V,)`, the model's logits for the next token.
        num_continuations: `K`.
        num_distances: `D`.

    Returns:
        `D` tensors `(V,)`, float32, `[d - 1]` for `d` tokens ahead, lower bounds except for the first;
        and the probability that each covers.
    """
    marginals = [logits.float().softmax(dim=-1)]
    covered = [1.0]
    # (rows, V): the joint probability of a row's continuation and the token after it
    joint, cache = marginals[0][None], take_row(cache, 0)
    vocab_size = logits.shape[-1]
    for _ in range(num_distances - 1):
        best = joint.flatten().topk(min(num_continuations, joint.numel()))
        select_rows(cache, (best.indices // vocab_size).tolist())
        tokens = (best.indices % vocab_size)[:, None]
        outputs = forward_with_cache(model, cache, input_ids=tokens)
        joint = best.values[:, None] * outputs.logits[:, -1].float().softmax(dim=-1)
        marginals.append(joint.sum(dim=0))
        covered.append(best.values.sum().item())
    return marginals, covered


def sample_roots(
    examples: Sequence[Example], num_positions: int, num_distances: int, seed: int
) -> list[list[int]]:
    """Draw positions uniformly from all answers, without replacement.

    Args:
        examples: the answers.
        num_positions: `M`; all positions, if there are fewer.
        num_distances: `D`; tokens `r … r + D - 1` must exist for a position `r`.
        seed: seed of the draw.

    Returns:
        For each answer its positions `r`, increasing: the tokens before `r` are known, and `r` itself is
        `1` ahead.
    """
    roots = [
        (number, root)
        for number, example in enumerate(examples)
        for root in range(max(1, example.answer_start), len(example.input_ids) - num_distances + 1)
    ]
    generator = torch.Generator().manual_seed(seed)
    drawn: list[list[int]] = [[] for _ in examples]
    for index in torch.randperm(len(roots), generator=generator)[:num_positions].tolist():
        number, root = roots[index]
        drawn[number].append(root)
    return [sorted(positions) for positions in drawn]


@torch.no_grad()
def marginalize(
    model: Any,
    examples: Sequence[Example],
    *,
    num_positions: int = 128,
    num_continuations: int = 16,
    num_distances: int = MAX_DISTANCE,
    seed: int = 0,
    progress: bool = False,
) -> Marginals:
    """Compute the marginals at sampled positions of answers, and the ranks of the right tokens.

    Args:
        model: a causal language model, in evaluation mode.
        examples: held-out answers.
        num_positions: `M`; fewer if the answers are shorter.
        num_continuations: `K`.
        num_distances: `D`.
        seed: seed of the positions.
        progress: show a progress bar.

    Raises:
        ValueError: a number is too small, or no answer has `D` tokens.
    """
    for name, value in (
        ("num_positions", num_positions),
        ("num_continuations", num_continuations),
        ("num_distances", num_distances),
    ):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}.")
    roots = sample_roots(examples, num_positions, num_distances, seed)
    if not any(roots):
        raise ValueError(
            f"No answer has {num_distances} tokens to predict. Use longer answers, or a smaller "
            "num_distances."
        )
    rows = []
    with tqdm(total=sum(map(len, roots)), desc="marginalize", disable=not progress) as bar:
        for number, (example, positions) in enumerate(zip(examples, roots, strict=True)):
            for row in _of_answer(model, example, positions, num_continuations, num_distances):
                rows.append((*row, number))
                bar.update()
    return Marginals(*(torch.tensor(column) for column in zip(*rows, strict=True)))


def _of_answer(
    model: Any,
    example: Example,
    positions: Sequence[int],
    num_continuations: int,
    num_distances: int,
) -> list[tuple[list[int], list[float], list[float]]]:
    """Return the right tokens' ranks and probabilities, and the covered probability, at each position."""
    input_ids = torch.tensor([example.input_ids], device=model.device)
    cache = new_cache(model.config)
    known, rows = 0, []
    for root in positions:
        outputs = forward_with_cache(model, cache, input_ids=input_ids[:, known:root])
        known = root
        marginals, covered = marginals_after(
            model, cache, outputs.logits[0, -1], num_continuations, num_distances
        )
        targets = example.input_ids[root : root + num_distances]
        values = [marginal[target] for marginal, target in zip(marginals, targets, strict=True)]
        ranks = [
            int((marginal > value).sum().clamp(max=MAX_RANK))
            for marginal, value in zip(marginals, values, strict=True)
        ]
        rows.append((ranks, [value.item() for value in values], covered))
    return rows
