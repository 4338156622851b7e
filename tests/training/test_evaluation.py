"""What evaluation says of heads is what decoding sees."""

import pytest
import torch
from tiny import tiny_llama

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.training.evaluation import (
    MAX_RANK,
    draft_ranks,
    evaluate_heads,
    simulated_steps,
)
from modeling_lmtp.training.examples import Example
from modeling_lmtp.tree_lmtp import DraftTree

SCHEDULES = [(3, 5, 7), (2, 3, 4), (2, 3, 5), (4, 7)]
TREE = [(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (2, 0), (0, 0, 0), (0, 0, 1)]


def model_and_answer(offsets, new_tokens=40):
    """A small vocabulary, so that untrained heads are right now and then."""
    torch.manual_seed(0)
    backbone = tiny_llama(vocab_size=24, initializer_range=0.3, eos_token_id=None)
    model = LMTPForCausalLM.from_backbone(backbone, leap_offsets=offsets).eval()
    prompt = torch.randint(3, 24, (1, 6))
    sequence = backbone.generate(prompt, max_new_tokens=new_tokens, do_sample=False)
    return model, prompt, Example(sequence[0].tolist(), prompt.shape[1])


@pytest.mark.parametrize("offsets", SCHEDULES, ids=str)
@pytest.mark.parametrize("kind", ["chain", "tree"])
def test_simulated_steps_are_the_decoders_acceptance_lengths(offsets, kind):
    model, prompt, answer = model_and_answer(offsets)
    horizon = offsets[-1] - 1
    if kind == "chain":
        tree, options = DraftTree.chain(horizon), {"draft_length": horizon}
    else:
        tree, options = DraftTree.from_paths(TREE), {"draft_tree": TREE}
    decoded = model.generate(
        prompt,
        use_lmtp=True,
        max_new_tokens=40,
        do_sample=False,
        return_dict_in_generate=True,
        **options,
    )
    assert decoded.sequences[0].tolist() == answer.input_ids
    simulated = simulated_steps(draft_ranks(model, answer), tree, answer.answer_start)
    assert simulated == decoded.acceptance_lengths[0]
    assert max(simulated) > 1, "nothing was accepted, so this shows nothing"


def test_ranks_are_those_of_the_target_from_the_scheduled_state():
    model, _, answer = model_and_answer((3, 5))
    ranks = draft_ranks(model, answer)
    tokens = torch.tensor([answer.input_ids])
    leap_logits = model(tokens, output_leap_logits=True).leap_logits
    root = 20
    for distance, head, state in [(1, 0, 18), (2, 0, 19), (3, 1, 18), (4, 1, 19)]:
        logits = leap_logits[head][0, state]
        expected = int((logits > logits[answer.input_ids[root + distance]]).sum())
        assert ranks[distance - 1, root] == min(expected, MAX_RANK)


def test_report_counts_ranks_over_the_answer():
    model, _, answer = model_and_answer((2, 3))
    report, [ranks] = evaluate_heads(model, [answer])
    at_distance_2 = ranks[1, answer.answer_start : len(answer.input_ids) - 2]
    assert report.accuracies[1][0] == pytest.approx((at_distance_2 == 0).float().mean().item())
    assert report.tokens == 40
    assert 1 <= report.chain_tokens_per_step <= 3
