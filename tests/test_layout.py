"""The folders import each other one way, and no file imports itself by a detour."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each may import those before it, and neighbours
ORDER = ("modeling_lmtp", "conversion", "training", "benchmarks")
# The command line knows all commands; it does not travel with a checkpoint
COMMAND_LINE = "modeling_lmtp.__main__"


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "modeling_lmtp" else ("modeling_lmtp", *parts)
    return ".".join(part for part in parts if part != "__init__")


FILES = {
    name_of(path): path
    for folder in ORDER
    for path in (ROOT / folder).glob("*.py")
    if path.name != "__init__.py" or folder == "modeling_lmtp"
}


def folder_of(name: str) -> str:
    part = name.split(".")[1] if "." in name else ""
    return part if part in ORDER else "modeling_lmtp"


def imports(name: str) -> list[tuple[str, int]]:
    """Return the files that a file imports, in functions and for types as well, and how many dots."""
    package = "modeling_lmtp" if name == "modeling_lmtp" else name.rpartition(".")[0]
    found = []
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        module = ".".join(filter(None, [package if node.level else "", node.module or ""]))
        for imported in [module, *(f"{module}.{alias.name}" for alias in node.names)]:
            if imported in FILES and imported != "modeling_lmtp":
                found.append((imported, node.level))
    return found


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_neighbours_relatively_and_lower_folders_absolutely(name):
    own = ORDER.index(folder_of(name))
    for imported, dots in imports(name):
        other = ORDER.index(folder_of(imported))
        if name == COMMAND_LINE and other != own:
            continue
        assert other <= own, f"{name} imports {imported}"
        assert dots == (1 if other == own else 0), f"{name} imports {imported}"


def test_no_file_imports_itself_by_a_detour():
    edges = {name: {imported for imported, _ in imports(name)} for name in FILES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for imported in sorted(edges[name]):
                visit(imported, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())


TESTS = sorted((ROOT / "tests").rglob("*.py"))


def test_tests_lie_in_folders_that_mirror_the_source():
    folders = {str(path.parent.relative_to(ROOT / "tests")) for path in TESTS}
    assert folders == {".", "helpers", *ORDER}
    beside = {path.name for path in (ROOT / "tests").glob("*.py")}
    assert beside == {"conftest.py", "test_layout.py"}


def test_no_test_imports_another():
    tests = {path.stem for path in TESTS if path.name.startswith("test_")}
    for path in TESTS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                assert node.module.rpartition(".")[2] not in tests, f"{path} imports {node.module}"
