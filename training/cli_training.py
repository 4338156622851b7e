"""The commands that make heads: wrap, distill, train and joint."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from modeling_lmtp.conversion.cli_base import (
    BadRows,
    Dtype,
    Offsets,
    app,
    console,
    parse_head_context,
    parse_offsets,
    reports_errors,
)

HeadContext = Annotated[
    str,
    typer.Option(
        help="Known tokens after its state that a head sees: 0 (the paper's head), more, or path for "
        "all up to its target, drafted ones included."
    ),
]


@app.command()
@reports_errors
def wrap(
    backbone: Annotated[str, typer.Argument(help="Folder or Hub id of a causal language model.")],
    output: Annotated[Path, typer.Argument(help="New folder for the checkpoint.")],
    num_leap_heads: Annotated[int | None, typer.Option(help="3 by default.")] = None,
    leap_stride: Annotated[int | None, typer.Option(help="2 by default.")] = None,
    leap_offsets: Offsets = None,
    head_context: HeadContext = "0",
    num_head_layers: int = 1,
    share_lm_head: bool = True,
    dtype: Dtype = "auto",
) -> None:
    """Give a backbone fresh leap heads and save it as a checkpoint."""
    from modeling_lmtp.conversion.loading import load_backbone, load_tokenizer
    from modeling_lmtp.conversion.saving import check_output_folder, save_checkpoint
    from modeling_lmtp.modeling_lmtp import LMTPForCausalLM

    check_output_folder(output)
    model = LMTPForCausalLM.from_backbone(
        load_backbone(backbone, dtype),
        num_leap_heads,
        leap_stride,
        leap_offsets=parse_offsets(leap_offsets),
        head_context=parse_head_context(head_context),
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
    bad_rows: Annotated[
        str, typer.Option(help="refuse prompts with a bad row, or skip such rows and count them.")
    ] = "refuse",
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
    from .distill_command import choose_prompts, choose_server, distill_from
    from .distill_settings import DistillSettings
    from .processes import MainProcessFailed, processes

    settings = DistillSettings(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        num_answers=num_answers,
        batch_size=batch_size,
        seed=seed,
    )
    choice = choose_prompts(
        prompts, dataset, dataset_config, split, field, self_written, limit, bad_rows
    )
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
    head_context: HeadContext = "0",
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
    bad_rows: BadRows = "refuse",
    eval_steps: Annotated[
        int | None, typer.Option(help="Evaluate so often, besides after each epoch.")
    ] = None,
    seed: int = 0,
    logging_steps: int = 10,
    save_steps: int = 200,
    state_folder: Annotated[
        Path | None,
        typer.Option(
            help="Keep the backbone's states of the answers here: it reads each once, whatever the "
            "epochs and runs that share the folder."
        ),
    ] = None,
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
    from .processes import processes
    from .train_command import HeadShape, train_heads
    from .warmup import WarmupSettings

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
        leap_offsets=parse_offsets(leap_offsets),
        head_context=parse_head_context(head_context),
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
        bad_rows=bad_rows,
        state_folder=state_folder,
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
    bad_rows: BadRows = "refuse",
    seed: int = 0,
    save_steps: int = 200,
    dtype: Dtype = "auto",
) -> None:
    """Tune backbone and leap heads together with LoRA (stage 2), and save the adapter."""
    from .joint_command import tune_jointly
    from .joint_settings import JointSettings

    checked_heads: Any = heads  # by the settings
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
        heads=checked_heads,
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
        bad_rows=bad_rows,
        merge=merge,
        bits=bits,
    )
    for line in report.summary():
        console.print(line)
    console.print(f"Saved {'the tuned checkpoint' if merge else 'the adapter'} in {output}.")
