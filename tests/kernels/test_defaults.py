"""No result depends on torch's default dtype or default device."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from op_calls import FAMILIES, decided, inputs, merged, sites, three
from torch import Tensor

from svg_ear_compile.kernels import context

LENGTH, TEXT = 270, 70
# Every family as one op and as three; and the papers' own budgets.
WAYS = [(i, whole, 0.3) for i in range(len(FAMILIES)) for whole in (merged, three)]
WAYS += [(2, merged, None), (3, merged, None)]


@pytest.fixture(autouse=True)
def changed_back() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.parametrize(("family", "whole", "density"), WAYS)
def test_default_dtype_and_device(family: int, whole: Callable[..., Tensor], density: float | None) -> None:
    """Outputs, measured errors and areas of two calls, the second of which goes on from the first."""
    steps = [inputs(LENGTH, seed=seed) for seed in (0, 1)]
    mask = (torch.arange(LENGTH) < torch.tensor([LENGTH, LENGTH - 9])[:, None])[:, None, None]
    c = sites(LENGTH, TEXT, density=density)[family]
    tried = context.Measure(3, (0.2, 0.5), ("cubes", "splits"), first_order=True)

    def results() -> list[Tensor]:
        call = decided(c, audit=True, measure=tried, first_order=(True, False))
        with context.active(call):
            found = [x for step in steps for x in (whole(*step, mask, c), call.results.measured.pop(c.site))]
        areas = call.results.totals[c.site].areas
        assert areas is not None
        return [*found, call.results.audited[c.site], areas]

    wanted = results()
    for dtype, device in ((torch.bfloat16, None), (torch.float64, None), (torch.float32, "meta")):
        torch.set_default_dtype(dtype)
        torch.set_default_device(device)
        found = results()
        assert [x.dtype for x in found] == [x.dtype for x in wanted]
        assert all(map(torch.equal, found, wanted)), (dtype, device)
