"""The comparison of head kinds: rows are trained and judged, and a stopped run goes on."""

import json
import sys

import pytest
import torch
from scripts import load_script
from tiny import tiny_llama, tiny_tokenizer

from modeling_lmtp.modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.training.arguments import (
    HeadOptions,
    JointTrainingArguments,
    LeapTrainingArguments,
)
from modeling_lmtp.training.examples import Example

# PEFT asks for what Transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
ROWS = {
    "frozen": {},
    "joint": {"joint": True},
    "trained": {"trained": True},
    "trained, joint": {"trained": True, "joint": True, "settings": {"kl_weight": 1.0}},
    "few answers": {"num_answers": 8, "epochs": 2},
    "attention": {"trial": "attention"},
    "wide": {"trial": "wide", "shape": {"head_context": "path"}},
}
PROMPTS = ("What is the sea?", "What is the wind?")


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Run the script with small rows; return what it has written down."""
    ablation = load_script("ablation")
    rows = {name: ablation.Row((2, 3), **options) for name, options in ROWS.items()}
    monkeypatch.setitem(ablation.STUDIES, "joint", rows)
    monkeypatch.setitem(ablation.FILES, "joint", tmp_path / "out.json")
    monkeypatch.setattr(load_script("head_trials"), "HEAD_SIZE", 8)
    monkeypatch.setattr(ablation, "PAGE", tmp_path / "page.md")
    marks = "<!-- joint: written by ablation.py -->", "<!-- end of joint -->"
    ablation.PAGE.write_text(f"About it.\n\n{marks[0]}\n\nolder\n\n{marks[1]}\n\nBelow.\n")
    tiny_llama().save_pretrained(tmp_path / "backbone")
    heads = LMTPForCausalLM.from_backbone(tiny_llama(), leap_offsets=(2, 3))
    heads.save_pretrained(tmp_path / "heads")
    tiny_tokenizer().save_pretrained(tmp_path / "backbone")
    rows = [{"prompt": p, "response": "The sea and the wind and the sea."} for p in PROMPTS]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 8))
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = {name: tmp_path / name for name in ("answers.jsonl", "held_out.jsonl")}
    options = ["--answers", places["answers.jsonl"], "--held-out", places["held_out.jsonl"]]
    options += ["--state-folder", tmp_path / "states", "--study", "joint"]
    options += ["--checkpoint", tmp_path / "heads"]
    options += ["--draft-vocab-size", 40, "--dtype", "float32"]
    arguments = ["ablation.py", tmp_path / "backbone", *options]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])

    def run():
        ablation.main()
        return json.loads((tmp_path / "out.json").read_text())

    run.page = ablation.PAGE
    return run


def test_rows_stand_side_by_side_and_are_made_once(command, monkeypatch):
    record = command()
    assert [result["row"] for result in record["results"]] == list(ROWS)
    frozen, joint, trained, both, few, attention, wide = record["results"]
    assert frozen["parameters"] == joint["parameters"] == few["parameters"]
    assert wide["parameters"] > frozen["parameters"]
    assert attention["parameters"] > frozen["parameters"]
    for result in record["results"]:
        assert len(result["top1"]) == 2
        assert result["tokens_per_step"]["chain"]["value"] >= 1
    assert joint["drift"]["kl"] > 0
    assert both["drift"]["kl"] > 0
    assert trained["tokens_per_step"] != frozen["tokens_per_step"]
    # What the tuned backbone says itself, not what the original one said
    assert 0 < joint["own_answer_tokens"] <= record["conditions"]["held_out_tokens"]
    page = command.page.read_text()
    assert page.startswith("About it.")
    assert page.endswith("\n\nBelow.\n")
    assert "older" not in page
    assert "| joint | 2, 3 |" in page
    assert f"| {joint['drift']['kl']:.4f} |" in page
    ablation = load_script("ablation")

    def train_again(*arguments):
        raise AssertionError("what is known is not trained again")

    monkeypatch.setattr(ablation.Laboratory, "run", train_again)
    assert command() == record


def test_heads_of_trials_start_as_the_same_heads_without_them(monkeypatch):
    """An attention layer and wide blocks start at zero; an attention layer sees no later state."""
    ablation, trials = load_script("ablation"), load_script("head_trials")
    monkeypatch.setattr(trials, "HEAD_SIZE", 8)
    torch.manual_seed(0)
    model = LMTPForCausalLM.from_backbone(tiny_llama(), leap_offsets=(2, 3), head_context="path")
    example = Example(list(range(3, 15)), 4)
    plain = ablation.read_states(model, example, None)
    logits = model.leap_logits(0, plain[None], torch.tensor([example.input_ids]), 0)
    trials.widen_blocks(model)
    trials.add_attention(model)
    assert torch.equal(ablation.read_states(model, example, None), plain)
    wide = model.leap_logits(0, plain[None], torch.tensor([example.input_ids]), 0)
    torch.testing.assert_close(wide, logits)
    torch.nn.init.normal_(model.attention.out.weight)
    states = ablation.read_states(model, example, None)
    other = Example([*example.input_ids[:-1], 20], 4)
    changed = ablation.read_states(model, other, None)
    # The layer reads the token after each state, so only the last two states may change
    torch.testing.assert_close(changed[:-2], states[:-2])
    assert not torch.allclose(changed[-2], states[-2])


def test_every_row_has_settings_that_training_takes():
    ablation = load_script("ablation")
    for rows in ablation.STUDIES.values():
        for name, row in rows.items():
            HeadOptions(leap_offsets=list(row.offsets), **row.shape)  # raises, as the next
            arguments = JointTrainingArguments if row.joint else LeapTrainingArguments
            arguments(output_dir="run", **row.settings)
            assert row.trial in (None, *ablation.TRIALS), name
