"""A call that is recorded into a CUDA graph reads and leaves nothing that a replay would find changed.

Here on a CPU, which is told that it records; tests/gpu/test_cuda_graph.py records.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from op_calls import CONSTANTS, decided, inputs, merged

from svg_ear_compile.kernels import capture, context


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "is_recorded", lambda x: True)


@pytest.mark.parametrize("order", ["splits", "kmeans"])
@pytest.mark.parametrize("dense", [False, True])
def test_nothing_is_carried_measured_or_summed(
    order: str, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    c, mask = CONSTANTS._replace(order=order), torch.ones(2, 1, 1, 300, dtype=torch.bool)
    before, now = inputs(300), inputs(300, seed=1)
    earlier = context.RunContext(context.Decisions(strict=True))
    with context.active(earlier):
        merged(*before, None, c)
    fresh = decided(c, dense="a test" if dense else "")
    with context.active(fresh):
        wanted = merged(*now, None, c)
    monkeypatch.setattr(capture, "is_recorded", lambda x: True)
    call = decided(c, audit=True, dense="a test" if dense else "", measure=context.Measure(0, (0.3,)))
    call.memo.carried.update(earlier.memo.carried)
    call.memo.seen_keys[c.site] = 300
    with context.active(call):
        out = merged(*now, mask, c)
    assert torch.equal(out, wanted)
    assert call.memo.carried[c.site] is earlier.memo.carried[c.site]
    assert not call.results.measured
    assert not call.results.audited
    assert not call.results.totals


def test_what_the_host_knows_of_a_mask_is_not_used(recorded: None) -> None:
    """The replay's mask may hide other keys."""
    q, k, v = inputs(300)
    mask = (torch.arange(300) < 200).expand(2, 1, 1, 300)
    call = context.RunContext(
        context.Decisions(strict=True), memo=context.Memo(seen_keys={CONSTANTS.site: 300})
    )
    with context.active(call):
        sparse = merged(q, k, v, mask, CONSTANTS._replace(density=1.0))
    with context.active(replace(call, decisions=decided(CONSTANTS, dense="a test").decisions)):
        dense = merged(q, k, v, mask, CONSTANTS)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(dense, expected)
    torch.testing.assert_close(sparse, expected)
    assert call.memo.seen_keys == {CONSTANTS.site: 300}
