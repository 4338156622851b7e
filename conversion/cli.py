"""The `lmtp` command line: each command reads its arguments and calls one function."""

import json
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    help="Leap multi-token prediction for Hugging Face Transformers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = Console()

Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")]
Offsets = Annotated[
    str | None, typer.Option(help="Comma-separated leap offsets, such as 2,3,5, instead of both.")
]

HeadContext = Annotated[
    int, typer.Option(help="Known tokens after its state that a head sees; 0 is the paper's head.")
]


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Print errors that the user can mend as one line, without a traceback."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, OSError, RuntimeError, StrictDataclassError) as error:
            # A configuration's own error is wrapped in the name of its validator
            shown = error.__cause__ if isinstance(error, StrictDataclassError) else error
            message = f"error: {shown}"
            Console(stderr=True).print(message, style="red", markup=False, soft_wrap=True)
            raise typer.Exit(1) from error

    return wrapped


@app.command()
@reports_errors
def demo(
    output: Annotated[Path, typer.Argument(help="Folder for all it makes.")] = Path("lmtp-demo"),
) -> None:
    """Train leap heads for SmolLM2-135M-Instruct and compare: the whole path, in minutes."""
    from modeling_lmtp.conversion.demo import run_demo

    run_demo(output, console)


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
    from modeling_lmtp.conversion.streaming import stream_answer

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
def wrap(
    backbone: Annotated[str, typer.Argument(help="Folder or Hub id of a causal language model.")],
    output: Annotated[Path, typer.Argument(help="New folder for the checkpoint.")],
    num_leap_heads: Annotated[int | None, typer.Option(help="3 by default.")] = None,
    leap_stride: Annotated[int | None, typer.Option(help="2 by default.")] = None,
    leap_offsets: Offsets = None,
    head_context: HeadContext = 0,
    num_head_layers: int = 1,
    share_lm_head: bool = True,
    dtype: Dtype = "auto",
) -> None:
    """Give a backbone fresh leap heads and save it as a checkpoint."""
    from modeling_lmtp.conversion.loading import load_backbone, load_tokenizer
    from modeling_lmtp.modeling_lmtp import LMTPForCausalLM
    from modeling_lmtp.training.saving import check_output_folder, save_checkpoint

    check_output_folder(output)
    model = LMTPForCausalLM.from_backbone(
        load_backbone(backbone, dtype),
        num_leap_heads,
        leap_stride,
        leap_offsets=_offsets(leap_offsets),
        head_context=head_context,
        num_head_layers=num_head_layers,
        share_lm_head=share_lm_head,
    )
    save_checkpoint(model, load_tokenizer(backbone), output, {"command": "lmtp wrap"})
    console.print(
        f"Saved {model.config.num_leap_heads} untrained leap heads with {backbone} in {output}."
    )


@app.command()
@reports_errors
def distill(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of the backbone.")],
    output: Annotated[Path, typer.Argument(help="Answers, a .jsonl file; a stopped run goes on.")],
    prompts: Annotated[Path | None, typer.Option(help="Prompts, .jsonl or .jsonl.gz.")] = None,
    field: Annotated[str, typer.Option(help="The field of the prompts file to ask.")] = "prompt",
    self_written: Annotated[
        int, typer.Option(min=0, help="Let an instruct model write so many prompts itself.")
    ] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first so many prompts.")] = None,
    max_new_tokens: int = 320,
    temperature: float = 0.0,
    top_p: float = 1.0,
    num_answers: int = 1,
    batch_size: int = 16,
    seed: int = 0,
    dtype: Dtype = "auto",
) -> None:
    """Let a backbone answer prompts: the answers are what leap heads learn."""
    from modeling_lmtp.conversion.distilling import distill_from
    from modeling_lmtp.training.distill import DistillSettings

    settings = DistillSettings(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        num_answers=num_answers,
        batch_size=batch_size,
        seed=seed,
    )
    report = distill_from(
        model, output, settings, prompts=prompts, field=field, self_written=self_written,
        limit=limit, dtype=dtype,
    )  # fmt: skip
    console.print(
        f"{report.rows} answers, {report.tokens} tokens, {report.finished_share:.0%} finished, in "
        f"{report.output} ({report.new_rows} of them new)."
    )


