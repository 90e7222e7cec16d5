"""Does an op run dense? Because the host says so or is gone, the call is too small, or the op failed.

A failure is counted, and warned of once. With strict it raises.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from svg_ear_compile.exceptions import SiteError

from . import context
from .constants import SiteConstants

_T = TypeVar("_T")


def is_dense(query: Tensor, c: SiteConstants) -> bool:
    """Whether this call of a site is dense. If it is too small, the results get the reason."""
    if c.host and not context.inside():
        _warn_of_no_host()
        return True
    call = context.current()
    if call.decisions.of(c).dense:
        return True
    found = call.results.dense
    if c.site not in found and (reason := unfit(query, c, call.decisions)):
        found[c.site] = reason
    return c.site in found


def unfit(query: Tensor, c: SiteConstants, decisions: context.Decisions) -> str:
    """Why a call with these queries [B,H,L,D] cannot be sparse, as the report says it; "" if it can."""
    if not c.packed:
        return c.too_small(query, decisions.grid[0] if decisions.grid else None)
    if decisions.packed is None or decisions.packed.length != query.shape[2]:
        return "its video rows are not known"
    return c.too_small(query, decisions.packed.frames or None)


def sparse_or_dense(
    query: Tensor, c: SiteConstants, sparse: Callable[[], _T], dense: Callable[[], _T], alone: bool = True
) -> _T:
    """sparse(), or dense() if the call is dense or sparse() fails.

    A site that failed is dense for the rest of the call, and counted. Each kind of error is warned of once.
    alone: dense() is right whatever the other ops of the site do. If it is not, and there is no context to
    tell the others, the error is raised. Autocast is off in here: the fakes promise the dtype of the query, and
    float32 must stay float32. Triton launches on the current device, which may differ from the query's.
    """
    call = context.current()
    with torch.cuda.device_of(query), torch.autocast(query.device.type, enabled=False):
        if not is_dense(query, c):
            try:
                return sparse()
            except Exception as error:  # whatever it was, dense attention is still right
                # After a CUDA error every further call fails too: falling back would only hide its origin.
                if isinstance(error, torch.AcceleratorError) or not (alone or context.inside()):
                    raise
                if call.decisions.strict:
                    raise SiteError(f"svg_ear: {call.decisions.name_of(c.site)} failed: {error!r}") from error
                _record_failure(call, c.site, error)
        return dense()


@cache
def _warn_of_no_host() -> None:
    warnings.warn(
        "svg_ear: compiled code runs without the part that decides each call, as after it was saved and loaded: its "
        "attention is dense. Let torch.compile(model, backend='svg_ear') compile it in this process",
        RuntimeWarning,
        stacklevel=4,
    )


def _record_failure(call: context.RunContext, site: int, error: Exception) -> None:
    kind = type(error).__name__
    call.results.dense[site] = f"failed: {kind}"
    call.results.fallbacks[f"fallback: {kind}"] += 1
    warn_once(call, kind, f"{call.decisions.name_of(site)} ran dense because of {error!r}")


def warn_once(call: context.RunContext, kind: str, message: str) -> None:
    if kind not in call.memo.warned:
        call.memo.warned.add(kind)
        warnings.warn(f"svg_ear: {message}", RuntimeWarning, stacklevel=4)
