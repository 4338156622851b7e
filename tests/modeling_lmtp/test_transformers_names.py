"""Names of Transformers that it may change stand in one file, and its cache in whatever name it has.

`test_future_transformers` shows what happens where one of them is another.
"""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_causal_lm
from plain_decoding import warnings_said
from tiny import tiny_llama
from transformers import DynamicCache, GenerationMixin, LlamaConfig, LlamaForCausalLM

import modeling_lmtp
from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.transformers_lmtp import (
    LOWEST,
    cache_of,
    check_release,
    commit_of,
    extend,
    keep_commit,
    with_cache,
)

PACKAGE = Path(modeling_lmtp.__file__).parent
SHIPPED = sorted(PACKAGE.glob("*_lmtp.py"))
SEAM = "transformers_lmtp.py"
OF_THE_CACHE = ("cache_lmtp.py", "static_lmtp.py")
# Modules of Transformers that its documentation tells users to import from
PUBLIC_MODULES = {
    "transformers",
    "transformers.generation",
    "transformers.modeling_outputs",
    "transformers.utils",
}
KEYS_OF_THE_CACHE = {"past_key_values", "cache_params", "cache"}
LAYER_ATTRIBUTES = {
    *("cumulative_length", "record_past", "conv_states", "recurrent_states", "indexer_keys"),
    *("is_recurrent_states_initialized", "is_sliding", "get_mask_sizes", "is_croppable"),
    *("activate_past_recording", "reorder_cache", "batch_select_indices"),
}
# What authors of models are told to define, and so to call on their parent class
OVERRIDDEN = {"_init_weights"}
PRIVATE = re.compile(r"_[a-z]\w*")


def complaints(source: str, file: str) -> list[str]:
    """Return what in a shipped file only the files that know Transformers may use."""
    tree = ast.parse(source)
    of_us = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    of_us |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and is_own(n.value)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
            private = [a.name for a in node.names if PRIVATE.fullmatch(a.name)]
            if node.level == 0 and (node.module not in PUBLIC_MODULES or private):
                found.append(f"from {node.module} import {[a.name for a in node.names]}")
        elif isinstance(node, ast.Attribute):
            is_private = PRIVATE.fullmatch(node.attr) and not is_own(node.value)
            if is_private and node.attr not in of_us | OVERRIDDEN:
                found.append(f".{node.attr}")
            if node.attr in LAYER_ATTRIBUTES and file not in OF_THE_CACHE:
                found.append(f".{node.attr}")
        elif isinstance(node, ast.keyword) and node.arg in KEYS_OF_THE_CACHE - {"cache"}:
            found.append(f"{node.arg}=")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            is_private = PRIVATE.fullmatch(node.value) and node.value not in of_us
            if is_private or node.value in KEYS_OF_THE_CACHE:
                found.append(repr(node.value))
            if node.value in LAYER_ATTRIBUTES and file not in OF_THE_CACHE:
                found.append(repr(node.value))
    return found


