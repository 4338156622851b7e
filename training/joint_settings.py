"""How backbone and heads are tuned together."""

from dataclasses import dataclass

from .adapters import HeadTraining


@dataclass(frozen=True)
class JointSettings:
    """How backbone and heads are tuned together; the defaults are the paper's where it names any.

    Baselines on the same data: `leap_loss_weight=0` is NTP (the heads stay as they are), and a
    checkpoint with offsets 2, 3, 4, … is MTP.

    Args:
        learning_rate: of the backbone's adapters.
        head_learning_rate: of the heads; None is `learning_rate`, as in the paper.
        leap_loss_weight: β.
        kl_weight: weight of `KL(original ‖ tuned)` of the next token, beside the NTP loss.
        rank, alpha, dropout: LoRA's.
        heads: `"lora"`, or `"full"` to train all of the heads' weights and keep them in the adapter.
        warmup_share: of the steps; then a cosine down to 0.
        activation_checkpointing: compute the backbone's layers twice, and keep less of them.

    Raises ValueError naming the argument, the value and what is allowed.
    """

    epochs: float = 3.0
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-5
    head_learning_rate: float | None = None
    leap_loss_weight: float = 0.1
    kl_weight: float = 0.0
    rank: int = 32
    alpha: int = 16
    dropout: float = 0.0
    heads: HeadTraining = "lora"
    warmup_share: float = 0.1
    weight_decay: float = 0.0
    seed: int = 0
    logging_steps: int = 10
    save_steps: int = 200
    train_on_prompts: bool = False
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        counts = (
            "batch_size",
            "gradient_accumulation_steps",
            "rank",
            "logging_steps",
            "save_steps",
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        for name in ("epochs", "learning_rate", "head_learning_rate", "alpha"):
            value = getattr(self, name)
            if not (value is None and name == "head_learning_rate") and not value > 0:
                raise ValueError(f"{name}: expected more than 0, got {value}")
        for name in ("leap_loss_weight", "kl_weight", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        for name in ("warmup_share", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 0 or more, below 1, got {getattr(self, name)}")
        if self.heads not in ("lora", "full"):
            raise ValueError(
                f"heads: expected 'lora' or 'full', got {self.heads!r}; leap_loss_weight=0 leaves "
                "them as they are"
            )

    @property
    def head_training(self) -> HeadTraining:
        """How the heads train: not at all where their loss does not count."""
        return self.heads if self.leap_loss_weight else "none"
