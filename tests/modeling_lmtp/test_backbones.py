"""Any causal language model can be wrapped, and stays as it was."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch
from architectures import REPRESENTATIVE, tiny_causal_lm
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tiny import tiny_llama
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    T5Config,
)

from modeling_lmtp import LMTPConfig, LMTPForCausalLM

INPUT_IDS = torch.tensor([[3, 17, 5, 9, 44, 2, 60], [8, 8, 31, 90, 7, 12, 0]])
# These scale or cap what their unembedding gives before they call it logits
POST_PROCESSED = {"gemma2", "granite"}
# A configuration checks itself as huggingface_hub's strict dataclasses do
REFUSALS = (ValueError, StrictDataclassError)

every_architecture = pytest.mark.parametrize("architecture", REPRESENTATIVE)
both_unembeddings = pytest.mark.parametrize("share_lm_head", [True, False], ids=["shared", "own"])


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(INPUT_IDS).logits


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@both_unembeddings
@every_architecture
def test_wrapping_changes_no_weight_and_no_logit(architecture, share_lm_head):
    # Frozen as wrapping will freeze it: mamba rounds differently with parameters that are
    backbone = tiny_causal_lm(architecture).requires_grad_(False)
    before, logits_before = weights(backbone), logits_of(backbone)
    model = LMTPForCausalLM.from_backbone(backbone, share_lm_head=share_lm_head)
    assert model.backbone is backbone
    after = weights(backbone)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(logits_of(model), logits_before)
    assert torch.equal(logits_of(model.backbone), logits_before)


@both_unembeddings
@every_architecture
def test_leap_logits_start_as_what_the_backbone_s_unembedding_gives(architecture, share_lm_head):
    model = LMTPForCausalLM.from_backbone(
        tiny_causal_lm(architecture), 2, share_lm_head=share_lm_head
    )
    unembedded = []
    model.get_output_embeddings().register_forward_hook(
        lambda _module, _args, output: unembedded.append(output)
    )
    with torch.no_grad():
        outputs = model(INPUT_IDS, output_leap_logits=True)
    assert len(outputs.leap_logits) == 2
    for leap_logits in outputs.leap_logits:
        torch.testing.assert_close(leap_logits, unembedded[0])
        # What a backbone does to its logits afterwards keeps their order
        assert torch.equal(leap_logits.argmax(-1), outputs.logits.argmax(-1))
        if architecture not in POST_PROCESSED:
            torch.testing.assert_close(leap_logits, outputs.logits)


@every_architecture
def test_heads_learn_and_the_frozen_backbone_stays(architecture):
    model = LMTPForCausalLM.from_backbone(tiny_causal_lm(architecture), leap_offsets=(2, 3, 5))
    before = weights(model.backbone)
    optimizer = torch.optim.SGD(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.05
    )
    losses = []
    for _ in range(4):
        loss = model(INPUT_IDS, labels=INPUT_IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(later < earlier for earlier, later in pairwise(losses))
    after = weights(model.backbone)
    assert all(torch.equal(after[name], before[name]) for name in before)


@both_unembeddings
@pytest.mark.parametrize("architecture", ["llama", "llama_tied", "gpt2", "phi", "opt"])
@pytest.mark.parametrize("vocab_size", [101, 91], ids=["grow", "shrink"])
def test_resizing_the_vocabulary_resizes_every_unembedding(architecture, share_lm_head, vocab_size):
    model = LMTPForCausalLM.from_backbone(tiny_causal_lm(architecture), share_lm_head=share_lm_head)
    for number, head in enumerate(model.leap_heads):
        if not share_lm_head:  # as if trained
            head.lm_head.weight.data += 1 + number
    before = [None if head.lm_head is None else weights(head.lm_head) for head in model.leap_heads]

    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    assert model.config.get_text_config().vocab_size == vocab_size
    assert model.get_input_embeddings().weight.shape[0] == vocab_size
    with torch.no_grad():
        outputs = model(INPUT_IDS.clamp(max=90), output_leap_logits=True)
    shapes = {logits.shape for logits in (outputs.logits, *outputs.leap_logits)}
    assert shapes == {(*INPUT_IDS.shape, vocab_size)}

    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    unembedding = weights(model.get_output_embeddings())
    for head, old in zip(model.leap_heads, before, strict=True):
        if share_lm_head:
            assert head.lm_head is None
            continue
        assert all(parameter.requires_grad for parameter in head.lm_head.parameters())
        for name, tensor in weights(head.lm_head).items():
            rows = min(96, vocab_size)
            assert torch.equal(tensor[:rows], old[name][:rows])
            assert torch.equal(tensor[rows:], unembedding[name][rows:])


@pytest.mark.parametrize(
    ("arguments", "offsets"),
    [
        ({}, (3, 5, 7)),
        ({"num_leap_heads": 0}, ()),
        ({"num_leap_heads": 2}, (3, 5)),
        ({"leap_stride": 1}, (2, 3, 4)),
        ({"num_leap_heads": 2, "leap_stride": 3}, (4, 7)),
        ({"leap_offsets": [2, 3, 5]}, (2, 3, 5)),
    ],
    ids=str,
)
def test_offsets_are_given_by_number_and_stride_or_one_by_one(arguments, offsets):
    model = LMTPForCausalLM.from_backbone(tiny_llama(), **arguments)
    assert model.config.leap_offsets == offsets
    assert model.config.num_leap_heads == len(model.leap_heads) == len(offsets)


def test_a_folder_is_loaded_as_the_backbone_and_remembered(tmp_path):
    backbone = tiny_llama()
    backbone.save_pretrained(tmp_path)
    model = LMTPForCausalLM.from_backbone(str(tmp_path), dtype=torch.bfloat16, revision="main")
    assert torch.equal(model.backbone.lm_head.weight, backbone.lm_head.weight.to(torch.bfloat16))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.base_model_name_or_path == str(tmp_path)
    assert model.config.base_model_revision == "main"


@pytest.mark.parametrize("training", [True, False])
def test_wrapping_keeps_the_training_mode(training):
    assert LMTPForCausalLM.from_backbone(tiny_llama().train(training)).training is training


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_wrapping_keeps_the_attention_of_a_loaded_backbone(tmp_path, implementation):
    tiny_llama().save_pretrained(tmp_path)
    backbone = AutoModelForCausalLM.from_pretrained(
        str(tmp_path), attn_implementation=implementation
    )
    model = LMTPForCausalLM.from_backbone(backbone)
    assert model.backbone.config._attn_implementation == implementation
    assert model.config.backbone_config._attn_implementation == implementation


def test_generation_settings_are_copied_from_the_backbone():
    backbone = tiny_llama()
    backbone.generation_config.top_k = 7
    model = LMTPForCausalLM.from_backbone(backbone)
    assert model.generation_config.top_k == 7
    model.generation_config.top_k = 9
    assert backbone.generation_config.top_k == 7


def t5() -> PreTrainedModel:
    config = T5Config(vocab_size=96, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    return AutoModelForSeq2SeqLM.from_config(config)


def headless() -> PreTrainedModel:
    config = tiny_llama().config
    model = AutoModel.from_config(config)
    assert isinstance(model, LlamaModel)
    return model


def adapted() -> PreTrainedModel:
    model = tiny_llama()
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model)
    return model


def with_heads() -> PreTrainedModel:
    return LMTPForCausalLM.from_backbone(tiny_llama())


REFUSED = {
    "adapters": (adapted, {}, "LlamaForCausalLM has adapters, so a checkpoint of it could not be"),
    "PEFT's wrapper": (
        lambda: get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])),
        {},
        "has adapters, so a checkpoint of it could not be loaded again. Merge them first",
    ),
    "heads on it": (with_heads, {}, "LMTPForCausalLM already has leap heads."),
    "encoder-decoder": (t5, {}, "T5ForConditionalGeneration is an encoder-decoder model."),
    "no unembedding": (headless, {}, "LlamaModel has no language-modeling head. Load the backbone"),
    "offsets given twice": (
        tiny_llama,
        {"leap_offsets": (2, 3), "num_leap_heads": 2},
        "Pass either leap_offsets ((2, 3)) or num_leap_heads and leap_stride (2, None), not both.",
    ),
    "stride beside offsets": (
        tiny_llama,
        {"leap_offsets": (2, 3), "leap_stride": 1},
        "Pass either leap_offsets ((2, 3)) or num_leap_heads and leap_stride (None, 1), not both.",
    ),
    "loading arguments": (
        tiny_llama,
        {"dtype": "auto", "device_map": "cpu"},
        "['device_map', 'dtype'] are arguments for loading a backbone, but a loaded model was",
    ),
    "stride": (tiny_llama, {"leap_stride": 0}, "leap_stride must be 1 (multi-token prediction)"),
    "heads": (tiny_llama, {"num_leap_heads": -1}, "num_leap_heads must be 0 (plain next-token"),
    "offsets": (tiny_llama, {"leap_offsets": (1, 2)}, "leap_offsets must be 2 or more, got (1, 2)"),
    "layers": (tiny_llama, {"num_head_layers": 0}, "num_head_layers must be 1 or more, got 0."),
    "weight": (
        tiny_llama,
        {"leap_loss_weight": -0.5},
        "leap_loss_weight must be 0 or more, got -0.5.",
    ),
}


# PEFT asks for what Transformers has renamed
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize(("backbone", "arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_wrapped_is_refused(backbone, arguments, message):
    with pytest.raises(REFUSALS, match=re.escape(message)):
        LMTPForCausalLM.from_backbone(backbone(), **arguments)


BAD_CONFIGS = {
    "offsets": ({"leap_offsets": (3, 2)}, "leap_offsets must be increasing, got (3, 2)"),
    "layers": ({"num_head_layers": 0}, "num_head_layers must be 1 or more, got 0."),
    "weight": ({"leap_loss_weight": -1}, "leap_loss_weight must be 0 or more, got -1."),
    "not a number": ({"leap_loss_weight": float("nan")}, "must be 0 or more, got nan."),
    "unknown architecture": (
        {"backbone_config": {"hidden_size": 8}},
        "backbone_config has no 'model_type', so its architecture is unknown.",
    ),
    "encoder-decoder": (
        {"backbone_config": T5Config()},
        "The backbone is an encoder-decoder model ('t5'). Leap heads need a causal language model",
    ),
    "type of layers": ({"num_head_layers": "two"}, "num_head_layers"),
    "type of flag": ({"share_lm_head": "yes"}, "share_lm_head"),
    "type of offsets": ({"leap_offsets": 3}, "leap_offsets"),
}


@pytest.mark.parametrize(("settings", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS.keys())
def test_bad_configurations_are_refused(settings, message):
    with pytest.raises(REFUSALS, match=re.escape(message)):
        LMTPConfig(**{"backbone_config": LlamaConfig(), **settings})


def test_a_model_needs_a_backbone():
    with pytest.raises(ValueError, match=r"config\.backbone_config is not set\. Use LMTP"):
        LMTPForCausalLM(LMTPConfig())