@app.command()
@reports_errors
def train(
    model: Annotated[str, typer.Argument(help="A backbone, or a checkpoint whose heads go on.")],
    answers: Annotated[Path, typer.Argument(help="What `lmtp distill` made with this backbone.")],
    output: Annotated[Path, typer.Argument(help="New folder; a stopped run goes on.")],
    num_leap_heads: Annotated[int | None, typer.Option(help="3 by default.")] = None,
    leap_stride: Annotated[int | None, typer.Option(help="2 by default.")] = None,
    leap_offsets: Offsets = None,
    head_context: HeadContext = 0,
    num_head_layers: int = 1,
    share_lm_head: bool = True,
    draft_vocab_size: Annotated[
        int | None, typer.Option(help="Draft only so many tokens, the answers' most frequent.")
    ] = None,
    epochs: float = 1.0,
    batch_size: int = 8,
    gradient_accumulation_steps: int = 1,
    learning_rate: float = 1e-3,
    max_length: int = 1024,
    held_out: Annotated[int, typer.Option(min=0, help="Answers kept for evaluation.")] = 32,
    seed: int = 0,
    save_steps: int = 200,
    dtype: Dtype = "auto",
) -> None:
    """Warm up leap heads on self-distilled answers (stage 1: the backbone stays as it is)."""
    from modeling_lmtp.conversion.training import HeadShape, train_heads
    from modeling_lmtp.training.warmup import WarmupSettings

    settings = WarmupSettings(
        epochs=epochs,
        batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        learning_rate=learning_rate,
        seed=seed,
        save_steps=save_steps,
    )
    shape = HeadShape(
        num_leap_heads=num_leap_heads,
        leap_stride=leap_stride,
        leap_offsets=_offsets(leap_offsets),
        head_context=head_context,
        num_head_layers=num_head_layers,
        share_lm_head=share_lm_head,
        draft_vocab_size=draft_vocab_size,
    )
    report = train_heads(
        model,
        answers,
        output,
        shape,
        settings,
        max_length=max_length,
        held_out=held_out,
        dtype=dtype,
    )
    if report.held_out is not None:
        top1 = ", ".join(f"{row[0]:.2f}" for row in report.held_out.accuracies)
        console.print(
            f"Held-out top-1 accuracy per draft distance: {top1}; simulated tokens per step of the "
            f"chain: {report.held_out.chain_tokens_per_step:.2f}."
        )
    console.print(f"Saved in {output}.")


@app.command()
@reports_errors
def verify(
    checkpoint: Annotated[str, typer.Argument(help="Folder or Hub id with leap heads.")],
    prompts: Annotated[Path, typer.Option(help="Prompts, .jsonl or .jsonl.gz.")],
    field: str = "prompt",
    num_prompts: Annotated[int, typer.Option(min=1)] = 20,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    seed: int = 0,
    dtype: Dtype = "float32",
    output: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Check that L-MTP generates what plain decoding generates; exits with 1 if it does not.

    In 16 bits, tokens may differ where the plain model's two best logits nearly tie; each such place
    is reported, and told from an error.
    """
    from modeling_lmtp.conversion.exactness import exactness_record, verify_exactness
    from modeling_lmtp.conversion.loading import (
        first_prompts,
        load_lmtp,
        load_tokenizer,
        prompt_tensors,
    )
    from modeling_lmtp.support_lmtp import Tier, decoding_support

    texts = first_prompts(prompts, field, num_prompts)
    model = load_lmtp(checkpoint, dtype)
    support = decoding_support(model.backbone)
    console.print(
        f"Tier: {support.tier.value} ({support.reason}; {dtype}, {model.device.type}, "
        f"{model.backbone.config._attn_implementation} attention); rows of a batch "
        f"{'may accept different lengths' if support.ragged else 'go in step'}."
    )
    if support.tier is Tier.REFUSED:
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


def _offsets(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(
            f"--leap-offsets takes whole numbers with commas between, such as 2,3,5; got {text!r}."
        ) from error
