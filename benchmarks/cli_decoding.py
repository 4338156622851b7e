"""The commands that decode: demo, generate and verify."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from modeling_lmtp.conversion.cli_base import Dtype, app, console, reports_errors


@app.command()
@reports_errors
def demo(
    output: Annotated[Path, typer.Argument(help="Folder for all it makes.")] = Path("lmtp-demo"),
    train: Annotated[
        bool, typer.Option("--train", help="Train heads on the spot, in minutes.")
    ] = False,
) -> None:
    """Give SmolLM2-135M-Instruct leap heads and compare: in a minute, once it is downloaded."""
    from .demo import run_demo
    from .demo_training import Recipe

    run_demo(output, console, Recipe() if train else None)


@app.command()
@reports_errors
def generate(
    checkpoint: Annotated[str, typer.Argument(help="Folder or Hub id with leap heads.")],
    prompt: Annotated[str, typer.Argument(help="The prompt; a chat template is applied.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: int = 0,
    plain: Annotated[bool, typer.Option(help="Decode without leap heads.")] = False,
    dtype: Dtype = "auto",
) -> None:
    """Stream the answer to a prompt."""
    from .streaming import stream_answer

    figures = stream_answer(
        checkpoint,
        prompt,
        dtype=dtype,
        seed=seed,
        use_lmtp=not plain,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )
    print(figures, file=sys.stderr)


@app.command()
@reports_errors
def verify(
    checkpoint: Annotated[str, typer.Argument(help="Folder or Hub id with leap heads.")],
    prompts: Annotated[Path, typer.Option(help="Prompts, .jsonl or .jsonl.gz.")],
    field: str = "prompt",
    num_prompts: Annotated[int, typer.Option(min=1)] = 20,
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 128,
    seed: int = 0,
    dtype: Dtype = "float32",
    output: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Check that L-MTP generates what plain decoding generates; exits with 1 if it does not.

    In 16 bits, tokens may differ where the plain model's two best logits nearly tie; each such place
    is reported, and told from an error.
    """
    from modeling_lmtp.conversion.loading import (
        first_prompts,
        load_lmtp,
        load_tokenizer,
        prompt_tensors,
    )
    from modeling_lmtp.conversion.saving import check_output_file
    from modeling_lmtp.support_lmtp import Tier, decoding_support
    from modeling_lmtp.transformers_lmtp import attention_implementation

    from .exactness import exactness_record, verify_exactness

    if output is not None:
        check_output_file(output)
    texts = first_prompts(prompts, field, num_prompts)
    model = load_lmtp(checkpoint, dtype)
    support = decoding_support(model.backbone)
    console.print(
        f"Tier: {support.tier.value} ({support.reason}; {dtype}, {model.device.type}, "
        f"{attention_implementation(model.backbone.config)} attention); rows of a batch "
        f"{'may accept different lengths' if support.ragged else 'go in step'}."
    )
    if support.tier is Tier.PLAIN:
        raise typer.Exit(1)
    tensors = prompt_tensors(load_tokenizer(checkpoint), texts, model.device)
    results = verify_exactness(model, tensors, max_new_tokens, seed=seed)
    table = Table("decoding", "equal texts", "tokens per step", "tokens differing*", "errors")
    for name, result in results.items():
        summary = result.summary()
        places = [
            f"{found.position} ({found.top_two_gap:.2g}/{found.rounding:.2g})"
            for found in result.divergences[:5]
        ]
        table.add_row(
            name,
            f"{result.num_equal} of {len(result.pairs)}",
            f"{result.median('tokens_per_step'):.2f}",
            f"{summary['share_of_tokens_differing']:.2%} {', '.join(places)}",
            str(result.num_errors),
        )
    console.print(table)
    console.print(
        "* Their share; of the first ones the position, and in brackets the gap between the plain "
        "model's two best logits there and the rounding of the logits. A gap beyond twice the "
        "rounding is an error. Sampling stops counting at a text's first difference."
    )
    if output is not None:
        conditions = {
            "prompts": prompts.name,
            "max_new_tokens": max_new_tokens,
            "seed": seed,
            "dtype": dtype,
        }
        record = exactness_record(model, results, conditions)
        output.write_text(json.dumps(record, indent=2) + "\n")
    if any(result.num_errors for result in results.values()):
        raise typer.Exit(1)
