"""The facts of docs/FACTS.md that need no GPU are still so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.slow
def test_facts_are_still_so() -> None:
    run = subprocess.run([sys.executable, DOCS / "facts.py"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    shown = {line.partition(": ")[0] for line in run.stdout.strip().split("\n")}
    page = (DOCS / "FACTS.md").read_text()
    assert all(f"`python docs/facts.py {name}`" in page for name in shown), shown
