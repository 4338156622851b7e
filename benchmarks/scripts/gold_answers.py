"""Converts human-written answers from GSM8K's format to rows with `prompt` and `response`.

    python benchmarks/scripts/gold_answers.py gsm8k_train.jsonl gold.jsonl --num-answers 1000

It takes rows spread evenly over the file, removes GSM8K's calculator annotations (`<<48/2=24>>`) and
keeps the last line, `#### NUMBER`.
"""

import argparse
import json
import re
from pathlib import Path

from modeling_lmtp.conversion.prompts import read_json_lines
from modeling_lmtp.training.examples import evenly

CALCULATOR = re.compile(r"<<[^<>]*>>")


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("questions", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--num-answers", type=int, required=True)
    arguments = parser.parse_args()
    rows = [row for _, row in read_json_lines(arguments.questions)]
    with arguments.output.open("w", encoding="utf-8") as output:
        for row in evenly(rows, arguments.num_answers):
            answer = CALCULATOR.sub("", row["answer"])
            output.write(json.dumps({"prompt": row["question"], "response": answer}) + "\n")


if __name__ == "__main__":
    main()
