"""How good heads are: how they rank the right token, and the acceptance length that follows.

Everything uses the decoder's own schedule (`leaps_lmtp.drafts`) on teacher-forced states, so it says
what decoding will see, without running it. On the backbone's own greedy answers the simulated
acceptance is the decoder's, up to rounding.

Shapes: `L` tokens of one example, `A` draft distances, `V` vocabulary size.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from tqdm.auto import tqdm

from modeling_lmtp.backbone_lmtp import unembedding_size
from modeling_lmtp.leaps_lmtp import drafts
from modeling_lmtp.losses_lmtp import IGNORE_INDEX
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.tree_lmtp import DraftTree
from modeling_lmtp.unembeddings_lmtp import draft_labels

from .examples import Example

MAX_RANK = 10  # ranks beyond count as "not among the candidates"


@dataclass(frozen=True)
class HeadReport:
    """What held-out answers say of the heads.

    Args:
        accuracies: `accuracies[a - 1][r]`, how often the rank-`r` candidate for distance `a` is the
            right token.
        chain_tokens_per_step: tokens per step τ of the top-1 chain, the bonus token included.
        tokens: answer tokens looked at.
    """

    accuracies: list[list[float]]
    chain_tokens_per_step: float
    tokens: int

    def as_dict(self) -> dict[str, object]:
        """Return the report as JSON-serialisable values."""
        return asdict(self)

    def summary(self) -> str:
        """Return the report in a sentence."""
        top1 = ", ".join(f"{row[0]:.2f}" for row in self.accuracies)
        return (
            f"top-1 accuracy per draft distance {top1}; simulated tokens per step of the chain "
            f"{self.chain_tokens_per_step:.2f}"
        )

    def metrics(self) -> dict[str, float]:
        """Return the report as numbers by name, as a Trainer logs them."""
        top1 = {f"top1_distance_{a}": row[0] for a, row in enumerate(self.accuracies, start=1)}
        return {"tokens_per_step": self.chain_tokens_per_step, **top1}


@torch.no_grad()
def answer_states(model: LMTPForCausalLM, example: Example) -> torch.Tensor:
    """Return what the heads read of an answer, teacher-forced, `(L, K·H)`."""
    input_ids = torch.tensor([example.input_ids], device=model.device)
    with model.head_states(num_logits=1) as states:
        model.backbone(input_ids=input_ids, use_cache=False)
    return states[0][0]


@torch.no_grad()
def draft_ranks(
    model: LMTPForCausalLM, example: Example, states: torch.Tensor | None = None
) -> torch.Tensor:
    """Rank the right token among what would be drafted, from every root of the answer.

    Args:
        model: the heads.
        example: the answer.
        states: `(L, K·H)`, if known; see `answer_states`.

    Returns:
        `(A, L)`: `[a - 1, r]` is the rank of token `r + a` among the candidates drafted for distance
        `a` when token `r` is the root, that is from state `r - 1 - look_back`; `MAX_RANK` where it
        is not among the first or cannot be drafted.
    """
    input_ids = torch.tensor([example.input_ids], device=model.device)
    length = input_ids.shape[1]
    schedule = drafts(model.config.leap_offsets)
    ranks = torch.full((len(schedule), length), MAX_RANK, device=model.device)
    states = answer_states(model, example) if states is None else states
    targets = _draft_targets(model, input_ids)
    for draft in schedule:
        offset = model.config.leap_offsets[draft.head]
        if offset >= length:
            continue
        logits = model.leap_logits(draft.head, states[None], input_ids, draft.look_back)
        rank_of_target = _ranks(logits[0, :-offset], targets[offset:])
        first_root = 1 + draft.look_back  # the root whose state is the example's first
        ranks[draft.distance - 1, first_root:][: len(rank_of_target)] = rank_of_target
    return ranks


def _draft_targets(model: LMTPForCausalLM, input_ids: torch.Tensor) -> torch.Tensor:
    """Return each token's row in the heads' logits, `(L,)`; `IGNORE_INDEX` if it has none."""
    token_ids = model.config.draft_token_ids
    if token_ids is None:
        return input_ids[0]
    vocab_size, _ = unembedding_size(model.backbone)
    return draft_labels(input_ids[0], token_ids, vocab_size, IGNORE_INDEX)


def _ranks(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Count the tokens that beat the target, at most `MAX_RANK`: `(n, D)`, `(n,)` to `(n,)`."""
    target_logits = logits.gather(1, targets.clamp(min=0)[:, None])
    beaten_by = (logits > target_logits).sum(dim=1).clamp(max=MAX_RANK)
    return torch.where(targets == IGNORE_INDEX, MAX_RANK, beaten_by)


def simulated_steps(ranks: torch.Tensor, tree: DraftTree, start: int) -> list[int]:
    """Return the tokens that each decoding step would emit, the bonus token included.

    Args:
        ranks: `(A, L)`, see `draft_ranks`.
        tree: the draft tree.
        start: the first root, the answer's first token (the prefill emits it).
    """
    by_root = ranks.T.tolist()
    paths = set(tree.paths)
    steps, root, length = [], start, len(by_root)
    while root < length - 1:
        accepted: tuple[int, ...] = ()
        while len(accepted) < tree.depth and root + len(accepted) + 1 < length - 1:
            longer = (*accepted, by_root[root][len(accepted)])
            if longer not in paths:
                break
            accepted = longer
        steps.append(len(accepted) + 1)
        root += len(accepted) + 1
    return steps


def tokens_per_step(
    ranks: Iterable[torch.Tensor], examples: Iterable[Example], tree: DraftTree
) -> float:
    """Return the simulated tokens per step τ over examples; 1 is plain decoding."""
    steps = [
        step
        for example_ranks, example in zip(ranks, examples, strict=True)
        for step in simulated_steps(example_ranks, tree, example.answer_start)
    ]
    return sum(steps) / len(steps) if steps else 1.0


def evaluate_heads(
    model: LMTPForCausalLM,
    examples: Sequence[Example],
    *,
    progress: bool = False,
) -> tuple[HeadReport, list[torch.Tensor]]:
    """Evaluate the heads on held-out examples; return the report and each example's ranks.

    Args:
        model: the heads.
        examples: the answers.
        progress: show a progress bar.
    """
    was_training = model.training
    model.eval()
    bar = tqdm(examples, desc="evaluate heads", unit="answer", disable=not progress)
    all_ranks = []
    for example in bar:
        all_ranks.append(draft_ranks(model, example).cpu())
    model.train(was_training)
    num_distances = len(drafts(model.config.leap_offsets))
    # A root may be any answer token, and its candidates may not lie beyond the end
    counted = [
        [
            ranks[a, example.answer_start : ranks.shape[1] - a - 1]
            for ranks, example in zip(all_ranks, examples, strict=True)
        ]
        for a in range(num_distances)
    ]
    accuracies = [
        torch.bincount(torch.cat(rows), minlength=MAX_RANK + 1)[:MAX_RANK] for rows in counted
    ]
    report = HeadReport(
        accuracies=[
            (hits / max(1, sum(map(len, rows)))).tolist()
            for hits, rows in zip(accuracies, counted, strict=True)
        ],
        chain_tokens_per_step=tokens_per_step(all_ranks, examples, DraftTree.chain(num_distances)),
        tokens=sum(len(example.input_ids) - example.answer_start for example in examples),
    )
    return report, all_ranks
