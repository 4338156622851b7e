"""The identity of a training run, recorded in its folder, so that only the same run resumes there."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

from modeling_lmtp.conversion.options import own_fields
from modeling_lmtp.conversion.saving import read_json
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM

from .arguments import AnswerTrainingArguments, MayChangeOnResume
from .distill_files import replace_file
from .examples import Example
from .fingerprints import json_sha256, model_fingerprint

RECORD = "run.json"
# The fields of `TrainingArguments` that affect the trained weights. Of this package's own fields, all
# count except those marked `MayChangeOnResume`.
RESULT_ARGUMENTS = (
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
    """Return the values that must stay the same for a run to resume.

    The split of a global batch into processes and accumulation steps may change.

    Args:
        args: the training arguments.
        model: the model before training.
        examples: the training examples.
    """
    hints = get_type_hints(type(args), include_extras=True)
    fixed_names = {
        field.name
        for field in own_fields(type(args))
        if MayChangeOnResume not in getattr(hints[field.name], "__metadata__", ())
    }
    values = args.to_dict()  # enumerations as strings
    rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return {
        **{name: values[name] for name in (*sorted(fixed_names), *RESULT_ARGUMENTS)},
        **{name: getattr(model.config, name) for name in HEAD_SETTINGS},
        "global_batch_size": rows_per_step * args.world_size,
        "checkpoint": model_fingerprint(model),
        "examples_sha256": examples_sha256(examples),
    }


def claim_run_folder(run_folder: Path, identity: dict[str, Any]) -> None:
    """Record a run's identity in `run_folder`, or check that the folder holds the same run.

    Args:
        run_folder: created if it does not exist.
        identity: see `run_identity`; JSON-serialisable.

    Raises:
        ValueError: the folder holds another run; the message lists the differences.
    """
    identity = json.loads(json.dumps(identity))  # JSON turns tuples into lists
    record = run_folder / RECORD
    if not record.exists():
        run_folder.mkdir(parents=True, exist_ok=True)
        replace_file(record, json.dumps(identity, indent=2) + "\n")
        return
    existing = read_json(record)
    differences = sorted(
        key for key in {*identity, *existing} if identity.get(key) != existing.get(key)
    )
    if differences:
        raise ValueError(
            f"{run_folder} holds a run with another {', '.join(differences)}. Choose another output, "
            "or delete that folder to start again."
        )


def examples_sha256(examples: Sequence[Example]) -> str:
    """Return a hash of the examples' tokens and answer starts."""
    return json_sha256([[example.input_ids, example.answer_start] for example in examples])
