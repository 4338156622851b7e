"""Loads a checkpoint as its users will: in a fresh process, as remote code, without this package."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("remote_script.py")


def generate_as_remote_code(
    checkpoint: Path,
    prompt_ids: list[int],
    max_new_tokens: int,
    *,
    form: str = "full",
    base: str | None = None,
) -> dict[str, Any]:
    """Generate greedily, plainly and with L-MTP, from a checkpoint's own code in a fresh process.

    Args:
        checkpoint: a folder.
        prompt_ids: token ids of one prompt.
        max_new_tokens: passed to `generate`.
        form: `"full"`, `"heads"` or `"adapter"`; each loads through its own Auto classes.
        base: a folder with the base model of heads or an adapter, in place of the one they name.

    Returns:
        In float32, where both must be equal: `plain_ids`, `lmtp_ids` (the new tokens) and
        `acceptance_lengths`. In the checkpoint's dtype: plain decoding's `ids`, and `tensors` with the
        prompt's `logits` `(1, L, V)` and the `leap_logits.{i}` of each head.

    Raises:
        RuntimeError: the process failed; the message ends with its error output.
    """
    task = {
        "form": form,
        "base": base,
        "prompt_ids": prompt_ids,
        "max_new_tokens": max_new_tokens,
        "threads": torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory() as scratch:
        tensors = Path(scratch) / "logits.safetensors"
        done = subprocess.run(
            # By its text: run by its path, Python would look for modules in this folder first
            [
                sys.executable,
                "-c",
                SCRIPT.read_text(),
                str(checkpoint),
                str(tensors),
                json.dumps(task),
            ],
            capture_output=True,
            text=True,
            check=False,
            # Transformers caches a copy of remote code; delete it with the scratch folder
            env={**os.environ, "HF_MODULES_CACHE": str(Path(scratch) / "modules")},
        )
        if done.returncode:
            raise RuntimeError(
                f"{checkpoint} does not load as remote code in a fresh process:\n{done.stderr[-2000:]}"
            )
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return {**result, "tensors": load_file(tensors)}
