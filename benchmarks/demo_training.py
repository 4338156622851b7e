"""Trains heads for the demo: SmolLM2 writes prompts and answers them, and leap heads learn the answers."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from modeling_lmtp.conversion.command_line import console
from modeling_lmtp.conversion.loading import load_backbone
from modeling_lmtp.conversion.prompts import answer_end_id, read_prompts
from modeling_lmtp.conversion.saving import save_checkpoint
from modeling_lmtp.training.answers import read_examples
from modeling_lmtp.training.arguments import HeadOptions, LeapTrainingArguments
from modeling_lmtp.training.distill import DistillSettings, append_rows, distill
from modeling_lmtp.training.examples import split_examples
from modeling_lmtp.training.leap_trainer import LeapTrainer
from modeling_lmtp.training.self_written import self_written_prompts
from modeling_lmtp.training.train_command import add_heads
from modeling_lmtp.training.writers import ModelWriter

from .smollm2 import HUB_REPOSITORY


@dataclass(frozen=True)
class Recipe:
    """Which heads to train, on what, and how."""

    num_prompts: int = 128
    prompt_tokens: int = 48  # longer self-written prompts are dropped: batches wait for the longest
    held_out: int = 12
    answer_tokens: int = 128
    leap_offsets: tuple[int, ...] = (2, 3, 5)
    head_context: int = 2
    draft_vocab_size: int = 8192
    epochs: float = 4.0
    batch_size: int = 4
    learning_rate: float = 1e-3
    dtype: str = "bfloat16"
    seed: int = 0


def train_checkpoint(
    source: Path,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    checkpoint: Path,
    recipe: Recipe,
) -> None:
    """Train heads and save them as `checkpoint`.

    Args:
        source: the backbone's folder.
        tokenizer: the backbone's.
        output: keeps the result of each step, so that an interrupted demo resumes.
        checkpoint: a new folder.
        recipe: what to train.
    """
    backbone = load_backbone(source, dtype=recipe.dtype)
    answers = _distil(backbone, tokenizer, output, recipe)
    console.print("The heads learn the answers; the backbone stays as it is.")
    examples = read_examples(answers, tokenizer, answer_end_id(backbone, tokenizer))
    train, held_out = split_examples(examples, recipe.held_out)
    heads = HeadOptions(
        leap_offsets=list(recipe.leap_offsets),
        head_context=str(recipe.head_context),
        draft_vocab_size=recipe.draft_vocab_size,
    )
    model = add_heads(backbone, heads, train)
    model.config.base_model_name_or_path = HUB_REPOSITORY
    args = LeapTrainingArguments(
        output_dir=str(output / "training"),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        seed=recipe.seed,
    )
    trainer = LeapTrainer(model, args, train, held_out)
    trainer.train(resume_from_checkpoint=True)
    report = trainer.head_report(held_out)
    model.generation_config.do_sample = False
    record: dict[str, Any] = {
        "command": "lmtp demo --train",
        "recipe": asdict(recipe),
        "held_out": report.as_dict() if report else None,
        "log": trainer.state.log_history,
    }
    save_checkpoint(model, tokenizer, checkpoint, record)


def _distil(
    backbone: Any,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    recipe: Recipe,
) -> Path:
    settings = DistillSettings(
        max_new_tokens=recipe.answer_tokens,
        magpie_max_tokens=recipe.prompt_tokens,
        seed=recipe.seed,
    )
    prompts, answers = output / "prompts.jsonl", output / "answers.jsonl"
    if not prompts.exists():
        console.print(f"The model writes {recipe.num_prompts} prompts itself.")
        written = self_written_prompts(
            ModelWriter(backbone, tokenizer), recipe.num_prompts, settings
        )
        append_rows(prompts, [{"prompt": p.text, "kind": p.kind} for p in written])
    console.print("It answers them; the heads will learn these answers.")
    distill(backbone, tokenizer, read_prompts(prompts), answers, settings)
    return answers
