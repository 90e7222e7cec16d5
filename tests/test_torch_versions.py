"""The table of torch_versions.py: a new result takes the place of the one of the same versions."""

from __future__ import annotations

from torch_versions import HEADING, kept, merged

OLD = ["2.13.0", "3.9.0", "3.11.7", "2026-01-01", "1 failed"]
NEW = ["2.13.0", "3.9.0", "3.11.7", "2026-02-01", "9 passed"]
OTHER = ["2.10.0", "3.6.0", "3.11.7", "2026-01-01", "9 passed"]


def test_rows_are_replaced_and_sorted() -> None:
    page = merged(merged("# Models\n", [OLD]), [NEW, OTHER])
    assert page.startswith(f"# Models\n{HEADING}")
    rows = [line.strip("| ").split(" | ") for line in kept(page).splitlines() if line.startswith("| 2")]
    assert rows == [OTHER, NEW]
    assert not kept("# Models\n")
