"""Trains a small Gemma 3 from scratch on this project's files, to take another architecture all the way.

SmolLM2, on which everything else is measured, is a Llama. This model has sliding windows in two layers of
three, embeddings that are scaled, states that are normalized twice per layer, and a tokenizer of its own.
OUTPUT gets the model, the prompts that it answers for training, and others, from files that it has never
seen.

    python benchmarks/scripts/second_model.py OUTPUT
    lmtp distill OUTPUT/backbone OUTPUT/answers.jsonl --prompts OUTPUT/prompts.jsonl --max_new_tokens 96
    lmtp train OUTPUT/backbone OUTPUT/answers.jsonl OUTPUT/heads --leap_offsets 2 3 4 --head_context path
    lmtp verify OUTPUT/heads --prompts OUTPUT/held_out.jsonl
    lmtp bench OUTPUT/heads --prompts OUTPUT/held_out.jsonl --rounds 1 --per_kind 10 --max_new_tokens 64
"""

import argparse
import json
import random
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DataCollatorForLanguageModeling,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

ROOT = Path(__file__).parents[2]
KINDS = {".py": "code", ".md": "pages"}
END = "<end>"
VOCAB_SIZE = 4096
LENGTH = 192  # of the pieces that are learned, in tokens
PROMPT_LENGTHS = (80, 240)  # in characters
HELD_OUT_SHARE = 0.1  # of the files
MAX_HELD_OUT = 40  # prompts per kind


def read_files(root: Path) -> dict[Path, str]:
    """Return the code and the pages that git tracks under `root`."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True
    ).stdout
    paths = [root / name for name in listed.split("\0") if Path(name).suffix in KINDS]
    return {path: path.read_text(encoding="utf-8") for path in sorted(paths)}


def split_files(files: dict[Path, str]) -> tuple[dict[Path, str], dict[Path, str]]:
    """Return the files to learn, and those that are held out."""
    paths = list(files)
    random.Random(0).shuffle(paths)
    count = max(1, round(HELD_OUT_SHARE * len(paths)))
    return {p: files[p] for p in paths[count:]}, {p: files[p] for p in paths[:count]}


def prompts_of(files: dict[Path, str]) -> Iterator[dict[str, str]]:
    """Yield one prompt for each part of a file: how it begins."""
    generator = random.Random(0)
    for path, text in files.items():
        for part in text.split("\n\n\n" if path.suffix == ".py" else "\n\n"):
            prompt = part.strip("\n")[: generator.randint(*PROMPT_LENGTHS)].rstrip()
            if len(prompt) >= PROMPT_LENGTHS[0]:
                yield {"kind": KINDS[path.suffix], "prompt": prompt}


def few_of_each(prompts: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Return at most `MAX_HELD_OUT` prompts of each kind."""
    shuffled = random.Random(0).sample(prompts, len(prompts))
    return [
        prompt
        for kind in KINDS.values()
        for prompt in [row for row in shuffled if row["kind"] == kind][:MAX_HELD_OUT]
    ]


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that begins nothing and ends texts with `END`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def new_model(tokenizer: PreTrainedTokenizerFast, hidden_size: int) -> Gemma3ForCausalLM:
    """Return a random Gemma 3: six layers, of which the third and the sixth see the whole text."""
    end = tokenizer.convert_tokens_to_ids(END)
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
        query_pre_attn_scalar=hidden_size // 4,
        max_position_embeddings=1024,
        sliding_window=64,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    return Gemma3ForCausalLM(config)


def train(
    model: Gemma3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    folder: Path,
    steps: int,
) -> None:
    """Train a model on texts, cut into pieces of `LENGTH` tokens."""
    ids = [i for text in texts for i in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    pieces = [{"input_ids": ids[i : i + LENGTH]} for i in range(0, len(ids) - LENGTH, LENGTH)]
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        logging_steps=max(1, steps // 20),
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    Trainer(model, args, collator, pieces, processing_class=tokenizer).train()


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Train the model, and write it with its prompts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--corpus", type=Path, default=ROOT, help="A git repository to learn.")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--hidden-size", type=int, default=160)
    options = parser.parse_args()
    learned, held_out = split_files(read_files(options.corpus))
    torch.manual_seed(0)
    tokenizer = train_tokenizer(list(learned.values()))
    model = new_model(tokenizer, options.hidden_size)
    print(
        f"{len(learned)} files to learn, {len(held_out)} held out, {model.num_parameters():,} parameters"
    )
    train(model, tokenizer, list(learned.values()), options.output / "training", options.steps)
    model.save_pretrained(options.output / "backbone")
    tokenizer.save_pretrained(options.output / "backbone")
    write_rows(options.output / "prompts.jsonl", list(prompts_of(learned)))
    write_rows(options.output / "held_out.jsonl", few_of_each(list(prompts_of(held_out))))


if __name__ == "__main__":
    main()
