r"""What joint tuning does to the model itself: backbones tuned on the same data, side by side.

The paper's other claim (arXiv 2505.17505, its accuracy table): the auxiliary loss of leap heads makes a
better model even when it decodes without them. Give the backbones tuned with NTP, MTP and L-MTP losses,
and the one that they came from; each is compared with the first:

    python benchmarks/scripts/tuned_backbones.py NTP=FOLDER MTP=FOLDER L-MTP=FOLDER original=FOLDER \
        --answers held_out.jsonl --arithmetic gsm8k_test.jsonl --functions humaneval.jsonl \
        --run-written-code --output benchmarks/results/tuned_backbones.json

Folders hold plain backbones (`lmtp export --to plain` makes one of an adapter) or full L-MTP checkpoints,
whose heads are left out. lm-evaluation-harness (`pip install lm_eval`) asks the questions, from local files
in GSM8K's and HumanEval's forms (`local_tasks.py`), so no hub is needed. Without questions only perplexity
is measured. A model's results are written as soon as they are known, and an interrupted run resumes. With
--tables they go into `tuned_backbones.md`.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from local_tasks import SCORE, arithmetic, functions
from tqdm.auto import tqdm

from modeling_lmtp.benchmarks.resampling import resample, resampled_ratios
from modeling_lmtp.conversion.loading import DTYPES, load_backbone, load_tokenizer
from modeling_lmtp.conversion.prompts import answer_end_id
from modeling_lmtp.conversion.saving import PROVENANCE, file_sha256, versions
from modeling_lmtp.training.answers import read_examples
from modeling_lmtp.training.examples import Example

PAGE = Path(__file__).parents[1] / "tuned_backbones.md"
MARK = "<!-- tables: written by tuned_backbones.py -->"


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


def right_answers(
    model: Any, tokenizer: Any, task: dict[str, Any], num_questions: int, batch_size: int
) -> torch.Tensor:
    """Ask the first questions through lm-evaluation-harness; return what is right, `(N,)`, 0 or 1."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise RuntimeError(
            "Task accuracy needs lm-evaluation-harness: pip install lm_eval. Or leave out "
            "--arithmetic and --functions."
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
    samples = sorted(found["samples"][task["task"]], key=lambda sample: sample["doc_id"])
    return torch.tensor([float(sample[SCORE]) for sample in samples])


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


