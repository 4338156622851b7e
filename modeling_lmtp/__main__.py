"""The `lmtp` command line: where each command is; it is imported when it is called."""

import os
import sys

from modeling_lmtp.conversion.command_line import run

COMMANDS = {
    "demo": (
        "modeling_lmtp.benchmarks.demo:demo",
        "Compare plain decoding with L-MTP on SmolLM2-135M-Instruct, in two minutes.",
    ),
    "distill": (
        "modeling_lmtp.training.distill_command:distill_answers",
        "Let a backbone answer prompts: its answers are what leap heads learn.",
    ),
    "train": (
        "modeling_lmtp.training.train_command:train",
        "Train leap heads on those answers (stage 1).",
    ),
    "joint": (
        "modeling_lmtp.training.joint_command:joint",
        "Tune backbone and heads together with LoRA (stage 2).",
    ),
    "convert": (
        "modeling_lmtp.conversion.converting:convert",
        "Convert Medusa heads, or heads of the official L-MTP code.",
    ),
    "generate": ("modeling_lmtp.benchmarks.streaming:generate", "Stream the answer to a prompt."),
    "verify": (
        "modeling_lmtp.benchmarks.exactness:verify",
        "Check that L-MTP generates what plain decoding generates.",
    ),
    "bench": (
        "modeling_lmtp.benchmarks.bench:bench",
        "Measure ways of decoding side by side.",
    ),
    "analyze": (
        "modeling_lmtp.benchmarks.analyzing:analyze",
        "Show how far ahead heads predict, and which schedule to use.",
    ),
    "export": (
        "modeling_lmtp.conversion.exporting:export",
        "Save a checkpoint merged, as a plain backbone, or for vLLM and Medusa engines.",
    ),
    "serve": (
        "modeling_lmtp.conversion.transformers_serve:serve",
        "Serve a checkpoint with Transformers' own OpenAI-compatible server.",
    ),
    "publish": (
        "modeling_lmtp.conversion.publishing:publish",
        "Write the model card, check the repository, and upload it.",
    ),
    "refresh": (
        "modeling_lmtp.conversion.refreshing:refresh",
        "Replace the code in a published checkpoint.",
    ),
}


def main() -> None:
    """Run `lmtp` with the process's arguments, and exit with its status."""
    if sys.stdin is not None and not sys.stdin.isatty():
        # No command reads it, and a library that asks something would wait for an answer
        os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
    sys.exit(run(COMMANDS, sys.argv[1:]))


if __name__ == "__main__":
    main()
