"""The folder of a training run: it belongs to one run, which may be stopped and go on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

from modeling_lmtp.conversion.options import own_fields
from modeling_lmtp.conversion.saving import read_json
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM

from .arguments import AnswerTrainingArguments, SameRun
from .distill_files import replace_file
from .examples import Example
from .fingerprints import json_sha256, model_fingerprint

RECORD = "run.json"
# Of `TrainingArguments`, what decides the weights that a run ends with; of our own, all but those
# that are marked `SameRun`
DECISIVE = (
    "max_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "optim",
    "optim_args",
    "lr_scheduler_kwargs",
    "data_seed",
    "neftune_noise_alpha",
    "bf16",
    "fp16",
)
HEAD_SETTINGS = (
    "leap_offsets",
    "head_context",
    "head_input",
    "num_head_layers",
    "share_lm_head",
    "lm_head_rank",
    "draft_token_ids",
    "base_model_name_or_path",
)


def run_identity(
    args: AnswerTrainingArguments, model: LMTPForCausalLM, examples: Sequence[Example]
) -> dict[str, Any]:
    """Return what makes a run this run.

    How a global batch is shared among processes and steps of accumulation is left open.

    Args:
        args: its arguments.
        model: as it is before training.
        examples: what it learns.
    """
    hints = get_type_hints(type(args), include_extras=True)
    own = {
        field.name
        for field in own_fields(type(args))
        if SameRun not in getattr(hints[field.name], "__metadata__", ())
    }
    values = args.to_dict()  # enumerations as strings
    rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return {
        **{name: values[name] for name in (*sorted(own), *DECISIVE)},
        **{name: getattr(model.config, name) for name in HEAD_SETTINGS},
        "global_batch_size": rows_per_step * args.world_size,
        "checkpoint": model_fingerprint(model),
        "examples_sha256": examples_sha256(examples),
    }


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
