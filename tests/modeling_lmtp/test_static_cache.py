"""Static caches: the same texts from passes that all have the same shapes, so that they can be compiled."""

from __future__ import annotations

import functools
import gc
import itertools

import pytest
import torch
from batches import (
    GREEDY,
    LENGTH,
    NEW_TOKENS,
    NEW_TOKENS_ALONE,
    NUM_ROWS,
    OwnProcessor,
    assert_same_states,
    assert_same_steps,
    generate,
    leap,
    new_tokens_alone,
    padded,
    plain_texts,
    tokens_that_end,
    wrapped,
)
from drafters import RULES, TREE, Oracle, always, sometimes
from plain_decoding import assert_decoded_plainly, warnings_said
from round_trips import count_round_trips
from tiny import tiny_llama
from transformers import CompileConfig, LogitsProcessorList, StaticCache
from transformers.cache_utils import StaticLayer
from twelve_tokens import wrapped as of_twelve_tokens

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.static_lmtp import StaticSlots
from modeling_lmtp.support_lmtp import decoding_support
from modeling_lmtp.transformers_lmtp import cache_of, with_cache
from modeling_lmtp.tree_lmtp import DraftTree

STATIC = {"cache_implementation": "static"}
PROMPT = torch.tensor([[3, 1, 5, 9, 4, 3, 1, 5]])
INPUTS = {
    "one": {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT)},
    "batch": {
        "input_ids": torch.tensor([[0, 0, 3, 7, 5], [8, 1, 8, 1, 8], [0, 0, 0, 0, 6]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]),
    },
}
DRAFTS = {
    "chain": {"draft_length": 4},
    "tree": {"draft_tree": [(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]},
    "planned": {},
    "lookup and chain": {"prompt_lookup_num_tokens": 5, "draft_length": 4},
    "planned, few nodes": {"prompt_lookup_num_tokens": 5, "draft_nodes": 9},
}
CHOICES = {"greedy": {"do_sample": False}, "sampled": {"do_sample": True, "top_k": 5}}


@functools.cache
def twelve(architecture: str, context: int | str = 0) -> LMTPForCausalLM:
    """Return a model over twelve tokens, whose heads are right now and then; leave it as it is."""
    return of_twelve_tokens(architecture, head_context=context)


class Passes:
    """Notes the shapes of all that a backbone is given after the prefill."""

    only_watches = True

    def __init__(self, backbone: torch.nn.Module) -> None:
        self.backbone = backbone
        self.shapes: list[dict[str, tuple[int, ...]]] = []
        self.places: list[int] = []

    def __enter__(self) -> Passes:
        self.handle = self.backbone.register_forward_pre_hook(self._note, with_kwargs=True)
        return self

    def __exit__(self, *error: object) -> None:
        self.handle.remove()
        del self.shapes[0], self.places[0]

    def _note(self, module, args, kwargs) -> None:
        cache = cache_of(kwargs).layers[0]
        tensors = {name: value for name, value in kwargs.items() if torch.is_tensor(value)}
        if cache.is_initialized:
            tensors["keys"] = cache.keys
            self.places.append(cache.keys.data_ptr())
        else:
            self.places.append(0)
        self.shapes.append({name: tuple(value.shape) for name, value in tensors.items()})


# Texts


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS.keys())
@pytest.mark.parametrize("draft", DRAFTS.values(), ids=DRAFTS.keys())
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES.keys())
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_texts_are_those_of_a_dynamic_cache(architecture, choice, draft, inputs):
    model, options = twelve(architecture), {**choice, **draft, "max_new_tokens": 20}
    dynamic = generate(model, inputs, use_lmtp=True, **options)
    static = generate(model, inputs, use_lmtp=True, **STATIC, **options)
    # Planned drafts are other ones over a static cache, and each step draws for all rows at once
    if "draft_length" in draft or "draft_tree" in draft:
        assert static.sequences.tolist() == dynamic.sequences.tolist()
        assert static.acceptance_lengths == dynamic.acceptance_lengths
    if len(inputs["input_ids"]) == 1 or not choice["do_sample"]:
        plain = generate(model.backbone, inputs, **choice, max_new_tokens=20)
        assert static.sequences.tolist() == plain.sequences.tolist()


