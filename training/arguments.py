"""Arguments of the trainers: Transformers' `TrainingArguments`, with options for leap heads."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from modeling_lmtp.conversion.options import HIDDEN, Options, Range, check_options

from .curriculum import Curriculum
from .processes import process_state
from .sharding import pop_fsdp_flag

HeadTraining = Literal["lora", "full"]


class MayChangeOnResume:
    """Marks, in `Annotated`, an argument whose value may change when a run resumes."""


@dataclass
class HeadOptions(Options):
    """The leap heads to add to a backbone, see `LMTPForCausalLM.from_backbone`."""

    title: ClassVar[str] = "heads (a checkpoint can change only its draft vocabulary)"

    num_leap_heads: int | None = field(
        default=None, metadata={"help": "Number of leap heads; 3 by default."}
    )
    leap_stride: int | None = field(
        default=None, metadata={"help": "Leap k between neighbouring offsets; 2 by default."}
    )
    leap_offsets: list[int] | None = field(
        default=None, metadata={"help": "Offsets of the heads, such as 2 3 4, instead of both."}
    )
    head_context: str = field(
        default="0",
        metadata={"metavar": "N|path", "help": "Tokens after its state that a head reads too."},
    )
    head_input: str = field(
        default="last",
        metadata={"help": "States that heads read: last, or weighted for all layers."},
    )
    num_head_layers: int = field(default=1, metadata={"help": "Residual blocks per head."})
    share_lm_head: bool = field(
        default=True, metadata={"help": "Give each head its own unembedding."}
    )
    lm_head_rank: int = field(
        default=0, metadata={"help": "Rank of each head's update to the shared unembedding."}
    )
    draft_vocab_size: int | None = field(
        default=None, metadata={"help": "Draft only the N most frequent tokens of the answers."}
    )

    def __post_init__(self) -> None:
        """Check `head_context`; the model's configuration checks the other options."""
        super().__post_init__()
        if self.head_context != "path" and not self.head_context.isdecimal():
            raise ValueError(
                f"head_context must be a number of tokens or path, got {self.head_context!r}."
            )


@dataclass
class OutputArguments(TrainingArguments, Options):
    """How often a run logs, evaluates and saves."""

    title: ClassVar[str] = "output"

    logging_steps: Annotated[float, Range(gt=0), MayChangeOnResume] = field(
        default=10, metadata={"help": HIDDEN}
    )
    eval_strategy: Annotated[str, MayChangeOnResume] = field(
        default="epoch",
        metadata={"help": "When to evaluate: epoch, steps (--eval_steps) or no."},
    )
    save_steps: Annotated[float, Range(gt=0), MayChangeOnResume] = field(
        default=200, metadata={"help": "Save a checkpoint every N steps, to resume from."}
    )
    save_total_limit: Annotated[int | None, Range(ge=1), MayChangeOnResume] = field(
        default=2, metadata={"help": HIDDEN}
    )


