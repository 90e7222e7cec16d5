"""Does a few tests' worth of everything hold on other versions of torch? docs/MODELS.md has the last results.

    make matrix VERSIONS="2.13.0 2.14.1"          PYTHON=python3.13 for another Python

Each version gets an environment of its own, which is thrown away: torch with the triton that it asks for. A CPU
build asks for none, and gets the one of constraints.txt.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "MODELS.md"
HEADING = "\n## Versions of torch\n"
INTRODUCTION = """
Last results of `make matrix` (`tests/torch_versions.py`), on CPUs: the private interfaces of torch, the toy
model through Inductor, the passes, the ops.

| torch | triton | Python | day | result |
| --- | --- | --- | --- | --- |
"""
TESTS = [
    "tests/test_compat.py", "tests/test_backend.py", "tests/test_backend_inductor.py",
    "tests/passes/test_rewrite.py", "tests/failures/test_passes.py", "tests/kernels/test_ops.py",
]  # fmt: skip


def result(version: str, folder: Path) -> list[str]:
    """A row of the table."""
    venv.create(folder, with_pip=True)
    pip = [folder / "bin" / "pip", "install", "-q", "--no-compile"]
    constrained = [*pip, "-c", ROOT / "constraints.txt"]
    for command in (
        [*pip, f"torch=={version}", "numpy"],  # the newest for this Python
        [*constrained, "setuptools", "tabulate", "pytest"],
        [*pip, "--no-deps", "--no-build-isolation", "-e", ROOT],
    ):
        subprocess.run(command, check=True)
    python = folder / "bin" / "python"
    if subprocess.run([python, "-c", "import triton"], capture_output=True, check=False).returncode:
        subprocess.run([*constrained, "triton"], check=True)
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *TESTS]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(tests, cwd=ROOT, env=one_thread, capture_output=True, text=True, check=False)
    print(run.stdout[-4000:], run.stderr[-1000:])
    versions = "import torch, triton; print(torch.__version__, triton.__version__)"
    told = subprocess.run([python, "-c", versions], capture_output=True, text=True, check=True).stdout.split()
    outcome = re.search(r"\d+ (?:passed|failed|error)[^\n]*?(?= in \d)", run.stdout)
    return [
        *told,
        platform.python_version(),
        time.strftime("%Y-%m-%d"),
        outcome[0] if outcome else "no tests ran",
    ]


def kept(page: str) -> str:
    """This section of docs/MODELS.md, which golden.py leaves as it is."""
    return page[page.index(HEADING) :] if HEADING in page else ""


def merged(page: str, new: list[list[str]]) -> str:
    """The page with new rows, each in place of the one of the same versions."""
    rows = {}
    for row in (*re.findall(r"^\| (\d[^\n]*) \|$", kept(page), flags=re.MULTILINE), *map(" | ".join, new)):
        rows[tuple(row.split(" | ")[:3])] = row
    table = "".join(f"| {rows[key]} |\n" for key in sorted(rows))
    return page.removesuffix(kept(page)) + HEADING + INTRODUCTION + table


def main(versions: list[str]) -> None:
    for version in versions:
        with tempfile.TemporaryDirectory() as folder:
            row = result(version, Path(folder))
        PAGE.write_text(merged(PAGE.read_text(), [row]))


if __name__ == "__main__":
    main(sys.argv[1:])
