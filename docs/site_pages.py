"""What the site needs besides docs/: the README as its first page, and CONTRIBUTING. mkdocs.yml names this file.

Links that leave docs/ lead to files of the repository, which the site does not hold: they become code.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
EXTRA = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md"}


def on_files(files: Files, config: Any) -> Files:
    for name, source in EXTRA.items():
        text = (
            (ROOT / source)
            .read_text()
            .replace("](docs/", "](")
            .replace("](CONTRIBUTING)", "](contributing.md)")
        )
        files.append(File.generated(config, name, content=text))
    for script in [file for file in files if file.src_uri.endswith(".py") or "__pycache__" in file.src_uri]:
        files.remove(script)
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    for name, source in EXTRA.items():
        markdown = re.sub(rf"\]\((?:\.\./)?{source}(#[^)]*)?\)", rf"]({name}\1)", markdown)
    return re.sub(r"\[([^\]]*)\]\((?:\.\./|svg_ear_compile/|examples/)[^)]*\)", r"`\1`", markdown)
