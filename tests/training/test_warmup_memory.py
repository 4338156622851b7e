"""What one warm-up step keeps in memory, counted byte by byte."""

import weakref

import pytest
import torch
from tiny import tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.losses_lmtp import CHUNK_SIZE
from modeling_lmtp.training.objective import HeadObjective

OFFSETS, HIDDEN_SIZE = (2, 3, 5), 32


def new_model(vocab_size, **options):
    backbone = tiny_llama(vocab_size, max_position_embeddings=2048)
    return LMTPForCausalLM.from_backbone(backbone, leap_offsets=OFFSETS, **options).train()


def loss_of(model, length, weight=0.5):
    input_ids = torch.arange(length)[None] % 50
    objective = HeadObjective(len(OFFSETS), weight)
    return model(input_ids, labels=input_ids, leap_objective=objective).loss


class Kept:
    """Stands for a tensor that autograd keeps, for as long as it does."""

    def __init__(self, tensor):
        self.tensor = tensor


def kept_bytes(model, length):
    """The storage that autograd holds when the forward pass is over, weights not counted."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    holders = weakref.WeakSet()

    def pack(tensor):
        holder = Kept(tensor)
        holders.add(holder)
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        loss = loss_of(model, length)
    assert loss.requires_grad
    storages = [holder.tensor.untyped_storage() for holder in holders]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(size for pointer, size in sizes.items() if pointer not in weights)


class Largest(TorchDispatchMode):
    """Notes the most elements that any tensor made inside has."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return output


@pytest.mark.parametrize("options", [{}, {"head_context": 2}], ids=["paper's", "grounded"])
def test_what_is_kept_for_backward_does_not_depend_on_the_vocabulary(options):
    small, large = (kept_bytes(new_model(size, **options), 500) for size in (64, 4096))
    assert small == large


def test_what_is_kept_for_backward_is_a_few_states_per_target_and_head():
    model = new_model(64)
    bytes_per_target = (kept_bytes(model, 900) - kept_bytes(model, 500)) / 400
    assert bytes_per_target == pytest.approx(len(OFFSETS) * 4 * HIDDEN_SIZE * 4, rel=0.3)


def test_own_unembeddings_keep_a_gradient_each_whatever_the_length():
    short, long = (kept_bytes(new_model(4096, share_lm_head=False), n) for n in (300, 900))
    shared = [kept_bytes(new_model(4096), n) for n in (300, 900)]
    assert short - shared[0] == long - shared[1] == len(OFFSETS) * 4096 * HIDDEN_SIZE * 4


@pytest.mark.parametrize("share_lm_head", [True, False], ids=["shared", "own"])
def test_no_tensor_is_larger_than_one_chunk_of_logits(share_lm_head):
    vocab_size, length = 4096, 3 * CHUNK_SIZE + 10
    model = new_model(vocab_size, share_lm_head=share_lm_head)
    with Largest() as largest:
        loss_of(model, length).backward()
    assert largest.numel == CHUNK_SIZE * vocab_size
