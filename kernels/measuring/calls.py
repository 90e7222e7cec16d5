"""What is measured in a call, if the host asks for it?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import capture, context, planning
from ..constants import OWN_CALL, SiteConstants
from ..dense import drop_noop_mask
from ..fallback import note_failure, unfit
from ..plan import SparsePlan
from . import errors as measure


def measure_call(
    query: Tensor, keys: Callable[[], tuple[Tensor, Tensor, Tensor | None]], out: Tensor, query_order: Tensor,
    c: SiteConstants, trial: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> None:  # fmt: skip
    """Measures the error of a sparse call's output, on a sample and on all rows, if the host asked for it.

    query_order: of the plan, the rest of which may be gone. keys: makes key and value, in any order, and their
    mask (None: all are seen). trial: `try_forms` with all it needs but tokens and exact rows; if the host
    asked for a trial, its sums follow the error.
    """
    if capture.is_recorded(query):
        return
    call = context.current()
    request = call.decisions.of(c).measure
    scale = c.scale_of(query)
    if request is not None:

        def sampled() -> Tensor:
            slots = measure.sample(query.shape[2], query, request.seed, measure.count(query))
            tokens = query_order.gather(-1, slots).long()
            error = measure.output_error(query, *keys(), out, tokens, scale)[None]
            if trial is None or not request.densities:
                return error
            tokens = measure.sample(query.shape[2], query, request.seed, measure.count(query, trial=True))
            exact = measure.exact_rows(measure.rows(query, tokens), *keys(), scale)
            return torch.cat([error, trial(tokens, exact)])

        _lay(call.results.measured, c, sampled)
    if call.decisions.audit:
        _lay(call.results.audited, c, lambda: measure.true_error(query, *keys(), out, scale)[None])


def measure_dense(out: Tensor, c: SiteConstants, trial: Callable[[Tensor, Tensor], Tensor]) -> None:
    """In a dense call: measures what sparse calls would have lost, if the host asked for it."""
    call = context.current()
    request = call.decisions.of(c).measure
    if request is None or not request.densities or capture.is_recorded(out):
        return
    # Where a sparse call failed, a trial would only fail once more. For a call that cannot be sparse it is of no use.
    if c.site in call.results.dense or unfit(out, c, call.decisions):
        return
    seed = request.seed

    def tried() -> Tensor:
        tokens = measure.sample(out.shape[2], out, seed, measure.count(out, trial=True))
        return trial(tokens, measure.rows(out, tokens))

    _lay(call.results.measured, c, tried)


def try_forms(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, c: SiteConstants,
    tokens: Tensor, exact: Tensor,
) -> Tensor:  # fmt: skip
    """What plans of the orders and densities that the host asked for would lose at the queries tokens [B,H,n],
    whose exact attention is `exact` [B,H,n,D].

    [orders * densities * forms,2,B,H] float32: forms are 1, or 2, without and with first-order terms.
    """
    mask, request = drop_noop_mask(attn_mask, c.site), context.current().decisions.of(c).measure
    assert request is not None

    def plans(order: str) -> list[SparsePlan]:
        # Splits are made anew; k-means goes on from what it left.
        site = c if order == "kmeans" else c._replace(order=order, site=OWN_CALL)
        blocks = planning.arrange(query, key, value, mask, site)
        scores = planning.probe(blocks, site)
        return [planning.route(blocks, scores, site, density)[0] for density in request.densities]

    errors = [
        measure.planned_errors(query, plans(order), exact, tokens, c.scale_of(query), request.first_order)
        for order in request.orders or (c.order,)
    ]
    return torch.cat(errors)


def _lay(place: dict[int, Tensor], c: SiteConstants, sums: Callable[[], Tensor]) -> None:
    """Puts sums() there. If it fails there is no measurement; the output is right all the same."""
    try:
        place[c.site] = sums()
    except Exception as error:  # noqa: BLE001 - the output is right all the same
        name = context.current().decisions.name_of(c.site)
        note_failure(f"measuring {name}", error, "not measured", "failed")
