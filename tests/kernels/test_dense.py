"""A dense call is what the model asked for, without the keys that a mask hides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_calls import CONSTANTS, B, decided, inputs, lies_by_token, merged, three
from torch import Tensor

from svg_ear_compile.kernels import context


@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("whole", [merged, three])
def test_dense_is_what_the_model_asked_for(
    whole: Callable[..., Tensor], masked: bool, by_token: bool
) -> None:
    tensors = [x if by_token else x.contiguous() for x in inputs(70)]
    mask = (torch.arange(70) < 60).expand(B, 1, 1, 70) if masked else None
    call = decided(CONSTANTS, dense="a test")
    with context.active(call):
        got = whole(*tensors, mask, CONSTANTS._replace(scale=0.3))
    expected = F.scaled_dot_product_attention(*tensors, attn_mask=mask, scale=0.3)
    if masked:  # without its hidden keys instead
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    else:
        assert torch.equal(got, expected)
    assert lies_by_token(got)
    assert not call.results.totals


@pytest.mark.parametrize("whole", [merged, three])
@pytest.mark.parametrize(
    ("shown", "seen"),
    [
        ([[True] * 70] * 2, 70),
        ([[True] * 41 + [False] * 29] * 2, 41),
        ([[True] * 41 + [False] * 29], 41),
        ([[True] * 41 + [False] * 29, [True] * 40 + [False] * 30], None),
        ([[True] * 41 + [False] * 28 + [True]] * 2, None),
        ([[False] + [True] * 69] * 2, None),
        ([[False] * 70] * 2, None),
    ],
    ids=["all", "first", "one row", "unlike", "gap", "last", "none"],
)
def test_dense_calls_leave_out_the_keys_that_a_mask_hides(
    whole: Callable[..., Tensor], shown: list[list[bool]], seen: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, mask = inputs(70), torch.tensor(shown)[:, None, None]
    expected = F.scaled_dot_product_attention(*tensors, attn_mask=mask)
    asked = []
    sdpa = F.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, **options: Any) -> Tensor:
        asked.append((key.shape[2], value.shape[2], attn_mask is None))
        return sdpa(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    call = decided(CONSTANTS, dense="a test")
    with context.active(call):
        got = whole(*tensors, mask, CONSTANTS)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert asked == [(seen or 70, seen or 70, seen is not None)]
    assert call.memo.seen_keys == {CONSTANTS.site: seen}


def test_noop_mask_is_dropped_and_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, mask = inputs(70), torch.ones(1, 1, 1, 70, dtype=torch.bool)
    asked = []
    sdpa = F.scaled_dot_product_attention

    def spy(*args: Tensor, **options: Any) -> Tensor:
        asked.append(options["attn_mask"])
        return sdpa(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    call = context.RunContext(
        context.Decisions(
            dict.fromkeys((3, 4, 5), context.SiteDecision("a test")), mask_ids={3: 0, 4: 0, 5: 1}
        )
    )
    with context.active(call):
        merged(*tensors, mask, CONSTANTS)
        assert call.memo.seen_keys == {0: 70}
        mask[:] = False  # would be seen if it were read again
        merged(*tensors, mask, CONSTANTS._replace(site=4))
        assert call.memo.seen_keys == {0: 70}
        merged(*tensors, mask, CONSTANTS._replace(site=5))
        assert call.memo.seen_keys == {0: 70, 1: None}
    assert asked[:2] == [None, None]
    assert asked[2] is not None
