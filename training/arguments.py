"""Arguments of the trainers: Transformers' `TrainingArguments`, with what leap heads add."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from transformers import TrainingArguments

from modeling_lmtp.conversion.options import Options, Range, check_options

from .curriculum import Curriculum
from .processes import processes
from .sharding import take_over_fsdp

HeadTraining = Literal["lora", "full"]


class SameRun:
    """Marks, in `Annotated`, an argument that a stopped run may resume with another value of."""


@dataclass
class HeadOptions(Options):
    """The heads to add to a backbone, see `LMTPForCausalLM.from_backbone`."""

    title: ClassVar[str] = "heads (not for a checkpoint that has some)"

    num_leap_heads: int | None = field(
        default=None, metadata={"help": "Number of leap heads; 3 by default."}
    )
    leap_stride: int | None = field(
        default=None, metadata={"help": "Distance between two offsets; 2 by default."}
    )
    leap_offsets: list[int] | None = field(
        default=None, metadata={"help": "The heads' offsets, such as 2 3 4, in place of both."}
    )
    head_context: str = field(
        default="0",
        metadata={
            "help": "Tokens after its state that a head reads: a number, or path for all, drafts too."
        },
    )
    head_input: str = field(
        default="last",
        metadata={"help": "last, or weighted to read the states of all layers."},
    )
    num_head_layers: int = field(default=1, metadata={"help": "Residual blocks per head."})
    share_lm_head: bool = field(
        default=True, metadata={"help": "Give each head an unembedding of its own."}
    )
    lm_head_rank: int = field(
        default=0, metadata={"help": "Rank of each head's update to the shared unembedding."}
    )
    draft_vocab_size: int | None = field(
        default=None, metadata={"help": "Draft only the answers' N most frequent tokens."}
    )

    def __post_init__(self) -> None:
        """Check `head_context`; the model's configuration checks the others."""
        super().__post_init__()
        if self.head_context != "path" and not self.head_context.isdecimal():
            raise ValueError(
                f"head_context must be a number of tokens, or path, got {self.head_context!r}."
            )


@dataclass
class OutputArguments(TrainingArguments):
    """What a run logs and saves."""

    title: ClassVar[str] = "output"

    logging_steps: Annotated[float, Range(gt=0), SameRun] = field(
        default=10, metadata={"help": "Log every N steps."}
    )
    eval_strategy: Annotated[str, SameRun] = field(
        default="epoch",
        metadata={"help": "Evaluate after each epoch, or every --eval_steps steps."},
    )
    save_steps: Annotated[float, Range(gt=0), SameRun] = field(
        default=200, metadata={"help": "Save a checkpoint to resume from every N steps."}
    )
    save_total_limit: Annotated[int | None, Range(ge=1), SameRun] = field(
        default=2, metadata={"help": "Number of such checkpoints to keep."}
    )


