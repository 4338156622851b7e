"""What `trust_remote_code=True` runs: the shipped files reach for nothing but Transformers' loading."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import modeling_lmtp

SHIPPED = sorted(Path(modeling_lmtp.__file__).parent.glob("*_lmtp.py"))

# Of the standard library, modules that compute; of others, the names, or all of a module
ALLOWED_MODULES = {
    "abc",
    "collections",
    "collections.abc",
    "contextlib",
    "copy",
    "dataclasses",
    "enum",
    "functools",
    "heapq",
    "inspect",
    "itertools",
    "math",
    "re",
    "torch",
    "torch.nn.functional",
    "typing",
    "weakref",
}
ALLOWED_NAMES = {
    "huggingface_hub": {"try_to_load_from_cache"},  # says where a file lies, and reads nothing
    "huggingface_hub.dataclasses": {"strict"},
    "importlib": {"import_module"},  # of Transformers' own modules, see below
    "pathlib": {"Path"},  # in signatures
    "safetensors": {"SafetensorError"},
    "bisect": {"bisect_left", "bisect_right"},
    "statistics": {"median_low"},
    "threading": {"get_ident"},
    "time": {"perf_counter"},
    "torch": {"nn"},
}
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__", "open", "input", "breakpoint", "globals"),
    "Path",
}
FORBIDDEN_ATTRIBUTES = {
    # files
    *("open", "read_text", "read_bytes", "write_text", "write_bytes", "iterdir", "glob", "rglob"),
    *("unlink", "rmdir", "mkdir", "touch", "rename", "symlink_to", "chmod", "exists", "is_file"),
    # pickle and foreign code, by way of torch
    *("load_library", "load_inline", "cpp_extension", "hub", "classes", "_C", "multiprocessing"),
    # network and processes, by way of Transformers
    *("cached_file", "hf_hub_download", "snapshot_download", "get_session", "http_backoff"),
    *("system", "popen", "Popen", "fork", "spawn", "urlopen", "requests", "subprocess", "socket"),
    # the interpreter
    *("__globals__", "__builtins__", "__subclasses__", "__code__", "__import__", "__dict__"),
}
FORBIDDEN_OF_TORCH = {"load", "save", "distributed", "package", "jit"}
# Transformers' own loading and saving: the only way in or out
LOADERS = {"from_pretrained", "save_pretrained", "get_config_dict"}


def complaints(source: str) -> list[str]:
    """Return what in a file goes beyond what shipped code may do."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found += [f"import {name}" for name in names if name not in ALLOWED_MODULES]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            allowed = ALLOWED_NAMES.get(node.module, set())
            if not may_import(node.module):
                names = [alias.name for alias in node.names if alias.name not in allowed]
                found += [f"from {node.module} import {name}" for name in names]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found += [node.func.id] if node.func.id in FORBIDDEN_CALLS else []
        elif isinstance(node, ast.Attribute):
            of_torch = isinstance(node.value, ast.Name) and node.value.id == "torch"
            if node.attr in FORBIDDEN_ATTRIBUTES or (of_torch and node.attr in FORBIDDEN_OF_TORCH):
                found.append(f".{node.attr}")
    return found


def may_import(module: str) -> bool:
    return module in ALLOWED_MODULES or module.split(".")[0] == "transformers"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_code_reaches_for_no_file_network_or_process(path):
    assert complaints(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import os",
        "import torch.hub",
        "from subprocess import run",
        "from pathlib import PurePath",
        "eval('1')",
        "exec(text)",
        "open(path)",
        "Path(name)",
        "path.read_text()",
        "torch.load(path)",
        "torch.hub.load(name)",
        "hub.cached_file(name)",
        "f.__globals__",
        "__import__('os')",
    ],
)
def test_each_way_out_would_be_found(source):
    assert complaints(source)


def test_names_of_transformers_that_reach_out_are_only_its_loading():
    imported = {
        alias.name
        for path in SHIPPED
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and not node.level and may_import(node.module)
        for alias in node.names
    }
    assert not imported & FORBIDDEN_ATTRIBUTES


def test_only_the_files_about_checkpoints_load_or_save():
    users = {
        path.name
        for path in SHIPPED
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in LOADERS
    }
    assert users == {"heads_only_lmtp.py", "modeling_lmtp.py", "pretrained_lmtp.py"}
