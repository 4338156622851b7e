"""The log of a model that writes prompts itself: what it sampled so far, batch by batch.

It lets a stopped run go on. Its first line says what made it, each further one holds a batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modeling_lmtp.conversion.prompts import read_json_lines

from .distill_files import append_rows, cut_partial_line, refuse_differences
from .distill_settings import DistillSettings

# Answers may follow other settings than the prompts: these alone shape the prompts.
SETTINGS = ("seed", "batch_size", "magpie_temperature", "magpie_top_p", "magpie_max_tokens")


class SampleLog:
    """The samples of one model with one set of settings, in the file `path`.

    Args:
        path: a .jsonl file; it need not exist.
        identity: what names the model and its tokenizer.
        settings: how prompts are sampled.
    """

    def __init__(self, path: Path, identity: dict[str, Any], settings: DistillSettings) -> None:
        self.path = path
        shaping = {name: getattr(settings, name) for name in SETTINGS}
        self.header = {**identity, "settings": shaping}

    def read(self) -> list[list[str]]:
        """Return the texts of batch 0, 1, …; a last line that was cut by a kill is removed.

        Raises:
            ValueError: the file was made by another model or with other settings.
        """
        if self.path.exists():
            cut_partial_line(self.path)
            rows = [row for _, row in read_json_lines(self.path)]
            if rows:
                refuse_differences(self.path, self.header, rows[0], self.header)
                return [row["texts"] for row in rows[1:]]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_rows(self.path, [self.header])
        return []

    def append(self, batches: list[list[str]]) -> None:
        """Append the texts of the next batches; they are on the disk when this returns."""
        append_rows(self.path, [{"texts": texts} for texts in batches])
