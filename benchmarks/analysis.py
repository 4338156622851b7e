"""Measures leap heads, and the model they stand on, on held-out answers.

The figures are accuracies per draft distance, the attenuation of certainty with distance (`attenuation`) in
the heads and in the model itself (`marginalization`), and the tokens per step that follow.

Shapes: `N` answers, `A` draft distances, `L` tokens of one answer, `D` distances.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from modeling_lmtp.backbone_lmtp import unembedding_size
from modeling_lmtp.leaps_lmtp import Draft, drafts, num_visible
from modeling_lmtp.losses_lmtp import IGNORE_INDEX
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.training.evaluation import (
    MAX_RANK,
    answer_states,
    draft_ranks,
    simulated_steps,
)
from modeling_lmtp.training.examples import Example
from modeling_lmtp.tree_lmtp import DraftTree, grow_tree
from modeling_lmtp.unembeddings_lmtp import draft_labels

from .attenuation import Attenuation, fit_attenuation
from .marginalization import Marginals
from .resampling import Estimate, ratio

TOP_KS = (1, 3, 10)
CHAIN = "chain"


@dataclass(frozen=True)
class HeadAnalysis:
    """The figures of one checkpoint's heads.

    Args:
        leap_offsets, head_context: of the heads.
        top_k: `top_k[k][a - 1]`, how often the right token is among the first `k` candidates for draft
            distance `a`.
        mean_probabilities: `[a - 1]`, the mean probability of the right token.
        ceiling_distances: `[a - 1]`, the distance of the marginal that bounds the head, see
            `ceiling_distance`.
        attenuation: γ, fitted to the mean probabilities.
        top1_attenuation: γ, fitted to how often the first candidate is right.
        tokens_per_step: simulated, by draft: `CHAIN` or a number of candidates.
        num_nodes: the number of candidates of each draft; a tree may have fewer than its name says if
            the accuracies offer no more.
    """

    leap_offsets: tuple[int, ...]
    head_context: int | str
    top_k: dict[int, list[float]]
    mean_probabilities: list[float]
    ceiling_distances: list[int]
    attenuation: Attenuation
    top1_attenuation: Attenuation
    tokens_per_step: dict[str, Estimate]
    num_nodes: dict[str, int]

    @property
    def kind(self) -> str:
        """The kind of heads, in words."""
        return head_kind(self.head_context)


def head_kind(head_context: int | str) -> str:
    """Return the kind of heads in words, by the tokens that they see after their state."""
    if head_context == 0:
        return "paper's heads"
    return "path-grounded" if head_context == "path" else f"grounded, {head_context}"


def ceiling_distance(draft: Draft, offsets: Sequence[int], head_context: int | str) -> int:
    """Return the distance of a head's target from the last token that the head sees when it drafts.

    The marginal at that distance bounds the head. If the head sees all tokens before its target,
    including drafted ones, the distance is 1: the model's next-token distribution bounds it.
    """
    offset = offsets[draft.head]
    return offset - num_visible(offset, draft.look_back, head_context)


def attenuation_distance(draft: Draft, offsets: Sequence[int], head_context: int | str) -> int:
    """Return the `d` of a draft on the attenuation curve.

    For the paper's heads it is the offset, counted from the state that the head reads. A grounded head
    knows more than its state, but the curve starts at the one token that is certain, `x_{t+1}`, whether
    the head sees it or not: `d` is at least `1 + a`.
    """
    return max(1 + draft.distance, ceiling_distance(draft, offsets, head_context))


@torch.no_grad()
def draft_probabilities(
    model: LMTPForCausalLM, example: Example, states: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the probability that the heads give to the right token, from every root of the answer.

    Args:
        model, example, states: see `evaluation.draft_ranks`.

    Returns:
        `(A, L)`, aligned with `evaluation.draft_ranks`; 0 for a token outside the draft vocabulary.
    """
    input_ids = torch.tensor([example.input_ids], device=model.device)
    length = input_ids.shape[1]
    offsets, token_ids = model.config.leap_offsets, model.config.draft_token_ids
    targets = input_ids[0]
    if token_ids is not None:
        vocab_size, _ = unembedding_size(model.backbone)
        targets = draft_labels(targets, token_ids, vocab_size, IGNORE_INDEX)
    states = answer_states(model, example) if states is None else states
    schedule = drafts(offsets)
    probabilities = torch.zeros(len(schedule), length, device=model.device)
    for draft in schedule:
        offset = offsets[draft.head]
        if offset >= length:
            continue
        logits = model.leap_logits(draft.head, states[None], input_ids, draft.look_back)
        labels = targets[offset:]
        log_probs = logits[0, :-offset].float().log_softmax(dim=-1)
        of_labels = log_probs.gather(1, labels.clamp(min=0)[:, None])[:, 0].exp()
        of_labels = of_labels.masked_fill(labels == IGNORE_INDEX, 0.0)
        probabilities[draft.distance - 1, 1 + draft.look_back :][: len(of_labels)] = of_labels
    return probabilities


