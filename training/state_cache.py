"""Cache the frozen backbone's states on disk, so that it reads each answer only once.

Warm-up spends most of its time in the backbone, which computes the same states in every epoch and run. A
folder holds the states of one backbone, one file per answer. Runs with other heads, other settings or a
subset of the answers share it, and a stopped run keeps what it has computed.

Shapes: `L` length, `K·H` numbers that heads read of each token.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from modeling_lmtp.modeling_lmtp import LMTPForCausalLM

from .examples import AnswerDataset, Example, collate
from .fingerprints import json_sha256, model_fingerprint
from .processes import process_state
from .runs import claim_run_folder

TOKENS_PER_BATCH = 4096  # including padding


class StateCache:
    """A folder with the states `(L, K·H)` that heads read of each answer.

    Args:
        folder: created if it does not exist.
        model: its backbone and its `head_input` determine the states.

    Raises:
        ValueError: the folder holds the states of another backbone, or for another `head_input`.
    """

    def __init__(self, folder: Path, model: LMTPForCausalLM) -> None:
        self.folder = folder
        self.model = model
        claim_run_folder(
            folder,
            {
                "backbone": model_fingerprint(model.backbone),
                "head_input": model.config.head_input,
            },
        )

    def load(self, example: Example) -> torch.Tensor:
        """Return the states of an answer, `(L, K·H)`, in the backbone's dtype."""
        return load_file(self._path(example))["states"]

    def fill(self, examples: Sequence[Example], *, progress: bool = True) -> None:
        """Compute and save the missing states, each process its share."""
        state = process_state()
        missing = [example for example in examples if not self._path(example).exists()]
        batches = _batches(missing)[state.process_index :: state.num_processes]
        state.wait_for_everyone()  # a process that writes early would change what the others miss
        with tqdm(
            total=sum(len(example.input_ids) for batch in batches for example in batch),
            desc="caching backbone states",
            unit="token",
            unit_scale=True,
            disable=not (progress and batches and state.is_main_process),
        ) as bar:
            for batch in batches:
                for example, states in zip(batch, self._states(batch), strict=True):
                    self._save(example, states[: len(example.input_ids)])
                    bar.update(len(example.input_ids))
        state.wait_for_everyone()

    @torch.no_grad()
    def _states(self, batch: Sequence[Example]) -> torch.Tensor:
        rows = AnswerDataset(batch)
        inputs = collate([rows[i] for i in range(len(rows))])
        del inputs["labels"]
        device = self.model.device
        with self.model.head_states(num_logits=1) as states:
            self.model.backbone(**{n: v.to(device) for n, v in inputs.items()}, use_cache=False)
        return states[0].cpu()

    def _path(self, example: Example) -> Path:
        name = json_sha256(example.input_ids)
        return self.folder / name[:2] / f"{name[2:]}.safetensors"

    def _save(self, example: Example, states: torch.Tensor) -> None:
        path = self._path(example)
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_suffix(f".{process_state().process_index}.unfinished")
        try:
            save_file({"states": states.contiguous()}, unfinished)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


def _batches(examples: Sequence[Example]) -> list[list[Example]]:
    """Batch answers of similar length, longest first, with at most `TOKENS_PER_BATCH` or one answer."""
    batches: list[list[Example]] = []
    for example in sorted(examples, key=lambda example: -len(example.input_ids)):
        longest = len(batches[-1][0].input_ids) if batches else TOKENS_PER_BATCH
        if batches and longest * (len(batches[-1]) + 1) <= TOKENS_PER_BATCH:
            batches[-1].append(example)
        else:
            batches.append([example])
    return batches
