"""`lmtp analyze`: what held-out answers say of checkpoints, as figures, pictures and advice."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from modeling_lmtp.conversion.loading import (
    has_leap_heads,
    load_backbone,
    load_lmtp,
    load_tokenizer,
    names_of,
)
from modeling_lmtp.conversion.saving import check_output_folder, file_sha256
from modeling_lmtp.training.answer_files import load_answers, unseen_answers
from modeling_lmtp.training.examples import Example, split_examples
from modeling_lmtp.training.fingerprints import model_fingerprint
from modeling_lmtp.transformers_lmtp import attention_implementation
from modeling_lmtp.tree_lmtp import MAX_NODES

from .analysis import HeadAnalysis, analyze_heads
from .analysis_record import Measured, analysis_record
from .marginalization import Marginals, marginalize
from .pictures import draw_pictures, pictures_available

# Of the model's own greedy answers nearly all tokens are its first choice; rounding takes a few
OWN_ANSWERS = 0.9


@dataclass(frozen=True)
class AnalysisSettings:
    """What to measure on.

    Args:
        num_answers: answers, evenly spread over the file: those that `lmtp train --held-out` with the
            same number keeps out of training.
        marginalize_positions: positions for numerical marginalization; 0 leaves it out.
        num_continuations: how many continuations it sums over.
        node_counts: candidates of the trees to simulate.
        max_length: longer examples are cut.
        bad_rows: of the answers, see `read_answers`.
        seed: of the positions, and of the resampling that errors come from.
        dtype: of the models.
    """

    num_answers: int = 32
    marginalize_positions: int = 128
    num_continuations: int = 16
    node_counts: tuple[int, ...] = (4, 8, 16, 32)
    max_length: int = 1024
    bad_rows: str = "refuse"
    seed: int = 0
    dtype: str = "auto"

    def __post_init__(self) -> None:
        """Raise a ValueError if a number is out of range."""
        if any(not 0 < count < MAX_NODES for count in self.node_counts):
            raise ValueError(
                f"node_counts must be from 1 to {MAX_NODES - 1}, got {self.node_counts}: so many "
                "candidates may be verified at once."
            )
        if self.num_answers < 2:
            raise ValueError(
                f"num_answers must be 2 or more, got {self.num_answers}: draft trees grown on one half "
                "are judged on the other."
            )
        if self.marginalize_positions < 0:
            raise ValueError(
                "marginalize_positions must be 0 (leave it out) or more, got "
                f"{self.marginalize_positions}."
            )


def whole_numbers(text: str) -> tuple[int, ...]:
    """Read comma-separated whole numbers.

    Raises:
        ValueError: there is something else in it.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(
            f"--nodes takes whole numbers with commas between, such as 4,8,16; got {text!r}."
        ) from error


def run_analysis(
    sources: Sequence[str],
    answers: Path,
    output: Path,
    settings: AnalysisSettings,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Analyze checkpoints and write `analysis.json` and the pictures into `output`.

    Args:
        sources: checkpoints with leap heads on the same backbone, or one plain backbone.
        answers: held-out answers of that backbone, as `lmtp distill` makes them.
        output: a new folder.
        settings: what to measure on.
        progress: show progress bars.

    Returns:
        What `analysis.json` holds.

    Raises:
        ValueError: `output` holds something, the checkpoints do not belong together, or there are too
            few answers.
    """
    check_output_folder(output)
    if not sources:
        raise ValueError("There is nothing to analyze: name a checkpoint or a backbone.")
    names = names_of(sources)
    have_heads = [has_leap_heads(source) for source in sources]
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
    by_name = dict(zip(names, sources, strict=True))
    measured = _measure(by_name, have_heads[0], answers, settings, progress)
    held_out = {"file": answers.name, "sha256": file_sha256(answers)}
    record = analysis_record(measured, sources, held_out, asdict(settings))
    output.mkdir(parents=True, exist_ok=True)
    if pictures_available():
        record["pictures"] = [path.name for path in draw_pictures(record, output)]
    else:
        record["notes"].append(
            "No pictures: matplotlib is not installed. pip install 'modeling-lmtp[plots]'."
        )
    (output / "analysis.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


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
    if marginals is not None and (own := marginals.accuracy(1, 1)) < OWN_ANSWERS:
        notes.append(
            f"Only {own:.0%} of the answers' tokens are this backbone's own first choice: these are not "
            "its greedy answers, so decoding may accept more or fewer drafts than is simulated here. "
            "Make some with `lmtp distill`."
        )
    conditions |= {"answers_tokens": sum(len(e.input_ids) - e.answer_start for e in examples)}
    return Measured(heads, marginals, notes, conditions)


def _held_out(examples: Sequence[Example], count: int) -> list[Example]:
    """Return the answers that `lmtp train --held-out COUNT` keeps out of training."""
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
    """Say so if heads were trained on answers that are to judge them, as far as their record tells."""
    unseen = unseen_answers(source, answers, examples)
    if unseen is None or all(example in unseen for example in chosen):
        return []
    return [
        f"{name} was trained on some of these answers, so its figures are too good: pass "
        + (
            f"num_answers {len(unseen)}, those it was not trained on."
            if len(unseen) > 1
            else "others."
        )
    ]
