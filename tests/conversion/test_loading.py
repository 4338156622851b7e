"""Damaged checkpoints end in one error that names the folder or the file, whatever library reads them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from commands import error_of
from tiny import tiny_llama, tiny_tokenizer

from modeling_lmtp.conversion.loading import (
    load_backbone,
    load_config,
    load_lmtp,
    load_tokenizer,
)

DAMAGED = {
    "tokenizer.json without its parts": (load_tokenizer, "tokenizer.json", b"{}"),
    "tokenizer.json of another kind": (load_tokenizer, "tokenizer.json", b"[]"),
    "tokenizer.json that is no JSON": (load_tokenizer, "tokenizer.json", b"{"),
    "tokenizer_config.json that is no JSON": (load_tokenizer, "tokenizer_config.json", b"{"),
    "tokenizer_config.json in Latin-1": (load_tokenizer, "tokenizer_config.json", b'{"a": "\xff"}'),
    "config.json that is no JSON": (load_config, "config.json", b"{"),
    "config.json with a wrong value": (
        load_config,
        "config.json",
        b'{"model_type": "llama", "hidden_size": "x"}',
    ),
    "weights that are cut off": (load_backbone, "model.safetensors", b"\0" * 20),
    "empty weights": (load_backbone, "model.safetensors", b""),
    "generation_config.json of another kind": (load_backbone, "generation_config.json", b"[]"),
}


@pytest.fixture
def backbone(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "backbone")
    tiny_tokenizer().save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


@pytest.mark.parametrize(("load", "file", "content"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_an_error_that_names_the_folder(backbone, load, file, content):
    (backbone / file).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=str(backbone)) as caught:
        load(backbone)
    if file.endswith("json") and content in (b"{", b"[]", b'{"a": "\xff"}'):
        assert file in str(caught.value)


def test_a_backbone_without_a_tokenizer_is_named(backbone):
    for path in backbone.glob("*token*"):
        path.unlink()
    with pytest.raises((ValueError, OSError), match=str(backbone)):
        load_tokenizer(backbone)


def test_an_adapter_that_names_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for load in (load_tokenizer, load_lmtp):
        with pytest.raises(ValueError, match=r"does not name its checkpoint\. Set base_model_name"):
            load(tmp_path)


def bring_code(folder):
    """Make a model of a class that only its repository has."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))


NOT_ALLOWED = (
    "brings code of its own, which was not allowed to run. Read that code; then run the command"
)


def test_remote_code_is_refused_with_what_to_do(backbone, tmp_path):
    bring_code(backbone)
    (tmp_path / "p.jsonl").write_text('{"prompt": "Hi"}\n')
    error = error_of("distill", backbone, tmp_path / "out.jsonl", "--prompts", tmp_path / "p.jsonl")
    assert error.startswith(f"error: '{backbone}' {NOT_ALLOWED}")


def test_nothing_waits_for_an_answer_where_there_is_no_terminal(backbone):
    bring_code(backbone)
    # What Transformers does if a library calls it without saying whether code is trusted
    script = f"""
import modeling_lmtp.__main__ as main
from transformers import AutoConfig
main.run = lambda *_: AutoConfig.from_pretrained({str(backbone)!r})
main.main()
"""
    reading, writing = os.pipe()  # never written to, and never closed
    done = subprocess.run(
        [sys.executable, "-c", script], stdin=reading, capture_output=True, text=True, check=False
    )
    os.close(reading)
    os.close(writing)
    assert "EOFError" in done.stderr
