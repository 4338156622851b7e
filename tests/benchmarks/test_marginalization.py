"""Numerical marginalization against the sum written out: every continuation, a pass of its own."""

import pytest
import torch
from tiny import tiny_llama
from transformers import DynamicCache

from modeling_lmtp.benchmarks.marginalization import marginalize, marginals_after, sample_roots
from modeling_lmtp.training.evaluation import MAX_RANK
from modeling_lmtp.training.examples import Example
from modeling_lmtp.transformers_lmtp import with_cache

VOCAB = 12


def model():
    return tiny_llama(vocab_size=VOCAB, initializer_range=0.4, eos_token_id=None)


def answers(backbone, lengths=(20, 14)):
    torch.manual_seed(1)
    examples = []
    for length in lengths:
        prompt = torch.randint(3, VOCAB, (1, 5))
        sequence = backbone.generate(prompt, max_new_tokens=length, do_sample=False)
        examples.append(Example(sequence[0].tolist(), 5))
    return examples


@torch.no_grad()
def next_token(backbone, token_ids):
    return backbone(torch.tensor([token_ids])).logits[0, -1].softmax(dim=-1)


def brute_force(backbone, token_ids, distance):
    """Σ_v p(… | x, v) p(v | x) over the whole vocabulary, without a cache."""
    first = next_token(backbone, token_ids)
    if distance == 1:
        return first
    return sum(
        first[v] * brute_force(backbone, [*token_ids, v], distance - 1) for v in range(VOCAB)
    )


@torch.no_grad()
def marginals(backbone, token_ids, num_continuations, num_distances=3):
    cache = DynamicCache(config=backbone.config)
    logits = backbone(torch.tensor([token_ids]), **with_cache({}, cache)).logits[0, -1]
    found = marginals_after(backbone, cache, logits, num_continuations, num_distances)
    assert cache.get_seq_length() == len(token_ids), "the caller's cache has changed"
    assert cache.layers[0].keys.shape[0] == 1
    return found


def test_over_all_continuations_it_is_the_brute_force_sum():
    backbone, known = model(), [3, 4, 5, 6]
    found, covered = marginals(backbone, known, num_continuations=VOCAB**2)
    for distance in (1, 2, 3):
        torch.testing.assert_close(
            found[distance - 1], brute_force(backbone, known, distance), atol=1e-6, rtol=1e-4
        )
    assert covered == pytest.approx([1, 1, 1], abs=1e-5)


def test_over_the_likeliest_it_is_a_lower_bound_that_says_what_it_covers():
    backbone, known = model(), [3, 4, 5, 6]
    found, covered = marginals(backbone, known, num_continuations=3, num_distances=2)
    first = next_token(backbone, known)
    likeliest = first.topk(3)
    expected = sum(
        share * next_token(backbone, [*known, v])
        for share, v in zip(likeliest.values, likeliest.indices.tolist(), strict=True)
    )
    torch.testing.assert_close(found[1], expected, atol=1e-6, rtol=1e-4)
    assert (found[1] <= brute_force(backbone, known, 2) + 1e-6).all()
    assert covered[1] == pytest.approx(likeliest.values.sum().item(), abs=1e-6)
    assert covered[1] < 0.99, "all was covered, so this shows nothing of truncation"


def test_pairs_for_the_third_token_are_the_likeliest_jointly():
    backbone, known = model(), [3, 4, 5, 6]
    _, covered = marginals(backbone, known, num_continuations=VOCAB)
    first = next_token(backbone, known)
    pairs = torch.stack([first[v] * next_token(backbone, [*known, v]) for v in range(VOCAB)])
    assert covered[2] == pytest.approx(pairs.flatten().topk(VOCAB).values.sum().item(), abs=1e-6)


def test_ranks_are_those_of_the_answers_own_tokens():
    backbone = model()
    examples = answers(backbone)
    found = marginalize(backbone, examples, num_positions=6, num_continuations=VOCAB, seed=3,
                        num_distances=2)  # fmt: skip
    roots = sample_roots(examples, 6, 2, seed=3)
    expected = [
        [example.input_ids, root]
        for example, positions in zip(examples, roots, strict=True)
        for root in positions
    ]
    assert len(expected) == len(found.ranks) == 6
    for row, (input_ids, root) in enumerate(expected):
        for distance in (1, 2):
            marginal = brute_force(backbone, input_ids[:root], distance)
            target = input_ids[root + distance - 1]
            rank = min(int((marginal > marginal[target]).sum()), MAX_RANK)
            assert found.ranks[row, distance - 1] == rank
            given = found.probabilities[row, distance - 1].item()
            assert given == pytest.approx(marginal[target].item(), abs=1e-5)
    assert found.accuracy(1, 1) == 1, "greedy answers are the model's own first choice"
    assert found.answers.tolist() == [n for n, positions in enumerate(roots) for _ in positions]


def test_positions_lie_in_the_answers_with_all_their_targets():
    examples = [Example(list(range(20)), 8), Example(list(range(6)), 4), Example([1, 2], 1)]
    roots = sample_roots(examples, 1000, 3, seed=0)
    assert roots == [list(range(8, 18)), [], []]
    fewer = sample_roots(examples, 4, 3, seed=0)
    assert len(fewer[0]) == 4
    assert fewer[0] == sorted(set(fewer[0]))
    assert fewer != sample_roots(examples, 4, 3, seed=1)


@pytest.mark.parametrize("name", ["num_positions", "num_continuations", "num_distances"])
def test_a_number_below_one_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be 1 or more, got 0"):
        marginalize(model(), [Example([1, 2, 3, 4, 5], 1)], **{name: 0})


def test_answers_too_short_to_look_ahead_are_refused():
    with pytest.raises(ValueError, match="No answer has 3 tokens to predict"):
        marginalize(model(), [Example([1, 2, 3], 1)])
