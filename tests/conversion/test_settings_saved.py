"""Generation settings that cannot be saved are found before the work, in every command that saves."""

from __future__ import annotations

import json

import pytest
from commands import error_of
from foreign_checkpoints import medusa_heads, save_backbone, save_medusa
from tiny import tiny_llama, tiny_tokenizer
from transformers import GenerationConfig

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.conversion.saving import check_settings

CONTRADICTORY = {"do_sample": False, "temperature": 0.9}
MESSAGE = "could not be saved: - `temperature`"


def contradict(folder):
    """Add settings that Transformers reads with a warning, and does not save once they are changed."""
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **CONTRADICTORY}))


@pytest.fixture
def unsaveable(monkeypatch):
    """Every release refuses these, whether they were changed or not."""

    def refuse(self, *args, **kwargs):
        raise ValueError("GenerationConfig is invalid:\n- `temperature`: no.\n\nFix these issues.")

    monkeypatch.setattr(GenerationConfig, "save_pretrained", refuse)


def test_what_will_change_is_taken_into_account(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    contradict(tmp_path)
    settings = GenerationConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=MESSAGE):
        check_settings(settings, use_lmtp=True)
    assert not hasattr(settings, "use_lmtp")
    check_settings(GenerationConfig(do_sample=True, temperature=0.9), use_lmtp=True)


def test_a_plain_backbone_with_such_settings_is_refused_before_it_is_saved(tmp_path, monkeypatch):
    LMTPForCausalLM.from_backbone(tiny_llama()).save_pretrained(tmp_path / "checkpoint")
    contradict(tmp_path / "checkpoint")
    monkeypatch.delattr("modeling_lmtp.conversion.exporting.load_tokenizer_with_fallback")
    options = ("export", tmp_path / "checkpoint", tmp_path / "out", "--to", "plain")
    assert MESSAGE in error_of(*options)


def test_convert_does_not_attach_heads_in_vain(tmp_path, request, monkeypatch):
    save_backbone(tmp_path / "backbone")
    save_medusa(tmp_path / "in", medusa_heads(1, 1))
    request.getfixturevalue("unsaveable")
    monkeypatch.delattr("modeling_lmtp.conversion.converting.attach_heads")
    options = ("convert", tmp_path / "in", tmp_path / "out", "--backbone", tmp_path / "backbone")
    assert MESSAGE in error_of(*options)


@pytest.mark.parametrize("command", ["train", "joint"])
def test_training_does_not_begin(tmp_path, monkeypatch, request, command):
    backbone = tiny_llama()
    model = LMTPForCausalLM.from_backbone(backbone) if command == "joint" else backbone
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "answers.jsonl").write_text("no answers are read")
    request.getfixturevalue("unsaveable")
    options = (command, tmp_path / "model", tmp_path / "answers.jsonl", tmp_path / "out")
    assert MESSAGE in error_of(*options)
