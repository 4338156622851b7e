"""Write people's own answers as rows to learn or to be judged on: GSM8K's form to `prompt`, `response`.

    python benchmarks/scripts/gold_answers.py gsm8k_train.jsonl gold.jsonl --num-answers 1000

Takes rows evenly spread over the file. The notes that GSM8K's answers give a calculator (`<<48/2=24>>`) are
left out; the last line stays `#### NUMBER`.
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