@pytest.mark.parametrize("context", [2, "path"])
@pytest.mark.parametrize("draft", ["chain", "tree"])
def test_heads_that_see_tokens_draft_as_with_a_dynamic_cache(context, draft):
    options = {**DRAFTS[draft], "use_lmtp": True, "max_new_tokens": 20, "do_sample": False}
    model = twelve("llama", context)
    dynamic = generate(model, INPUTS["batch"], **options)
    static = generate(model, INPUTS["batch"], **options, **STATIC)
    assert static.sequences.tolist() == dynamic.sequences.tolist()
    assert static.acceptance_lengths == dynamic.acceptance_lengths


@pytest.mark.parametrize("right", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("architecture", ["llama", "mixtral", "deepseek_v3"])
def test_rows_go_as_far_as_they_do_with_a_dynamic_cache(architecture, right):
    texts = plain_texts(architecture)
    dynamic = leap(wrapped(architecture), texts, right=right, **GREEDY)
    static = leap(wrapped(architecture), texts, right=right, **GREEDY, **STATIC)
    assert static.sequences.tolist() == texts.tolist()
    assert static.acceptance_lengths == dynamic.acceptance_lengths


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_any_attention_that_takes_a_mask_will_do(attention):
    backbone = tiny_llama(vocab_size=96, attn_implementation=attention)
    model = LMTPForCausalLM.from_backbone(backbone, leap_offsets=(2, 3, 5)).eval()
    texts = generate(backbone, **GREEDY).sequences
    assert leap(model, texts, **GREEDY, **STATIC).sequences.tolist() == texts.tolist()


def test_rows_may_have_to_go_in_step():
    model = wrapped("llama")
    options = {**GREEDY, "logits_processor": LogitsProcessorList([OwnProcessor()])}
    texts = generate(model.backbone, **options).sequences
    output = leap(model, texts, **options, **STATIC)
    assert output.sequences.tolist() == texts.tolist()
    assert max(itertools.chain(*output.acceptance_lengths)) > 1


# Shapes


@pytest.mark.parametrize("draft", DRAFTS.values(), ids=DRAFTS.keys())
@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS.keys())
def test_passes_over_drafts_have_the_same_shapes(draft, inputs):
    model = twelve("llama")
    end = {"eos_token_id": [2, 7]}  # rows end at different times
    options = {**draft, **end, "do_sample": False, "max_new_tokens": 20, "use_lmtp": True}
    generate(model, inputs, **options, **STATIC)
    with Passes(model.backbone) as passes:
        generate(model, inputs, return_dict_in_generate=False, **options, **STATIC)
    drafted = [shapes for shapes in passes.shapes if shapes["input_ids"][1] > 1]
    assert len(drafted) > 1
    assert all(shapes == drafted[0] for shapes in drafted)
    assert len(set(passes.places)) == 1
    for shapes in passes.shapes:
        rows, nodes = shapes["input_ids"]
        capacity = shapes["keys"][2]
        assert rows == len(inputs["input_ids"])
        assert shapes["position_ids"] == (rows, nodes)
        assert shapes["attention_mask"] == (rows, 1, nodes, capacity)


def test_a_pass_is_as_wide_as_the_largest_draft():
    model = twelve("llama")
    widths = {}
    for name, draft in DRAFTS.items():
        with Passes(model.backbone) as passes:
            generate(model, INPUTS["one"], use_lmtp=True, **GREEDY, **draft, **STATIC)
        widths[name] = max(shapes["input_ids"][1] for shapes in passes.shapes)
    assert widths == {
        "chain": 5,
        "tree": 8,
        "planned": 16,
        "lookup and chain": 10,
        "planned, few nodes": 10,
    }


@pytest.mark.parametrize("prefill_chunk_size", [None, 3])
def test_one_cache_is_allocated(prefill_chunk_size):
    model, allocated = twelve("llama"), set()

    def note(*_args) -> None:
        # Transformers allocates its own at once for a prefill in chunks
        layers = [kept for kept in gc.get_objects() if type(kept) is StaticLayer]
        allocated.add(sum(kept.is_initialized for kept in layers))

    options = {"max_new_tokens": 6, "prefill_chunk_size": prefill_chunk_size, **STATIC}
    generate(model, INPUTS["one"], use_lmtp=True, **options)
    gc.collect()
    handle = model.backbone.register_forward_hook(note)
    decoding_support(model.backbone, static=True)  # with a hook, it is tried again
    gc.collect()
    allocated.clear()
    generate(model, INPUTS["one"], use_lmtp=True, **options)
    handle.remove()
    assert allocated == {model.backbone.config.num_hidden_layers}


