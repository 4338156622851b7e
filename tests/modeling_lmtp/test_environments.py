"""Where models are used: with other caches, devices and compilers, in wrappers, copies and threads."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from architectures import tiny_causal_lm
from drafters import CHAIN, TREE, Oracle, sometimes
from environments import BATCH, NEW_TOKENS, PROMPT, assert_same_texts, generate, wrapped
from peft import LoraConfig, PeftModel, get_peft_model
from plain_decoding import assert_decoded_plainly
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel, pipeline

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.support_lmtp import Tier, decoding_support
from modeling_lmtp.transformers_lmtp import cache_of, with_cache
from modeling_lmtp.tree_lmtp import DraftTree

# Caches


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_a_dynamic_cache_may_be_asked_for(architecture):
    assert_same_texts(wrapped(architecture), cache_implementation="dynamic")


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="Transformers offloads with streams, which a CPU lacks"
)
@pytest.mark.parametrize("inputs", [PROMPT, BATCH], ids=["prompt", "batch"])
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_a_cache_may_be_offloaded(architecture, inputs):
    model = wrapped(architecture).to("cuda")
    inputs = {name: tensor.to("cuda") for name, tensor in inputs.items()}
    assert_same_texts(model, inputs, cache_implementation="offloaded")


def test_a_cache_of_fixed_size_is_decoded_plainly_where_it_holds_windows():
    options = {**PROMPT, "cache_implementation": "static", "disable_compile": True}
    assert_decoded_plainly(wrapped("mistral"), "static cache layers of the kind", options)


def test_a_quantized_cache_is_decoded_plainly():
    pytest.importorskip("optimum.quanto")
    options = {**PROMPT, "cache_implementation": "quantized"}
    assert_decoded_plainly(wrapped(), "a QuantizedCache is not known to roll back", options)


def test_continuous_batching_is_refused(monkeypatch):
    model, calls = wrapped(), []
    monkeypatch.setattr(model.backbone, "generate_batch", lambda *_, **__: calls.append(None))
    with pytest.raises(ValueError, match="paged"):
        generate(model, use_lmtp=True, cache_implementation="paged")
    assert not calls


# Devices

ON_DISK = {
    **{f"backbone.{name}": "cpu" for name in ("model.embed_tokens", "model.layers.0", "lm_head")},
    **{"backbone.model.layers.1": "disk", "backbone.model.norm": "cpu"},
    **{"backbone.model.rotary_emb": "cpu", "leap_heads": "cpu"},
}


@pytest.mark.parametrize("device_map", ["auto", "cpu", ON_DISK], ids=["auto", "cpu", "disk"])
def test_a_checkpoint_is_placed_by_a_device_map(device_map, tmp_path):
    model = wrapped()
    plain = generate(model).sequences
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=device_map, offload_folder=tmp_path / "offloaded"
    )
    assert isinstance(loaded, LMTPForCausalLM)
    if device_map is ON_DISK:
        assert loaded.backbone.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    assert_same_texts(loaded, plain=plain)


# What the heads read is where the unembedding computes, though its weights are elsewhere
OFFLOADED_UNEMBEDDING = {"model": "cpu", "lm_head": "disk"}
VOCABULARY = tuple(range(0, 96, 2))


@pytest.mark.parametrize("settings", [{}, {"draft_token_ids": VOCABULARY}], ids=["all", "some"])
@pytest.mark.parametrize("context", [0, "path"])
def test_an_offloaded_unembedding_drafts_what_it_does_in_memory(settings, context, tmp_path):
    settings = {"leap_offsets": (2, 3), "head_context": context, **settings}
    backbone = tiny_llama(96, eos_token_id=None)
    model = LMTPForCausalLM.from_backbone(backbone, **settings)
    backbone.save_pretrained(tmp_path / "backbone")
    options = {"device_map": OFFLOADED_UNEMBEDDING, "offload_folder": tmp_path / "offloaded"}
    offloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone", **options)
    assert offloaded.lm_head.weight.is_meta
    wrapped = LMTPForCausalLM.from_backbone(offloaded, **settings)
    expected = generate(model, use_lmtp=True)
    found = generate(wrapped, use_lmtp=True)
    assert found.sequences.tolist() == expected.sequences.tolist()
    assert found.acceptance_lengths == expected.acceptance_lengths
    with pytest.raises(ValueError, match="is offloaded, so heads cannot copy it"):
        LMTPForCausalLM.from_backbone(offloaded, share_lm_head=False)


def test_heads_alone_join_a_backbone_whose_unembedding_is_offloaded(tmp_path):
    tiny_llama(96, eos_token_id=None).save_pretrained(tmp_path / "backbone")
    model = LMTPForCausalLM.from_backbone(tmp_path / "backbone", leap_offsets=(2, 3))
    with torch.no_grad():
        for head in model.leap_heads:
            head.blocks[0].linear.weight.normal_()
    expected = generate(model, use_lmtp=True)
    model.save_pretrained(tmp_path / "heads", heads_only=True)
    options = {"device_map": OFFLOADED_UNEMBEDDING, "offload_folder": tmp_path / "offloaded"}
    offloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone", **options)
    joined = LMTPForCausalLM.from_pretrained(tmp_path / "heads", backbone=offloaded)
    found = generate(joined, use_lmtp=True)
    assert found.sequences.tolist() == expected.sequences.tolist()
    assert found.acceptance_lengths == expected.acceptance_lengths


# Compilers


class Noting(Oracle):
    """Notes the states that it is given."""

    def draft(self, input_ids, hidden_states, max_depth):
        self.noted = [*getattr(self, "noted", []), hidden_states]
        return super().draft(input_ids, hidden_states, max_depth)


def compile_forward(model: LMTPForCausalLM) -> Any:
    model.backbone.forward = torch.compile(model.backbone.forward, backend="eager")
    return model


def compile_backbone(model: LMTPForCausalLM) -> Any:
    model.backbone.compile(backend="eager")
    return model


def compile_model(model: LMTPForCausalLM) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiled", "plain_first"),
    [(compile_forward, True), (compile_backbone, False), (compile_model, True)],
)
def test_compiled_code_gives_plain_text_and_its_states_to_the_drafter(compiled, plain_first):
    options, chain = {"max_new_tokens": 8}, DraftTree.chain(2)
    original = wrapped(num_hidden_layers=1)
    plain = generate(original, **options).sequences
    expected = Noting(plain, chain, sometimes)
    generate(original, use_lmtp=True, drafter=expected, **options)

    model = wrapped(num_hidden_layers=1)
    decoding_support(model.backbone)  # tried before, so that fewer shapes are compiled
    torch.compiler.reset()
    model = compiled(model)
    with torch._dynamo.config.patch(recompile_limit=32):
        if plain_first:
            assert generate(model, **options).sequences.tolist() == plain.tolist()
        for _ in range(2):
            drafter = Noting(plain, chain, sometimes)
            output = generate(model, use_lmtp=True, drafter=drafter, **options)
            assert output.sequences.tolist() == plain.tolist()
            for states, expected_states in zip(drafter.noted, expected.noted, strict=True):
                torch.testing.assert_close(states, expected_states, rtol=1e-4, atol=1e-4)
        assert generate(model, **options).sequences.tolist() == plain.tolist()
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo does not know:UserWarning")
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # Dynamo asks for it
@pytest.mark.parametrize("compiled", [compile_backbone, compile_model])
def test_code_compiled_without_the_heads_is_named_and_the_remedy_helps(compiled):
    torch.compiler.reset()
    model, tokens = wrapped(num_hidden_layers=1), PROMPT["input_ids"]
    expected = model(tokens, labels=tokens).loss
    model = compiled(model)
    with torch.no_grad():
        plain = model if compiled is compile_model else model.backbone
        plain(input_ids=tokens, use_cache=False, return_dict=True)
    if compiled is compile_model:
        torch.testing.assert_close(model(input_ids=tokens, labels=tokens).loss, expected)
    else:
        with pytest.raises(RuntimeError, match=r"compile the whole model \(model\.compile\(\)\)"):
            model(input_ids=tokens, labels=tokens)
    torch.compiler.reset()


@pytest.mark.slow
def test_a_backbone_that_is_a_compiled_module_is_taken_as_it_is():
    plain = generate(tiny_causal_lm("llama"), max_new_tokens=12).sequences
    backbone = torch.compile(tiny_causal_lm("llama"), backend="eager")
    model = LMTPForCausalLM.from_backbone(backbone, leap_offsets=(2, 3, 5))
    assert_same_texts(model, plain=plain, max_new_tokens=12)
    torch.compiler.reset()


# What wraps a model


# PEFT asks whether gradients are checkpointed by a name that Transformers has deprecated
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("inputs", [PROMPT, BATCH], ids=["prompt", "batch"])
def test_a_peft_model_generates_with_and_without_its_adapter(inputs):
    backbone = tiny_causal_lm("llama")
    model = LMTPForCausalLM.from_backbone(backbone, leap_offsets=(2, 3), train_backbone=True)
    unadapted = generate(model, inputs).sequences
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, r=4)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        adapted = get_peft_model(model, config).eval()
    assert isinstance(adapted, PeftModel)
    plain = generate(adapted, inputs).sequences
    assert plain.tolist() != unadapted.tolist()
    assert_same_texts(adapted, inputs, plain=plain)
    with adapted.disable_adapter():
        assert_same_texts(adapted, inputs, plain=unadapted)


def pass_lengths(model: PreTrainedModel) -> list[int]:
    """Return a list that will grow by the number of tokens of each pass of the backbone."""
    lengths: list[int] = []
    model.get_input_embeddings().register_forward_hook(
        lambda _module, args, _output: lengths.append(args[0].shape[1])
    )
    return lengths


TEXTS = ["The sea", "What is the capital of France?", "How many legs does a spider have?"]
CHATS = [[{"role": "user", "content": text}] for text in TEXTS]


@pytest.mark.parametrize("prompts", [TEXTS, CHATS], ids=["texts", "chats"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_pipeline_takes_the_flag_for_lists_of_prompts(prompts, batch_size):
    tokenizer = tiny_tokenizer(padding_side="left")
    model = LMTPForCausalLM.from_backbone(tiny_llama(len(tokenizer)), leap_offsets=(2, 3))
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 12, "do_sample": False, "batch_size": batch_size}
    plain = generator(prompts, **options)
    decoding_support(model.backbone)
    lengths = pass_lengths(model.backbone)
    assert generator(prompts, use_lmtp=True, draft_length=2, **options) == plain
    assert 3 in lengths, "nothing was drafted"


def test_a_chat_template_makes_the_prompt():
    tokenizer = tiny_tokenizer()
    model = LMTPForCausalLM.from_backbone(tiny_llama(len(tokenizer), eos_token_id=None))
    inputs = tokenizer.apply_chat_template(
        CHATS[1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert_same_texts(model, dict(inputs))


@pytest.mark.parametrize("architecture", ["llama", "mistral", "lfm2"])
def test_a_copy_generates_when_the_original_is_gone(architecture):
    model = wrapped(architecture)
    tree = TREE if decoding_support(model.backbone).tier is Tier.TREE else CHAIN
    plain = generate(model).sequences
    assert_same_texts(model, tree=tree)
    copied = copy.deepcopy(model)
    del model
    assert_same_texts(copied, tree=tree, plain=plain)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "lfm2", "qwen3_next"])
def test_inference_mode_may_be_left_and_entered_between_calls(architecture):
    model = wrapped(architecture)
    plain = generate(model).sequences
    with torch.inference_mode():
        tree = TREE if decoding_support(model.backbone).tier is Tier.TREE else CHAIN
        assert_same_texts(model, tree=tree, plain=plain)
        assert_same_texts(model, BATCH, tree)
    assert_same_texts(model, tree=tree, plain=plain)


def test_a_cache_made_in_inference_mode_goes_on_outside_of_it():
    model = wrapped()
    whole = generate(model).sequences
    with torch.inference_mode():
        begun = generate(model, use_lmtp=True, max_new_tokens=NEW_TOKENS // 2)
    inputs = {"input_ids": begun.sequences, "attention_mask": torch.ones_like(begun.sequences)}
    rest = whole.shape[1] - begun.sequences.shape[1]
    continued = generate(
        model,
        inputs,
        **with_cache({}, cache_of(begun)),
        use_lmtp=True,
        drafter=Oracle(whole, TREE, sometimes),
        max_new_tokens=rest,
    )
    assert continued.sequences.tolist() == whole.tolist()


# Threads


@pytest.mark.parametrize("head_input", ["last", "weighted"])
def test_a_thread_may_generate_in_the_middle_of_another_s_pass(head_input):
    model = LMTPForCausalLM.from_backbone(tiny_causal_lm("llama"), head_input=head_input)
    other = {"input_ids": torch.tensor([[60, 2, 31, 8]]), "attention_mask": torch.ones(1, 4).long()}
    plain, other_plain = generate(model).sequences, generate(model, other).sequences
    alone = Noting(plain, TREE, sometimes)
    generate(model, use_lmtp=True, drafter=alone)

    others: list[Any] = []

    def generate_other() -> None:
        drafter = Oracle(other_plain, CHAIN, sometimes)
        others.append(generate(model, other, use_lmtp=True, drafter=drafter).sequences.tolist())

    def interrupt(_module: torch.nn.Module, _args: Any) -> None:
        if threading.current_thread() is threading.main_thread() and len(drafter.noted) in (2, 5):
            thread = threading.Thread(target=generate_other)
            thread.start()
            thread.join()

    drafter = Noting(plain, TREE, sometimes)
    drafter.noted = []
    handle = model.backbone.register_forward_pre_hook(interrupt)
    output = generate(model, use_lmtp=True, drafter=drafter)
    handle.remove()
    assert output.sequences.tolist() == plain.tolist()
    assert others == [other_plain.tolist()] * 2
    for states, expected in zip(drafter.noted, alone.noted, strict=True):
        torch.testing.assert_close(states, expected)


def test_threads_generate_side_by_side():
    model = wrapped("mistral")
    decoding_support(model.backbone)
    prompts = [PROMPT, BATCH, PROMPT]
    plain = [generate(model, prompt).sequences for prompt in prompts]
    results: dict[int, bool] = {}

    def run(number: int) -> None:
        drafter = Oracle(plain[number], TREE, sometimes)
        output = generate(model, prompts[number], use_lmtp=True, drafter=drafter)
        results[number] = output.sequences.tolist() == plain[number].tolist()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(len(prompts)), True)
