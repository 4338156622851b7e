"""`lmtp verify`: checks that a checkpoint generates the same text with and without `use_lmtp=True`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.table import Table

from modeling_lmtp.conversion.command_line import console
from modeling_lmtp.conversion.loading import (
    first_prompts,
    load_lmtp,
    load_tokenizer,
    prompt_tensors,
)
from modeling_lmtp.conversion.options import Dtype, Options, Range
from modeling_lmtp.conversion.saving import check_output_file
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.support_lmtp import Support, Tier, decoding_support
from modeling_lmtp.transformers_lmtp import attention_implementation

from .comparison import Comparison, compare, compare_batches
from .conditions import model_conditions
from .drafts_to_try import SAMPLING, all_drafts, saved_shape

SHOWN_DIVERGENCES = 5  # in the table; the result file lists all
FOOTNOTE = (
    "* The share of tokens that differ. For the first ones: their position and, in brackets, the gap "
    "between the plain model's two best logits and the rounding of the logits. A gap of more than twice "
    "the rounding is an error. In sampling only the first difference of each text counts."
)


@dataclass
class VerifyOptions(Options):
    """What to verify."""

    checkpoint: str = field(metadata={"help": "Folder or Hub id of a checkpoint with leap heads."})
    prompts: Path = field(kw_only=True, metadata={"help": "Prompts, .jsonl or .jsonl.gz."})
    num_prompts: Annotated[int, Range(ge=1)] = field(
        default=20, metadata={"help": "Take the first N prompts."}
    )
    max_new_tokens: Annotated[int, Range(ge=2)] = field(
        default=128, metadata={"help": "Generate N tokens per prompt, past any end token."}
    )
    batch_size: Annotated[int, Range(ge=1)] = field(
        default=1, metadata={"help": "Greedily, decode N prompts together as well."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})
    dtype: Dtype = field(
        default="float32", metadata={"help": "Dtype of the model; float32 promises equal texts."}
    )
    output: Path | None = field(default=None, metadata={"help": "Write the figures as JSON."})
    field: str = field(default="prompt", metadata={"help": "Field of a row that holds the prompt."})


def verify(options: VerifyOptions) -> int:
    """Check that leap heads generate the text of plain decoding: greedy and sampled, chain and tree.

    The exit status is 1 if they do not. In 16 bits tokens may differ where the plain model's two best
    logits nearly tie; the table lists these places and tells them from errors.

    Examples:
      lmtp verify OUT --prompts prompts.jsonl
      lmtp verify OUT --prompts prompts.jsonl --dtype bfloat16 --output figures.json
    """
    if options.output is not None:
        check_output_file(options.output)
    texts = first_prompts(options.prompts, options.field, options.num_prompts)
    model = load_lmtp(options.checkpoint, options.dtype)
    support = decoding_support(model.backbone)
    console.print(_describe_support(model, support, options.dtype), highlight=False)
    if support.tier is Tier.PLAIN:
        return 1
    prompts = prompt_tensors(load_tokenizer(options.checkpoint), texts, model.device)
    results = verify_exactness(
        model, prompts, options.max_new_tokens, batch_size=options.batch_size, seed=options.seed
    )
    console.print(_table(results))
    console.print(FOOTNOTE)
    if options.output is not None:
        record = exactness_record(model, results, options)
        options.output.write_text(json.dumps(record, indent=2) + "\n")
    return int(any(result.num_errors for result in results.values()))


def _describe_support(model: LMTPForCausalLM, support: Support, dtype: str) -> str:
    rows = "can accept different lengths" if support.ragged else "all accept the same length"
    return (
        f"Tier: {support.tier.value} ({support.reason}; {dtype}, {model.device.type}, "
        f"{attention_implementation(model.backbone.config)} attention); the rows of a batch {rows}."
    )


def _table(results: dict[str, Comparison]) -> Table:
    table = Table("decoding", "equal texts", "tokens per step", "tokens differing*", "errors")
    for name, result in results.items():
        share = result.summary()["share_of_tokens_differing"]
        places = [
            f"{divergence.position} ({divergence.top_two_gap:.2g}/{divergence.rounding:.2g})"
            for divergence in result.divergences[:SHOWN_DIVERGENCES]
        ]
        table.add_row(
            name,
            f"{result.num_equal} of {len(result.pairs)}",
            f"{result.median('tokens_per_step'):.2f}",
            f"{share:.2%} {', '.join(places)}",
            str(result.num_errors),
        )
    return table


def verify_exactness(
    model: LMTPForCausalLM,
    prompts: Sequence[torch.Tensor],
    max_new_tokens: int,
    *,
    batch_size: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Comparison]:
    """Decode each prompt both ways, greedily and sampling: with a chain, a tree, a plan, and as saved.

    Rows of a sampled batch draw other numbers than plain decoding's, so batches are decoded greedily.

    Args:
        model: the checkpoint, in evaluation mode; float32 is where equality is promised.
        prompts: token ids, each `(1, L)`.
        max_new_tokens: how many tokens to generate per prompt, past any end token.
        batch_size: if more than 1, that many prompts are decoded together as well.
        seed: set before each generation.
        progress: show progress bars.

    Raises:
        ValueError: the backbone's cache cannot drop rejected candidates, so L-MTP refuses it.
    """
    results = {}
    modes: dict[str, dict[str, Any]] = {"greedy": {"do_sample": False}, "sampling": SAMPLING}
    for mode, options in modes.items():
        comparisons = compare(
            model,
            prompts,
            all_drafts(model),
            seed=seed,
            progress=progress,
            description=mode,
            max_new_tokens=max_new_tokens,
            eos_token_id=None,
            **options,
        )
        results.update({f"{mode}, {draft}": result for draft, result in comparisons.items()})
    if batch_size > 1:
        comparisons = compare_batches(
            model,
            prompts,
            batch_size,
            all_drafts(model),
            max_new_tokens=max_new_tokens,
            progress=progress,
        )
        title = f"greedy, batches of {batch_size}"
        results.update({f"{title}, {draft}": result for draft, result in comparisons.items()})
    return results


def exactness_record(
    model: LMTPForCausalLM, results: dict[str, Comparison], options: VerifyOptions
) -> dict[str, Any]:
    """Return the results with all their conditions, JSON-serialisable.

    Args:
        model: the checkpoint that was verified.
        results: by `verify_exactness`.
        options: the command's.
    """
    support = decoding_support(model.backbone)
    return {
        "command": "lmtp verify",
        **model_conditions(model),
        "tier": support.tier.value,
        "reason": support.reason,
        "ragged_batches": support.ragged,
        "drafts": {name: draft or saved_shape(model) for name, draft in all_drafts(model).items()},
        "prompts": options.prompts.name,
        "max_new_tokens": options.max_new_tokens,
        "seed": options.seed,
        "dtype": options.dtype,
        "sampling": SAMPLING,
        "batch_size": options.batch_size,
        "results": {name: result.summary() for name, result in results.items()},
    }
