"""The comparison of head kinds: rows are trained and judged, and a stopped run goes on."""

import json
import sys

import pytest
from scripts import load_script
from tiny import tiny_llama, tiny_tokenizer

# PEFT asks for what Transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
ROWS = (("frozen", {}), ("joint", {"joint": True}))
PROMPTS = ("What is the sea?", "What is the wind?")


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Run the script with two small rows; return what it has written down."""
    ablation = load_script("ablation")
    rows = {name: ablation.Row((2, 3), **options) for name, options in ROWS}
    monkeypatch.setattr(ablation, "ROWS", rows)
    monkeypatch.setattr(ablation, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(ablation, "MAX_NEW_TOKENS", 12)
    ablation.PAGE.write_text(f"About it.\n\n{ablation.MARK}\n\nolder\n")
    tiny_llama().save_pretrained(tmp_path / "backbone")
    tiny_tokenizer().save_pretrained(tmp_path / "backbone")
    rows = [{"prompt": p, "response": "The sea and the wind and the sea."} for p in PROMPTS]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 8))
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = {name: tmp_path / name for name in ("answers.jsonl", "held_out.jsonl")}
    options = ["--answers", places["answers.jsonl"], "--held-out", places["held_out.jsonl"]]
    options += ["--state-folder", tmp_path / "states", "--output", tmp_path / "out.json"]
    options += ["--draft-vocab-size", 40, "--dtype", "float32"]
    arguments = ["ablation.py", tmp_path / "backbone", *options]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])

    def run():
        ablation.main()
        return json.loads((tmp_path / "out.json").read_text())

    run.page = ablation.PAGE
    return run


def test_frozen_and_joint_rows_stand_side_by_side_and_are_made_once(command, monkeypatch):
    record = command()
    frozen, joint = record["results"]
    assert (frozen["row"], joint["row"]) == ("frozen", "joint")
    assert frozen["parameters"] == joint["parameters"]
    for result in (frozen, joint):
        assert len(result["top1"]) == 2
        assert result["tokens_per_step"]["chain"]["value"] >= 1
    assert joint["drift"]["kl"] > 0
    # What the tuned backbone says itself, not what the original one said
    assert 0 < joint["own_answer_tokens"] <= 12 * len(PROMPTS)
    page = command.page.read_text()
    assert page.startswith("About it.")
    assert "older" not in page
    assert "| joint | 2, 3 |" in page
    ablation = load_script("ablation")

    def train_again(*arguments):
        raise AssertionError("what is known is not trained again")

    monkeypatch.setattr(ablation.Laboratory, "run", train_again)
    assert command() == record
