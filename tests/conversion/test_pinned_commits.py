"""The commit that was loaded: every command pins it in what it writes, and heads without one say so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import lmtp
from foreign_checkpoints import medusa_heads, save_medusa
from huggingface_hub import snapshot_download
from repositories import (
    BASE_ID,
    FULL_ID,
    HEADS_ID,
    files_of,
    hub_in_use,
    save_adapter,
    save_backbone,
    save_full,
)
from transformers import AutoModelForCausalLM

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.conversion.saving import read_json
from modeling_lmtp.heads_only_lmtp import logger

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
ROWS = [{"prompt": f"Question {i}?", "response": "The sea and the wind."} for i in range(4)]
ONE_STEP = ["--held_out", 1, "--max_steps", 1]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pinned")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


@pytest.fixture(scope="module")
def hub(scratch):
    with hub_in_use(scratch) as hub:
        save_backbone(scratch / "base")
        base = hub.add(BASE_ID, files_of(scratch / "base"))
        save_full(scratch / "full", scratch / "base", base)
        hub.add(FULL_ID, files_of(scratch / "full"))
        yield hub


def main_of(hub, repo_id: str) -> str:
    return hub.repos[repo_id].branches["main"]


def run(*arguments) -> None:
    result = lmtp(*arguments)
    assert result.exit_code == 0, result.output


def test_distill_pins_the_model(hub, scratch, tmp_path):
    output = tmp_path / "out.jsonl"
    run("distill", BASE_ID, output, "--prompts", scratch / "rows.jsonl", "--max_new_tokens", 2)
    manifest = read_json(Path(f"{output}.manifest.json"))
    assert (manifest["model"], manifest["model_revision"]) == (BASE_ID, main_of(hub, BASE_ID))


def test_train_pins_the_backbone(hub, scratch, tmp_path):
    run("train", BASE_ID, scratch / "rows.jsonl", tmp_path / "out", *ONE_STEP)
    for file in ("provenance.json", "config.json"):
        assert read_json(tmp_path / "out" / file)["base_model_revision"] == main_of(hub, BASE_ID)


def test_joint_pins_the_checkpoint(hub, scratch, tmp_path):
    run("joint", FULL_ID, scratch / "rows.jsonl", tmp_path / "out", *ONE_STEP)
    record = read_json(tmp_path / "out" / "provenance.json")
    assert record["checkpoint_revision"] == main_of(hub, FULL_ID)
    assert read_json(tmp_path / "out" / "adapter_config.json")["revision"] == main_of(hub, FULL_ID)


def test_convert_pins_the_backbone(hub, tmp_path):
    config = {"medusa_num_layers": 1, "base_model_name_or_path": BASE_ID}
    save_medusa(tmp_path / "medusa", medusa_heads(2, 1), config)
    run("convert", tmp_path / "medusa", tmp_path / "out", "--no_check_leap")
    record = read_json(tmp_path / "out" / "provenance.json")
    assert (record["base_model"], record["base_model_revision"]) == (BASE_ID, main_of(hub, BASE_ID))


def test_export_pins_the_checkpoint_and_the_backbone_that_heads_were_joined_with(hub, tmp_path):
    model = LMTPForCausalLM.from_pretrained(FULL_ID)
    model.config.base_model_revision = None
    model.save_pretrained(tmp_path / "heads", heads_only=True)
    hub.add(HEADS_ID, files_of(tmp_path / "heads"))
    run("export", HEADS_ID, tmp_path / "out", "--to", "full")
    record = read_json(tmp_path / "out" / "provenance.json")
    assert record["checkpoint_revision"] == main_of(hub, HEADS_ID)
    assert record["base_model_revision"] == main_of(hub, BASE_ID)


def test_export_of_an_adapter_pins_the_commit_that_it_names(hub, scratch, tmp_path):
    save_adapter(tmp_path / "adapter", scratch / "full")
    config = read_json(tmp_path / "adapter" / "adapter_config.json")
    first = main_of(hub, FULL_ID)
    config |= {"base_model_name_or_path": FULL_ID, "revision": first}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    hub.add(FULL_ID, {**hub.files(FULL_ID), "note.txt": b"a later commit"})
    assert main_of(hub, FULL_ID) != first
    run("export", tmp_path / "adapter", tmp_path / "out", "--to", "full")
    assert read_json(tmp_path / "out" / "provenance.json")["checkpoint_revision"] == first


def test_a_snapshot_in_the_cache_is_pinned(hub):
    commit = main_of(hub, BASE_ID)
    snapshot = snapshot_download(BASE_ID)
    for backbone in (snapshot, AutoModelForCausalLM.from_pretrained(snapshot)):
        assert LMTPForCausalLM.from_backbone(backbone).config.base_model_revision == commit


@pytest.mark.parametrize("revision", ["commit", None])
def test_heads_say_once_if_they_pin_no_commit_of_their_backbone(
    hub, tmp_path, monkeypatch, revision
):
    warnings: list[str] = []
    monkeypatch.setattr(logger, "warning_once", warnings.append)
    model = LMTPForCausalLM.from_pretrained(FULL_ID)
    model.config.base_model_revision = revision and main_of(hub, BASE_ID)
    model.save_pretrained(tmp_path, heads_only=True)
    LMTPForCausalLM.from_pretrained(tmp_path)
    assert any("contains leap heads only" in warning for warning in warnings)
    unpinned = [warning for warning in warnings if "pins no commit" in warning]
    assert len(unpinned) == (revision is None)
    assert all(main_of(hub, BASE_ID) in warning for warning in unpinned)