def sums_over_answers(
    values: Iterable[torch.Tensor], examples: Iterable[Example]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add up values over the roots of each answer, per draft distance, and count the roots.

    A root is any token of an answer whose target lies in the answer too.

    Args:
        values: one `(A, L)` per example.
        examples: the answers.

    Returns:
        Sums and counts, each `(N, A)`.
    """
    totals, counts = [], []
    for value, example in zip(values, examples, strict=True):
        rows = [
            row[example.answer_start : len(row) - distance]
            for distance, row in enumerate(value, start=1)
        ]
        totals.append(torch.stack([row.double().sum() for row in rows]))
        counts.append(torch.tensor([len(row) for row in rows]))
    return torch.stack(totals), torch.stack(counts)


def rank_shares(
    ranks: Sequence[torch.Tensor], examples: Sequence[Example], max_rank: int = MAX_RANK
) -> torch.Tensor:
    """Return `(A, max_rank)`: how often the rank-`r` candidate for distance `a` is the right token."""
    shares = []
    for rank in range(max_rank):
        hits, counts = sums_over_answers([of_answer == rank for of_answer in ranks], examples)
        shares.append(hits.sum(dim=0) / counts.sum(dim=0).clamp(min=1))
    return torch.stack(shares, dim=1)


def simulated_tokens_per_step(
    ranks: Sequence[torch.Tensor], examples: Sequence[Example], tree: DraftTree
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens that decoding each answer would emit, and its steps, each `(N,)`."""
    steps = [
        simulated_steps(of_answer, tree, example.answer_start)
        for of_answer, example in zip(ranks, examples, strict=True)
    ]
    return torch.tensor([sum(s) for s in steps]), torch.tensor([len(s) for s in steps])


def cross_validated(
    ranks: Sequence[torch.Tensor], examples: Sequence[Example], num_nodes: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Simulate each half of the answers with the tree grown from the other half.

    Judged by the answers it was grown from, a tree would look better than it is.

    Returns:
        Tokens and steps per answer, each `(N,)`, and the larger tree's number of candidates.
    """
    tokens, steps = torch.zeros(len(ranks)), torch.zeros(len(ranks))
    largest = 0
    for half in (0, 1):
        grown = rank_shares(ranks[1 - half :: 2], examples[1 - half :: 2])
        tree = grow_tree(grown.tolist(), num_nodes)
        largest = max(largest, tree.num_nodes)
        simulated = simulated_tokens_per_step(ranks[half::2], examples[half::2], tree)
        tokens[half::2], steps[half::2] = simulated[0].float(), simulated[1].float()
    return tokens, steps, largest


def analyze_heads(
    model: LMTPForCausalLM,
    examples: Sequence[Example],
    *,
    node_counts: Sequence[int] = (4, 8, 16, 32),
    seed: int = 0,
    progress: bool = False,
) -> HeadAnalysis:
    """Measure a checkpoint's heads on held-out answers.

    Args:
        model: the checkpoint, in evaluation mode.
        examples: at least two answers.
        node_counts: candidates of the trees to simulate.
        seed: seed of the resampling that gives the errors.
        progress: show a progress bar.

    Raises:
        ValueError: the model has no heads, or there are fewer than two answers of several tokens.
    """
    schedule = drafts(model.config.leap_offsets)
    if not schedule:
        raise ValueError("The model has no leap heads to analyze. Train some with `lmtp train`.")
    if len(examples) < 2:
        raise ValueError(
            f"examples must be at least 2 answers, got {len(examples)}: trees grown on one half are "
            "judged on the other."
        )
    ranks, probabilities = _measure(model, examples, progress)
    totals, counts = sums_over_answers(probabilities, examples)
    if not counts.any():
        raise ValueError(
            f"There is nothing to draft in {len(examples)} answers: they end with their first token. Use "
            "longer answers."
        )
    hits, _ = sums_over_answers([of_answer == 0 for of_answer in ranks], examples)
    shares = rank_shares(ranks, examples)

    offsets, head_context = model.config.leap_offsets, model.config.head_context
    chain = DraftTree.chain(len(schedule))
    simulated = {CHAIN: (*simulated_tokens_per_step(ranks, examples, chain), len(schedule))}
    simulated |= {str(count): cross_validated(ranks, examples, count) for count in node_counts}
    return HeadAnalysis(
        leap_offsets=tuple(offsets),
        head_context=head_context,
        top_k={k: shares[:, :k].sum(dim=1).tolist() for k in TOP_KS},
        mean_probabilities=(totals.sum(dim=0) / counts.sum(dim=0).clamp(min=1)).tolist(),
        ceiling_distances=[ceiling_distance(d, offsets, head_context) for d in schedule],
        attenuation=_fit(schedule, offsets, head_context, totals, counts, seed),
        top1_attenuation=_fit(schedule, offsets, head_context, hits, counts, seed),
        tokens_per_step={
            name: ratio(tokens, steps, seed) for name, (tokens, steps, _) in simulated.items()
        },
        num_nodes={name: count for name, (_, _, count) in simulated.items()},
    )


def _measure(
    model: LMTPForCausalLM, examples: Sequence[Example], progress: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return `draft_ranks` and `draft_probabilities` of each answer, on the CPU."""
    ranks, probabilities = [], []
    for example in tqdm(examples, desc="analyze heads", unit="answer", disable=not progress):
        states = answer_states(model, example)
        ranks.append(draft_ranks(model, example, states).cpu())
        probabilities.append(draft_probabilities(model, example, states).cpu())
    return ranks, probabilities


def _fit(
    schedule: Sequence[Draft],
    offsets: Sequence[int],
    head_context: int | str,
    totals: torch.Tensor,
    counts: torch.Tensor,
    seed: int,
) -> Attenuation:
    """Fit γ to sums `(N, A)` over draft distances, after pooling those with the same `d` to `(N, D)`."""
    of_draft = [attenuation_distance(draft, offsets, head_context) for draft in schedule]
    distances = sorted(set(of_draft))
    pooled = [
        torch.stack(
            [
                sums[:, [a for a, d in enumerate(of_draft) if d == distance]].sum(dim=1)
                for distance in distances
            ],
            dim=1,
        )
        for sums in (totals, counts)
    ]
    return fit_attenuation(distances, pooled[0], pooled[1], seed)


def marginal_attenuations(marginals: Marginals, seed: int = 0) -> tuple[Attenuation, Attenuation]:
    """Fit γ to the model's marginals: to their probabilities, and to their top-1 accuracies.

    Raises:
        ValueError: the marginals are of the next token only.
    """
    num_distances = marginals.ranks.shape[1]
    numbers = marginals.answers.unique()
    inside = (marginals.answers == numbers[:, None]).double()
    counts = inside.sum(dim=1, keepdim=True).expand(-1, num_distances - 1)
    distances = range(2, num_distances + 1)
    probabilities, hits = marginals.probabilities.double(), (marginals.ranks == 0).double()
    return (
        fit_attenuation(distances, (inside @ probabilities)[:, 1:], counts, seed),
        fit_attenuation(distances, (inside @ hits)[:, 1:], counts, seed),
    )


def marginal_estimates(marginals: Marginals, seed: int = 0) -> list[dict[str, Estimate | float]]:
    """Return top-k accuracies, mean probability and covered probability for each distance from 1."""
    numbers = marginals.answers.unique()
    inside = (marginals.answers == numbers[:, None]).double()
    counts = inside.sum(dim=1)
    return [
        {
            **{f"top{k}": ratio(inside @ (ranks < k).double(), counts, seed) for k in TOP_KS},
            "mean_probability": ratio(inside @ probabilities.double(), counts, seed),
            "covered": covered.double().mean().item(),
        }
        for ranks, probabilities, covered in zip(
            marginals.ranks.T, marginals.probabilities.T, marginals.covered.T, strict=True
        )
    ]