def tasks_of(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the tasks that were asked for, by name."""
    tasks = {}
    if arguments.arithmetic is not None:
        tasks["arithmetic"] = arithmetic(arguments.arithmetic, arguments.max_new_tokens)
    if arguments.functions is not None:
        if not arguments.run_written_code:
            raise ValueError(
                "--functions runs code that a model wrote on this machine, with your rights. Say "
                "--run-written-code as well if that may be."
            )
        tasks["functions"] = functions(arguments.functions, arguments.max_new_tokens)
    return tasks


def weights_sha256(folder: str) -> dict[str, str]:
    """Return the hashes of a folder's weights by file; empty for a Hub id."""
    return {path.name: file_sha256(path) for path in sorted(Path(folder).glob("*.safetensors"))}


def tuning_of(folder: str) -> dict[str, Any] | None:
    """Return what `lmtp joint` wrote down of its run, heads before and after among it."""
    path = Path(folder) / PROVENANCE
    record = json.loads(path.read_text()) if path.exists() else {}
    if record.get("command") != "lmtp joint":
        return None
    return {name: record[name] for name in ("answers_sha256", "examples", "settings", "held_out")}


def measure_one(arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Return the raw results of one model: losses of the answers, and which questions it got right."""
    model, tokenizer = load_backbone(folder, arguments.dtype), load_tokenizer(folder)
    model = model.backbone if model.config.model_type == "lmtp" else model
    end_id = answer_end_id(model, tokenizer)
    examples = read_examples(arguments.answers, tokenizer, end_id)[: arguments.num_answers]
    losses, counts = answer_losses(model, examples)
    right = {
        name: right_answers(model, tokenizer, task, arguments.num_questions, arguments.batch_size)
        for name, task in tasks_of(arguments).items()
    }
    return {
        "losses": losses.tolist(),
        "counts": counts.tolist(),
        "right": {name: found.tolist() for name, found in right.items()},
        "tuning": tuning_of(folder),
        "weights_sha256": weights_sha256(folder),
        "device": str(model.device),
        "model_dtype": str(model.dtype),
    }


def conditions(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what all models have in common."""
    files = ("answers", "arithmetic", "functions")
    given = {name: getattr(arguments, name) for name in files}
    return {
        **{f"{name}_sha256": file_sha256(path) for name, path in given.items() if path},
        "dtype": arguments.dtype,
        "num_answers": arguments.num_answers,
        "num_questions": arguments.num_questions,
        "max_new_tokens": arguments.max_new_tokens,
        "batch_size": arguments.batch_size,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def summary(models: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Compare each model with the first."""
    first = next(iter(models.values()))
    return {
        "perplexity": perplexities(
            {name: torch.tensor(found["losses"]) for name, found in models.items()},
            torch.tensor(first["counts"]),
        ),
        "accuracy": {
            task: accuracies(
                {name: torch.tensor(found["right"][task]) for name, found in models.items()}
            )
            for task in first["right"]
        },
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the models that the output file does not have yet, and return the record."""
    tasks_of(arguments)  # refuses before anything is loaded
    record: dict[str, Any] = {
        "command": "python benchmarks/scripts/tuned_backbones.py",
        "conditions": conditions(arguments),
        "models": {},
    }
    if arguments.output.exists():
        found = json.loads(arguments.output.read_text())
        if found["conditions"] != record["conditions"]:
            raise SystemExit(f"{arguments.output} was made under other conditions.")
        record = found
    for name, folder in read_models(arguments.models).items():
        if name in record["models"]:
            if record["models"][name]["weights_sha256"] != weights_sha256(folder):
                raise SystemExit(f"In {arguments.output} {name!r} is another model.")
        else:
            record["models"][name] = measure_one(arguments, folder)
            record |= summary(record["models"])
            arguments.output.write_text(json.dumps(record) + "\n")
    return record


def table(record: dict[str, Any]) -> str:
    """Return the comparison as Markdown."""
    first = next(iter(record["models"]))
    tasks = list(record["accuracy"])
    columns = ["backbone", "held-out perplexity", f"nats per token − {first}'s"]
    columns += [title for task in tasks for title in (f"{task}, right", f"− {first}'s")]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name, found in record["perplexity"].items():
        cells = [name, f"{found['perplexity']:.3f}"]
        cells.append(f"{found['log_ratio']:+.4f} ± {found['log_ratio_standard_error']:.4f}")
        for task in tasks:
            right = record["accuracy"][task][name]
            cells.append(f"{right['accuracy']:.1%} ± {right['accuracy_standard_error']:.1%}")
            cells.append(f"{right['gain']:+.1%} ± {right['gain_standard_error']:.1%}")
        lines.append("| " + " | ".join(cells) + " |")
    asked = next(iter(record["models"].values()))
    lines += [
        "",
        f"{len(asked['counts'])} held-out answers, {sum(asked['counts'])} tokens; "
        + "".join(f"{len(asked['right'][task])} questions of {task}; " for task in tasks)
        + f"at most {record['conditions']['max_new_tokens']} new tokens, greedy, "
        f"{asked['model_dtype'].removeprefix('torch.')}, {asked['device']}. ± standard errors, those of "
        f"differences over the same answers.",
    ]
    return "\n".join(lines)


def heads_table(record: dict[str, Any]) -> str:
    """Return what tuning did to the heads, and how far it drove the backbone, as Markdown.

    Of models that kept answers out of their tuning to tell; empty if there are none.
    """
    told = {
        name: found["tuning"]["held_out"]
        for name, found in record["models"].items()
        if found["tuning"] is not None and found["tuning"]["held_out"]["heads_after"] is not None
    }
    if not told:
        return ""
    lines = [
        "On answers of the training file that tuning kept out, as people wrote them:",
        "",
        "| tuning | KL from the original | heads' top-1 at t+2, t+3, …, before | after | "
        "τ of the chain, before | after |",
        "|---|---|---|---|---|---|",
    ]
    for name, held_out in told.items():
        heads = [held_out[f"heads_{when}"] for when in ("before", "after")]
        cells = [name, f"{held_out['drift']['kl']:.4f}"]
        cells += [" ".join(f"{row[0]:.2f}" for row in h["accuracies"]) for h in heads]
        cells += [f"{h['chain_tokens_per_step']:.2f}" for h in heads]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables(record: dict[str, Any]) -> str:
    """Return all that stands below the mark in `tuned_backbones.md`."""
    return "\n\n".join(filter(None, (table(record), heads_table(record)))) + "\n"


def write_tables(output: Path) -> None:
    """Replace what stands below the mark in `tuned_backbones.md`."""
    above = PAGE.read_text().split(MARK)[0]
    PAGE.write_text(f"{above}{MARK}\n\n{tables(json.loads(output.read_text()))}")


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
    parser.add_argument("--arithmetic", type=Path, help="questions in GSM8K's form")
    parser.add_argument("--functions", type=Path, help="stubs with tests in HumanEval's form")
    parser.add_argument(
        "--run-written-code", action="store_true", help="let --functions run what a model wrote"
    )
    parser.add_argument("--num-questions", type=int, default=200, help="the first ones, of each")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tables", action="store_true", help="write tuned_backbones.md as well")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, print and write."""
    arguments = parse()
    record = measure(arguments)
    if arguments.tables:
        write_tables(arguments.output)
    print(json.dumps({key: record[key] for key in ("perplexity", "accuracy")}, indent=2))


if __name__ == "__main__":
    main()
