"""Tiny checkpoints of every form, and a Hub to publish them to, for the tests of repositories."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import TOKEN, Hub, running_hub
from huggingface_hub.utils import get_session
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama, tiny_tokenizer
from transformers.utils.hub import hf_api

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.conversion.saving import save_checkpoint, write_record

BASE_ID, FULL_ID, HEADS_ID, ADAPTER_ID = "me/base", "me/full", "me/heads", "me/adapter"
RECORD = {"command": "lmtp train", "examples": 4, "settings": {"epochs": 1.0, "seed": 0}}
CARD = ["--license", "apache-2.0", "--language", "en"]


def save_backbone(folder: Path) -> None:
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def save_full(folder: Path, backbone: Path, revision: str) -> None:
    """Save a checkpoint with random heads on the backbone `BASE_ID`."""
    model = LMTPForCausalLM.from_backbone(backbone, leap_offsets=(2, 3), head_context=1)
    generator = torch.Generator().manual_seed(8)
    for parameter in model.leap_heads.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    model.config.base_model_name_or_path = BASE_ID
    model.config.base_model_revision = revision
    save_checkpoint(model, tiny_tokenizer(), folder, {**RECORD, "checkpoint": str(folder)})


def save_adapter(folder: Path, full: Path) -> None:
    """Save an adapter that changes the text of the checkpoint in `full`."""
    model = LMTPForCausalLM.from_pretrained(full)
    torch.manual_seed(3)
    lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(model, lora)
    adapted.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    write_record(folder, {**RECORD, "command": "lmtp joint"}, model.config)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class _Redirected:
    """huggingface_hub asks one address of the Hub by its full name until 1.33."""

    def __init__(self, url: str) -> None:
        self.url = url

    def post(self, url: str, **kwargs: Any) -> Any:
        return get_session().post(url.replace("https://huggingface.co", self.url), **kwargs)


@contextmanager
def hub_in_use(scratch: Path) -> Iterator[Hub]:
    """Run a Hub that this process, and those it starts, take for theirs."""
    with running_hub() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        patch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)
        patch.setattr(hf_api(), "endpoint", hub.url)  # that of Transformers, perhaps in use already
        files = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", files)
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        patch.setattr("huggingface_hub.repocard.get_session", lambda: _Redirected(hub.url))
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(scratch / "hf" / "hub"))
        environment = {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(scratch / "hf"),
            "HF_MODULES_CACHE": str(scratch / "modules"),
            "OMP_NUM_THREADS": "1",
        }
        for name, value in environment.items():
            patch.setenv(name, value)
        yield hub


def code_of(card: str) -> str:
    """Return the first block of Python in a card."""
    found = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert found
    return found[1]


def run_without_package(script: str, arguments: object, scratch: Path) -> dict:
    """Run a script that writes `torch.save(results, output)` where modeling_lmtp cannot be imported."""
    blocked = 'import sys\nsys.modules["modeling_lmtp"] = None\n'
    reading = "import json\narguments, output = json.loads(sys.argv[1]), sys.argv[2]\n"
    output = scratch / "results.pt"
    subprocess.run(
        [sys.executable, "-c", blocked + reading + script, json.dumps(arguments), output],
        env=dict(os.environ),
        cwd=scratch,
        check=True,
    )
    return torch.load(output)
