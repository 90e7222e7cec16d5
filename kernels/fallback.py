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
    with torch.cuda.device_of(query), torch.autocast(query.device.type, enabled=False):
        if not is_dense(query, c):
            try:
                return sparse()
            except Exception as error:  # whatever it was, dense attention is still right
                if not (alone or context.inside()):
                    raise
                call = context.current()
                note_failure(call.decisions.name_of(c.site), error, "fallback", "ran dense")
                call.results.dense[c.site] = f"failed: {type(error).__name__}"
        return dense()


@cache
def _warn_of_no_host() -> None:
    warnings.warn(
        "svg_ear: compiled code runs without the part that decides each call, as after it was saved and loaded: its "
        "attention is dense. Let torch.compile(model, backend='svg_ear') compile it in this process",
        RuntimeWarning,
        stacklevel=4,
    )


def note_failure(who: str, error: Exception, kind: str, consequence: str) -> None:
    """Counts a failure, and warns of it once. Raises with strict, and after an error of the device: every further call
    fails too, and going on would only hide the origin."""
    call, reason = context.current(), f"{kind}: {type(error).__name__}"
    if isinstance(error, torch.AcceleratorError):
        raise error
    if call.decisions.strict:
        raise SiteError(f"svg_ear: {who} failed: {error!r}") from error
    call.results.fallbacks[reason] += 1
    if reason not in call.memo.warned:
        call.memo.warned.add(reason)
        warnings.warn(f"svg_ear: {who} {consequence} because of {error!r}", RuntimeWarning, stacklevel=4)
