"""What vLLM serves of a checkpoint: the two folders of `lmtp export --to vllm`, and the check of one."""

from __future__ import annotations

import json
import shlex

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.conversion.exporting import ExportOptions, export_checkpoint
from modeling_lmtp.conversion.vllm_serving import serving_notes


def save(folder, heads_only=False, **settings):
    model = LMTPForCausalLM.from_backbone(tiny_llama(), **{"leap_offsets": (2, 3), **settings})
    for parameter in model.leap_heads.parameters():
        parameter.data += torch.randn(parameter.shape) * 0.2
    model.config.base_model_name_or_path = "some/backbone"
    model.generation_config.draft_length = 2
    model.save_pretrained(folder, heads_only=heads_only)
    tiny_tokenizer().save_pretrained(folder)
    return model


def test_a_full_checkpoint_is_taken_apart(tmp_path):
    model = save(tmp_path / "full", head_context="path")
    output = tmp_path / "out"
    (note,) = export_checkpoint(ExportOptions(str(tmp_path / "full"), output, to="vllm"))
    words = shlex.split(note.partition("with: ")[2])
    assert words[:4] == ["vllm", "serve", str(output / "backbone"), "--speculative-config"]
    assert json.loads(words[4]) == {"model": str(output / "heads"), "num_speculative_tokens": 2}
    backbone = AutoModelForCausalLM.from_pretrained(output / "backbone")
    ours, theirs = backbone.state_dict(), model.backbone.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert AutoTokenizer.from_pretrained(output / "backbone").get_vocab()
    assert "draft_length" not in (output / "backbone" / "generation_config.json").read_text()
    assert serving_notes(output / "heads") == []
    again = LMTPForCausalLM.from_pretrained(output / "heads")
    assert all(
        torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items()
    )
    record = json.loads((output / "provenance.json").read_text())
    assert record["base_model"] == "some/backbone"


def test_what_vllm_cannot_serve_is_not_exported(tmp_path):
    save(tmp_path / "leaps", leap_offsets=(3, 5, 7))
    with pytest.raises(ValueError, match=r"vLLM cannot draft .*leap_offsets=\(3, 5, 7\)"):
        export_checkpoint(ExportOptions(str(tmp_path / "leaps"), tmp_path / "out", to="vllm"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("heads_only", [True, False], ids=["heads only", "full"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"head_context": "path", "num_head_layers": 2},
        {"share_lm_head": False},
        {"lm_head_rank": 2, "draft_token_ids": (1, 5, 9)},
    ],
    ids=str,
)
def test_nothing_is_said_of_what_can_be_served(tmp_path, settings, heads_only):
    save(tmp_path, heads_only, **settings)
    assert serving_notes(tmp_path) == []


def test_what_cannot_be_served_is_said(tmp_path):
    save(tmp_path / "leaps", leap_offsets=(3, 5, 7), head_input="weighted")
    leaps, weighted = serving_notes(tmp_path / "leaps")
    assert "(2, 3, 4) can be served" in leaps
    assert "head_input='weighted'" in weighted
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert "export --to vllm" in serving_notes(tmp_path / "adapter")[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("leap_heads.1.blocks.0.linear.weight"),
        lambda tensors: tensors.update({"leap_heads.2.blocks.0.linear.weight": torch.zeros(1)}),
        lambda tensors: tensors.update({"leap_heads.0.blocks.0.linear.bias": torch.zeros(3)}),
    ],
    ids=["missing", "unexpected", "another shape"],
)
def test_tensors_that_the_configuration_does_not_describe_are_an_error(tmp_path, change):
    save(tmp_path, heads_only=True)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 tensors are not those"):
        serving_notes(tmp_path)
