"""Shard a frozen backbone across processes (FSDP), for backbones that do not fit on one device.

Each transformer block is sharded and gathered for its forward pass. Embeddings, final norm and
unembedding are replicated, because the heads need them too. So are the small heads themselves, whose
gradients DDP averages. Trained weights, optimizer and checkpoints are therefore the same as without
sharding.

`accelerate launch --use_fsdp` turns this on as well. Accelerate's own FSDP would shard the heads too, could
not resume with another number of processes, and does not run without an accelerator.
"""

import os
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from modeling_lmtp.transformers_lmtp import block_classes

USE_FSDP = "ACCELERATE_USE_FSDP"


def pop_fsdp_flag() -> bool:
    """Return whether `accelerate launch --use_fsdp` was used, and hide the flag from Accelerate."""
    return os.environ.pop(USE_FSDP, "false").lower() == "true"


def is_sharded(backbone: nn.Module) -> bool:
    """Return whether a backbone, or a model that contains it, is sharded."""
    return any(isinstance(module, FSDPModule) for module in backbone.modules())


def shard_backbone(model: Any, device: torch.device, num_processes: int) -> None:
    """Shard the backbone's blocks across processes, and move all other modules to `device`.

    Afterwards all processes must run the model together, and its backbone cannot be saved.

    Args:
        model: an `LMTPForCausalLM` on the CPU, so that no device ever holds the full backbone.
        device: the device of this process.
        num_processes: the number of processes that train.

    Raises:
        ValueError: there is only one process, or the model does not declare its blocks.
    """
    if num_processes == 1:
        raise ValueError(
            "shard_backbone needs several processes, got one. Launch more with `accelerate launch "
            "--num_processes`, or leave it out."
        )
    backbone = model.backbone
    names = block_classes(backbone)
    blocks = [module for module in backbone.modules() if type(module).__name__ in names]
    if not blocks:
        raise ValueError(
            f"{type(backbone).__name__} cannot be sharded, because it does not declare its blocks "
            "(_no_split_modules). Train without shard_backbone."
        )
    mesh = init_device_mesh(device.type, (num_processes,))
    for block in reversed(blocks):  # nested blocks must be sharded before the outer ones
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    sharded = {id(module) for block in blocks for module in block.modules()}
    for module in model.modules():
        if id(module) not in sharded:
            _move_direct_tensors(module, device)


def _move_direct_tensors(module: nn.Module, device: torch.device) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(device)
    for name, buffer in module.named_buffers(recurse=False):
        setattr(module, name, buffer.to(device))


def distribute_heads(model: Any, device: torch.device, *, find_unused: bool) -> nn.Module:
    """Wrap `model` in DDP for its heads only.

    Args:
        model: an `LMTPForCausalLM` with a sharded backbone.
        device: the device of this process.
        find_unused: allow steps in which some heads get no gradient.
    """
    frozen = [name for name, _ in model.named_parameters() if name.startswith("backbone.")]
    frozen += [name for name, _ in model.named_buffers() if name.startswith("backbone.")]
    wrapper = nn.parallel.DistributedDataParallel
    wrapper._set_params_and_buffers_to_ignore_for_model(model, frozen)
    device_ids = None if device.type == "cpu" else [device.index]
    return wrapper(model, device_ids=device_ids, find_unused_parameters=find_unused)
