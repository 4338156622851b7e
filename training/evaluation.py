"""Evaluate heads: the ranks they give the target tokens, and the acceptance length that results.

The simulation applies the decoder's schedule (`leaps_lmtp.drafts`) to teacher-forced states, so it needs
one forward pass per answer and no decoding. On greedy answers of the backbone, the simulated acceptance
lengths equal the decoder's, up to rounding.

Shapes: `L` tokens of one example, `A` draft distances, `K·H` numbers that heads read of each token,
`n` tokens, `D` draft vocabulary size.
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

MAX_RANK = 10  # ranks from here on all mean "not among the candidates"


@dataclass(frozen=True)
class HeadReport:
    """The quality of the heads on held-out answers.

    Args:
        accuracies: `accuracies[a - 1][r]` is the share of targets at distance `a` that equal the
            candidate of rank `r` (from 0).
        chain_tokens_per_step: simulated tokens per step τ of the top-1 chain, with the bonus token.
        tokens: number of answer tokens.
    """

    accuracies: list[list[float]]
    chain_tokens_per_step: float
    tokens: int

    def as_dict(self) -> dict[str, object]:
        """Return the report as JSON-serialisable values."""
        return asdict(self)

    def summary(self) -> str:
        """Return the report in one line."""
        top1 = ", ".join(f"{row[0]:.2f}" for row in self.accuracies)
        return (
            f"top-1 accuracy per draft distance {top1}; simulated tokens per step of the chain "
            f"{self.chain_tokens_per_step:.2f}"
        )

    def metrics(self) -> dict[str, float]:
        """Return the report as metrics of a Trainer: name and number."""
        top1 = {f"top1_distance_{a}": row[0] for a, row in enumerate(self.accuracies, start=1)}
        return {"tokens_per_step": self.chain_tokens_per_step, **top1}


@torch.no_grad()
def answer_states(model: LMTPForCausalLM, example: Example) -> torch.Tensor:
    """Return the teacher-forced states that the heads read, `(L, K·H)`."""
    input_ids = torch.tensor([example.input_ids], device=model.device)
    with model.head_states(num_logits=1) as states:
        model.backbone(input_ids=input_ids, use_cache=False)
    return states[0][0]


@torch.no_grad()
def draft_ranks(
    model: LMTPForCausalLM, example: Example, states: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the rank of each target among the candidates that the heads draft from each root.

    Args:
        model: a model with leap heads.
        example: the answer.
        states: `(L, K·H)`, see `answer_states`; computed if not given.

    Returns:
        `(A, L)`: `[a - 1, r]` is the rank of token `r + a` among the candidates drafted for distance
        `a` when token `r` is the root, that is from state `r - 1 - look_back`. It is `MAX_RANK` if the
        rank is that low or the token cannot be drafted.
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
        first_root = 1 + draft.look_back  # its draft is read from the first state
        ranks[draft.distance - 1, first_root:][: len(rank_of_target)] = rank_of_target
    return ranks


def _draft_targets(model: LMTPForCausalLM, input_ids: torch.Tensor) -> torch.Tensor:
    """Return each token's index in the heads' logits, `(L,)`; `IGNORE_INDEX` if it has none."""
    token_ids = model.config.draft_token_ids
    if token_ids is None:
        return input_ids[0]
    vocab_size, _ = unembedding_size(model.backbone)
    return draft_labels(input_ids[0], token_ids, vocab_size, IGNORE_INDEX)


def _ranks(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the targets' ranks in logits `(n, D)`, from 0 to `MAX_RANK`, `(n,)`."""
    target_logits = logits.gather(1, targets.clamp(min=0)[:, None])
    ranks = (logits > target_logits).sum(dim=1).clamp(max=MAX_RANK)
    return torch.where(targets == IGNORE_INDEX, MAX_RANK, ranks)


def simulated_steps(ranks: torch.Tensor, tree: DraftTree, start: int) -> list[int]:
    """Return the number of tokens that each decoding step would emit, with the bonus token.

    Args:
        ranks: `(A, L)`, see `draft_ranks`.
        tree: the draft tree.
        start: position of the first root: the answer's first token, which the prefill emits.
    """
    ranks_by_root = ranks.T.tolist()
    paths = set(tree.paths)
    steps, root, length = [], start, len(ranks_by_root)
    while root < length - 1:
        accepted: tuple[int, ...] = ()
        while len(accepted) < tree.depth and root + len(accepted) + 1 < length - 1:
            longer = (*accepted, ranks_by_root[root][len(accepted)])
            if longer not in paths:
                break
            accepted = longer
        steps.append(len(accepted) + 1)
        root += len(accepted) + 1
    return steps


def tokens_per_step(
    ranks: Iterable[torch.Tensor], examples: Iterable[Example], tree: DraftTree
) -> float:
    """Return the simulated tokens per step τ over all steps of the examples; plain decoding has 1."""
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
    """Evaluate the heads on held-out examples.

    Args:
        model: a model with leap heads.
        examples: the answers.
        progress: show a progress bar.

    Returns:
        The report, and the ranks `(A, L)` of each example on the CPU, see `draft_ranks`.
    """
    was_training = model.training
    model.eval()
    bar = tqdm(examples, desc="evaluating heads", unit="answer", disable=not progress)
    all_ranks = [draft_ranks(model, example).cpu() for example in bar]
    model.train(was_training)
    num_distances = len(drafts(model.config.leap_offsets))
    report = HeadReport(
        accuracies=[_accuracies(all_ranks, examples, a) for a in range(1, num_distances + 1)],
        chain_tokens_per_step=tokens_per_step(all_ranks, examples, DraftTree.chain(num_distances)),
        tokens=sum(len(example.input_ids) - example.answer_start for example in examples),
    )
    return report, all_ranks


def _accuracies(
    all_ranks: Sequence[torch.Tensor], examples: Sequence[Example], distance: int
) -> list[float]:
    """Return the share of targets at a distance that have rank 0, 1, …, `MAX_RANK - 1`."""
    # Any answer token may be a root, as long as its target is within the answer
    ranks = torch.cat(
        [
            ranks[distance - 1, example.answer_start : ranks.shape[1] - distance]
            for ranks, example in zip(all_ranks, examples, strict=True)
        ]
    )
    hits = torch.bincount(ranks, minlength=MAX_RANK + 1)[:MAX_RANK]
    return (hits / max(1, len(ranks))).tolist()
