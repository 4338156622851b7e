"""The rows of each study of `ablation.py`: kinds of heads, and how they are trained."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One kind of heads, and what its recipe has of its own.

    Args:
        offsets: of the heads.
        shape: other settings of the heads, see `HeadOptions`.
        settings: of training.
        seeds: how many times it is trained.
        joint: the backbone is tuned along (LoRA, whole heads).
        trained: starts from the heads of the checkpoint, not from heads that know nothing yet.
        num_answers: how many of the answers it learns, the first ones; all if None.
        epochs: how often; the command's `--epochs` if None.
        trial: what is changed about the heads, one of `TRIALS`.
    """

    offsets: tuple[int, ...]
    shape: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    seeds: int = 1
    joint: bool = False
    trained: bool = False
    num_answers: int | None = None
    epochs: int | None = None
    trial: str | None = None


KINDS = {
    "paper's heads, k = 2": Row((3, 5, 7), seeds=3),
    "paper's heads, k = 1": Row((2, 3, 4), seeds=3),
    "path-grounded, k = 1": Row((2, 3, 4), {"head_context": "path"}, seeds=3),
    "grounded by 1, k = 1": Row((2, 3, 4), {"head_context": "1"}, seeds=3),
    "grounded by 2, k = 2": Row((3, 5, 7), {"head_context": "2"}),
    "grounded by 2, mixed": Row((2, 3, 5), {"head_context": "2"}),
    "paper's heads, mixed": Row((2, 3, 5)),
    "paper's heads, even": Row((2, 4, 6)),
    "paper's heads, k = 1, 6 heads": Row((2, 3, 4, 5, 6, 7)),
    "grounded by 1, k = 1, 6 heads": Row((2, 3, 4, 5, 6, 7), {"head_context": "1"}),
    "path-grounded, k = 2": Row((3, 5, 7), {"head_context": "path"}),
    "path-grounded, 4 heads": Row((2, 3, 4, 5), {"head_context": "path"}),
    "path-grounded, 2 blocks": Row((2, 3, 4), {"head_context": "path", "num_head_layers": 2}),
    "path-grounded, soft targets": Row(
        (2, 3, 4), {"head_context": "path"}, {"distillation_weight": 0.5}
    ),
    "paper's heads, k = 1, soft targets": Row((2, 3, 4), {}, {"distillation_weight": 0.5}),
    "paper's heads, k = 1, weighted states": Row((2, 3, 4), {"head_input": "weighted"}),
    "paper's heads, k = 1, joint": Row((2, 3, 4), settings={"learning_rate": 2e-4}, joint=True),
}


def of_data(
    num_answers: int,
    epochs: int = 1,
    trial: str | None = None,
    offsets: tuple[int, ...] = (2, 3, 4),
    **shape: Any,
) -> Row:
    """Return a row of path-grounded heads with two blocks, but for what is said."""
    shape = {"head_context": "path", "num_head_layers": 2, **shape}
    return Row(offsets, shape, num_answers=num_answers, epochs=epochs, trial=trial)


DATA = {
    "path-grounded, 1,250 answers": of_data(1250),
    "path-grounded, 2,500 answers": of_data(2500),
    "path-grounded, 5,000 answers": of_data(5000),
    "path-grounded, 10,000 answers": of_data(10000),
    "path-grounded, 5,000 answers twice": of_data(5000, 2),
    "5,000 answers, attention layer": of_data(5000, trial="attention"),
    "2,500 answers, draft vocabulary of 12,288": of_data(2500, draft_vocab_size=12288),
    "2,500 answers, draft vocabulary of 4,096": of_data(2500, draft_vocab_size=4096),
    "2,500 answers, draft vocabulary of 2,048": of_data(2500, draft_vocab_size=2048),
    "2,500 answers, one wide block": of_data(2500, trial="wide", num_head_layers=1),
    "2,500 answers, low-rank unembedding": of_data(2500, lm_head_rank=64),
    "2,500 answers, one block": of_data(2500, num_head_layers=1),
    "2,500 answers, four heads": of_data(2500, offsets=(2, 3, 4, 5)),
    "2,500 answers, paper's heads": of_data(2500, head_context="0"),
}


def of_joint(joint: bool = True, **settings: Any) -> Row:
    """Return a row that trains the heads of the checkpoint further."""
    rates = (
        {"learning_rate": 2e-4, "head_learning_rate": 5e-4} if joint else {"learning_rate": 5e-4}
    )
    return Row((2, 3, 4), settings={**rates, **settings}, joint=joint, trained=True)


JOINT = {
    "frozen backbone": of_joint(joint=False),
    "joint, no KL": of_joint(),
    "joint, KL weight 1": of_joint(kl_weight=1.0),
    "joint, KL weight 10": of_joint(kl_weight=10.0),
    "joint, β = 1, KL weight 1": of_joint(leap_loss_weight=1.0, kl_weight=1.0),
    "joint, β = 1, KL weight 10": of_joint(leap_loss_weight=1.0, kl_weight=10.0),
}
STUDIES = {"kinds": KINDS, "data": DATA, "joint": JOINT}
