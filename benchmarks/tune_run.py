"""`lmtp tune`: the best draft for this device, per batch size, written beside the checkpoint."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from rich.table import Table

from modeling_lmtp.conversion.command_line import console
from modeling_lmtp.conversion.loading import adapter_config, load_lmtp, load_tokenizer
from modeling_lmtp.conversion.options import Dtype, Options, Range
from modeling_lmtp.conversion.saving import check_settings
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.settings_lmtp import DRAFT_SHAPES, STRICT
from modeling_lmtp.training.answers import load_answers, unseen_answers, warn
from modeling_lmtp.training.evaluation import evaluate_heads
from modeling_lmtp.training.examples import Example, evenly
from modeling_lmtp.transformers_lmtp import attention_implementation

from .bench_methods import Method, plain_method
from .bench_report import rows
from .bench_runner import make_batches, measure, pad_id
from .conditions import device_name
from .quiet import measure_quietness
from .tuning import NOTHING, TunedDraft, choose_drafts

TRIAL_PROMPTS = 12
TRIAL_TOKENS = 64
HOPELESS = 0.9  # an expected speed-up below it is not tried


@dataclass
class TuneOptions(Options):
    """What to tune, and for what."""

    checkpoint: str = field(metadata={"help": "Folder or Hub id of a checkpoint with leap heads."})
    answers: Path = field(
        kw_only=True, metadata={"help": "Held-out answers of the backbone, made by `lmtp distill`."}
    )
    batch_sizes: list[Annotated[int, Range(ge=1)]] = field(
        default_factory=lambda: [1, 2, 4, 8], metadata={"help": "Batch sizes to tune for."}
    )
    num_answers: Annotated[int, Range(ge=1)] = field(
        default=64, metadata={"help": "Use N answers, spread evenly over the file."}
    )
    bad_rows: Literal["refuse", "skip"] = field(
        default="refuse",
        metadata={"help": "Refuse answers with a bad row, or skip and count such rows."},
    )
    dtype: Dtype = field(default="auto", metadata={"help": "Dtype of the model."})
    output: Path | None = field(
        default=None,
        metadata={
            "help": "Folder whose generation_config.json is written; the checkpoint by default."
        },
    )


@dataclass(frozen=True)
class Trial:
    """A draft that was tried.

    Args:
        expected: by simulation and step times.
        speed_up: when it decoded in turns with plain decoding.
    """

    expected: TunedDraft
    speed_up: float


@dataclass(frozen=True)
class Verdict:
    """What is written for one batch size.

    Args:
        trials: the best draft of each kind.
    """

    trials: Sequence[Trial]

    @property
    def best(self) -> Trial | None:
        """The fastest draft, if any is faster than plain decoding."""
        best = max(self.trials, key=lambda trial: trial.speed_up, default=None)
        return best if best is not None and best.speed_up > 1 else None

    @property
    def options(self) -> dict[str, Any]:
        """What is drafted: nothing, unless drafting has won."""
        return NOTHING if self.best is None else dict(self.best.expected.options)


def tune(
    model: LMTPForCausalLM, examples: Sequence[Example], batch_sizes: Sequence[int]
) -> dict[int, Verdict]:
    """Choose drafts for each batch size, and try them."""
    report, ranks = evaluate_heads(model, examples, progress=True)
    chosen = choose_drafts(model, report, ranks, examples, batch_sizes, progress=True)
    return {size: Verdict(try_out(model, examples, best, size)) for size, best in chosen.items()}


def try_out(
    model: LMTPForCausalLM, examples: Sequence[Example], drafts: Sequence[TunedDraft], size: int
) -> list[Trial]:
    """Decode some prompts plainly and with each draft that has a chance, in turns, `size` at a time."""
    hopeful = [d for d in drafts if d.speed_up > HOPELESS and d.options != NOTHING]
    if not hopeful:
        return []
    prompts = [example.input_ids[: example.answer_start] for example in examples]
    prompts = evenly(prompts, max(TRIAL_PROMPTS, size))
    batches = make_batches({"trial": prompts}, size, pad_id(model), model.device)
    methods = [plain_method(model)]
    methods += [
        Method(str(number), model, {"use_lmtp": STRICT, **draft.options})
        for number, draft in enumerate(hopeful)
    ]
    measured = measure(
        methods, batches, "greedy", max_new_tokens=TRIAL_TOKENS, rounds=1, stop_at_end=False
    )
    return [
        Trial(draft, row["speed_up_of_totals"])
        for draft, row in zip(hopeful, rows(measured, "")[1:], strict=True)
    ]


def set_drafts(
    model: LMTPForCausalLM, verdicts: Mapping[int, Verdict], conditions: dict[str, Any]
) -> None:
    """Put the drafts and their conditions into `generation_config`, in place of what was there.

    Args:
        model: whose `generation_config` it is.
        verdicts: by batch size.
        conditions: of the measurement.
    """
    config = model.generation_config
    for name in (*DRAFT_SHAPES, "draft_threshold"):
        if hasattr(config, name):
            delattr(config, name)
    config.draft_by_batch_size = {str(size): found.options for size, found in verdicts.items()}
    config.draft_conditions = {
        **conditions,
        "device": device_name(model.device),
        "dtype": str(model.backbone.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "attention": attention_implementation(model.backbone.config),
        "tried": {str(size): _figures(verdict) for size, verdict in verdicts.items()},
    }


def run_tune(options: TuneOptions) -> None:
    """Find the draft that is fastest on this device for each batch size, or none where drafting loses.

    The result goes into generation_config.json, which `generate` follows.

    Examples:
      lmtp tune OUT --answers held_out.jsonl
      lmtp tune OUT --answers held_out.jsonl --batch_sizes 1 8
    """
    folder = _check_folder(options)
    model, tokenizer = (
        load_lmtp(options.checkpoint, options.dtype),
        load_tokenizer(options.checkpoint),
    )
    check_settings(model.generation_config, use_lmtp=True)
    quietness = measure_quietness(model.device)
    for complaint in quietness.complaints():
        console.print(f"[yellow]This machine is not quiet: {complaint}.[/] Tune again when it is.")
    found = load_answers(options.answers, model, tokenizer, bad_rows=options.bad_rows)
    warn(found.notes)
    unseen = unseen_answers(options.checkpoint, options.answers, found.examples)
    if unseen:
        console.print(
            f"Tuning on the {len(unseen)} of these answers that the heads were not trained on."
        )
    elif unseen is not None:
        console.print(
            "[yellow]The heads were trained on all of these answers,[/] which makes large drafts look "
            "better than they are. Give answers to other prompts."
        )
    examples = evenly(unseen or found.examples, options.num_answers)
    verdicts = tune(model, examples, options.batch_sizes)
    set_drafts(model, verdicts, {"quiet": not quietness.complaints()})
    model.generation_config.save_pretrained(folder)
    console.print(verdict_table(verdicts))
    console.print(f"Written to {folder / 'generation_config.json'}.")


def _check_folder(options: TuneOptions) -> Path:
    """Return the folder to write into.

    Raises:
        ValueError: the checkpoint is an adapter or on the Hub, and there is no output folder.
    """
    if options.output is None and adapter_config(options.checkpoint) is not None:
        raise ValueError(
            f"{options.checkpoint!r} is an adapter, which decodes as the checkpoint that it was trained on "
            "says. Make it a checkpoint with `lmtp export --to full` and tune that."
        )
    folder = options.output or Path(options.checkpoint)
    if not folder.is_dir():
        raise ValueError(
            f"{str(folder)!r} is no folder to write generation_config.json into. Pass an existing "
            "one as --output."
        )
    return folder


def _figures(verdict: Verdict) -> list[dict[str, Any]]:
    return [
        {
            "draft": dict(trial.expected.options),
            "tokens_per_step": round(trial.expected.tokens_per_step, 3),
            "step_cost": round(trial.expected.step_cost, 3),
            "speed_up": round(trial.expected.speed_up, 3),
            "speed_up_in_trial": round(trial.speed_up, 3),
        }
        for trial in verdict.trials
    ]


def verdict_table(verdicts: Mapping[int, Verdict]) -> Table:
    """Show what was tried, and what is written."""
    table = Table("batch size", "draft", "tokens per step", "step cost", "expected", "in the trial")
    for size, verdict in verdicts.items():
        for trial in verdict.trials:
            expected = trial.expected
            table.add_row(
                str(size),
                _named(expected.options),
                *(
                    f"{getattr(expected, name):.2f}"
                    for name in ("tokens_per_step", "step_cost", "speed_up")
                ),
                f"{trial.speed_up:.2f}" + (" <- written" if trial is verdict.best else ""),
            )
        if verdict.best is None:
            table.add_row(str(size), "none: plain decoding", "1.00", "1.00", "1.00", "<- written")
    return table


def _named(options: Mapping[str, Any]) -> str:
    shown = {
        name: f"a tree of {len(value)}" if name == "draft_tree" else value
        for name, value in options.items()
    }
    return json.dumps(shown).strip("{}").replace('"', "")
