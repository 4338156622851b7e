"""What a checkpoint needs to be served by vLLM: a folder to serve, and a check of one. Needs no vLLM.

vLLM takes the heads of a heads-only repository, or of a full checkpoint, as they are, beside a model that
it loads itself. It does not find a full checkpoint's own backbone there, so `save_for_vllm` takes the two
apart. To serve a quantized backbone, quantize that one: the heads go with it unchanged.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedTokenizerBase

from modeling_lmtp.configuration_lmtp import LMTPConfig
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM

from .repository import Form, form_of
from .saving import new_folder, write_record
from .vllm_config import check_servable, reasons_against
from .vllm_heads import PREFIX, ChainHeads

BACKBONE, HEADS = "backbone", "heads"


def save_for_vllm(
    model: LMTPForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    record: dict[str, Any],
    settings: GenerationConfig,
) -> str:
    """Save backbone and heads as vLLM serves them: in two folders, `backbone` and `heads`.

    Args:
        model, tokenizer: what to save; an adapter is merged already.
        output: a folder that does not exist yet, or is empty.
        record: how the checkpoint was made.
        settings: the backbone's generation settings, without those of L-MTP.

    Returns:
        The command that serves them.

    Raises:
        ValueError: vLLM cannot draft with these heads, or `output` holds something.
    """
    check_servable(model.config)
    backbone, named = model.backbone, model.config.base_model_name_or_path
    backbone.generation_config = settings
    with new_folder(output) as folder:
        backbone.save_pretrained(folder / BACKBONE)
        tokenizer.save_pretrained(folder / BACKBONE)
        try:
            model.config.base_model_name_or_path = str(output / BACKBONE)
            model.save_pretrained(folder / HEADS, heads_only=True)
        finally:
            model.config.base_model_name_or_path = named
        write_record(folder, record, model.config)
    return serve_command(str(output / BACKBONE), str(output / HEADS), model.config.num_leap_heads)


def serve_command(backbone: str, heads: str, num_heads: int) -> str:
    """Return the command that serves a model with leap heads."""
    settings = f'{{"model": "{heads}", "num_speculative_tokens": {num_heads}}}'
    return f"vllm serve {backbone} --speculative-config '{settings}'"


class CardNotes(NamedTuple):
    """What a model card says of vLLM: the commands that serve the repository, or why there are none."""

    commands: list[str]
    why_not: str


def card_notes(repo_id: str, form: Form, base_model: str, config: Any) -> CardNotes:
    """Say how vLLM serves a repository, or why it cannot.

    Args:
        repo_id: the repository on the Hub.
        form: its form.
        base_model: the backbone of heads.
        config: the `LMTPConfig` of the heads.
    """
    reasons = reasons_against(config)
    if reasons:
        return CardNotes([], "; ".join(reason.why for reason in reasons))
    if form == "heads":
        return CardNotes([serve_command(base_model, repo_id, config.num_leap_heads)], "")
    # vLLM would serve a model that it loads itself, without what this repository may have trained
    served = serve_command(f"OUT/{BACKBONE}", f"OUT/{HEADS}", config.num_leap_heads)
    return CardNotes([f"lmtp export {repo_id} OUT --to vllm", served], "")


def serving_notes(folder: Path) -> list[str]:
    """Say what keeps vLLM from serving a repository; empty where it can be served as it is.

    Args:
        folder: a checkpoint of any form.

    Raises:
        ValueError: its tensors are not those that its configuration describes.
    """
    if form_of(folder) == "adapter":
        return [
            "vLLM does not draft with an adapter's heads. `lmtp export --to vllm` merges it for serving."
        ]
    config = LMTPConfig.from_pretrained(folder)
    reasons = reasons_against(config)
    if reasons:
        return [f"vLLM cannot draft with these heads: {reason}." for reason in reasons]
    check_shapes(config, tensor_shapes(folder))
    return []


def check_shapes(config: Any, found: dict[str, tuple[int, ...]]) -> None:
    """Raise a ValueError unless tensors have the names and shapes of the heads of an `LMTPConfig`."""
    with torch.device("meta"):
        heads = ChainHeads(config, max_rows=0).leap_heads
    expected = {PREFIX + name: tuple(t.shape) for name, t in heads.state_dict().items()}
    for name in found.keys() - expected.keys():
        # The backbone's unembedding may have a bias, which the configuration does not say
        weight = expected.get(f"{name.removesuffix('bias')}weight", ())
        if name.endswith(".lm_head.bias") and found[name] == weight[:1]:
            expected[name] = found[name]
    differing = sorted(
        name
        for name in expected.keys() | found.keys()
        if found.get(name, ()) != expected.get(name, ())
    )
    if differing:
        name = differing[0]
        raise ValueError(
            f"{len(differing)} tensors are not those that config.json describes; {name} has the shape "
            f"{found.get(name, 'of none')} instead of {expected.get(name, 'none')}. Save the checkpoint "
            "again."
        )


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a checkpoint's leap heads, without loading them."""
    shapes = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no dict
                if name.startswith(PREFIX):
                    shapes[name] = tuple(tensors.get_slice(name).get_shape())
    return shapes
