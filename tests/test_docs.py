"""The documents name things that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / ".github").rglob("*.[my]*"))
FOLDERS = (
    "svg_ear_compile",
    "passes",
    "kernels",
    "tests",
    "benchmarks",
    "examples",
    "docs",
    ".github",
    ".ci",
)
SOURCES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if path.resolve() == ROOT.resolve() / path.relative_to(ROOT)
)
ENDINGS = r"\.(?:py|md|json|txt|sh|png|svg|toml|yml|yaml)"


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
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_s_commands_are_in_the_makefile() -> None:
    commands = re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert set(commands) == {"demo", "test"}
    assert all(f"\n{command}:" in (ROOT / "Makefile").read_text() for command in commands)


def exists(name: str) -> bool:
    """Whether a path, a pattern, or the name of a file somewhere in the repository is one of ours."""
    if "/" in name:
        return any(ROOT.glob(name.rstrip("/")))
    return (ROOT / name).exists() or any(any((ROOT / folder).rglob(name)) for folder in FOLDERS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    """In `code`: files, and folders that end in a slash. What scripts write goes to outputs/."""
    text = re.sub(r"`[^`]*` up\s+to commit", "", page.read_text())
    spans = re.findall(r"```.*?```|`[^`]+`", text, flags=re.DOTALL)
    words = {word.partition("::")[0].strip("`'\"()=,;:") for span in spans for word in span.split()}
    names = {word for word in words if re.fullmatch(rf"[\w.*/-]+(?:{ENDINGS}|/)", word)}
    assert {name for name in names if not name.startswith("outputs/") and not exists(name)} <= {"script.py"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_path_that_a_source_names_exists(path: Path) -> None:
    names = set(re.findall(rf"(?<![\w/.])(?:{'|'.join(FOLDERS)})/[\w./*-]*{ENDINGS}\b", path.read_text()))
    assert not {name for name in names if not exists(name)}


def test_the_site_builds_and_no_link_in_it_is_broken(tmp_path: Path) -> None:
    """`make docs`: mkdocs looks at anchors, too."""
    commands = pytest.importorskip("mkdocs.commands.build")
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path))
    commands.build(config)
    built = {path.stem for path in tmp_path.glob("*.html")}
    assert built >= {path.stem for path in (ROOT / "docs").glob("*.md")} | {"index", "contributing"}


def test_the_page_on_troubles_quotes_what_is_said() -> None:
    """Lines of the report, in the first column of its tables."""
    code = "\n".join(
        path.read_text() for path in SOURCES if "svg_ear_compile" in path.parts or "passes" in path.parts
    )
    code += (ROOT / "kernels/attention/choice.py").read_text()
    flat = " ".join(re.sub(r'["\n]|f"', " ", code).split())
    page = (ROOT / "docs/TROUBLESHOOTING.md").read_text()
    quoted = re.findall(r"^\| `([^`]+)`", page, flags=re.MULTILINE)
    assert len(quoted) > 20
    missing = []
    for text in quoted:
        parts = [part.strip() for part in re.split(r"\.\.\.|[()]|kernel: |svg_ear: |0\.6|: ?$", text)]
        missing += [(text, part) for part in parts if part and part not in flat]
    assert not missing
