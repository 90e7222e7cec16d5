"""What making a plan leaves in the context of the call."""

from __future__ import annotations

from op_calls import CONSTANTS, B, H, inputs, merged, sites

from svg_ear_compile.kernels import context, reference
from svg_ear_compile.kernels.plan import SparsePlan


def test_totals_count_video_pairs_of_sparse_calls(
    plans: list[SparsePlan], strict: context.RunContext
) -> None:
    query, key, value = inputs(270)
    c = sites(270, num_text=70)[1]
    merged(query, key, value, None, c)
    merged(query, key, value, None, c)
    plan = plans.pop()
    kept = reference.kept_matrix(plan)[:, :, :2, :4].double()
    area = plan.query_offsets.diff()[..., :2, None] * plan.key_offsets.diff()[..., None, :4]
    totals = strict.results.totals[c.site]
    assert totals.areas is not None
    exact, executed = totals.areas.tolist()
    assert totals.pairs == 2 * B * H * 200 * 200
    assert exact == 2 * float((kept * area).sum())
    assert executed == 2 * 128 * 64 * float(kept.sum())
    assert 0 < exact <= 0.3 * totals.pairs


def test_kmeans_carries_centroids_in_the_call() -> None:
    c = CONSTANTS._replace(order="kmeans")
    call = context.RunContext(context.Decisions(strict=True))
    with context.active(call):
        merged(*inputs(200), None, c)
        first = call.memo.carried[c.site]
        merged(*inputs(200, seed=1), None, c)
    assert call.memo.carried[c.site] is not first
    assert set(call.memo.carried) == {c.site}