@dataclass
class AnswerTrainingArguments(OutputArguments):
    """Arguments of both stages; the base of `LeapTrainingArguments` and `JointTrainingArguments`."""

    title: ClassVar[str] = "training"

    num_train_epochs: Annotated[float, Range(gt=0)] = field(
        default=1.0, metadata={"help": "Number of passes over the answers."}
    )
    per_device_train_batch_size: Annotated[int, Range(ge=1), MayChangeOnResume] = field(
        default=8, metadata={"help": "Answers (or packs) per batch and process."}
    )
    gradient_accumulation_steps: Annotated[int, Range(ge=1), MayChangeOnResume] = field(
        default=1, metadata={"help": HIDDEN}
    )
    learning_rate: Annotated[float, Range(gt=0)] = field(
        default=1e-3, metadata={"help": "Peak learning rate (AdamW)."}
    )
    warmup_steps: Annotated[float, Range(ge=0)] = field(default=0.1, metadata={"help": HIDDEN})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": HIDDEN})
    seed: Annotated[int, Range(ge=0)] = field(default=0, metadata={"help": HIDDEN})
    max_length: Annotated[int, Range(ge=1)] = field(
        default=1024, metadata={"help": "Truncate answers with their prompt, or fill packs."}
    )
    train_on_prompts: bool = field(
        default=False, metadata={"help": "Also train on the tokens of the prompts."}
    )

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: names the argument, the value and what is allowed.
        """
        check_options(self)
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor must be 0, got {self.label_smoothing_factor}: with it the "
                "Trainer withholds the labels from the model, which computes the loss of the heads."
            )
        process_state()  # first, because `TrainingArguments` sets up CPU processes differently
        if not torch.accelerator.is_available():
            self.use_cpu = True
            self.dataloader_pin_memory = False
        self.remove_unused_columns = False  # the collator needs all columns of our datasets
        self.logging_nan_inf_filter = False  # the trainers stop at a loss that is not finite
        super().__post_init__()
        missing = sorted({*self.report_to} - {*get_available_reporting_integrations(), "flyte"})
        if (
            missing
        ):  # the Trainer would say so only after the model is loaded and the answers are read
            raise ValueError(
                f"report_to: {', '.join(missing)} cannot be used here. Install the package (`pip install "
                f"{' '.join(missing)}`), or report to none."
            )


@dataclass
class LeapTrainingArguments(AnswerTrainingArguments):
    """Arguments of `LeapTrainer`; except for the epochs, the defaults are those of arXiv 2505.17505.

    All other arguments of `transformers.TrainingArguments` are accepted too.

    Args:
        max_length: length of a pack with `packing`, otherwise of prompt plus answer, in tokens.
        train_on_prompts: also train on the tokens of the prompts.
        packing: put several answers into one sequence.
        distillation_weight, distillation_temperature: `w` and `T` of `HeadObjective`.
        curriculum, curriculum_share: which heads train at which step, see `active_heads`.
        state_folder: caches the backbone's states on disk, see `StateCache`.
        shard_backbone: shard the backbone across processes, see `sharding`.
    """

    packing: bool = field(
        default=False, metadata={"help": "Pack several answers into one sequence of --max_length."}
    )
    distillation_weight: Annotated[float, Range(ge=0, le=1)] = field(
        default=0.0, metadata={"help": "Weight w of the KL to the backbone's distribution."}
    )
    distillation_temperature: Annotated[float, Range(gt=0)] = field(
        default=1.0, metadata={"help": "Temperature of both distributions in that KL."}
    )
    curriculum: Curriculum = field(
        default="none",
        metadata={"metavar": "KIND", "help": "Add heads one by one: none, forward or reverse."},
    )
    curriculum_share: Annotated[float, Range(gt=0, le=1)] = field(
        default=0.5, metadata={"help": "Share of the steps over which the heads are added."}
    )
    state_folder: Annotated[str | None, MayChangeOnResume] = field(
        default=None,
        metadata={
            "metavar": "FOLDER",
            "help": "Cache the backbone's states there for further epochs and runs.",
        },
    )
    shard_backbone: Annotated[bool, MayChangeOnResume] = field(
        default=False, metadata={"help": "Shard the backbone across processes (FSDP)."}
    )

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: names the argument, the value and what is allowed.
        """
        if self.fsdp:
            raise ValueError(
                f"fsdp must be empty, got {self.fsdp!r}, which would shard the heads too. Pass "
                "shard_backbone, or launch with `accelerate launch --use_fsdp`, which does the same."
            )
        if pop_fsdp_flag():
            self.shard_backbone = True
        if self.shard_backbone and self.state_folder is not None:
            raise ValueError(
                f"state_folder must be None with shard_backbone, got {self.state_folder!r}: processes "
                "that share a backbone cannot read different answers. Leave out one of the two."
            )
        super().__post_init__()


@dataclass
class JointTrainingArguments(AnswerTrainingArguments):
    """Arguments of `JointTrainer`; the defaults are those of arXiv 2505.17505 where it gives any.

    All other arguments of `transformers.TrainingArguments` are accepted too. Baselines on the same data:
    `leap_loss_weight=0` is next-token prediction (NTP; the heads stay frozen), and a checkpoint with
    offsets 2, 3, 4, … is multi-token prediction (MTP).

    Args:
        learning_rate: of the backbone's adapters.
        head_learning_rate: of the heads; None uses `learning_rate`, as in the paper.
        leap_loss_weight: β.
        kl_weight: weight of `KL(original ‖ tuned)` of the next token, added to the NTP loss.
        lora_r, lora_alpha, lora_dropout: see `peft.LoraConfig`.
        head_training: `"lora"`, or `"full"` to train all weights of the heads and store them in the
            adapter.
    """

    num_train_epochs: Annotated[float, Range(gt=0)] = field(
        default=3.0, metadata={"help": "Number of passes over the answers."}
    )
    learning_rate: Annotated[float, Range(gt=0)] = field(
        default=1e-5, metadata={"help": "Peak learning rate of the backbone's adapters (AdamW)."}
    )
    head_learning_rate: Annotated[float | None, Range(gt=0)] = field(
        default=None, metadata={"help": "Peak rate of the heads; --learning_rate by default."}
    )
    leap_loss_weight: Annotated[float, Range(ge=0)] = field(
        default=0.1,
        metadata={"help": "Weight β of the heads' loss; 0 freezes the heads."},
    )
    kl_weight: Annotated[float, Range(ge=0)] = field(
        default=0.0, metadata={"help": "Weight of the KL to the original backbone."}
    )
    lora_r: Annotated[int, Range(ge=1)] = field(default=32, metadata={"help": "LoRA rank."})
    lora_alpha: Annotated[int, Range(gt=0)] = field(default=16, metadata={"help": "LoRA alpha."})
    lora_dropout: Annotated[float, Range(ge=0, lt=1)] = field(
        default=0.0, metadata={"help": "LoRA dropout."}
    )
    head_training: HeadTraining = field(
        default="lora", metadata={"help": "Train the heads with LoRA, or in full."}
    )
