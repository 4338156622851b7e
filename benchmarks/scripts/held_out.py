"""Writes `held_out.jsonl`: prompts of four kinds never used in training, with source and licence.

Maths, code and chat prompts are rows of public test sets, spread evenly. The retrieval prompts, whose
answers quote a passage, were written for this project; `retrieval.jsonl` holds them.

    python benchmarks/scripts/held_out.py --gsm8k gsm8k_test.jsonl --humaneval humaneval.jsonl.gz \
        --instructions user_oriented_instructions.jsonl
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modeling_lmtp.conversion.prompts import read_json_lines
from modeling_lmtp.training.examples import evenly

PER_KIND = 8
LONGEST = 900  # characters of a prompt
HERE = Path(__file__).parents[1]


def maths(row: dict[str, Any]) -> str:
    """Return a question of GSM8K."""
    return str(row["question"])


def code(row: dict[str, Any]) -> str:
    """Ask for the function of a HumanEval stub."""
    stub = str(row["prompt"]).strip()
    return f"Complete this Python function:\n```python\n{stub}\n```"


def chat(row: dict[str, Any]) -> str:
    """Return an instruction with its first input."""
    given = row["instances"][0]["input"]
    return f"{row['instruction']}\n\n{given}".strip()


SOURCES: dict[str, tuple[Callable[[dict[str, Any]], str], str, str]] = {
    "maths": (maths, "openai/grade-school-math @ 3101c7d5, test split", "MIT"),
    "code": (code, "openai/human-eval @ 6d43fb98", "MIT"),
    "chat": (chat, "yizhongw/self-instruct, user-oriented instructions", "Apache-2.0"),
}


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gsm8k", dest="maths", type=Path, required=True)
    parser.add_argument("--humaneval", dest="code", type=Path, required=True)
    parser.add_argument("--instructions", dest="chat", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=HERE / "held_out.jsonl")
    arguments = parser.parse_args()
    written = []
    for kind, (prompt_of, source, licence) in SOURCES.items():
        prompts = [prompt_of(row) for _, row in read_json_lines(getattr(arguments, kind))]
        short = [prompt for prompt in prompts if len(prompt) <= LONGEST]
        written += [
            {"kind": kind, "prompt": prompt, "source": source, "licence": licence}
            for prompt in evenly(short, PER_KIND)
        ]
    written += [row for _, row in read_json_lines(HERE / "retrieval.jsonl")]
    arguments.output.write_text("".join(json.dumps(row) + "\n" for row in written))


if __name__ == "__main__":
    main()
