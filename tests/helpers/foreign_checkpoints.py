"""Checkpoints as other projects write them, by modules written here from their descriptions alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny import tiny_llama, tiny_tokenizer
from torch import nn

HIDDEN, VOCAB = 32, 320


class Block(nn.Module):
    """`x + SiLU(W x + b)`, with the linear layer under the name that a project gives it."""

    def __init__(self, linear: str) -> None:
        super().__init__()
        self.add_module(linear, nn.Linear(HIDDEN, HIDDEN))

    def forward(self, x):
        (linear,) = self.children()
        z = linear(x)
        return x + z * torch.sigmoid(z)


class OfficialHead(nn.Module):
    def __init__(self, num_layers: int, repeated: bool) -> None:
        super().__init__()
        one = Block("l_proj")
        blocks = [one if repeated else Block("l_proj") for _ in range(num_layers)]
        self.resblock = nn.Sequential(*blocks)
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, x):
        return self.lm_head(self.resblock(x))


class OfficialHeads(nn.Module):
    """Named like the attribute `heads` of the official model, which holds a list `heads`."""

    def __init__(self, num_heads: int, num_layers: int, repeated: bool) -> None:
        super().__init__()
        self.heads = nn.ModuleList(OfficialHead(num_layers, repeated) for _ in range(num_heads))


def medusa_heads(num_heads: int, num_layers: int = 1, *, repeated: bool = True) -> nn.ModuleList:
    """Return a list of sequences: blocks, the same one repeated, and an unembedding."""

    def head() -> nn.Sequential:
        one = Block("linear")
        blocks = [one if repeated else Block("linear") for _ in range(num_layers)]
        return nn.Sequential(*blocks, nn.Linear(HIDDEN, VOCAB, bias=False))

    return nn.ModuleList(head() for _ in range(num_heads))


def save_backbone(folder: Path, **settings: Any) -> Any:
    """Save a tiny backbone with its tokenizer."""
    backbone = tiny_llama(**settings)
    backbone.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return backbone


def save_medusa(folder: Path, heads: nn.ModuleList, config: dict[str, Any] | None = None) -> None:
    """Save as the Medusa code does: a pickle of tensors, and a configuration."""
    folder.mkdir()
    torch.save(heads.state_dict(), folder / "medusa_lm_head.pt")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))


def save_official(
    folder: Path, heads: OfficialHeads, backbone: Any, config: dict[str, Any], **fields: Any
) -> None:
    """Save as the official model does: backbone and heads in one file, each shared tensor once."""
    folder.mkdir()
    state = {f"heads.{name}": tensor for name, tensor in heads.state_dict().items()}
    state |= backbone.state_dict()
    once: dict[int, str] = {}
    for name, tensor in state.items():
        once.setdefault(tensor.data_ptr(), name)
    save_file({name: state[name] for name in once.values()}, folder / "model.safetensors")
    settings = {**backbone.config.to_dict(), **config, **fields, "head_type": "lmtp"}
    (folder / "config.json").write_text(json.dumps(settings))
