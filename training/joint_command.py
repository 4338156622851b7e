"""`lmtp joint`: tune backbone and heads of a checkpoint together, and save a LoRA adapter."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from modeling_lmtp.conversion.command_line import console
from modeling_lmtp.conversion.loading import adapter_config, load_lmtp, load_tokenizer
from modeling_lmtp.transformers_lmtp import commit_of

from .arguments import JointTrainingArguments
from .drift import DriftReport
from .evaluation import HeadReport, evaluate_heads
from .joint_trainer import JointTrainer
from .processes import process_state
from .training_run import RunOptions, TrainingRun


@dataclass
class JointOptions(RunOptions):
    """The checkpoint to tune, the answers, and the output."""

    title: ClassVar[str] = "data"

    merge: bool = field(
        default=False, metadata={"help": "Save a full checkpoint instead of an adapter."}
    )


def joint(options: JointOptions, args: JointTrainingArguments) -> None:
    """Tune backbone and leap heads together with LoRA (stage 2), and save the adapter.

    MODEL is a checkpoint with trained heads. Load the adapter with
    `PeftModel.from_pretrained(LMTPForCausalLM.from_pretrained(MODEL), OUTPUT)`.

    Examples:
    lmtp joint me/heads answers.jsonl adapter --kl_weight 0.1
    lmtp joint me/heads answers.jsonl tuned --merge --head_learning_rate 1e-3
    """
    run = TrainingRun("lmtp joint", options, args)
    if (adapter := adapter_config(options.model)) is not None:
        raise ValueError(
            f"model must be a checkpoint, got the adapter {options.model!r}, without which a second "
            f"adapter could not be loaded. Tune its base {adapter.base_model_name_or_path!r}, or train "
            "the adapter again with --merge and tune the resulting checkpoint."
        )
    tokenizer = load_tokenizer(options.model)
    model = load_lmtp(options.model, options.dtype)
    revision = commit_of(model.config)
    run.read_answers(model, tokenizer)
    before = evaluate_heads(model, run.held_out)[0] if run.held_out and model.leap_heads else None
    reports: dict[str, HeadReport | DriftReport | None] = {"heads_before": before}
    trainer = JointTrainer(model, args, run.examples, run.held_out, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=True)
    reports["heads_after"] = trainer.head_report(run.held_out)
    reports["drift"] = trainer.drift_report(run.held_out) if run.held_out else None
    record = {
        "checkpoint": options.model,
        "checkpoint_revision": revision,
        "merged": options.merge,
        "held_out": {name: report and report.as_dict() for name, report in reports.items()},
    }
    model_to_save: Any = trainer.model.merge_and_unload() if options.merge else trainer.model
    run.save(model_to_save, tokenizer, trainer, record)
    if process_state().is_main_process:
        _print_reports(reports)
        kind = "the tuned checkpoint" if options.merge else "the adapter"
        console.print(f"Saved {kind} in {options.output}.", soft_wrap=True)


def _print_reports(reports: dict[str, HeadReport | DriftReport | None]) -> None:
    titles = {
        "drift": "Drift from the original backbone",
        "heads_before": "Heads before",
        "heads_after": "Heads after",
    }
    for name, title in titles.items():
        if (report := reports[name]) is not None:
            console.print(f"{title}: {report.summary()}.", soft_wrap=True)
