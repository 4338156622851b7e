"""Trained heads side by side: how many tokens they draft for the same answers."""

import json
import sys

import pytest
import torch
from scripts import load_script
from tiny import tiny_llama, tiny_tokenizer

from modeling_lmtp import LMTPForCausalLM


@pytest.fixture(scope="module")
def compare_heads():
    return load_script("compare_heads")


def test_drafted_tokens_are_those_beyond_one_a_step(compare_heads):
    tokens = torch.tensor([30, 50])
    ours, theirs = (tokens, torch.tensor([15, 25])), (tokens, torch.tensor([20, 30]))
    found = compare_heads.times_drafted(ours, theirs)
    assert found.value == pytest.approx((80 / 40 - 1) / (80 / 50 - 1))
    assert found.standard_error > 0
    same = compare_heads.times_drafted(ours, ours)
    assert (same.value, same.standard_error) == (1, 0)


def test_each_kind_has_its_tokens_per_step(compare_heads, tmp_path):
    rows = [{"kind": kind} for kind in ("maths", "chat", "maths")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = torch.tensor([30, 20, 50]), torch.tensor([15, 20, 25])
    assert compare_heads.by_kind(counts, tmp_path / "a.jsonl") == {"maths": 2, "chat": 1}


def test_checkpoints_are_judged_on_the_same_answers(compare_heads, tmp_path, monkeypatch, capsys):
    for name, offsets in (("first", (2, 3)), ("other", (3,))):
        model = LMTPForCausalLM.from_backbone(tiny_llama(), leap_offsets=offsets)
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    rows = [{"prompt": "What is the sea?", "response": "The sea and the wind and the sea."}] * 2
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = [f"{name}={tmp_path / name}" for name in ("first", "other")]
    options = ["--answers", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["compare_heads.py", *models, *options])
    compare_heads.main()
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["answers"] == 2
    first = record["checkpoints"]["first"]
    assert first["leap_offsets"] == [2, 3]
    assert first["chain_by_kind"] == {"": first["tokens_per_step"]["chain"]["value"]}
    assert set(record["times_the_drafted_tokens"]) == {"other"}
    assert set(record["times_the_drafted_tokens"]["other"]) == {"chain", "8", "16", "32"}
    assert "chain" in capsys.readouterr().out