def test_a_drafter_of_ones_own_may_not_exceed_what_it_said():
    texts = plain_texts("llama")
    drafter = Oracle(texts, TREE, always)
    drafter.max_nodes = 3
    with pytest.raises(ValueError, match="proposed 13 candidates, but its max_nodes is 3"):
        generate(wrapped("llama"), use_lmtp=True, drafter=drafter, **GREEDY, **STATIC)


def test_slots_are_copied_to_the_end_of_their_row():
    cache = StaticCache(tiny_llama().config, max_cache_len=12)
    numbers = torch.arange(12.0)[None, None, :, None]
    states = numbers + torch.tensor([0.0, 100.0])[:, None, None, None]
    for layer in range(2):
        cache.update(states[:, :, :4], -states[:, :, :4], layer)
    slots = StaticSlots(cache, 2, attention_mask=None)
    slots.keep_paths([[0], [0]], 1)
    for paths in ([[0, 2, 3], [0]], [[0], [0, 3]]):
        for layer in range(2):
            new = states[:, :, slots.start : slots.start + 4]
            cache.update(new, -new, layer)
        slots.keep_paths(paths, 4)
    for layer in cache.layers:
        assert layer.keys[0, 0, : slots.lengths[0], 0].tolist() == [0, 1, 2, 3, 4, 6, 7, 7]
        assert layer.keys[1, 0, : slots.lengths[1], 0].tolist() == [
            100 + n for n in (0, 1, 2, 3, 4, 7, 10)
        ]
        assert torch.equal(layer.values, -layer.keys)
        assert int(layer.cumulative_length) == slots.start == 8


@pytest.mark.parametrize("draft", ["chain", "tree"])
def test_a_greedy_step_needs_one_round_trip_to_the_host(monkeypatch, draft):
    model = twelve("llama")
    options = {**DRAFTS[draft], **STATIC, "do_sample": False, "use_lmtp": True}
    generate(model, INPUTS["one"], **options, max_new_tokens=20)
    trips = count_round_trips(monkeypatch)
    counts = []
    for new_tokens in (10, 20):
        trips.clear()
        with Passes(model.backbone) as passes:
            generate(model, INPUTS["one"], **options, max_new_tokens=new_tokens)
        counts.append((len(passes.shapes), len(trips)))
    (few, before), (many, after) = counts
    assert after - before == many - few > 0


# Compiled code

COMPILE = {"backend": "eager", "mode": None, "dynamic": False, "fullgraph": True}


def compile_config(**settings) -> CompileConfig:
    """Return how to compile, on a CPU as well."""
    config = CompileConfig(**{**COMPILE, **settings})
    config._compile_all_devices = True
    return config


