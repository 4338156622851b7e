"""What an analysis says of heads is what evaluation and the heads themselves say."""

import pytest
import torch
from tiny import tiny_llama

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.benchmarks.advice import advise, leap_verdict
from modeling_lmtp.benchmarks.analysis import (
    CHAIN,
    HeadAnalysis,
    analyze_heads,
    attenuation_distance,
    ceiling_distance,
    cross_validated,
    draft_probabilities,
    marginal_attenuations,
    marginal_estimates,
    rank_shares,
)
from modeling_lmtp.benchmarks.attenuation import Attenuation
from modeling_lmtp.benchmarks.marginalization import Marginals
from modeling_lmtp.benchmarks.resampling import Estimate
from modeling_lmtp.leaps_lmtp import drafts
from modeling_lmtp.training.evaluation import MAX_RANK, draft_ranks, evaluate_heads
from modeling_lmtp.training.examples import Example

VOCAB = 24


def model_and_answers(num_answers=3, new_tokens=24, **options):
    """A small vocabulary, so that untrained heads are right now and then."""
    torch.manual_seed(0)
    backbone = tiny_llama(vocab_size=VOCAB, initializer_range=0.3, eos_token_id=None)
    model = LMTPForCausalLM.from_backbone(backbone, **options).eval()
    prompts = torch.randint(3, VOCAB, (num_answers, 6))
    sequences = backbone.generate(prompts, max_new_tokens=new_tokens, do_sample=False)
    return model, [Example(sequence.tolist(), 6) for sequence in sequences]


@pytest.mark.parametrize(
    ("offsets", "context"),
    [((2, 3, 4), 0), ((3, 5), 0), ((2, 3, 5), 2), ((2, 4), "path")],
    ids=str,
)
def test_probabilities_are_what_the_heads_give_the_right_token(offsets, context):
    model, [answer, *_] = model_and_answers(leap_offsets=offsets, head_context=context)
    found = draft_probabilities(model, answer)
    tokens = torch.tensor([answer.input_ids])
    states = model.backbone(tokens, output_hidden_states=True).hidden_states[-1]
    root = 15
    for draft in drafts(offsets):
        logits = model.leap_logits(draft.head, states, tokens, draft.look_back)
        given = logits[0, root - 1 - draft.look_back].softmax(dim=-1)
        expected = given[answer.input_ids[root + draft.distance]]
        torch.testing.assert_close(found[draft.distance - 1, root], expected)


def test_a_token_outside_the_draft_vocabulary_is_given_nothing():
    model, [answer, *_] = model_and_answers(leap_offsets=(2, 4), draft_token_ids=range(12))
    found, ranks = draft_probabilities(model, answer), draft_ranks(model, answer)
    outside = torch.tensor(answer.input_ids) >= 12
    for distance in (1, 2, 3):
        roots = slice(answer.answer_start, len(outside) - distance)
        is_out = outside[answer.answer_start + distance :]
        assert is_out.any()
        assert not is_out.all()
        assert (found[distance - 1, roots][is_out] == 0).all()
        assert (found[distance - 1, roots][~is_out] > 0).all()
        assert (ranks[distance - 1, roots][is_out] == MAX_RANK).all()


def test_accuracies_and_the_chain_agree_with_evaluation():
    model, answers = model_and_answers(leap_offsets=(2, 3, 5), head_context=2)
    report, ranks = evaluate_heads(model, answers)
    shares = rank_shares(ranks, answers)
    torch.testing.assert_close(shares.float(), torch.tensor(report.accuracies))
    analysis = analyze_heads(model, answers, node_counts=(4,))
    assert analysis.tokens_per_step[CHAIN].value == pytest.approx(report.chain_tokens_per_step)
    for distance, accuracies in enumerate(report.accuracies):
        assert analysis.top_k[1][distance] == pytest.approx(accuracies[0])
        assert analysis.top_k[3][distance] == pytest.approx(sum(accuracies[:3]), abs=1e-6)
    assert analysis.num_nodes == {CHAIN: 4, "4": 4}
    assert analysis.top1_attenuation.values == pytest.approx(analysis.top_k[1])
    assert analysis.attenuation.values == pytest.approx(analysis.mean_probabilities)


def test_mean_probability_is_over_roots_whose_target_is_in_the_answer():
    model, answers = model_and_answers(leap_offsets=(3, 5))
    analysis = analyze_heads(model, answers, node_counts=())
    for distance in (1, 4):
        given = [
            draft_probabilities(model, answer)[distance - 1, root].item()
            for answer in answers
            for root in range(answer.answer_start, len(answer.input_ids) - distance)
        ]
        expected = sum(given) / len(given)
        assert analysis.mean_probabilities[distance - 1] == pytest.approx(expected, rel=1e-4)


