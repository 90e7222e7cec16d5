"""How do measured errors get to the host? As sums, copied asynchronously while the GPU goes on.

The sums (kernels/measuring/errors.py) go to pinned memory; reading them waits for the event of the copy.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Error(NamedTuple):
    """The relative error of a whole call, and of its worst head. See `Sums.errors`."""

    call: float
    worst_head: float


class Sums:
    """Error sums [errors,2,B,H] of one call on their way from the device; `errors` waits for them."""

    def __init__(self, sums: Tensor) -> None:
        self._event = None
        self._sums: Tensor | None = sums
        self._read = sums
        if sums.is_cuda:
            self._sums = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
            self._sums.copy_(sums, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(sums.device))

    def read(self) -> Tensor:
        """[errors,2,B,H] float64 on the host."""
        if self._sums is not None:
            if self._event is not None:
                self._event.synchronize()
            self._read = self._sums.double()
            self._sums = self._event = None  # the next call's sums reuse the pinned memory
        return self._read

    def errors(self) -> list[Error]:
        """One error for each thing measured.

        Heads whose exact output is not finite are left out; NaN if all are. Infinite if an output is not finite and the
        exact one is.
        """
        return [error_of(*sums) for sums in self.read()]


def error_of(lost: Tensor, whole: Tensor) -> Error:
    """lost, whole [B,H]: see kernels/measuring/errors.py. In plain Python, which takes a third of the time of
    torch's operations on so few numbers: the GPU waits while a step's first call reads the errors of the last step."""
    heads = zip(lost.flatten().tolist(), whole.flatten().tolist(), strict=True)
    known = [(math.inf if math.isnan(x) else x, y) for x, y in heads if math.isfinite(y)]
    total = sum(y for _, y in known)
    call = math.sqrt(sum(x for x, _ in known) / total) if total > 0 else math.nan
    tiny = torch.finfo(torch.float32).tiny
    return Error(call, math.sqrt(max((x / max(y, tiny) for x, y in known), default=0.0)))
