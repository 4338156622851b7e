"""The folder of a training run: it belongs to one run, which may be stopped and go on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modeling_lmtp.conversion.saving import read_json

from .distill_files import replace_file
from .examples import Example
from .fingerprints import json_sha256

RECORD = "run.json"


def claim_run_folder(run_folder: Path, identity: dict[str, Any]) -> None:
    """Record in `run_folder` what run it holds, or check that it is this one.

    Args:
        run_folder: made if it does not exist.
        identity: all that makes a run this run; JSON-serialisable.

    Raises:
        ValueError: it holds another run; names what differs.
    """
    identity = json.loads(json.dumps(identity))  # as it will be read back
    record = run_folder / RECORD
    if not record.exists():
        run_folder.mkdir(parents=True, exist_ok=True)
        replace_file(record, json.dumps(identity, indent=2) + "\n")
        return
    found = read_json(record)
    differing = sorted(key for key in {*identity, *found} if identity.get(key) != found.get(key))
    if differing:
        raise ValueError(
            f"{run_folder} holds a run with another {', '.join(differing)}. Choose another output, "
            "or delete that folder to start again."
        )


def examples_sha256(examples: Sequence[Example]) -> str:
    """Return the SHA-256 of the examples' tokens and answer starts, in hexadecimal."""
    return json_sha256([[example.input_ids, example.answer_start] for example in examples])
