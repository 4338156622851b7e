"""A quantized backbone takes heads, which are saved alone and find it again."""

from __future__ import annotations

import json

import pytest
import torch
from commands import error_of
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.training import train_command

PROMPT = torch.tensor([[5, 17, 33, 41]])
SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128}
HOW = {"quant_method": "some_method", "bits": 4}


def torchao_config():
    return TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())


LIBRARIES = {
    "bitsandbytes, 8 bits": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True)),
    "bitsandbytes, 4 bits": (
        "bitsandbytes",
        lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
    ),
    "quanto": ("optimum.quanto", lambda: QuantoConfig(weights="int8")),
    "torchao": ("torchao", torchao_config),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(**SIZES).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize(("library", "config"), LIBRARIES.values(), ids=LIBRARIES.keys())
def test_heads_are_saved_alone_and_find_the_backbone_as_it_was(base, tmp_path, library, config):
    pytest.importorskip(library)
    model = LMTPForCausalLM.from_backbone(
        base, leap_offsets=(2, 3), quantization_config=config(), dtype=torch.float32
    ).eval()
    torch.nn.init.normal_(model.leap_heads[0].blocks[0].linear.weight)
    with pytest.raises(ValueError, match=r"Save the heads only \(heads_only=True\)"):
        model.save_pretrained(tmp_path / "full")
    assert not (tmp_path / "full").exists()
    model.save_pretrained(tmp_path / "heads", heads_only=True)  # as the error says
    loaded = LMTPForCausalLM.from_pretrained(tmp_path / "heads").eval()
    with torch.no_grad():
        ours, theirs = (m(PROMPT, output_leap_logits=True) for m in (loaded, model))
    assert torch.equal(ours.logits, theirs.logits)
    assert all(map(torch.equal, ours.leap_logits, theirs.leap_logits))


@pytest.mark.parametrize("saved_quantized", [False, True])
def test_the_backbone_is_quantized_as_it_was_unless_it_was_saved_so(
    base, tmp_path, monkeypatch, saved_quantized
):
    model = LMTPForCausalLM.from_backbone(base, leap_offsets=(2, 3))
    model.backbone.config.quantization_config = dict(HOW)
    model.save_pretrained(tmp_path / "heads", heads_only=True)
    saved = json.loads((tmp_path / "heads" / "config.json").read_text())
    assert saved["backbone_config"]["quantization_config"] == HOW
    asked = {}

    def load(name, **options):
        asked.update(options)
        return tiny_llama(**SIZES)

    if saved_quantized:
        monkeypatch.setattr(
            "modeling_lmtp.heads_only_lmtp.AutoConfig.from_pretrained",
            lambda *_, **__: model.backbone.config,
        )
    monkeypatch.setattr("modeling_lmtp.heads_only_lmtp.AutoModelForCausalLM.from_pretrained", load)
    loaded = LMTPForCausalLM.from_pretrained(tmp_path / "heads")
    assert asked.get("quantization_config") == (None if saved_quantized else HOW)
    assert loaded.config.backbone_config is loaded.backbone.config


def test_train_refuses_a_quantized_backbone_before_it_reads_the_answers(
    base, tmp_path, monkeypatch
):
    backbone = AutoModelForCausalLM.from_pretrained(base)
    backbone.config.quantization_config = dict(HOW)
    monkeypatch.setattr(train_command, "_load", lambda *_, **__: backbone)
    error = error_of("train", base, tmp_path / "no answers", tmp_path / "out")
    assert "The backbone is quantized" in error


@pytest.mark.filterwarnings("ignore")  # PyTorch deprecates it
def test_dynamically_quantized_layers_are_refused():
    quantized = torch.ao.quantization.quantize_dynamic(tiny_llama(), {torch.nn.Linear})
    with pytest.raises(ValueError, match=r"quantize_dynamic makes them.*quantization_config="):
        LMTPForCausalLM.from_backbone(quantized)
