"""What held-out answers say of leap heads, and of the model under them.

Accuracy per draft distance, how certainty fades with distance (`attenuation`), how that compares with
what the model itself knows (`marginalization`), and the tokens per step that follow.

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
    """What held-out answers say of one checkpoint's heads.

    Args:
        leap_offsets, head_context: which heads these are.
        top_k: `top_k[k][a - 1]`, how often the right token is among the first `k` candidates for draft
            distance `a`.
        mean_probabilities: `[a - 1]`, what the right token is given.
        ceiling_distances: `[a - 1]`, which marginal bounds the head, see `ceiling_distance`.
        attenuation: γ, fitted to the mean probabilities.
        top1_attenuation: γ, fitted to how often the first candidate is right.
        tokens_per_step: simulated, by draft: `CHAIN` or a number of candidates.
        num_nodes: the candidates that each draft really has: a tree may be asked for more than the
            accuracies offer.
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
        """What the heads see after their state, in words."""
        return head_kind(self.head_context)


def head_kind(head_context: int | str) -> str:
    """Name the heads by what they see after their state."""
    if head_context == 0:
        return "paper's heads"
    return "path-grounded" if head_context == "path" else f"grounded, {head_context}"


def ceiling_distance(draft: Draft, offsets: Sequence[int], head_context: int | str) -> int:
    """Return the distance of a head's target from the last token that it sees, when it drafts.

    The marginal at that distance is the best the head could know. A head that sees all tokens before
    its target, drafted ones included, is bounded by the model's own next-token distribution, 1.
    """
    offset = offsets[draft.head]
    return offset - num_visible(offset, draft.look_back, head_context)


def attenuation_distance(draft: Draft, offsets: Sequence[int], head_context: int | str) -> int:
    """Return the `d` of the attenuation curve that a draft belongs to.

    For the paper's heads the offset, counted from the state that the head reads. A grounded head
    knows more than its state, but the curve starts at the one token that is certain, `x_{t+1}`, seen
    or not: `d` is never below `1 + a`.
    """
    return max(1 + draft.distance, ceiling_distance(draft, offsets, head_context))


@torch.no_grad()
def draft_probabilities(
    model: LMTPForCausalLM, example: Example, states: torch.Tensor | None = None
) -> torch.Tensor:
    """Return what the heads give the right token, from every root of the answer.

    Args:
        model, example, states: see `evaluation.draft_ranks`.

    Returns:
        `(A, L)`, aligned with `evaluation.draft_ranks`; 0 where the token cannot be drafted.
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
        wanted = targets[offset:]
        chosen = logits[0, :-offset].float().log_softmax(dim=-1)
        given = chosen.gather(1, wanted.clamp(min=0)[:, None])[:, 0].exp()
        given = given.masked_fill(wanted == IGNORE_INDEX, 0.0)
        probabilities[draft.distance - 1, 1 + draft.look_back :][: len(given)] = given
    return probabilities


def sums_over_answers(
    values: Iterable[torch.Tensor], examples: Iterable[Example]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add up, per answer and draft distance, what every root in the answer has; count the roots.

    A root may be any token of an answer whose target is in the answer as well.

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
    """Return the tokens that decoding each answer would draft and verify, and its steps, each `(N,)`."""
    steps = [
        simulated_steps(of_answer, tree, example.answer_start)
        for of_answer, example in zip(ranks, examples, strict=True)
    ]
    return torch.tensor([sum(s) for s in steps]), torch.tensor([len(s) for s in steps])


def cross_validated(
    ranks: Sequence[torch.Tensor], examples: Sequence[Example], num_nodes: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Simulate each half of the answers with the tree that the other half grows.

    A tree judged by the answers that it was grown from would look better than it is.

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
        seed: of the resampling that errors come from.
        progress: show a progress bar.

    Raises:
        ValueError: the model has no heads, or there are fewer than two answers, or only of one token.
    """
    schedule = drafts(model.config.leap_offsets)
    if not schedule:
        raise ValueError("The model has no leap heads to analyze. Train some with `lmtp train`.")
    if len(examples) < 2:
        raise ValueError(
            f"examples must be at least 2 answers, got {len(examples)}: trees grown on one half are "
            "judged on the other."
        )
    bar = tqdm(examples, desc="analyze heads", unit="answer", disable=not progress)
    measured = []
    for example in bar:
        states = answer_states(model, example)
        drafted = (draft_ranks(model, example, states), draft_probabilities(model, example, states))
        measured.append([of_answer.cpu() for of_answer in drafted])
    ranks = [of_answer for of_answer, _ in measured]
    totals, counts = sums_over_answers([given for _, given in measured], examples)
    if not counts.any():
        raise ValueError(
            f"There is nothing to draft in {len(examples)} answers: they end with their first token. Give "
            "longer ones."
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


def _fit(
    schedule: Sequence[Draft],
    offsets: Sequence[int],
    head_context: int | str,
    totals: torch.Tensor,
    counts: torch.Tensor,
    seed: int,
) -> Attenuation:
    """Fit γ to draft distances, pooled where they share a `d` of the curve, `(N, A)` to `(N, D)`."""
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
    """Fit γ to what the model itself knows further ahead: to probabilities, and to top-1 accuracies.

    Raises:
        ValueError: only the next token was asked for.
    """
    num_distances = marginals.ranks.shape[1]
    numbers = marginals.answers.unique()
    inside = (marginals.answers == numbers[:, None]).double()
    counts = inside.sum(dim=1, keepdim=True).expand(-1, num_distances - 1)
    distances = range(2, num_distances + 1)
    given, right = marginals.probabilities.double(), (marginals.ranks == 0).double()
    return (
        fit_attenuation(distances, (inside @ given)[:, 1:], counts, seed),
        fit_attenuation(distances, (inside @ right)[:, 1:], counts, seed),
    )


def marginal_estimates(marginals: Marginals, seed: int = 0) -> list[dict[str, Estimate | float]]:
    """Return, per distance from 1, top-k accuracies, mean probability and what was covered."""
    numbers = marginals.answers.unique()
    inside = (marginals.answers == numbers[:, None]).double()
    counts = inside.sum(dim=1)
    return [
        {
            **{f"top{k}": ratio(inside @ (ranks < k).double(), counts, seed) for k in TOP_KS},
            "mean_probability": ratio(inside @ given.double(), counts, seed),
            "covered": covered.double().mean().item(),
        }
        for ranks, given, covered in zip(
            marginals.ranks.T, marginals.probabilities.T, marginals.covered.T, strict=True
        )
    ]
