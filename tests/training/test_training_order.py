"""The order of training depends on the seed and the epoch, not on who trains."""

import pytest

from modeling_lmtp.training.batches import GroupedSampler
from modeling_lmtp.training.examples import AnswerDataset, Example

LENGTHS = [(7 * i) % 53 + 1 for i in range(230)]


def order(size=8, seed=0, epoch=0, lengths=LENGTHS):
    sampler = GroupedSampler(lengths, size, seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_an_epoch_has_each_row_once_and_is_filled_with_the_empty_row():
    assert sorted(order()) == [*range(230), 230, 230]
    assert order()[-2:] == [230, 230]
    assert sorted(order(lengths=LENGTHS[:16])) == list(range(16))
    assert sorted(order(lengths=[5])) == [0] + [1] * 7


def test_the_order_depends_on_epoch_and_seed_and_is_reproducible():
    assert order() == order()
    assert order() != order(epoch=1) != order(seed=1, epoch=2)
    assert order(epoch=3) == order(epoch=3)


def test_batches_have_rows_of_similar_length_and_the_longest_row_comes_first():
    epoch = order()
    assert LENGTHS[epoch[0]] == max(LENGTHS)
    spreads = []
    for start in range(0, 224, 8):
        batch = [LENGTHS[i] for i in epoch[start : start + 8]]
        spreads.append(max(batch) - min(batch))
    assert max(spreads) <= 4
    starts = [LENGTHS[epoch[start]] for start in range(8, 224, 8)]
    assert starts != sorted(starts, reverse=True), "the batches themselves are not shuffled"


@pytest.mark.parametrize("train_on_prompts", [False, True])
def test_the_empty_row_has_no_target(train_on_prompts):
    rows = AnswerDataset([Example([5, 6], 1)], train_on_prompts=train_on_prompts)
    assert rows[1] == {"input_ids": [0], "labels": [-100]}
