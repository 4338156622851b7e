"""`lmtp analyze`: analyzes checkpoints on held-out answers, with figures, pictures and advice."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch

from modeling_lmtp.conversion.command_line import console
from modeling_lmtp.conversion.loading import (
    lmtp_config,
    load_backbone,
    load_lmtp,
    load_tokenizer,
    names_of,
)
from modeling_lmtp.conversion.options import Dtype, Options, Range
from modeling_lmtp.conversion.saving import check_output_folder, file_sha256
from modeling_lmtp.training.answers import load_answers, unseen_answers
from modeling_lmtp.training.examples import Example, split_examples
from modeling_lmtp.training.fingerprints import model_fingerprint
from modeling_lmtp.transformers_lmtp import attention_implementation
from modeling_lmtp.tree_lmtp import MAX_NODES

from .analysis import HeadAnalysis, analyze_heads
from .analysis_record import Measured, analysis_record, tables
from .marginalization import Marginals, marginalize
from .pictures import draw_pictures, pictures_available

# In the model's own greedy answers nearly all tokens are its first choice; rounding changes a few
OWN_ANSWERS = 0.9


@dataclass
class AnalyzeOptions(Options):
    """What to analyze, and where the result goes."""

    title: ClassVar[str] = "files"

    sources: list[str] = field(
        metadata={"help": "Checkpoints on one backbone, or one plain backbone; folders or Hub ids."}
    )
    answers: Path = field(
        kw_only=True, metadata={"help": "Held-out answers of the backbone, made by `lmtp distill`."}
    )
    output: Path = field(
        kw_only=True, metadata={"help": "New folder for analysis.json and the pictures."}
    )


@dataclass
class AnalysisSettings(Options):
    """How to measure; `analysis.json` records these."""

    title: ClassVar[str] = "measurement"

    num_answers: Annotated[int, Range(ge=2)] = field(
        default=32,
        metadata={
            "help": "Use the N answers that `lmtp train --held_out N` keeps out of training."
        },
    )
    marginalize_positions: Annotated[int, Range(ge=0)] = field(
        default=128,
        metadata={"help": "Positions for the numerical marginalization; 0 skips it."},
    )
    num_continuations: Annotated[int, Range(ge=1)] = field(
        default=16, metadata={"help": "Continuations that each marginal sums over."}
    )
    node_counts: list[Annotated[int, Range(ge=1, le=MAX_NODES - 1)]] = field(
        default_factory=lambda: [4, 8, 16, 32],
        metadata={"help": "Numbers of candidates of the draft trees to simulate."},
    )
    max_length: Annotated[int, Range(ge=2)] = field(
        default=1024, metadata={"help": "Cut longer examples to N tokens."}
    )
    bad_rows: Literal["refuse", "skip"] = field(
        default="refuse",
        metadata={"help": "Refuse answers with a bad row, or skip and count such rows."},
    )
    seed: int = field(
        default=0, metadata={"help": "Seed of the positions and of the resampled errors."}
    )
    dtype: Dtype = field(default="auto", metadata={"help": "Dtype of the models."})


def analyze(options: AnalyzeOptions, settings: AnalysisSettings) -> None:
    """Show how far ahead heads predict, what the model itself knows there, and which schedule to use.

    Examples:
      lmtp analyze OUT --answers held_out.jsonl --output analysis
      lmtp analyze BACKBONE --answers answers.jsonl --output analysis    before any heads are trained
    """
    record = run_analysis(options, settings)
    console.print(*tables(record), record["advice"], *record["notes"], sep="\n", markup=False)
    files = ", ".join(["analysis.json", *record["pictures"]])
    console.print(f"Saved {files} in {options.output}.", markup=False, highlight=False)


def run_analysis(
    options: AnalyzeOptions, settings: AnalysisSettings, *, progress: bool = True
) -> dict[str, Any]:
    """Analyze checkpoints and write `analysis.json` and the pictures.

    Args:
        options, settings: see their fields.
        progress: show progress bars.

    Returns:
        The content of `analysis.json`.

    Raises:
        ValueError: the output folder holds something, the checkpoints do not belong together, or there
            are too few answers.
    """
    check_output_folder(options.output)
    sources = options.sources
    have_heads = _check_sources(sources, settings)
    by_name = dict(zip(names_of(sources), sources, strict=True))
    measured = _measure(by_name, have_heads, options.answers, settings, progress)
    held_out = {"file": options.answers.name, "sha256": file_sha256(options.answers)}
    record = analysis_record(measured, sources, held_out, asdict(settings))
    options.output.mkdir(parents=True, exist_ok=True)
    if pictures_available():
        record["pictures"] = [path.name for path in draw_pictures(record, options.output)]
    else:
        record["notes"].append(
            "No pictures: matplotlib is not installed. pip install 'modeling-lmtp[plots]'."
        )
    (options.output / "analysis.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def _check_sources(sources: Sequence[str], settings: AnalysisSettings) -> bool:
    """Return whether the sources have leap heads.

    Raises:
        ValueError: they cannot be analyzed together, or there is nothing to measure.
    """
    names_of(sources)  # refuses a checkpoint given twice
    have_heads = [lmtp_config(source) is not None for source in sources]
    if len(sources) > 1 and not all(have_heads):
        plain = sources[have_heads.index(False)]
        raise ValueError(
            f"{plain!r} has no leap heads to compare with those of others. Leave it out, or analyze it "
            "alone; each checkpoint's backbone is analyzed with it."
        )
    if not have_heads[0] and settings.marginalize_positions == 0:
        raise ValueError(
            f"{sources[0]!r} has no leap heads, and marginalize_positions is 0: there is nothing to "
            "measure. Leave marginalize_positions out, or give a checkpoint with heads."
        )
    return have_heads[0]


def _measure(
    sources: dict[str, str],
    have_heads: bool,
    answers: Path,
    settings: AnalysisSettings,
    progress: bool,
) -> Measured:
    heads: dict[str, HeadAnalysis] = {}
    marginals, conditions = None, {}
    notes: list[str] = []
    examples: list[Example] = []
    first_backbone = ""
    for name, source in sources.items():
        model = (load_lmtp if have_heads else load_backbone)(source, settings.dtype)
        backbone = model.backbone if have_heads else model
        if not examples:
            found = load_answers(
                answers, model, load_tokenizer(source), settings.max_length, settings.bad_rows
            )
            everything = found.examples
            notes += found.notes
            examples = _held_out(everything, settings.num_answers)
            first_backbone = model_fingerprint(backbone)
            marginals = _marginals(backbone, examples, settings, progress)
            conditions = _conditions(backbone)
        elif model_fingerprint(backbone) != first_backbone:
            raise ValueError(
                f"The backbone of {name!r} is not that of {next(iter(sources))!r}, so the same answers "
                "cannot judge both. Analyze them one at a time, each on its own answers."
            )
        notes += _training_notes(name, source, answers, examples, everything)
        if have_heads:
            heads[name] = analyze_heads(
                model,
                examples,
                node_counts=settings.node_counts,
                seed=settings.seed,
                progress=progress,
            )
        del model, backbone
    if marginals is not None and (share := marginals.accuracy(1, 1)) < OWN_ANSWERS:
        notes.append(
            f"Only {share:.0%} of the answers' tokens are this backbone's own first choice: these are not "
            "its greedy answers, so decoding may accept more or fewer drafts than is simulated here. "
            "Make some with `lmtp distill`."
        )
    conditions |= {"answers_tokens": sum(len(e.input_ids) - e.answer_start for e in examples)}
    return Measured(heads, marginals, notes, conditions)


def _held_out(examples: Sequence[Example], count: int) -> list[Example]:
    """Return the answers that `lmtp train --held_out COUNT` keeps out of training."""
    if count == len(examples):
        return list(examples)
    if count > len(examples):
        raise ValueError(
            f"num_answers must be at most {len(examples)}, the answers that the file has, got {count}."
        )
    return split_examples(examples, count)[1]


def _marginals(
    backbone: Any, examples: Sequence[Example], settings: AnalysisSettings, progress: bool
) -> Marginals | None:
    if settings.marginalize_positions == 0:
        return None
    return marginalize(
        backbone,
        examples,
        num_positions=settings.marginalize_positions,
        num_continuations=settings.num_continuations,
        seed=settings.seed,
        progress=progress,
    )


def _conditions(backbone: Any) -> dict[str, Any]:
    return {
        "device": str(backbone.device),
        "model_dtype": str(backbone.dtype).removeprefix("torch."),
        "attention": attention_implementation(backbone.config),
        "threads": torch.get_num_threads(),
        "batch_size": 1,
    }


def _training_notes(
    name: str, source: str, answers: Path, chosen: Sequence[Example], examples: Sequence[Example]
) -> list[str]:
    """Return a note if the record of the heads shows that they were trained on these answers."""
    unseen = unseen_answers(source, answers, examples)
    if unseen is None or all(example in unseen for example in chosen):
        return []
    return [
        f"{name} was trained on some of these answers, so its figures are too good: pass "
        + (
            f"--num_answers {len(unseen)}, those it was not trained on."
            if len(unseen) > 1
            else "other answers."
        )
    ]
