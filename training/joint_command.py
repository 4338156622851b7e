"""`lmtp joint`: from a checkpoint and answers to an adapter that tunes backbone and heads together."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from modeling_lmtp.conversion.command_line import console
from modeling_lmtp.conversion.loading import adapter_config, load_lmtp, load_tokenizer
from modeling_lmtp.transformers_lmtp import commit_of

from .arguments import JointTrainingArguments
from .evaluation import evaluate_heads
from .joint_trainer import JointTrainer
from .processes import processes
from .training_run import RunOptions, TrainingRun


@dataclass
class JointOptions(RunOptions):
    """What a joint run trains, on what, and what is saved."""

    title: ClassVar[str] = "data"

    merge: bool = field(
        default=False, metadata={"help": "Save a full checkpoint in place of an adapter."}
    )


def joint(options: JointOptions, args: JointTrainingArguments) -> None:
    """Tune backbone and leap heads together with LoRA (stage 2), and save the adapter.

    MODEL is a checkpoint whose heads are trained. The adapter loads with
    `PeftModel.from_pretrained(LMTPForCausalLM.from_pretrained(MODEL), OUTPUT)`.

    Examples:
    lmtp joint me/heads answers.jsonl adapter --kl_weight 0.1
    lmtp joint me/heads answers.jsonl tuned --merge --head_learning_rate 1e-3
    """
    run = TrainingRun("lmtp joint", options, args)
    if (adapter := adapter_config(options.model)) is not None:
        raise ValueError(
            f"{options.model!r} is an adapter, and a second one would be of no use without it. Tune "
            f"{adapter.base_model_name_or_path!r}, which it was trained on, or train the adapter again "
            "with --merge and tune what that saves."
        )
    tokenizer = load_tokenizer(options.model)
    model = load_lmtp(options.model, options.dtype)
    revision = commit_of(model.config)
    run.read_answers(model, tokenizer)
    before = evaluate_heads(model, run.held_out)[0] if run.held_out and model.leap_heads else None
    reports: dict[str, Any] = {"heads_before": before}
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
    saved: Any = trainer.model.merge_and_unload() if options.merge else trainer.model
    run.save(saved, tokenizer, trainer, record)
    if not processes().is_main_process:
        return
    names = {
        "drift": "Drift from the original backbone",
        "heads_before": "Heads before",
        "heads_after": "Heads after",
    }
    for name, text in names.items():
        if reports[name] is not None:
            console.print(f"{text}: {reports[name].summary()}.", soft_wrap=True)
    what = "the tuned checkpoint" if options.merge else "the adapter"
    console.print(f"Saved {what} in {options.output}.", soft_wrap=True)