def test_a_tree_is_judged_by_answers_that_it_was_not_grown_from():
    examples = [Example([0] * 11, 1)] * 4
    always_first, always_fourth = torch.zeros(1, 11).long(), torch.full((1, 11), 3)
    mixed = [always_first, always_fourth, always_first, always_fourth]
    tokens, steps, nodes = cross_validated(mixed, examples, num_nodes=1)
    assert nodes == 1
    assert tokens.tolist() == steps.tolist() == [9] * 4, "a tree knew the answers that judge it"
    tokens, steps, _ = cross_validated([always_fourth] * 4, examples, num_nodes=1)
    assert (tokens / steps == 9 / 5).all()


@pytest.mark.parametrize(
    ("offsets", "context", "ceilings", "on_curve"),
    [
        ((2, 3, 4), 0, [2, 3, 4], [2, 3, 4]),
        ((3, 5), 0, [3, 3, 5, 5], [3, 3, 5, 5]),
        ((2, 3, 4), 1, [1, 2, 3], [2, 3, 4]),
        ((2, 3, 5), 2, [1, 2, 3, 4], [2, 3, 4, 5]),
        ((3, 5), 1, [2, 2, 4, 4], [2, 3, 4, 5]),
        ((2, 3, 5), "path", [1, 1, 1, 1], [2, 3, 4, 5]),
    ],
    ids=str,
)
def test_what_bounds_a_head_is_how_far_its_target_is_from_the_last_token_it_sees(
    offsets, context, ceilings, on_curve
):
    schedule = drafts(offsets)
    assert [ceiling_distance(draft, offsets, context) for draft in schedule] == ceilings
    assert [attenuation_distance(draft, offsets, context) for draft in schedule] == on_curve


def test_marginals_are_summed_up_per_distance():
    ranks = torch.tensor([[0, 0, 0], [0, 0, 2], [0, 5, 10], [0, 5, 2]])
    given = torch.tensor([[0.9, 0.5, 0.25], [0.9, 0.5, 0.25], [0.9, 0.5, 0.25], [0.9, 0.5, 0.25]])
    marginals = Marginals(ranks, given, torch.ones(4, 3), torch.tensor([0, 0, 0, 3]))
    rows = marginal_estimates(marginals)
    assert [row["top1"].value for row in rows] == [1, 0.5, 0.25]
    assert [row["top3"].value for row in rows] == [1, 0.5, 0.75]
    assert [row["top10"].value for row in rows] == [1, 1, 0.75]
    by_probability, by_top1 = marginal_attenuations(marginals)
    assert by_probability.gamma == pytest.approx(0.6931, abs=1e-3)
    assert by_top1.values == pytest.approx([0.5, 0.25])


def test_too_few_answers_and_heads_that_do_not_exist_are_refused():
    model, answers = model_and_answers(leap_offsets=(2,))
    with pytest.raises(ValueError, match="examples must be at least 2 answers, got 1"):
        analyze_heads(model, answers[:1])
    plain, answers = model_and_answers(num_leap_heads=0)
    with pytest.raises(ValueError, match="no leap heads to analyze"):
        analyze_heads(plain, answers)


def curve(gamma, error=0.01):
    return Attenuation(gamma, error, 0.0, [2, 3], [0.5, 0.25])


def heads(offsets=(2, 3, 4), tokens=1.5, error=0.02, gamma=0.4):
    return HeadAnalysis(
        leap_offsets=offsets,
        head_context=0,
        top_k={1: [0.5]},
        mean_probabilities=[0.5],
        ceiling_distances=[2],
        attenuation=curve(gamma),
        top1_attenuation=curve(gamma),
        tokens_per_step={CHAIN: Estimate(tokens - 0.2, error), "8": Estimate(tokens, error)},
        num_nodes={CHAIN: 3, "8": 8},
    )


def test_advice_names_the_best_checkpoint_and_how_far_the_next_is_behind():
    text = advise({"near": heads(tokens=1.5), "far": heads((3, 5, 7), tokens=1.8)}, None)
    assert text.startswith("far is predicted to emit the most: 1.80 ± 0.02 tokens per step with a ")
    assert "Next is near with 1.50 ± 0.02, clearly fewer." in text
    close = advise({"near": heads(tokens=1.5), "far": heads((3, 5, 7), tokens=1.53)}, None)
    assert "too close to call" in close


@pytest.mark.parametrize(
    ("gamma", "verdict"),
    [
        (0.4, "leap 2 does not pay"),
        (0.05, "leap 2 pays"),
        (0.14, "whether leap 2 pays is undecided"),
    ],
)
def test_advice_on_leaping_follows_gamma_and_its_error(gamma, verdict):
    assert verdict in advise({"a": heads(gamma=gamma)}, None)
    assert verdict in advise({}, (curve(gamma), curve(gamma)))


def test_no_verdict_where_the_two_fits_disagree_and_no_advice_on_nothing():
    assert leap_verdict(curve(0.05), curve(0.4), 3) == "is undecided"
    assert advise({}, None) == ""
