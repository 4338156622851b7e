"""Cache layers that grow in place hold exactly what concatenation would, and what a step then costs."""

import copy

import pytest
import torch
from round_trips import count_round_trips
from tiny import tiny_llama
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from twelve_tokens import BATCH, BATCH_MASK

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.benchmarks.pass_clock import PassClock
from modeling_lmtp.cache_lmtp import MIN_ROOM, GrowingLayer, start_rollback, stop_rollback
from modeling_lmtp.transformers_lmtp import cache_of

SHAPE = (2, 3, 5, 4)  # rows, heads, slots, head dimension
GREEDY = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}


def states(length, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, length, 4, generator=generator)


def filled():
    """Return a cache, and the same one with room."""
    plain = DynamicCache()
    plain.update(states(5, 0), states(5, 1), 0)
    growing = copy.deepcopy(plain)
    start_rollback(growing)
    assert type(growing.layers[0]) is GrowingLayer
    return plain, growing


def same(plain, growing):
    torch.testing.assert_close(growing.layers[0].keys, plain.layers[0].keys, rtol=0, atol=0)
    torch.testing.assert_close(growing.layers[0].values, plain.layers[0].values, rtol=0, atol=0)
    assert growing.get_seq_length() == plain.get_seq_length()
    assert growing.get_mask_sizes(3, 0) == plain.get_mask_sizes(3, 0)


OPERATIONS = {
    "append": lambda cache: cache.update(states(4, 2), states(4, 3), 0),
    "append much": lambda cache: cache.update(states(200, 2), states(200, 3), 0),
    "crop": lambda cache: cache.crop(-2),
    "select rows": lambda cache: cache.reorder_cache(torch.tensor([1])),
    "write": lambda cache: cache.layers[0].keys[..., :1, :].fill_(7),
    "replace": lambda cache: setattr(cache.layers[0], "keys", cache.layers[0].keys + 1),
}


@pytest.mark.parametrize("seed", range(12))
def test_any_sequence_of_operations_leaves_the_same_states(seed):
    plain, growing = filled()
    generator = torch.Generator().manual_seed(seed)
    for number in torch.randint(len(OPERATIONS), (12,), generator=generator).tolist():
        name, operation = list(OPERATIONS.items())[number]
        rows = plain.layers[0].keys.shape[0]
        if name == "select rows" and rows == 1:
            continue
        if name.startswith("append") and rows == 1:
            operation = lambda cache: cache.update(states(4, 2)[:1], states(4, 3)[:1], 0)  # noqa: E731
        operation(plain)
        operation(growing)
        same(plain, growing)


def test_slots_stay_where_they_are_until_the_room_is_used_up():
    _, cache = filled()
    cache.update(states(1, 2), states(1, 3), 0)
    place = cache.layers[0].keys.data_ptr()
    for seed in range(MIN_ROOM):
        cache.update(states(3, seed), states(3, seed), 0)
        cache.crop(-2)
        if cache.get_seq_length() + 3 <= 6 + MIN_ROOM:
            assert cache.layers[0].keys.data_ptr() == place
    assert cache.layers[0].keys.data_ptr() != place


def test_given_back_layers_share_no_room():
    plain, growing = filled()
    growing.update(states(1, 2), states(1, 3), 0)
    plain.update(states(1, 2), states(1, 3), 0)
    stop_rollback(growing)
    assert type(growing.layers[0]) is DynamicLayer
    assert vars(growing.layers[0]).keys() == vars(plain.layers[0]).keys()
    shallow = copy.copy(growing)
    shallow.layers = [copy.copy(layer) for layer in growing.layers]
    growing.update(states(1, 4), states(1, 4), 0)
    shallow.update(states(1, 5), states(1, 5), 0)
    plain.update(states(1, 4), states(1, 4), 0)
    same(plain, growing)


def test_a_subclass_keeps_what_it_does():
    cache = DynamicCache()
    cache.layers = [type("Own", (DynamicLayer,), {})()]
    start_rollback(cache)
    assert type(cache.layers[0]).__name__ == "Own"


@pytest.mark.parametrize("rows", [1, len(BATCH)])
def test_the_cache_goes_back_as_plain_decoding_leaves_it(rows):
    model = LMTPForCausalLM.from_backbone(tiny_llama(vocab_size=64), leap_offsets=(2, 3)).eval()
    prompts, mask = BATCH[:rows] % 64, BATCH_MASK[:rows]
    options = {**GREEDY, "attention_mask": mask, "return_dict_in_generate": True}
    plain = model.generate(prompts, **options)
    output = model.generate(prompts, use_lmtp=True, **options)
    assert output.sequences.tolist() == plain.sequences.tolist()
    layer = cache_of(output).layers[0]
    assert type(layer) is DynamicLayer
    assert layer.keys.shape == cache_of(plain).layers[0].keys.shape


@pytest.mark.parametrize("context", [0, 2, "path"], ids=str)
@pytest.mark.parametrize(
    "draft", [{"draft_length": 3}, {"draft_tree": [[0], [1], [0, 0]]}], ids=["chain", "tree"]
)
def test_a_greedy_step_needs_one_round_trip_to_the_host(monkeypatch, context, draft):
    model = LMTPForCausalLM.from_backbone(
        tiny_llama(vocab_size=64), leap_offsets=(2, 3, 4), head_context=context
    ).eval()
    prompt = torch.arange(3, 11)[None]
    options = {**GREEDY, "attention_mask": torch.ones_like(prompt), "use_lmtp": True, **draft}
    model.generate(prompt, **options)
    trips = count_round_trips(monkeypatch)
    counts = []
    for tokens in (6, 12):
        trips.clear()
        with PassClock(model.backbone) as clock:
            model.generate(prompt, **{**options, "max_new_tokens": tokens})
        counts.append((clock.passes, len(trips)))
    (short, before), (long, after) = counts
    assert after - before == long - short > 0
