"""The documents name things that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_promise_names_a_test_that_exists() -> None:
    """`file.py::test`, or `::test` of the file named before it."""
    file, seen = "", 0
    for path, name in re.findall(
        r"`(tests/[\w/]+\.py)?(?:::(\w+))?`", (ROOT / "docs/NUMERICS.md").read_text()
    ):
        file = path or file
        if path or name:
            assert f"def {name}" in (ROOT / file).read_text(), f"{file}::{name}"
            seen += 1
    assert seen > 20


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_s_commands_are_in_the_makefile() -> None:
    commands = re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert set(commands) == {"demo", "test"}
    assert all(f"\n{command}:" in (ROOT / "Makefile").read_text() for command in commands)
