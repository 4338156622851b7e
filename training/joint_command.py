"""`lmtp joint`: from a checkpoint and answers to an adapter that tunes backbone and heads together."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from modeling_lmtp.conversion.loading import adapter_config, load_lmtp, load_tokenizer
from modeling_lmtp.conversion.saving import file_sha256, run_folder_of, save_checkpoint
from modeling_lmtp.transformers_lmtp import commit_of

from .answer_files import load_answers, warn
from .examples import split_examples
from .joint import JointReport, joint_tune
from .joint_settings import JointSettings
from .processes import processes
from .quantized import load_quantized
from .training_log import save_training_log

COMMAND = "lmtp joint"


def tune_jointly(
    source: str,
    answers: Path,
    output: Path,
    settings: JointSettings,
    *,
    max_length: int,
    held_out: int,
    dtype: str,
    merge: bool = False,
    bits: int | None = None,
    bad_rows: str = "refuse",
) -> JointReport:
    """Tune backbone and heads, and save the adapter, or with `merge` the tuned checkpoint, in `output`.

    Checkpoints of the run itself are kept in `<output>.training` until then; called again after a
    stop, it goes on from the last. Of several processes, the main one writes.

    Args:
        source: a checkpoint with leap heads.
        answers: rows with `prompt` and `response`.
        output: a new folder; an adapter there loads with
            `PeftModel.from_pretrained(LMTPForCausalLM.from_pretrained(source), output)`.
        settings: how to tune.
        max_length: tokens of an example.
        held_out: answers kept out of training.
        dtype: of the backbone.
        merge: save a full checkpoint instead of the adapter.
        bits: 4 or 8 to quantize the backbone, see `load_quantized`.
        bad_rows: of the answers, see `read_answers`.

    Raises:
        ValueError: `output` holds something, the checkpoint has no heads or is an adapter, the answers
            are unusable, or a quantized backbone is to be merged.
    """
    run_folder = run_folder_of(output, COMMAND)
    if merge and bits is not None:
        raise ValueError(
            f"merge would round the adapter into {bits} bits. Save the adapter, and merge it into the "
            "checkpoint loaded whole."
        )
    if (adapter := adapter_config(source)) is not None:
        raise ValueError(
            f"{source!r} is an adapter, and a second one would be of no use without it. Tune "
            f"{adapter.base_model_name_or_path!r}, which it was trained on, or train the adapter again "
            "with --merge and tune what that saves."
        )
    this_process = processes()  # before the model is loaded: each process takes its own device
    tokenizer = load_tokenizer(source)
    model = load_lmtp(source, dtype) if bits is None else load_quantized(source, bits, dtype)
    found = load_answers(answers, model, tokenizer, max_length, bad_rows)
    warn(found.notes)
    training, evaluation = split_examples(found.examples, held_out)
    revision = commit_of(model.config)
    tuned, report = joint_tune(model, training, evaluation, run_folder, settings)
    if this_process.is_main_process:
        record: dict[str, Any] = {
            "command": COMMAND,
            "checkpoint": source,
            "checkpoint_revision": revision,
            "bits": bits,
            "merged": merge,
            "answers_sha256": file_sha256(answers),
            "answers_notes": found.notes,
            "examples": len(training),
            "processes": this_process.num_processes,
            "settings": asdict(settings),
            "held_out": report.held_out(),
            "log": report.log,
        }
        saved: Any = tuned.merge_and_unload() if merge else tuned
        save_checkpoint(
            saved,
            tokenizer,
            output,
            record,
            lambda folder: save_training_log(folder, report.log, model.config.leap_offsets),
        )
        shutil.rmtree(run_folder)
    this_process.wait_for_everyone()
    return report
