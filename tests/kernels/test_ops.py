"""The four ops: what they compute, registration, fakes, strides, torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_calls import CONSTANTS, B, D, H, decided, inputs, lies_by_token, merged, sites, three
from torch import Tensor

from svg_ear_compile.kernels import context, planning, reference
from svg_ear_compile.kernels.constants import SiteConstants
from svg_ear_compile.kernels.plan import SparsePlan

OPS = [
    torch.ops.svg_ear.clustered_permute.default,
    torch.ops.svg_ear.sparse_exact.default,
    torch.ops.svg_ear.centroid_compensation.default,
    torch.ops.svg_ear.attention.default,
]


# --- what they compute ------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [merged, three])
@pytest.mark.parametrize("density", [1.0, 0.3])
@pytest.mark.parametrize(
    ("length", "num_text", "text_first"),
    [(1, 0, False), (63, 0, False), (64, 0, False), (65, 0, False), (129, 3, True), (1000, 0, False),
     (270, 70, False), (270, 70, True)],
)  # fmt: skip
def test_joint_softmax_of_the_plan_that_was_used(
    length: int,
    num_text: int,
    text_first: bool,
    density: float,
    whole: Callable[..., Tensor],
    plans: list[SparsePlan],
    strict: context.RunContext,
) -> None:
    query, key, value = inputs(length)
    for c in sites(length, num_text, text_first=text_first, density=density):
        got = whole(query, key, value, None, c)
        plan = plans.pop()
        truth = reference.joint_softmax(query, reference.remade(plan, key, value), D**-0.5)
        torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-5)
        assert lies_by_token(got)
        if density == 1.0:
            want = reference.dense(query, key, value)
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("whole", [merged, three])
@pytest.mark.parametrize("density", [0.0, 0.15])
def test_dropped_blocks(
    density: float, whole: Callable[..., Tensor], plans: list[SparsePlan], strict: context.RunContext
) -> None:
    """Without compensation it is the softmax over kept tokens; 0 where a query meets none."""
    query, key, value = inputs(300)
    for c in sites(300, density=density, compensate=False):
        got = whole(query, key, value, None, c)
        plan = plans.pop()
        assert (plan.bias == -torch.inf).all()
        truth = reference.joint_softmax(query, reference.remade(plan, key, value), D**-0.5)
        torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-5)
        assert lies_by_token(got)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype, plans: list[SparsePlan], strict: context.RunContext) -> None:
    """At most twice the error of the same formula in the low precision (FlashAttention's rule)."""
    query, key, value = inputs(200, dtype)
    for c in sites(200):
        got = merged(query, key, value, None, c)
        assert got.dtype == dtype
        plan = plans.pop()
        truth = reference.joint_softmax(query, plan, D**-0.5)
        plain = reference.joint_softmax(query, plan, D**-0.5, dtype)
        assert (got.double() - truth).abs().max() <= 2 * (plain.double() - truth).abs().max()


def test_key_padding_mask(plans: list[SparsePlan], strict: context.RunContext) -> None:
    query, key, value = inputs(270)
    hidden = torch.arange(270) >= torch.tensor([[240], [270]])
    mask = ~hidden[:, None, None, :]
    for x in (key, value):
        x[0, :, 240:] = torch.nan  # what a hidden key holds must not matter
    for c in sites(270, num_text=70, density=1.0):
        for whole in (merged, three):
            got = whole(query, key, value, mask, c)
            plan = plans.pop()
            assert (plan.key_offsets[..., -1] == torch.tensor([[240], [270]])).all()
            assert not plan.key[0, :, 240:].any()
            assert not plan.value[0, :, 240:].any()
            want = reference.dense(query, key.nan_to_num(), value.nan_to_num(), mask)
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_large_logits_and_duplicates(plans: list[SparsePlan], strict: context.RunContext) -> None:
    query, key, value = inputs(200)
    for q, k in ((query * 22, key * 22), (query[:, :, :1].expand_as(query), key[:, :, :1].expand_as(key))):
        for c in sites(200):
            got = merged(q, k, value, None, c)
            truth = reference.joint_softmax(q, plans.pop(), D**-0.5)
            torch.testing.assert_close(got.double(), truth, rtol=1e-3, atol=1e-3)


def test_nan_stays_in_its_head_and_batch_element(strict: context.RunContext) -> None:
    for c in sites(200):
        for name in range(3):
            clean = inputs(200)
            bad = inputs(200)
            bad[name][1, 0, 17] = torch.nan
            want, got = merged(*clean, None, c), merged(*bad, None, c)
            assert torch.equal(got[0], want[0])
            assert not got[1, 1].isnan().any()
            assert got[1, 0].isnan().any()


def test_same_bits_twice(strict: context.RunContext) -> None:
    for c in sites(200):
        assert torch.equal(merged(*inputs(200), None, c), merged(*inputs(200), None, c))


def test_autocast_does_not_reach_into_the_ops(strict: context.RunContext) -> None:
    tensors = inputs(200)
    for whole in (merged, three):
        want = whole(*tensors, None, CONSTANTS)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = whole(*tensors, None, CONSTANTS)
        assert torch.equal(got, want)


# --- registration -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_tags(op: torch._ops.OpOverload) -> None:
    assert torch.Tag.cudagraph_unsafe in op.tags
    assert torch.Tag.needs_fixed_stride_order in op.tags
    assert torch.Tag.needs_exact_strides not in op.tags


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("order", ["splits", "kmeans"])
def test_opcheck(order: str, dtype: torch.dtype, strict: context.RunContext) -> None:
    """Schema, fake and aot dispatch with static and dynamic shapes."""
    query, key, value = inputs(70, dtype)
    mask = (torch.arange(70) < 66).expand(B, 1, 1, 70)
    c = CONSTANTS._replace(num_text=5, order=order)
    plan = torch.ops.svg_ear.clustered_permute(query, key, value, mask, *c)
    out, lse = torch.ops.svg_ear.sparse_exact(query, key, value, mask, *plan, *c)
    arguments: list[tuple[Any, ...]] = [
        (query, key, value, mask, *c),
        (query, key, value, mask, *plan, *c),
        (query, out, lse, *plan, *c),
        (query, key, value, mask, *c),
    ]
    for op, args in zip(OPS, arguments, strict=True):
        torch.library.opcheck(op, args)


@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("is_dense", [True, False])
@pytest.mark.parametrize("length", [1, 70])
def test_fakes_tell_the_truth(length: int, is_dense: bool, by_token: bool) -> None:
    """Shapes, strides and dtypes of all outputs, for queries of either layout, and no alias of an input."""
    tensors = [x if by_token else x.contiguous() for x in inputs(length)]
    mask = torch.arange(length).expand(B, 1, 1, length) < length - 1
    c = CONSTANTS._replace(num_text=length // 10)
    call = decided(c, dense="a test" if is_dense else "")
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (*tensors, mask)]
        fake_plan = torch.ops.svg_ear.clustered_permute(*fakes, *c)
        fake_exact = torch.ops.svg_ear.sparse_exact(*fakes, *fake_plan, *c)
        fake_out = torch.ops.svg_ear.centroid_compensation(fakes[0], *fake_exact, *fake_plan, *c)
        fake_merged = torch.ops.svg_ear.attention(*fakes, *c)
    with context.active(call):
        plan = torch.ops.svg_ear.clustered_permute(*tensors, mask, *c)
        exact = torch.ops.svg_ear.sparse_exact(*tensors, mask, *plan, *c)
        out = torch.ops.svg_ear.centroid_compensation(tensors[0], *exact, *plan, *c)
        together = torch.ops.svg_ear.attention(*tensors, mask, *c)
    real = [*plan, *exact, out, together]
    for x, fake in zip(real, [*fake_plan, *fake_exact, fake_out, fake_merged], strict=True):
        assert (x.shape, x.stride(), x.dtype) == (fake.shape, fake.stride(), fake.dtype)
    storages = [x.untyped_storage().data_ptr() for x in (*real, *tensors, mask) if x.numel()]
    assert len(set(storages)) == len(storages)


def test_constants_survive_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def make_plan(*args: Any) -> SparsePlan:
        seen.append(args[-1])
        raise ZeroDivisionError

    monkeypatch.setattr(planning, "make_plan", make_plan)
    c = SiteConstants(0.5, 3, True, [2, 3, 4], "cubes", "svg_ear", False, None, 7, 11)
    with pytest.warns(RuntimeWarning):
        merged(*inputs(27), None, c)
    assert seen == [c]


# --- torch.compile ----------------------------------------------------------------------------------------


def model(x: Tensor, whole: Callable[..., Tensor], c: SiteConstants) -> Tensor:
    """x [B,L,3HD] -> [B,L,HD], as models call attention."""
    q, k, v = (y.unflatten(-1, (H, D)).transpose(1, 2) for y in x.chunk(3, dim=-1))
    return whole(q, k, v, None, c).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("whole", [merged, pytest.param(three, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dynamic", [True, False])
def test_aot_eager(dynamic: bool, whole: Callable[..., Tensor], strict: context.RunContext) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for c in (CONSTANTS, CONSTANTS._replace(order="kmeans", num_text=4, text_first=True)):
        for length in (70, 133):
            x = torch.randn(B, length, 3 * H * D)
            assert torch.equal(compiled(x, whole, c), model(x, whole, c))


def test_inductor_copies_nothing(strict: context.RunContext) -> None:
    """The op reads slices of a fused projection and writes what the model goes on with, as they lie."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    x = torch.randn(B, 70, 3 * H * D)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        got, (code,) = run_and_get_code(compiled, x, merged, CONSTANTS)
    assert torch.equal(got, model(x, merged, CONSTANTS))
    assert "svg_ear.attention" in code
    assert "cpp_fused" not in code
    assert "empty_strided_cpu" not in code.split("def call", 1)[1]
