r"""What joint tuning does to the model itself: backbones tuned on the same data, side by side.

The paper's other claim (arXiv 2505.17505, its accuracy table): the auxiliary loss of leap heads makes a
better model even when it decodes without them. Give the backbones tuned with NTP, MTP and L-MTP losses,
and the one that they came from; each is compared with the first:

    python benchmarks/tuned_backbones.py base=FOLDER ntp=FOLDER mtp=FOLDER lmtp=FOLDER \
        --answers held_out.jsonl --questions gsm8k_test.jsonl --output results.json

Folders hold plain backbones (`lmtp merge` makes one of an adapter) or full L-MTP checkpoints, whose
heads are left out. Questions are rows with `question` and an `answer` that ends in `#### NUMBER`, as in
GSM8K. They are asked through lm-evaluation-harness (`pip install lm_eval`), from the local file: no hub
is needed. Without --questions only perplexity is measured.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from modeling_lmtp.conversion.loading import DTYPES, load_backbone, load_tokenizer
from modeling_lmtp.training.examples import Example, read_examples
from modeling_lmtp.training.prompts import end_ids
from modeling_lmtp.training.resampling import resample, resampled_ratios
from modeling_lmtp.training.saving import file_sha256, versions

TASK = "local_arithmetic"
METRIC = "exact_match"


def read_models(named: Sequence[str]) -> dict[str, str]:
    """Read `NAME=FOLDER` arguments.

    Raises:
        ValueError: one is not of that form, or a name comes twice.
    """
    models: dict[str, str] = {}
    for text in named:
        name, separator, folder = text.partition("=")
        if not (name and separator and folder):
            raise ValueError(f"A model must be given as NAME=FOLDER, got {text!r}.")
        if name in models:
            raise ValueError(f"The name {name!r} is given twice. Call each model differently.")
        models[name] = folder
    return models


@torch.no_grad()
def answer_losses(model: Any, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return per answer the summed `-log p` of its tokens in nats, and how many they are, `(N,)`."""
    losses, counts = [], []
    for example in tqdm(examples, desc="perplexity", unit="answer"):
        input_ids = torch.tensor([example.input_ids], device=model.device)
        start = max(1, example.answer_start)
        logits = model(input_ids=input_ids, use_cache=False).logits[0, start - 1 : -1]
        loss = torch.nn.functional.cross_entropy(
            logits.float(), input_ids[0, start:], reduction="sum"
        )
        losses.append(loss.item())
        counts.append(input_ids.shape[1] - start)
    return torch.tensor(losses), torch.tensor(counts)


def perplexities(
    losses: dict[str, torch.Tensor], counts: torch.Tensor, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Compare models on the same answers, each with the first.

    Returns:
        For each `perplexity`, and `log_ratio`: its mean loss minus the first's, in nats per token,
        with its standard error from resampling the answers for both alike.
    """
    resamples = resample(len(counts), seed)
    first = next(iter(losses.values()))
    return {
        name: {
            "perplexity": math.exp((loss.sum() / counts.sum()).item()),
            "log_ratio": ((loss - first).sum() / counts.sum()).item(),
            "log_ratio_standard_error": resampled_ratios(loss - first, counts, resamples)
            .std()
            .item(),
        }
        for name, loss in losses.items()
    }


def local_task(questions: Path, max_new_tokens: int) -> dict[str, Any]:
    """Describe the questions to lm-evaluation-harness: the last number of the answer is what counts."""
    return {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(questions.resolve())}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer.split('####')[-1].strip()}}",
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": max_new_tokens},
        "filter_list": [
            {
                "name": "last-number",
                "filter": [
                    {
                        "function": "regex",
                        "regex_pattern": r"(-?\d[\d,]*(?:\.\d+)?)",
                        "group_select": -1,
                    },
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [
            {
                "metric": METRIC,
                "aggregation": "mean",
                "higher_is_better": True,
                "regexes_to_ignore": [",", r"\.0+$"],
            }
        ],
    }


def right_answers(
    model: Any, tokenizer: Any, task: dict[str, Any], num_questions: int, batch_size: int
) -> torch.Tensor:
    """Ask the first questions through lm-evaluation-harness; return what is right, `(N,)`, 0 or 1."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise RuntimeError(
            "Task accuracy needs lm-evaluation-harness: pip install lm_eval. Or leave out --questions."
        ) from error
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = simple_evaluate(
        model=wrapped,
        tasks=[dict(task)],
        limit=num_questions,
        apply_chat_template=tokenizer.chat_template is not None,
        bootstrap_iters=0,
        log_samples=True,
    )
    samples = sorted(found["samples"][TASK], key=lambda sample: sample["doc_id"])
    return torch.tensor([float(sample[METRIC]) for sample in samples])


def accuracies(right: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """Compare models on the same questions, each with the first: `gain`, and its standard error."""
    first = next(iter(right.values()))
    size = math.sqrt(len(first))
    return {
        name: {
            "accuracy": of_model.mean().item(),
            "accuracy_standard_error": of_model.std().item() / size,
            "gain": (of_model - first).mean().item(),
            "gain_standard_error": (of_model - first).std().item() / size,
        }
        for name, of_model in right.items()
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all models, one after the other, and return the record."""
    losses, right, counts, conditions = {}, {}, torch.tensor(0), {}
    for name, folder in read_models(arguments.models).items():
        model, tokenizer = load_backbone(folder, arguments.dtype), load_tokenizer(folder)
        model = model.backbone if model.config.model_type == "lmtp" else model
        end_id = next(iter(end_ids(model, tokenizer)), None)
        examples = read_examples(arguments.answers, tokenizer, end_id)[: arguments.num_answers]
        losses[name], counts = answer_losses(model, examples)
        if arguments.questions is not None:
            task = local_task(arguments.questions, arguments.max_new_tokens)
            right[name] = right_answers(
                model, tokenizer, task, arguments.num_questions, arguments.batch_size
            )
        conditions = {"device": str(model.device), "model_dtype": str(model.dtype)}
    return {
        "command": "python benchmarks/tuned_backbones.py",
        "arguments": {name: str(value) for name, value in vars(arguments).items()},
        "answers_sha256": file_sha256(arguments.answers),
        "questions_sha256": file_sha256(arguments.questions) if arguments.questions else None,
        **conditions,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "answers": len(counts),
        "answer_tokens": int(counts.sum()),
        "perplexity": perplexities(losses, counts),
        "accuracy": accuracies(right) if right else None,
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument(
        "--answers", type=Path, required=True, help="held-out prompts and responses"
    )
    parser.add_argument("--num-answers", type=int, default=64)
    parser.add_argument("--questions", type=Path, help="a local .jsonl file")
    parser.add_argument("--num-questions", type=int, default=200)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, print and write."""
    arguments = parse()
    record = measure(arguments)
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps({key: record[key] for key in ("perplexity", "accuracy")}, indent=2))


if __name__ == "__main__":
    main()