def is_own(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_files_use_no_name_that_transformers_may_change(path):
    if path.name != SEAM:
        assert complaints(path.read_text(), path.name) == []


@pytest.mark.parametrize(
    "source",
    [
        "from transformers.cache_utils import DynamicLayer",
        "from transformers import _something",
        "backbone._sample(input_ids)",
        "backbone.config._attn_implementation",
        'getattr(config, "_commit_hash", None)',
        'model_kwargs["past_key_values"]',
        'model_kwargs.get("cache")',
        "backbone(input_ids, past_key_values=cache)",
        "layer.cumulative_length",
        'hasattr(layer, "record_past")',
    ],
)
def test_each_such_name_would_be_found(source):
    assert complaints(source, "some_lmtp.py")


# A Transformers that is too old


@pytest.mark.parametrize("version", ["4.57.6", "5.0.0", "5.14.1", "5.14.0.dev0"])
def test_a_release_that_is_too_old_is_told_the_range(version):
    with pytest.raises(
        ImportError, match=rf"need Transformers {LOWEST} or newer, and {version} is"
    ):
        check_release(version)


@pytest.mark.parametrize("version", [f"{LOWEST}.0", "5.100.1", "6.0.0.dev0"])
def test_a_release_that_is_not_too_old_is_taken(version):
    check_release(version)


def test_remote_code_names_the_range_before_anything_else_can_fail(tmp_path):
    script = """
import sys, transformers
transformers.__version__ = "5.0.0"
vars(transformers).pop("PreTrainedConfig", None)
import importlib
try:
    importlib.import_module("remote.configuration_lmtp")
except ImportError as error:
    print(error)
"""
    (tmp_path / "run.py").write_text(script)
    folder = tmp_path / "remote"
    folder.mkdir()
    for path in SHIPPED:
        (folder / path.name).write_text(path.read_text())
    done = subprocess.run(
        [sys.executable, "run.py"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"Leap heads need Transformers {LOWEST} or newer, and 5.0.0 is")


def test_old_loaders_find_every_file_that_the_configuration_needs():
    def imported(name: str) -> set[str]:
        tree = ast.parse((PACKAGE / f"{name}.py").read_text())
        return {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level}

    direct = imported("configuration_lmtp")
    assert set().union(*map(imported, direct)) <= direct


# The cache's name

PROMPT = torch.tensor([[3, 17, 5, 9, 44]])
NEW_NAME = "cache" in inspect.signature(GenerationMixin.generate).parameters or (
    "cache" in inspect.signature(LlamaForCausalLM.forward).parameters
)


class OldCode(LlamaForCausalLM):
    """Remote code that was written for one name of the cache, the old one."""

    def forward(self, input_ids=None, past_key_values=None, **kwargs) -> Any:
        return super().forward(input_ids, **with_cache(kwargs, past_key_values))


class NewCode(LlamaForCausalLM):
    """Remote code that was written for one name of the cache, the new one."""

    def forward(self, input_ids=None, cache=None, **kwargs) -> Any:
        return super().forward(input_ids, **with_cache(kwargs, cache))


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("code", [OldCode, NewCode])
def test_a_backbone_that_knows_one_name_only_does_what_it_does_plainly(code):
    backbone = code(tiny_llama().config).eval()
    backbone.load_state_dict(tiny_llama().state_dict())
    model = LMTPForCausalLM.from_backbone(backbone, leap_offsets=(2, 3))
    options = {"max_new_tokens": 6, "do_sample": False}

    def outcome(**more: Any) -> Any:
        try:
            return model.generate(PROMPT, **options, **more).tolist()
        except Exception as error:  # whatever Transformers makes of it
            return type(error)

    with warnings_said():
        assert outcome(use_lmtp=True) == outcome()


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["past_key_values", *(["cache"] if NEW_NAME else [])])
@pytest.mark.parametrize("use_lmtp", [False, True])
def test_a_cache_may_be_passed_by_every_name_that_this_release_takes(name, use_lmtp):
    model = LMTPForCausalLM.from_backbone(tiny_causal_lm("llama"), leap_offsets=(2, 3))
    options = {"do_sample": False, "use_lmtp": use_lmtp, "return_dict_in_generate": True}
    whole = model.generate(PROMPT, **{**options, "use_lmtp": False}, max_new_tokens=12).sequences
    cache = DynamicCache(config=model.backbone.config)
    begun = model.generate(PROMPT, **{name: cache}, **options, max_new_tokens=5)
    assert cache_of(begun) is cache
    again = model.generate(begun.sequences, **{name: cache}, **options, max_new_tokens=7)
    assert again.sequences.tolist() == whole.tolist()
    assert cache.get_seq_length() == whole.shape[1] - 1


@pytest.mark.skipif(not NEW_NAME, reason="this release has one name")
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_a_call_goes_on_with_a_cache_made_by_the_other_name():
    model = LMTPForCausalLM.from_backbone(tiny_causal_lm("llama"), leap_offsets=(2, 3))
    options = {"do_sample": False, "use_lmtp": True, "return_dict_in_generate": True}
    whole = model.generate(PROMPT, **options, max_new_tokens=12).sequences
    begun = model.generate(PROMPT, **options, max_new_tokens=5)
    again = model.generate(
        begun.sequences, past_key_values=begun.cache, **options, max_new_tokens=7
    )
    assert again.sequences.tolist() == whole.tolist()


# What the file exports


def test_kept_inputs_are_extended_as_for_new_tokens():
    cache = DynamicCache()
    kept = with_cache(
        {
            "position_ids": torch.tensor([[0, 0, 1], [0, 1, 2]]),
            "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
            "token_type_ids": torch.tensor([[0, 0, 1], [0, 0, 0]]),
            "use_cache": True,
        },
        cache,
    )
    extended = extend(kept, 2)
    assert extended["position_ids"].tolist() == [[0, 0, 1, 2, 3], [0, 1, 2, 3, 4]]
    assert extended["attention_mask"].tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert extended["token_type_ids"].tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]
    assert cache_of(extended) is cache
    assert extended["use_cache"] is True
    assert kept["position_ids"].shape == (2, 3)


@pytest.mark.parametrize("num_new", [1, 3])
def test_they_are_extended_as_transformers_extends_them(num_new):
    kept = {"position_ids": torch.arange(4)[None], "attention_mask": torch.ones(1, 4)}
    model = tiny_llama()
    expected = model._update_model_kwargs_for_generation({}, dict(kept), num_new_tokens=num_new)
    found = extend(kept, num_new)
    for name, value in expected.items():
        assert found[name].tolist() == value.tolist(), name


class Named:
    """A configuration that knows where it came from."""

    def __init__(self, name: str | None) -> None:
        self.name_or_path = name


def test_the_commit_is_read_from_the_hub_s_cache(tmp_path, monkeypatch):
    commit = "0123456789" * 4
    repo = tmp_path / "models--me--base"
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "snapshots" / commit / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert commit_of(Named("me/base"), revision="main") == commit
    assert commit_of(Named("me/base")) is None, "it may have been loaded from another revision"
    assert commit_of(Named(str(repo / "snapshots" / commit))) == commit
    assert commit_of(Named("me/base"), revision=commit) == commit
    assert commit_of(Named("me/base"), revision="another") is None
    assert commit_of(Named("me/other"), revision="main") is None
    assert commit_of(Named(str(tmp_path)), revision="main") is None
    assert commit_of(Named(None), revision="main") is None


def test_a_commit_that_is_kept_stays_when_the_branch_moves_on(tmp_path, monkeypatch):
    repo, (first, second) = tmp_path / "models--me--base", ("a" * 40, "b" * 40)
    for commit in (first, second):
        (repo / "snapshots" / commit).mkdir(parents=True)
        (repo / "snapshots" / commit / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(first)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = LlamaConfig()
    config.name_or_path = "me/base"
    keep_commit(config, "main")
    (repo / "refs" / "main").write_text(second)
    assert commit_of(config, "main") == commit_of(config) == first
    assert first not in config.to_json_string()
