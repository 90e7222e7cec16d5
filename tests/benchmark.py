"""Scripts of benchmarks/ and docs/: how a test gets at one."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


def import_script(folder: Path, name: str) -> ModuleType:
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


def import_benchmark(name: str) -> ModuleType:
    return import_script(BENCHMARKS, name)
