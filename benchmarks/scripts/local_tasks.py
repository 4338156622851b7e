"""Tasks for lm-evaluation-harness from local files, without a hub: arithmetic and Python functions.

Both use the model's chat template if it has one, greedy search and no examples. `score` is 1 for a right
answer.
"""

import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

SCORE = "acc"  # one of the harness's own metrics, whose mean it takes
CODE_SECONDS = 10.0
FENCED = re.compile(r"```(?:python)?[ ]*\n(.*?)(?:```|\Z)", re.DOTALL)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def _task(name: str, questions: Path, max_new_tokens: int, text: str, score: Any) -> dict[str, Any]:
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(questions.resolve())}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": text,
        "doc_to_target": "",
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": max_new_tokens},
        "process_results": lambda row, replies: {SCORE: float(score(row, replies[0]))},
        "metric_list": [{"metric": SCORE, "aggregation": "mean", "higher_is_better": True}],
    }


def arithmetic(questions: Path, max_new_tokens: int) -> dict[str, Any]:
    """Return a task of rows like GSM8K's: `question`, and an `answer` that ends in `#### NUMBER`."""
    return _task("local_arithmetic", questions, max_new_tokens, "{{question}}", ends_in_its_number)


def functions(
    questions: Path, max_new_tokens: int, seconds: float = CODE_SECONDS
) -> dict[str, Any]:
    """Return a task of rows like HumanEval's: `prompt` (a stub), `entry_point` and `test`.

    The functions that the model writes are run on this machine, each in a process of its own for at most
    `seconds`; they may do there what this user may.
    """
    text = "Complete this Python function:\n```python\n{{prompt.strip()}}\n```"
    score = partial(passes_its_tests, seconds=seconds)
    return _task("local_functions", questions, max_new_tokens, text, score)


def ends_in_its_number(row: dict[str, Any], reply: str) -> bool:
    """Say whether the last number of `reply` is the one that the answer names."""
    numbers = NUMBER.findall(reply)
    return bool(numbers) and _value(numbers[-1]) == _value(row["answer"].split("####")[-1].strip())


def _value(number: str) -> float:
    return float(number.replace(",", ""))


def program(row: dict[str, Any], reply: str, passed: str) -> str:
    """Return the Python program that tests what `reply` holds, and prints `passed` at its end.

    That is a whole function, or the rest of one.
    """
    blocks = FENCED.findall(reply)
    written = blocks[0] if blocks else reply
    stub: str = row["prompt"]
    if f"def {row['entry_point']}(" in written:
        before = stub[: stub.index(f"def {row['entry_point']}(")]  # imports, helpers
    else:
        before = stub
    return f"{before}{written}\n{row['test']}\ncheck({row['entry_point']})\nprint({passed!r})\n"


def passes_its_tests(row: dict[str, Any], reply: str, seconds: float = CODE_SECONDS) -> bool:
    """Run what `reply` holds with the row's tests, and say whether they pass in time."""
    passed = secrets.token_hex()  # a script that ends before its tests cannot know it
    with tempfile.TemporaryDirectory() as folder:
        command: Sequence[str] = [sys.executable, "-I", "-c", program(row, reply, passed)]
        try:
            done = subprocess.run(
                command, cwd=folder, timeout=seconds, capture_output=True, check=False
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0 and passed.encode() in done.stdout
