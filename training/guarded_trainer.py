"""A Trainer that saves checkpoints whole or not at all, and stops at a loss that is no number."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

STATE_FILE = "trainer_state.json"  # the Trainer writes it last


class GuardedTrainer(Trainer):
    """A Trainer that saves checkpoints whole or not at all, and stops at a loss that is no number."""

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Compute loss and gradients of one batch.

        Raises:
            RuntimeError: the loss is not finite; names the step, and the file that the batch is in.
        """
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not math.isfinite(loss.item()):
            self._stop(loss.item(), inputs)
        return loss

    def _stop(self, loss: float, inputs: dict[str, Any]) -> NoReturn:
        step = self.state.global_step + 1
        process = f"_process_{self.args.process_index}" if self.args.world_size > 1 else ""
        file = Path(self.args.output_dir) / f"bad_batch_step_{step}{process}.safetensors"
        tensors = {
            name: value.detach().cpu().contiguous()
            for name, value in inputs.items()
            if isinstance(value, torch.Tensor)
        }
        save_file(tensors, file)
        whole = last_whole_checkpoint(self.args.output_dir)
        before = f"The last checkpoint, {whole}, is from before" if whole else "Nothing is saved"
        raise RuntimeError(
            f"The loss is {loss} at step {step}. Its batch is in {file} ({', '.join(tensors)}; "
            f"safetensors.torch.load_file reads it). {before}. Look for what is unusual in the batch, "
            "or lower learning_rate, and start again."
        )

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint; of one that cannot be saved whole, leave nothing.

        Raises:
            OSError: it could not be saved; names the one before.
        """
        step = self.state.global_step
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            whole = last_whole_checkpoint(self.args.output_dir)
            goes_on = f"{whole} is whole: the run goes on from there" if whole else "it starts anew"
            raise OSError(
                f"The checkpoint of step {step} could not be saved in {self.args.output_dir}: {error}. "
                f"Make room on that disk and start again; {goes_on}."
            ) from error


def last_whole_checkpoint(run_folder: Path | str) -> str | None:
    """Return the Trainer's last checkpoint in `run_folder` that was written to its end, if any."""
    found = {
        int(match[1]): folder
        for folder in Path(run_folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name))
        and _is_whole(folder)
    }
    return str(found[max(found)]) if found else None


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / STATE_FILE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return True


def take_off_autocast(model: torch.nn.Module) -> None:
    """Give `model` its own `forward` back, which Accelerate wraps in autocast to train in 16 bits."""
    original = model.__dict__.pop("_original_forward", None)
    if original is None:
        return
    model.forward = original
    if getattr(original, "__func__", None) is type(model).forward:
        del model.forward
