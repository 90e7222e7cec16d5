"""What is measured in a call, if the host asks for it?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from . import context, measure, planning
from .constants import SiteConstants
from .dense import drop_noop_mask
from .fallback import SiteError, warn_once
from .plan import Plan


def measure_call(
    query: Tensor, keys: Callable[[], tuple[Tensor, Tensor, Tensor | None]], out: Tensor, plan: Plan,
    c: SiteConstants,
) -> None:  # fmt: skip
    """Measures the error of a sparse call's output, on a sample and on all rows, where the host asked for it.

    keys: makes key and value, in any order, and which of them there are (None: all).
    """
    call = context.current()
    request = call.measure.get(c.site)
    if request is not None:

        def sampled() -> Tensor:
            slots = measure.sample(query.shape[2], query, request.seed)
            tokens = plan.query_order.gather(-1, slots).long()
            return measure.output_error(query, *keys(), out, tokens, c.scale_of(query))[None]

        _lay(call.measured, c, sampled)
    if call.audit:
        _lay(call.audited, c, lambda: measure.true_error(query, *keys(), out, c.scale_of(query))[None])


def try_densities(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, out: Tensor, c: SiteConstants
) -> None:
    """In a dense call: measures what sparse ones would have lost, if the host asked for it.

    Leaves [orders * densities,2,B,H] float32, the densities of the first order first.
    """
    call = context.current()
    request = call.measure.get(c.site)
    if request is None or not request.densities:
        return

    def sums() -> Tensor:
        mask = drop_noop_mask(attn_mask, c.site)
        tokens, errors = measure.sample(query.shape[2], query, request.seed, measure.TRIAL_ROWS), []
        for order in request.orders or (c.order,):
            # Splits are made anew, once for all densities; k-means goes on from what it left.
            carried = call.carried if order == "kmeans" else {}
            for density in request.densities:
                # These plans compute no output: their areas count nowhere.
                trial = replace(call, density={c.site: density}, split_heads={}, carried=carried, totals={})
                with context.active(trial):
                    plan = planning.make_plan(query, key, value, mask, c._replace(order=order))
                errors.append(measure.planned_error(query, plan, out, tokens, c.scale_of(query)))
        return torch.stack(errors)

    _lay(call.measured, c, sums)


def _lay(place: dict[int, Tensor], c: SiteConstants, sums: Callable[[], Tensor]) -> None:
    """Lays sums() there. If that fails there is no measurement: the output is right all the same."""
    call = context.current()
    try:
        place[c.site] = sums()
    except Exception as error:
        if isinstance(error, torch.AcceleratorError):
            raise
        if call.strict:
            raise SiteError(f"svg_ear: measuring {call.name_of(c.site)} failed: {error!r}") from error
        kind = type(error).__name__
        call.counters[f"not measured: {kind}"] += 1
        warn_once(call, f"measuring: {kind}", f"{call.name_of(c.site)} was not measured: {error!r}")
