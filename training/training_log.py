"""Save the log of a training run as JSON and, if matplotlib is installed, as a picture."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

LOG_FILE = "training_log.json"
PICTURE_FILE = "training_log.png"
HELD_OUT = "held_out_tokens_per_step"

logger = logging.get_logger(__name__)


def save_training_log(
    folder: Path, log: Sequence[dict[str, Any]], leap_offsets: Sequence[int]
) -> None:
    """Write `training_log.json` and, with matplotlib, `training_log.png` into `folder`.

    Args:
        folder: an existing folder.
        log: the Trainer's `log_history`; see `LeapTrainer` for the keys.
        leap_offsets: the heads' offsets.
    """
    record = {"leap_offsets": list(leap_offsets), "log": list(log)}
    (folder / LOG_FILE).write_text(json.dumps(record, indent=2) + "\n")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning_once(
            f"matplotlib is not installed, so only {LOG_FILE} is saved. Install modeling-lmtp[plots] to "
            "get a picture of the training log too."
        )
        return
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss, top1, acceptance = figure.subplots(1, 3)
    for offset in leap_offsets:
        _line(loss, log, f"loss_head_{offset}", f"offset {offset}")
        _line(top1, log, f"top1_head_{offset}", f"offset {offset}")
    _line(acceptance, log, HELD_OUT, "chain, held-out answers", marker="o")
    for axes, title in (
        (loss, "cross-entropy per head"),
        (top1, "top-1 accuracy per head"),
        (acceptance, "simulated tokens per step"),
    ):
        axes.set(title=title, xlabel="step")
        if axes.get_lines():
            axes.legend()
    figure.savefig(folder / PICTURE_FILE, dpi=120)


def _line(axes: Any, log: Sequence[dict[str, Any]], name: str, label: str, **style: Any) -> None:
    points = [(entry["step"], entry[name]) for entry in log if name in entry]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, **style)
