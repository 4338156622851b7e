"""Checkpoints of every released version keep loading, and keep decoding as they did."""

from __future__ import annotations

import json

import pytest
import torch
from save_fixture import FIXTURES, HEADS, behaviour

from modeling_lmtp import LMTPForCausalLM, __version__

VERSIONS = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
SAVED = [
    (version, path.stem) for version in VERSIONS for path in (FIXTURES / version).glob("*.json")
]


@pytest.mark.parametrize("heads_only", [False, True], ids=["full", "heads only"])
@pytest.mark.parametrize(("version", "name"), SAVED)
def test_a_checkpoint_of_a_released_version_decodes_as_it_did(version, name, heads_only):
    folder = FIXTURES / version
    model = LMTPForCausalLM.from_pretrained(folder / name)
    if heads_only:
        heads = folder / f"{name} heads only"
        model = LMTPForCausalLM.from_pretrained(heads, backbone=model.backbone)
    expected = json.loads((folder / f"{name}.json").read_text())
    found = behaviour(model)
    logits = (torch.tensor(record.pop("leap_logits")) for record in (found, expected))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    assert found == expected


def test_this_version_s_checkpoints_are_among_them():
    assert {name for version, name in SAVED if version == __version__} == HEADS.keys()
