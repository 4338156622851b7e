"""The configuration answers for the backbone what libraries ask, and saves each value once."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from tiny import tiny_llama
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BartConfig,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3NextConfig,
)

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.configuration_lmtp import BACKBONE_ATTRIBUTES, LMTPConfig

MISSING = object()
# name: a backbone whose names, defaults or structure differ
BACKBONES = {
    "llama": lambda: LlamaConfig(vocab_size=77, tie_word_embeddings=True, pad_token_id=3),
    "gpt2, which has other names": lambda: GPT2Config(n_embd=48, n_layer=5),
    "mistral, with a window": lambda: MistralConfig(sliding_window=64),
    "gemma3, with a text configuration": lambda: Gemma3Config(),
    "bart, with settings of generation": lambda: BartConfig(is_encoder_decoder=False),
    "qwen3 next, with kinds of layers": lambda: Qwen3NextConfig(num_hidden_layers=4),
}


def answers(config):
    return {name: getattr(config, name, MISSING) for name in BACKBONE_ATTRIBUTES}


@pytest.fixture(params=BACKBONES.values(), ids=BACKBONES.keys())
def backbone(request):
    return request.param()


def test_it_answers_what_the_backbone_answers(backbone):
    before = copy.deepcopy(backbone)
    config = LMTPConfig(backbone_config=backbone)
    text = backbone.get_text_config()
    expected = {**answers(text), **{n: v for n, v in answers(backbone).items() if v is not MISSING}}
    assert answers(config) == expected
    assert config.vocab_size > 0
    assert backbone == before


def test_each_value_is_saved_once_and_comes_back(backbone, tmp_path):
    backbone.quantization_config = {"quant_method": "fp8"}
    config = LMTPConfig(backbone_config=backbone, dtype=torch.float16)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert not saved.keys() & set(BACKBONE_ATTRIBUTES)
    assert saved["backbone_config"]["quantization_config"] == {"quant_method": "fp8"}
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert answers(loaded) == answers(config)
    assert loaded.dtype == torch.float16
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == saved


def test_copies_are_equal_and_independent(backbone):
    config = LMTPConfig(backbone_config=backbone)
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin == config
        assert answers(twin) == answers(config)
        twin.pad_token_id = 5
        assert config.pad_token_id != 5
    assert answers(LMTPConfig(**config.to_dict())) == answers(config)


def test_what_is_set_reaches_the_backbone():
    config = LMTPConfig(backbone_config=LlamaConfig(tie_word_embeddings=True))
    config.tie_word_embeddings = False
    config.use_cache = False
    assert (config.backbone_config.tie_word_embeddings, config.backbone_config.use_cache) == (
        False,
        False,
    )
    config.quantization_config = {
        "quant_method": "fp8"
    }  # as `from_pretrained` sets it for a whole model
    assert not hasattr(config.backbone_config, "quantization_config")
    assert config.to_diff_dict()["quantization_config"] == {"quant_method": "fp8"}


def test_what_only_transformers_asks_is_not_answered():
    config = LMTPConfig(backbone_config=LlamaConfig())
    for name in ("rope_parameters", "layer_types", "attention_bias", "no_such_name"):
        with pytest.raises(AttributeError, match=name):
            getattr(config, name)
    assert not hasattr(LMTPConfig(), "vocab_size")


def test_peft_reads_tied_embeddings_from_the_dict():
    for tied in (True, False):
        backbone = LlamaConfig(tie_word_embeddings=tied)
        assert LMTPConfig(backbone_config=backbone).to_dict()["tie_word_embeddings"] is tied


def test_the_vocabulary_follows_a_resize(tmp_path):
    model = LMTPForCausalLM.from_backbone(tiny_llama(96))
    assert model.config.vocab_size == 96
    model.resize_token_embeddings(104)
    assert model.config.vocab_size == 104
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).vocab_size == 104


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder / "backbone")
    model = LMTPForCausalLM.from_backbone(folder / "backbone")
    model.save_pretrained(folder / "full")
    model.save_pretrained(folder / "heads", heads_only=True)
    return folder


LOADERS = {
    "from_backbone": lambda f, a: LMTPForCausalLM.from_backbone(
        f / "backbone", attn_implementation=a
    ),
    "full": lambda f, a: LMTPForCausalLM.from_pretrained(f / "full", attn_implementation=a),
    "heads only": lambda f, a: LMTPForCausalLM.from_pretrained(f / "heads", attn_implementation=a),
    "full, AutoModel": lambda f, a: AutoModelForCausalLM.from_pretrained(
        f / "full", attn_implementation=a
    ),
    "heads only, AutoModel": lambda f, a: AutoModelForCausalLM.from_pretrained(
        f / "heads", attn_implementation=a
    ),
}


@pytest.mark.parametrize("attention", ["eager", {"backbone_config": "eager"}], ids=str)
@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS.keys())
def test_the_attention_asked_for_reaches_the_backbone(folders, load, attention):
    assert load(folders, attention).backbone.config._attn_implementation == "eager"
