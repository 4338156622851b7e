"""Count the house: files, lines, options of commands, the longest function, the most parameters.

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


def is_command(function: Function) -> bool:
    """Whether a function is a command of `lmtp`."""
    return any(
        ast.unparse(decorator).startswith("app.command") for decorator in function.decorator_list
    )


def count(root: Path) -> dict[str, object]:
    """Return what was counted in a checkout, by name."""
    sources = [path for folder in SOURCES for path in sorted((root / folder).rglob("*.py"))]
    tests = sorted((root / "tests").rglob("*.py"))
    found = [(function, path) for path in sources for function in functions(path)]
    commands = [function for function, _ in found if is_command(function)]
    longest, where = max(found, key=lambda f: (f[0].end_lineno or 0) - f[0].lineno)
    widest, place = max(found, key=lambda f: num_parameters(f[0]))
    return {
        "source files": len(sources),
        "source lines": sum(len(path.read_text(encoding="utf-8").splitlines()) for path in sources),
        "test files": len(tests),
        "test lines": sum(len(path.read_text(encoding="utf-8").splitlines()) for path in tests),
        "commands": len(commands),
        "options": sum(map(num_parameters, commands)),
        "longest function": f"{(longest.end_lineno or 0) - longest.lineno + 1} lines, "
        f"{where.relative_to(root)}:{longest.name}",
        "most parameters": f"{num_parameters(widest)}, {place.relative_to(root)}:{widest.name}",
    }


if __name__ == "__main__":
    for name, value in count(Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()).items():
        print(f"{name:18} {value}")
