"""Head warm-up (stage 1): the backbone stays frozen, the leap heads learn its own answers.

`transformers.Trainer` does the training (see `trainer`), in one process or several; its checkpoints hold
the heads alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed

from modeling_lmtp.modeling_lmtp import LMTPForCausalLM

from .curriculum import CURRICULA, NONE
from .evaluation import HeadReport, evaluate_heads
from .examples import AnswerDataset, Example, check_targets, collate
from .fingerprints import model_fingerprint
from .guarded_trainer import last_whole_checkpoint, take_off_autocast
from .objective import HeadObjective
from .packing import PackedDataset, check_isolation, collate_packs
from .runs import claim_run_folder, examples_sha256
from .sharding import shard_backbone, take_over_fsdp
from .state_cache import StateCache
from .trainer import HeldOutCallback, LeapTrainer

HEAD_SETTINGS = (
    "leap_offsets",
    "head_context",
    "head_input",
    "num_head_layers",
    "share_lm_head",
    "lm_head_rank",
    "draft_token_ids",
    "base_model_name_or_path",
)


@dataclass(frozen=True)
class WarmupSettings:
    """How heads are warmed up; the defaults are the paper's, but for the length of the run.

    Raises ValueError naming the argument, the value and what is allowed.
    """

    epochs: float = 1.0
    batch_size: int = 8  # per process
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3
    warmup_share: float = 0.1  # of the steps; then a cosine down to 0
    weight_decay: float = 0.0
    seed: int = 0
    logging_steps: int = 10
    save_steps: int = 200
    eval_steps: int | None = None  # evaluate held-out answers so often, besides after each epoch
    train_on_prompts: bool = False
    pack_length: int | None = None  # pack answers into sequences of at most so many tokens
    distillation_weight: float = 0.0  # of the backbone's own distribution, see `HeadObjective`
    distillation_temperature: float = 1.0
    curriculum: str = NONE  # or "forward" or "reverse", see `active_heads`
    curriculum_share: float = 0.5  # of the steps, over which the heads join
    shard_backbone: bool = False  # among the processes, see `sharding`

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        for name in ("batch_size", "gradient_accumulation_steps", "logging_steps", "save_steps"):
            self._require(name, getattr(self, name) >= 1, "1 or more")
        for name in ("eval_steps", "pack_length"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "None, or 1 or more")
        for name in ("epochs", "learning_rate", "distillation_temperature"):
            self._require(name, getattr(self, name) > 0, "more than 0")
        self._require("warmup_share", 0 <= self.warmup_share < 1, "0 or more, below 1")
        self._require("distillation_weight", 0 <= self.distillation_weight <= 1, "from 0 to 1")
        self._require("curriculum", self.curriculum in CURRICULA, f"one of {', '.join(CURRICULA)}")
        self._require("curriculum_share", 0 < self.curriculum_share <= 1, "above 0 and at most 1")

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{name}: expected {allowed}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class WarmupReport:
    """The main process's log, and the heads' final evaluation if answers were held out."""

    log: list[dict[str, Any]]
    held_out: HeadReport | None


def warm_up(
    model: LMTPForCausalLM,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    run_folder: Path,
    settings: WarmupSettings,
    *,
    state_folder: Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> WarmupReport:
    """Train the leap heads of `model`, in place, on answers of its backbone.

    A backbone in bfloat16 stays so; the heads are kept in float32 while they train (autocast) and
    take the backbone's dtype at the end.

    Args:
        model: its backbone is frozen.
        examples: answers to learn.
        held_out: answers to evaluate on, may be empty.
        run_folder: holds checkpoints while training; the caller removes it when all is saved.
        settings: how to train. A run that was stopped goes on if they are the same; the global batch
            may be shared among another number of processes.
        state_folder: keeps the backbone's states of the answers, so that it reads each only once, in
            this run and others; see `state_cache`.
        resume: go on from the last checkpoint in `run_folder`, if there is one.
        progress: show a progress bar.

    Raises:
        ValueError: the backbone is not frozen, there are no heads or no targets, `run_folder` belongs
            to a run of another model or with other settings, or the backbone cannot keep packed
            answers apart.
        RuntimeError: the loss is not finite; names the step, and the file that its batch is in.
        OSError: a checkpoint could not be saved; the one before it stays.
    """
    _check_model(model)
    check_targets(examples, model.config.leap_offsets, train_on_prompts=settings.train_on_prompts)
    if take_over_fsdp():
        settings = replace(settings, shard_backbone=True)
    if settings.shard_backbone and state_folder is not None:
        raise ValueError(
            "state_folder: expected None while the backbone is sharded, whose processes pass answers "
            f"through it together; got {str(state_folder)!r}."
        )
    backbone_dtype = model.backbone.dtype
    arguments = _arguments(run_folder, settings, backbone_dtype, progress)
    answers = AnswerDataset(examples, train_on_prompts=settings.train_on_prompts)
    dataset, row_lengths = _dataset(answers, settings)
    identity = _identity(model, settings, examples, arguments.world_size)
    if settings.shard_backbone:
        shard_backbone(model, arguments.device, arguments.world_size)
    if settings.pack_length is not None and state_folder is None:
        check_isolation(model.backbone, settings.batch_size)
    with arguments.main_process_first(local=False):
        claim_run_folder(run_folder, identity)
    if state_folder is not None:
        answers.load_states = _known_states(model, examples, state_folder, arguments, progress)
    model.leap_heads.float()
    set_seed(settings.seed)
    trainer = LeapTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collate if settings.pack_length is None else collate_packs,
        callbacks=[HeldOutCallback(held_out, settings.eval_steps)],
        objective=HeadObjective(
            len(model.leap_heads), settings.distillation_weight, settings.distillation_temperature
        ),
        row_lengths=row_lengths,
        curriculum=settings.curriculum,
        curriculum_share=settings.curriculum_share,
    )
    try:
        trainer.train(resume_from_checkpoint=last_whole_checkpoint(run_folder) if resume else None)
    finally:
        take_off_autocast(model)
        model.leap_heads.to(backbone_dtype)
    model.eval()
    report = None
    if held_out:
        progress = progress and trainer.is_world_process_zero()
        report, _ = evaluate_heads(model, held_out, progress=progress)
    return WarmupReport(trainer.state.log_history, report)


def _known_states(
    model: LMTPForCausalLM,
    examples: Sequence[Example],
    folder: Path,
    arguments: TrainingArguments,
    progress: bool,
) -> Callable[[Example], torch.Tensor]:
    """Let the backbone read the answers, and return what looks their states up."""
    model.to(arguments.device)
    with arguments.main_process_first(local=False):
        cache = StateCache(folder, model)
    cache.fill(examples, progress=progress)
    return cache.load


def _dataset(
    answers: AnswerDataset, settings: WarmupSettings
) -> tuple[AnswerDataset | PackedDataset, list[int]]:
    """Return the rows to train on, and how many tokens each has."""
    if settings.pack_length is None:
        return answers, [len(example.input_ids) for example in answers.examples]
    packed = PackedDataset(answers, settings.pack_length)
    return packed, packed.lengths()


def _check_model(model: LMTPForCausalLM) -> None:
    if not model.leap_heads:
        raise ValueError("There are no leap heads to train: leap_offsets is empty.")
    if model.config.train_backbone:
        raise ValueError(
            "config.train_backbone is True. Warm-up freezes the backbone: load the model with "
            "train_backbone=False."
        )
    if model.backbone.dtype == torch.float16 and not torch.accelerator.is_available():
        raise ValueError(
            "The backbone is in float16, in which a CPU does not train. Load it with dtype bfloat16 or "
            "float32."
        )


def _identity(
    model: LMTPForCausalLM, settings: WarmupSettings, examples: Sequence[Example], world_size: int
) -> dict[str, Any]:
    """Return what makes a run this run.

    How a global batch is shared among processes and steps of accumulation is left open.
    """
    identity = asdict(settings)
    del identity["shard_backbone"]
    rows_per_step = identity.pop("batch_size") * identity.pop("gradient_accumulation_steps")
    heads = {name: getattr(model.config, name) for name in HEAD_SETTINGS}
    return {
        **identity,
        **heads,
        "global_batch_size": rows_per_step * world_size,
        "checkpoint": model_fingerprint(model),
        "examples_sha256": examples_sha256(examples),
    }


def _arguments(
    run_folder: Path, settings: WarmupSettings, backbone_dtype: torch.dtype, progress: bool
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(run_folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_share,
        lr_scheduler_type="cosine",
        weight_decay=settings.weight_decay,
        seed=settings.seed,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        save_steps=settings.save_steps,
        save_total_limit=2,
        bf16=backbone_dtype == torch.bfloat16,
        fp16=backbone_dtype == torch.float16,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        ddp_find_unused_parameters=settings.curriculum != NONE,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=not progress,
    )
