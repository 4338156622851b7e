"""Counts files, lines, commands and their options, the longest function, and the most parameters.

    python benchmarks/scripts/count.py [FOLDER]

Compare two states of the repository by running it on a checkout of each.
"""

import ast
import sys
from pathlib import Path

SOURCES = ("modeling_lmtp", "conversion", "training", "benchmarks")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(path: Path) -> list[Function]:
    """Return all functions of a file, methods and nested ones included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def num_parameters(function: Function) -> int:
    """Count named parameters, `self` included."""
    arguments = function.args
    return len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs)


def num_commands(root: Path) -> int:
    """Count the entries of the table of commands."""
    for node in ast.walk(ast.parse((root / "modeling_lmtp" / "__main__.py").read_text())):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COMMANDS":
            return len(node.value.keys) if isinstance(node.value, ast.Dict) else 0
    return 0


def num_options(path: Path) -> int:
    """Count the fields of the dataclasses of options in a file, without those of `TrainingArguments`."""
    classes = [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and "Options" in map(ast.unparse, node.bases)
    ]
    return sum(
        isinstance(line, ast.AnnAssign)
        and isinstance(line.value, ast.Call)
        and ast.unparse(line.value.func) == "field"
        for node in classes
        for line in node.body
    )


def count(root: Path) -> dict[str, object]:
    """Return the counts of a checkout, by name."""
    sources = [path for folder in SOURCES for path in sorted((root / folder).rglob("*.py"))]
    tests = sorted((root / "tests").rglob("*.py"))
    every = [(function, path) for path in sources for function in functions(path)]
    longest, where = max(every, key=lambda f: (f[0].end_lineno or 0) - f[0].lineno)
    widest, place = max(every, key=lambda f: num_parameters(f[0]))
    return {
        "source files": len(sources),
        "source lines": sum(len(path.read_text(encoding="utf-8").splitlines()) for path in sources),
        "test files": len(tests),
        "test lines": sum(len(path.read_text(encoding="utf-8").splitlines()) for path in tests),
        "commands": num_commands(root),
        "options": sum(map(num_options, sources)),
        "longest function": f"{(longest.end_lineno or 0) - longest.lineno + 1} lines, "
        f"{where.relative_to(root)}:{longest.name}",
        "most parameters": f"{num_parameters(widest)}, {place.relative_to(root)}:{widest.name}",
    }


if __name__ == "__main__":
    for name, value in count(Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()).items():
        print(f"{name:18} {value}")
