"""What was decided and measured for each compiled graph, and how the user sees it.

records.py holds the facts, table.py and accuracy.py show them, diagnostics.py tells the user about them.
The folder is not called `report`: a submodule of that name would replace the function `svg_ear_compile.report`.
"""

from __future__ import annotations

from .accuracy import CallError
from .records import GraphRecord, SiteRecord
from .table import Report, report

__all__ = ["CallError", "GraphRecord", "Report", "SiteRecord", "report"]
