"""What joint tuning holds beside next-token prediction alone, counted byte by byte."""

import pytest
import torch
from scripts import load_script
from tiny import tiny_llama

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.losses_lmtp import leap_losses
from modeling_lmtp.training.objective import HeadObjective

NUM_HEADS, VOCAB_SIZE, HIDDEN_SIZE, LENGTH = 6, 8192, 32, 64
GRADIENT = 4 * VOCAB_SIZE * HIDDEN_SIZE  # bytes of one unembedding's
OBJECTIVES = {"plain": lambda _: leap_losses, "distilling": lambda heads: HeadObjective(heads, 0.5)}


@pytest.fixture(scope="module")
def peak_bytes():
    return load_script("peak_bytes").PeakBytes


@pytest.fixture(params=OBJECTIVES.values(), ids=OBJECTIVES)
def peak(request, peak_bytes):
    """The most bytes that a joint loss and its gradients hold at one moment."""

    def measure(num_heads, **options):
        backbone = tiny_llama(VOCAB_SIZE)
        model = LMTPForCausalLM.from_backbone(
            backbone, num_heads, 1, train_backbone=True, **options
        ).train()
        tokens = torch.arange(LENGTH)[None]
        objective = request.param(num_heads)
        with peak_bytes() as counted:
            model(tokens, labels=tokens, use_cache=False, leap_objective=objective).loss.backward()
        return counted.peak

    return measure


@pytest.mark.parametrize("lm_head_rank", [0, 2])
def test_heads_with_a_shared_unembedding_accumulate_one_gradient(peak, lm_head_rank):
    more = peak(NUM_HEADS, lm_head_rank=lm_head_rank) - peak(1, lm_head_rank=lm_head_rank)
    assert more < GRADIENT


def test_own_unembeddings_have_one_gradient_each(peak):
    more = peak(NUM_HEADS, share_lm_head=False) - peak(1, share_lm_head=False)
    assert more < NUM_HEADS * GRADIENT
