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
        except typer.Exit:  # a RuntimeError, but no error to print
            raise
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
    dataset: Annotated[
        str | None, typer.Option(help="Prompts of a dataset: a Hub id, or a local folder or file.")
    ] = None,
    dataset_config: Annotated[str | None, typer.Option(help="Its configuration.")] = None,
    split: Annotated[str | None, typer.Option(help="Its split; train by default.")] = None,
    field: Annotated[
        str, typer.Option(help="The field of the prompt; in a dataset, conversations do too.")
    ] = "prompt",
    self_written: Annotated[
        int, typer.Option(min=0, help="Let an instruct model write so many prompts itself.")
    ] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first so many prompts.")] = None,
    max_new_tokens: int = 320,
    temperature: float = 0.0,
    top_p: float = 1.0,
    num_answers: int = 1,
    batch_size: Annotated[
        int, typer.Option(help="Answers made at once; with --server, requests under way.")
    ] = 16,
    seed: int = 0,
    dtype: Dtype = "auto",
    server: Annotated[
        str | None,
        typer.Option(help="Ask an OpenAI-compatible server, such as http://localhost:8000/v1."),
    ] = None,
    server_model: Annotated[
        str | None, typer.Option(help="The name it serves MODEL under; MODEL by default.")
    ] = None,
) -> None:
    """Let a backbone answer prompts: the answers are what leap heads learn.

    Several processes share the work when launched with, say,
    `accelerate launch --multi_gpu --num_processes 2 --no_python lmtp distill …` (on CPUs too).

    With --server no model is loaded: a server that holds the whole of MODEL, in the precision that
    the heads will run with, answers. The environment variable OPENAI_API_KEY holds the key, if any.
    """
    from modeling_lmtp.conversion.distilling import choose_prompts, choose_server, distill_from
    from modeling_lmtp.training.distill import DistillSettings
    from modeling_lmtp.training.processes import MainProcessFailed, processes

    settings = DistillSettings(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        num_answers=num_answers,
        batch_size=batch_size,
        seed=seed,
    )
    choice = choose_prompts(prompts, dataset, dataset_config, split, field, self_written, limit)
    endpoint = choose_server(model, server, server_model, dtype)
    try:
        report = distill_from(model, output, settings, choice, dtype=dtype, server=endpoint)
    except MainProcessFailed:  # the main process says why
        sys.exit(1)
    if processes().is_main_process:
        console.print(report.summary(), markup=False, soft_wrap=True)


@app.command()
@reports_errors
def train(
    model: Annotated[str, typer.Argument(help="A backbone, or a checkpoint whose heads go on.")],
    answers: Annotated[Path, typer.Argument(help="What `lmtp distill` made with this backbone.")],
    output: Annotated[Path, typer.Argument(help="New folder; a stopped run goes on.")],
    num_leap_heads: Annotated[int | None, typer.Option(help="3 by default.")] = None,
    leap_stride: Annotated[int | None, typer.Option(help="2 by default.")] = None,
    leap_offsets: Offsets = None,
    head_context: Annotated[
        str,
        typer.Option(
            help="Known tokens after its state that a head sees: 0 (the paper's head), more, or path "
            "for all up to its target, drafted ones included."
        ),
    ] = "0",
    head_input: Annotated[
        str, typer.Option(help="last, or weighted to read the states of all layers.")
    ] = "last",
    num_head_layers: int = 1,
    share_lm_head: bool = True,
    lm_head_rank: Annotated[
        int, typer.Option(help="Rank of what each head adds to a shared unembedding.")
    ] = 0,
    draft_vocab_size: Annotated[
        int | None, typer.Option(help="Draft only so many tokens, the answers' most frequent.")
    ] = None,
    epochs: float = 1.0,
    batch_size: Annotated[int, typer.Option(help="Answers, or packs, per process.")] = 8,
    gradient_accumulation_steps: int = 1,
    learning_rate: float = 1e-3,
    max_length: int = 1024,
    pack: Annotated[
        bool, typer.Option("--pack", help="Put several answers in one sequence of max_length.")
    ] = False,
    train_on_prompts: Annotated[
        bool, typer.Option("--train-on-prompts", help="Learn the prompts' tokens as well.")
    ] = False,
    distillation_weight: Annotated[
        float, typer.Option(help="Share of the backbone's own distribution in what is learned.")
    ] = 0.0,
    distillation_temperature: Annotated[
        float, typer.Option(help="Higher ones show more of its less likely tokens.")
    ] = 1.0,
    curriculum: Annotated[
        str, typer.Option(help="none, forward (near heads join first) or reverse.")
    ] = "none",
    curriculum_share: Annotated[
        float, typer.Option(help="Share of the steps over which heads join.")
    ] = 0.5,
    held_out: Annotated[int, typer.Option(min=0, help="Answers kept for evaluation.")] = 32,
    eval_steps: Annotated[
        int | None, typer.Option(help="Evaluate so often, besides after each epoch.")
    ] = None,
    seed: int = 0,
    logging_steps: int = 10,
    save_steps: int = 200,
    shard_backbone: Annotated[
        bool, typer.Option("--shard-backbone", help="Among the processes (FSDP).")
    ] = False,
    dtype: Dtype = "auto",
) -> None:
    """Warm up leap heads on self-distilled answers (stage 1: the backbone stays as it is).

    Several processes share the work when launched with, say,
    `accelerate launch --multi_gpu --num_processes 2 --no_python lmtp train …` (on CPUs too);
    `--use_fsdp` in place of `--multi_gpu` is --shard-backbone.
    """
    from modeling_lmtp.conversion.training import HeadShape, train_heads
    from modeling_lmtp.training.processes import processes
    from modeling_lmtp.training.warmup import WarmupSettings

    settings = WarmupSettings(
        epochs=epochs,
        batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        learning_rate=learning_rate,
        seed=seed,
        logging_steps=logging_steps,
        save_steps=save_steps,
        eval_steps=eval_steps,
        train_on_prompts=train_on_prompts,
        pack_length=max_length if pack else None,
        distillation_weight=distillation_weight,
        distillation_temperature=distillation_temperature,
        curriculum=curriculum,
        curriculum_share=curriculum_share,
        shard_backbone=shard_backbone,
    )
    shape = HeadShape(
        num_leap_heads=num_leap_heads,
        leap_stride=leap_stride,
        leap_offsets=_offsets(leap_offsets),
        head_context=_head_context(head_context),
        head_input=head_input,
        num_head_layers=num_head_layers,
        share_lm_head=share_lm_head,
        lm_head_rank=lm_head_rank,
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
    if not processes().is_main_process:
        return
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


def _head_context(text: str) -> int | str:
    if text == "path":
        return text
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"--head-context takes a whole number, or path; got {text!r}.") from error


