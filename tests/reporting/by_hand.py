"""Records made by hand: what a report is tested on."""

from __future__ import annotations

from typing import Any

import torch

from svg_ear_compile.precedence import resolve
from svg_ear_compile.reporting import GraphRecord, SiteRecord
from svg_ear_compile.runtime.density import CallLog, Decision
from svg_ear_compile.runtime.readback import Sums


def site(index: int = 0, reason: str = "REWRITTEN", **changes: Any) -> SiteRecord:
    values: dict[str, Any] = {
        "site": index, "module_path": f"blocks.{index}.attn1", "module_class": "Attention", "kind": "self",
        "batch": 1, "heads": 2, "head_dim": 64, "q_len": 1024, "k_len": 1024, "q_hint": 1024, "k_hint": 1024,
        "dtype": "float32", "mask": "none", "rewritten": reason == "REWRITTEN", "reason": reason,
        "sentence": "self attention over video tokens" if reason == "REWRITTEN" else "too few tokens (1024)",
        "hint": "" if reason == "REWRITTEN" else "lower min_tokens", "num_text": 0, "grid": None,
        "grid_source": "unknown",
    }  # fmt: skip
    return SiteRecord(**{**values, **changes})


def sums(*errors: float) -> torch.Tensor:
    """As the ops leave them, [errors,2,1,1]."""
    return torch.tensor([[[[e * e]], [[1.0]]] for e in errors])


def graph(*sites: SiteRecord, number: int = 0, options: dict[str, Any] | None = None) -> GraphRecord:
    return GraphRecord(number, resolve(options, {}), list(sites))


def log(
    layer: int, step: int, decision: Decision, error: float | None = None, true: float | None = None
) -> CallLog:
    measured, audited = (None if x is None else Sums(sums(x)) for x in (error, true))
    return CallLog(0, 7, layer, 0, step, decision, measured, audited)