@pytest.fixture
def compiler():
    """Start without compiled code, and leave none."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters["stats"]
    torch.compiler.reset()


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS.keys())
@pytest.mark.parametrize("draft", ["chain", "planned, few nodes"])
def test_a_pass_is_compiled_once(compiler, draft, inputs):
    model = twelve("llama")
    options = {**DRAFTS[draft], **STATIC, "do_sample": False, "max_new_tokens": 20}
    options["eos_token_id"] = [2, 7]
    expected = generate(model, inputs, use_lmtp=True, disable_compile=True, **options)
    assert not compiler
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            model._draft_planner = None  # or it would know more than in the call before
            output = generate(
                model, inputs, use_lmtp=True, compile_config=compile_config(), **options
            )
            assert output.sequences.tolist() == expected.sequences.tolist()
            assert output.acceptance_lengths == expected.acceptance_lengths
            assert compiler["unique_graphs"] == 1


def test_shorter_texts_run_the_code_compiled_for_longer_ones(compiler):
    model, prompt = LMTPForCausalLM.from_backbone(tiny_llama(), leap_offsets=(2, 3)).eval(), PROMPT
    options = {**STATIC, "do_sample": False, "compile_config": compile_config()}
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length, new_tokens in ((8, 20), (5, 20), (8, 12), (3, 9)):
            inputs = {"input_ids": prompt[:, :length], "attention_mask": torch.ones(1, length)}
            more = {"use_lmtp": True, "max_new_tokens": new_tokens}
            output = generate(model, inputs, **options, **more)
            more = {"max_new_tokens": new_tokens, "do_sample": False}
            plain = generate(model.backbone, inputs, **more)
            assert output.sequences.tolist() == plain.sequences.tolist()
    assert compiler["unique_graphs"] == 1


@pytest.mark.parametrize("head_input", ["last", "weighted"])
def test_compiled_code_returns_the_states_that_heads_read(compiler, head_input):
    class Noting(Oracle):
        def draft(self, input_ids, hidden_states, max_depth):
            self.noted = [*getattr(self, "noted", []), hidden_states]
            return super().draft(input_ids, hidden_states, max_depth)

    model = LMTPForCausalLM.from_backbone(
        tiny_llama(vocab_size=96), leap_offsets=(2, 3), head_input=head_input
    ).eval()
    texts, noted = generate(model.backbone, **GREEDY).sequences, []
    for options in ({}, {**STATIC, "compile_config": compile_config()}):
        drafter = Noting(texts, TREE, sometimes)
        output = generate(model, use_lmtp=True, drafter=drafter, **GREEDY, **options)
        assert output.sequences.tolist() == texts.tolist()
        noted.append(drafter.noted)
    for own, expected in zip(*noted, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)
    assert compiler["unique_graphs"] == 1


@pytest.mark.parametrize("first", ["last", "weighted"])
def test_models_whose_heads_read_other_states_do_not_run_each_other_s_code(compiler, first):
    second = "weighted" if first == "last" else "last"
    for head_input in (first, second, first):
        model = LMTPForCausalLM.from_backbone(
            tiny_llama(vocab_size=96), leap_offsets=(2, 3), head_input=head_input
        ).eval()
        plain = generate(model.backbone, **GREEDY).sequences
        options = {**GREEDY, **STATIC, "compile_config": compile_config()}
        output = generate(model, use_lmtp="strict", **options)
        assert output.sequences.tolist() == plain.tolist()


def test_plain_decoding_and_this_one_compile_apart(compiler):
    model, options = twelve("llama"), {**STATIC, "do_sample": False, "max_new_tokens": 12}
    config = compile_config()
    expected = generate(model.backbone, INPUTS["one"], **options).sequences.tolist()
    for use_lmtp in (False, True, False, True):
        output = generate(model, INPUTS["one"], use_lmtp=use_lmtp, compile_config=config, **options)
        assert output.sequences.tolist() == expected


def test_a_prefill_in_chunks_is_not_compiled(compiler):
    model = twelve("llama")
    options = {**STATIC, "do_sample": False, "max_new_tokens": 12, "prefill_chunk_size": 3}
    expected = generate(model.backbone, INPUTS["one"], disable_compile=True, **options)
    for _ in range(2):
        output = generate(
            model, INPUTS["one"], use_lmtp=True, compile_config=compile_config(), **options
        )
        assert output.sequences.tolist() == expected.sequences.tolist()
    assert compiler["unique_graphs"] == 1


# What goes back to the caller


@pytest.mark.parametrize("num_rows", [1, NUM_ROWS])
def test_a_cache_goes_back_as_plain_decoding_leaves_it(num_rows):
    model = wrapped("llama")
    inputs = {name: tensor[:num_rows] for name, tensor in padded().items()}
    endless = plain_texts("llama")[:num_rows, LENGTH:]
    ends = tokens_that_end(endless, [(row, 6 + 5 * row) for row in range(num_rows)])
    options = {**GREEDY, **STATIC, "eos_token_id": ends}
    plain = generate(model.backbone, inputs, **options)
    output = leap(model, plain_texts("llama")[:num_rows], inputs=inputs, **options)
    assert output.sequences.tolist() == plain.sequences.tolist()
    length = int(cache_of(plain).get_seq_length())
    assert int(cache_of(output).get_seq_length()) == length == plain.sequences.shape[1] - 1
    seen = inputs["attention_mask"][:, None, :, None].bool()
    seen = torch.nn.functional.pad(seen, (0, 0, 0, length - seen.shape[2]), value=True)
    for own, expected in zip(cache_of(output).layers, cache_of(plain).layers, strict=True):
        assert type(own) is type(expected)
        for name in ("keys", "values"):
            states, others = (getattr(layer, name)[:, :, :length] for layer in (own, expected))
            torch.testing.assert_close(states * seen, others * seen, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_rows", [1, NUM_ROWS])
def test_a_text_goes_on_from_a_cache_of_ones_own(num_rows):
    model, first = wrapped("llama"), 9
    inputs = {name: tensor[:num_rows] for name, tensor in padded().items()}
    texts = plain_texts("llama")[:num_rows]
    cache = StaticCache(model.backbone.config, max_cache_len=LENGTH + NEW_TOKENS + TREE.num_nodes)
    for new_tokens in (first, NEW_TOKENS - first):
        drafter = Oracle(texts, TREE, sometimes)
        drafter.max_nodes = TREE.num_nodes
        options = {**GREEDY, "max_new_tokens": new_tokens}
        output = generate(
            model, inputs, use_lmtp=True, drafter=drafter, **with_cache({}, cache), **options
        )
        assert cache_of(output) is cache
        ones = inputs["attention_mask"].new_ones((num_rows, new_tokens))
        mask = torch.cat([inputs["attention_mask"], ones], dim=-1)
        inputs = {"input_ids": output.sequences, "attention_mask": mask}
    assert output.sequences.tolist() == texts.tolist()


@pytest.mark.parametrize(
    ("prompts", "more", "ends"), NEW_TOKENS_ALONE.values(), ids=NEW_TOKENS_ALONE.keys()
)
def test_a_text_goes_on_from_its_new_tokens_alone(prompts, more, ends):
    model, inputs = wrapped("llama"), padded(prompts, more)

    def turn() -> dict[str, torch.Tensor]:
        cache = StaticCache(model.backbone.config, max_cache_len=2 * LENGTH + 2 * NEW_TOKENS)
        options = {**GREEDY, "max_new_tokens": 6, **with_cache({}, cache)}
        return new_tokens_alone(generate(model.backbone, inputs, **options), inputs)

    endless = generate(model.backbone, turn(), **GREEDY).sequences
    emitted = endless[:, turn()["input_ids"].shape[1] :]
    options = {**GREEDY, "eos_token_id": tokens_that_end(emitted, ends) or None}
    plain = generate(model.backbone, turn(), **options)
    drafter = Oracle(endless, TREE, sometimes)
    drafter.max_nodes = TREE.num_nodes
    output = generate(model, turn(), use_lmtp=True, drafter=drafter, **options)
    assert output.sequences.tolist() == plain.sequences.tolist()


def test_states_scores_and_logits_are_those_of_a_dynamic_cache():
    model, texts = wrapped("llama"), plain_texts("llama")
    ends = tokens_that_end(texts[:, LENGTH:], [(row, 6 + 5 * row) for row in range(NUM_ROWS)])
    options = {**GREEDY, "eos_token_id": ends, "output_hidden_states": True}
    options |= {"output_scores": True, "output_logits": True}
    dynamic = leap(model, texts, **options)
    static = leap(model, texts, **options, **STATIC)
    lengths = [1 + sum(row) for row in dynamic.acceptance_lengths]
    assert_same_steps(static.scores, dynamic.scores, lengths)
    assert_same_steps(static.logits, dynamic.logits, lengths)
    assert_same_states(static.hidden_states, dynamic.hidden_states, lengths)


# Refusals


@pytest.mark.parametrize("by", ["name", "cache"])
@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (
            "mistral",
            "static cache layers of the kind StaticSlidingWindowLayer cannot be rolled back",
        ),
        ("lfm2", "static cache layers of the kind LinearAttentionLayer cannot be rolled back"),
        (
            "bloom",
            r"static cache of BloomForCausalLM exactly \(no trees: its forward takes no posi",
        ),
    ],
)
def test_static_caches_that_cannot_be_rolled_back_are_decoded_plainly(architecture, message, by):
    model = wrapped(architecture)

    def options():
        if by == "name":
            return {**padded(), **STATIC}
        config = model.backbone.config.get_text_config()
        return {**padded(), **with_cache({}, StaticCache(config, max_cache_len=64))}

    assert_decoded_plainly(model, message, options)


def test_what_cannot_be_laid_out_as_plain_decoding_does_is_decoded_plainly():
    match = "output_attentions=True is not supported with a static cache"
    options = {**padded(), **STATIC, "output_attentions": True, "return_dict_in_generate": True}
    assert_decoded_plainly(wrapped("llama"), match, options)


def test_an_offloaded_static_cache_is_decoded_plainly():
    model = wrapped("llama")
    offloaded = StaticCache(model.backbone.config, max_cache_len=99)
    offloaded.offloading = True
    with pytest.raises(ValueError, match="an offloaded static cache is not supported"):
        generate(model, use_lmtp="strict", **with_cache({}, offloaded), **GREEDY)


def test_a_passed_cache_needs_room_for_the_text_and_a_draft():
    model, needed = wrapped("llama"), LENGTH + NEW_TOKENS + 4
    plain = generate(model.backbone, **GREEDY).sequences
    options = {**GREEDY, "use_lmtp": True, "draft_length": 4}
    for length in (LENGTH + NEW_TOKENS, needed - 1):
        cache = StaticCache(model.backbone.config, max_cache_len=length)
        message = rf"the static cache has {length} slots, and {needed} are needed"
        with warnings_said() as said:
            output = generate(model, **options, **with_cache({}, cache))
        assert output.sequences.tolist() == plain.tolist()
        assert message in said[0]
    cache = StaticCache(model.backbone.config, max_cache_len=needed)
    output = generate(model, **options, **with_cache({}, cache))
    assert output.sequences.tolist() == plain.tolist()


@pytest.mark.parametrize("num_rows", [1, NUM_ROWS])
def test_a_turn_given_without_the_one_before_needs_room_for_both(num_rows):
    model, first = wrapped("llama"), 9
    inputs = {name: tensor[:num_rows] for name, tensor in padded().items()}
    texts, needed = plain_texts("llama")[:num_rows], LENGTH + NEW_TOKENS + 4
    for missing in (1, 0):
        cache = StaticCache(model.backbone.config, max_cache_len=needed - missing)
        options = {"use_lmtp": True, **with_cache({}, cache), "do_sample": False}
        options["draft_length"] = 4
        output = generate(model, inputs, **options, max_new_tokens=first)
        ones = inputs["attention_mask"].new_ones((num_rows, first))
        mask = torch.cat([inputs["attention_mask"], ones], dim=-1)
        turn = {"input_ids": output.sequences[:, -1:], "attention_mask": mask}
        options["max_new_tokens"] = NEW_TOKENS - first
        if missing:
            with pytest.raises(ValueError, match=f"{needed} are needed"):
                generate(model, turn, **{**options, "use_lmtp": "strict"})
        else:
            output = generate(model, turn, **options)
            assert output.sequences[:, 1:].tolist() == texts[:, LENGTH + first :].tolist()


@pytest.mark.parametrize("right", RULES.values(), ids=RULES.keys())
def test_the_room_that_is_asked_for_is_enough(right):
    texts = plain_texts("llama")
    chain = DraftTree.chain(6)
    drafter = Oracle(texts, chain, right)
    drafter.max_nodes = chain.num_nodes
    cache = StaticCache(wrapped("llama").backbone.config, max_cache_len=LENGTH + NEW_TOKENS + 6)
    output = generate(
        wrapped("llama"), use_lmtp=True, drafter=drafter, **with_cache({}, cache), **GREEDY
    )
    assert output.sequences.tolist() == texts.tolist()


def test_settings_that_draft_nothing_decode_plainly():
    model = twelve("llama")
    options = {"do_sample": False, "max_new_tokens": 12, **STATIC}
    plain = generate(model.backbone, INPUTS["one"], **options).sequences
    output = generate(model, INPUTS["one"], use_lmtp=True, draft_length=0, **options)
    assert output.sequences.tolist() == plain.tolist()
