"""No record and nothing said from the test before."""

from __future__ import annotations

import pytest

from svg_ear_compile.reporting import diagnostics, records


@pytest.fixture(autouse=True)
def _fresh() -> None:
    diagnostics.clear()
    records.clear()