@dataclass
class AnswerTrainingArguments(OutputArguments):
    """What both stages share; the base of `LeapTrainingArguments` and `JointTrainingArguments`."""

    title: ClassVar[str] = "training"

    num_train_epochs: Annotated[float, Range(gt=0)] = field(
        default=1.0, metadata={"help": "Passes over the answers."}
    )
    per_device_train_batch_size: Annotated[int, Range(ge=1), SameRun] = field(
        default=8, metadata={"help": "Answers, or packs, per process."}
    )
    gradient_accumulation_steps: Annotated[int, Range(ge=1), SameRun] = field(
        default=1, metadata={"help": "Batches per optimizer step."}
    )
    learning_rate: Annotated[float, Range(gt=0)] = field(
        default=1e-3, metadata={"help": "Peak learning rate (AdamW)."}
    )
    warmup_steps: Annotated[float, Range(ge=0)] = field(
        default=0.1, metadata={"help": "Steps of linear warm-up; a share of all steps if below 1."}
    )
    lr_scheduler_type: str = field(
        default="cosine", metadata={"help": "Learning rate schedule after the warm-up."}
    )
    seed: Annotated[int, Range(ge=0)] = field(
        default=0, metadata={"help": "Seed of new weights and of the order of the answers."}
    )
    max_length: Annotated[int, Range(ge=1)] = field(
        default=1024, metadata={"help": "Cut prompt and answer, or fill packs, to N tokens."}
    )
    train_on_prompts: bool = field(
        default=False, metadata={"help": "Learn the tokens of the prompts as well."}
    )

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: names the argument, the value and what is allowed.
        """
        check_options(self)
        if self.label_smoothing_factor:
            raise ValueError(
                "label_smoothing_factor takes the labels away from the model, which computes the loss of "
                "the heads. Leave it at 0."
            )
        processes()  # joined before `TrainingArguments` joins them, in its own way, on CPUs
        if not torch.accelerator.is_available():
            self.use_cpu = True
            self.dataloader_pin_memory = False
        self.remove_unused_columns = False  # the datasets are ours, and hold nothing unused
        self.logging_nan_inf_filter = False  # the trainers stop at such a loss
        super().__post_init__()


@dataclass
class LeapTrainingArguments(AnswerTrainingArguments):
    """Arguments of `LeapTrainer`; the defaults are those of arXiv 2505.17505 but for the epochs.

    They take the place of those of `transformers.TrainingArguments` by the same name; all others of it
    are arguments as well.

    Args:
        max_length: tokens of a pack, if `packing`.
        train_on_prompts: also learn to predict the prompts' tokens.
        packing: put several answers into one sequence.
        distillation_weight, distillation_temperature: of the backbone's own distribution in the loss,
            see `HeadObjective`.
        curriculum, curriculum_share: heads that join one after another, see `active_heads`.
        state_folder: keeps the backbone's states of the answers, see `StateCache`.
        shard_backbone: shard the backbone across processes, see `sharding`.
    """

    packing: bool = field(
        default=False, metadata={"help": "Put several answers into one sequence of --max_length."}
    )
    distillation_weight: Annotated[float, Range(ge=0, le=1)] = field(
        default=0.0, metadata={"help": "Weight of the KL to the backbone's own distribution."}
    )
    distillation_temperature: Annotated[float, Range(gt=0)] = field(
        default=1.0, metadata={"help": "Temperature of both distributions in that KL."}
    )
    curriculum: Curriculum = field(
        default="none",
        metadata={"help": "Heads join one by one: near (forward) or far ones first."},
    )
    curriculum_share: Annotated[float, Range(gt=0, le=1)] = field(
        default=0.5, metadata={"help": "Share of the steps after which all heads have joined."}
    )
    state_folder: Annotated[str | None, SameRun] = field(
        default=None,
        metadata={
            "metavar": "FOLDER",
            "help": "Keep the backbone's states there, so that it reads each answer once.",
        },
    )
    shard_backbone: Annotated[bool, SameRun] = field(
        default=False, metadata={"help": "Shard the backbone across the processes (FSDP)."}
    )

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: names the argument, the value and what is allowed.
        """
        if self.fsdp:
            raise ValueError(
                f"fsdp={self.fsdp!r} would shard the heads as well. Pass shard_backbone, or launch with "
                "`accelerate launch --use_fsdp`, which means the same here."
            )
        if take_over_fsdp():
            self.shard_backbone = True
        if self.shard_backbone and self.state_folder is not None:
            raise ValueError(
                f"state_folder={self.state_folder!r} cannot be filled while the backbone is sharded: its "
                "processes read every answer together. Leave out one of the two."
            )
        super().__post_init__()


@dataclass
class JointTrainingArguments(AnswerTrainingArguments):
    """Arguments of `JointTrainer`; the defaults are those of arXiv 2505.17505 where it names any.

    They take the place of those of `transformers.TrainingArguments` by the same name; all others of it
    are arguments as well. Baselines on the same data: `leap_loss_weight=0` is NTP (the heads stay as
    they are), and a checkpoint with offsets 2, 3, 4, … is MTP.

    Args:
        learning_rate: of the backbone's adapters.
        head_learning_rate: of the heads; None is `learning_rate`, as in the paper.
        leap_loss_weight: β.
        kl_weight: weight of `KL(original ‖ tuned)` of the next token, added to the NTP loss.
        lora_r, lora_alpha, lora_dropout: see `peft.LoraConfig`.
        head_training: `"lora"`, or `"full"` to train all weights of the heads and keep them in the
            adapter.
    """

    num_train_epochs: Annotated[float, Range(gt=0)] = field(
        default=3.0, metadata={"help": "Passes over the answers."}
    )
    learning_rate: Annotated[float, Range(gt=0)] = field(
        default=1e-5, metadata={"help": "Peak learning rate of the backbone's adapters (AdamW)."}
    )
    head_learning_rate: Annotated[float | None, Range(gt=0)] = field(
        default=None, metadata={"help": "That of the heads; --learning_rate by default."}
    )
    leap_loss_weight: Annotated[float, Range(ge=0)] = field(
        default=0.1,
        metadata={"help": "Weight β of the heads' loss; 0 leaves the heads as they are."},
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
