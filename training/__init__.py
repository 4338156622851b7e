"""Training leap heads: answers of the backbone, and trainers on top of `transformers.Trainer`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .answers import load_answers
    from .arguments import JointTrainingArguments, LeapTrainingArguments
    from .examples import Example, split_examples
    from .joint_trainer import JointTrainer
    from .leap_trainer import LeapTrainer

_FILES = {
    "Example": "examples",
    "JointTrainer": "joint_trainer",
    "JointTrainingArguments": "arguments",
    "LeapTrainer": "leap_trainer",
    "LeapTrainingArguments": "arguments",
    "load_answers": "answers",
    "split_examples": "examples",
}

__all__ = [
    "Example",
    "JointTrainer",
    "JointTrainingArguments",
    "LeapTrainer",
    "LeapTrainingArguments",
    "load_answers",
    "split_examples",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: PEFT alone takes a second."""
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_FILES[name]}", __name__), name)
