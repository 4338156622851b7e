"""A frozen backbone shared out among processes (FSDP), for one that fits no single device.

Each transformer block is sharded on its own and gathered for its forward pass; embeddings, final norm
and unembedding, which the heads need as well, stay whole. The heads are small: every process has them
all, and DDP averages their gradients. So the weights that train, the optimizer and the checkpoints are
the same as without sharding.

`accelerate launch --use_fsdp` asks for this as well. Accelerate itself would shard the heads too, could
not resume in another number of processes, and has no FSDP without an accelerator.
"""

import os
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from modeling_lmtp.transformers_lmtp import block_classes

USE_FSDP = "ACCELERATE_USE_FSDP"


def take_over_fsdp() -> bool:
    """Return whether `accelerate launch` asked for FSDP; Accelerate won't know of it any more."""
    return os.environ.pop(USE_FSDP, "false").lower() == "true"


def is_sharded(backbone: nn.Module) -> bool:
    """Return whether `shard_backbone` has been called."""
    return any(isinstance(module, FSDPModule) for module in backbone.modules())


def shard_backbone(model: Any, device: torch.device, num_processes: int) -> None:
    """Share out the backbone's blocks, and move all else to `device`.

    The model can run afterwards only if all processes run it together, and not be saved.

    Args:
        model: an `LMTPForCausalLM`; on the CPU, so that no device ever holds all of it.
        device: this process's.
        num_processes: all that train.

    Raises:
        ValueError: there is one process, or it is not known what the model's blocks are.
    """
    if num_processes == 1:
        raise ValueError(
            "shard_backbone shares out the backbone among processes, but there is one. Launch several, "
            "with `accelerate launch --num_processes`, or leave it out."
        )
    backbone = model.backbone
    names = block_classes(backbone)
    blocks = [module for module in backbone.modules() if type(module).__name__ in names]
    if not blocks:
        raise ValueError(
            f"{type(backbone).__name__} does not say what its blocks are (_no_split_modules), so it "
            "cannot be sharded. Train without shard_backbone."
        )
    mesh = init_device_mesh(device.type, (num_processes,))
    for block in reversed(blocks):  # inner ones first, should they be nested
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    whole = {id(module) for block in blocks for module in block.modules()}
    for module in model.modules():
        if id(module) not in whole:
            _move_own_tensors(module, device)


def _move_own_tensors(module: nn.Module, device: torch.device) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(device)
    for name, buffer in module.named_buffers(recurse=False):
        setattr(module, name, buffer.to(device))


def distribute_heads(model: Any, device: torch.device, *, find_unused: bool) -> nn.Module:
    """Return `model` in a DDP wrapper that takes care of the heads alone.

    Args:
        model: an `LMTPForCausalLM`, sharded.
        device: this process's.
        find_unused: whether a step may leave a head out.
    """
    frozen = [name for name, _ in model.named_parameters() if name.startswith("backbone.")]
    frozen += [name for name, _ in model.named_buffers() if name.startswith("backbone.")]
    wrapper = nn.parallel.DistributedDataParallel
    wrapper._set_params_and_buffers_to_ignore_for_model(model, frozen)
    device_ids = None if device.type == "cpu" else [device.index]
    return wrapper(model, device_ids=device_ids, find_unused_parameters=find_unused)
