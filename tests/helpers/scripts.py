"""The scripts in `benchmarks/scripts/`, as modules; some import each other as neighbours."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = BENCHMARKS / "scripts"


def load_script(name: str) -> ModuleType:
    """Import `benchmarks/scripts/NAME.py`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        return importlib.import_module(name)