def _offsets(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(
            f"--leap-offsets takes whole numbers with commas between, such as 2,3,5; got {text!r}."
        ) from error


@app.command()
@reports_errors
def analyze(
    sources: Annotated[
        list[str], typer.Argument(help="Checkpoints on one backbone, or one plain backbone.")
    ],
    answers: Annotated[Path, typer.Option(help="Held-out answers, made by `lmtp distill`.")],
    output: Annotated[Path, typer.Option(help="New folder for figures and pictures.")],
    num_answers: Annotated[
        int, typer.Option(help="Those that `train --held-out` with this number keeps out.")
    ] = 32,
    marginalize_positions: Annotated[
        int, typer.Option(help="Positions for numerical marginalization; 0 leaves it out.")
    ] = 128,
    continuations: Annotated[int, typer.Option(help="How many each marginal sums over.")] = 16,
    nodes: Annotated[str, typer.Option(help="Candidates of the trees to simulate.")] = "4,8,16,32",
    max_length: int = 1024,
    seed: int = 0,
    dtype: Dtype = "auto",
) -> None:
    """Show how far heads see, what they could see at best, and which schedule to use."""
    from modeling_lmtp.conversion.analysis_record import tables
    from modeling_lmtp.conversion.analyzing import AnalysisSettings, run_analysis, whole_numbers

    settings = AnalysisSettings(
        num_answers=num_answers,
        marginalize_positions=marginalize_positions,
        num_continuations=continuations,
        node_counts=whole_numbers(nodes),
        max_length=max_length,
        seed=seed,
        dtype=dtype,
    )
    record = run_analysis(sources, answers, output, settings)
    console.print(*tables(record), record["advice"], *record["notes"], sep="\n", markup=False)
    console.print(f"Saved {', '.join(['analysis.json', *record['pictures']])} in {output}.")


@app.command()
@reports_errors
def joint(
    checkpoint: Annotated[str, typer.Argument(help="Folder or Hub id with warmed-up leap heads.")],
    answers: Annotated[Path, typer.Argument(help="What `lmtp distill` made, or such a file.")],
    output: Annotated[Path, typer.Argument(help="New folder; a stopped run goes on.")],
    merge: Annotated[bool, typer.Option("--merge", help="Save a full checkpoint.")] = False,
    epochs: float = 3.0,
    batch_size: int = 8,
    gradient_accumulation_steps: int = 1,
    learning_rate: float = 1e-5,
    head_learning_rate: Annotated[
        float | None, typer.Option(help="As the backbone's, unless given.")
    ] = None,
    leap_loss_weight: Annotated[
        float, typer.Option(help="Beta; 0 is the NTP baseline: the heads stay as they are.")
    ] = 0.1,
    kl_weight: Annotated[
        float, typer.Option(help="Weight of the KL to the original backbone.")
    ] = 0.0,
    rank: int = 32,
    alpha: int = 16,
    heads: Annotated[str, typer.Option(help="lora, or full to train all their weights.")] = "lora",
    bits: Annotated[
        int | None, typer.Option(help="4 or 8: quantize the backbone with bitsandbytes.")
    ] = None,
    activation_checkpointing: Annotated[bool, typer.Option(help="Less memory, more time.")] = False,
    max_length: int = 1024,
    held_out: Annotated[int, typer.Option(min=0, help="Answers kept for evaluation.")] = 32,
    seed: int = 0,
    save_steps: int = 200,
    dtype: Dtype = "auto",
) -> None:
    """Tune backbone and leap heads together with LoRA (stage 2), and save the adapter."""
    from modeling_lmtp.conversion.joint import tune_jointly
    from modeling_lmtp.training.joint_settings import JointSettings

    settings = JointSettings(
        epochs=epochs,
        batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        learning_rate=learning_rate,
        head_learning_rate=head_learning_rate,
        leap_loss_weight=leap_loss_weight,
        kl_weight=kl_weight,
        rank=rank,
        alpha=alpha,
        heads=heads,
        seed=seed,
        save_steps=save_steps,
        activation_checkpointing=activation_checkpointing,
    )
    report = tune_jointly(
        checkpoint,
        answers,
        output,
        settings,
        max_length=max_length,
        held_out=held_out,
        dtype=dtype,
        merge=merge,
        bits=bits,
    )
    for line in report.summary():
        console.print(line)
    console.print(f"Saved {'the tuned checkpoint' if merge else 'the adapter'} in {output}.")
