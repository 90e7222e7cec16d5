"""The four ops: registration, fakes, strides, the dense branch, masks, failures, contexts, torch.compile."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from svg_ear_compile.kernels import attention as cpu_kernels
from svg_ear_compile.kernels import context, ops, reference, route
from svg_ear_compile.kernels.ops import SiteConstants
from svg_ear_compile.kernels.plan import Plan

B, H, D = 2, 2, 16
CONSTANTS = SiteConstants(
    scale=None,
    num_text=0,
    text_first=False,
    grid=[],
    order="splits",
    routing="output_error",
    compensate=True,
    density=0.3,
    seed=0,
    site=3,
)
FAMILIES = [("cubes", "output_error"), ("splits", "output_error"), ("kmeans", "svg_ear")]
OPS = [
    torch.ops.svg_ear.clustered_permute.default,
    torch.ops.svg_ear.sparse_exact.default,
    torch.ops.svg_ear.centroid_compensation.default,
    torch.ops.svg_ear.attention.default,
]


def inputs(length: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value [B,H,L,D], in memory [B,L,H,D]."""
    random = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, length, H, D, generator=random).to(dtype).transpose(1, 2) for _ in range(3))
    return q, k, v


def sites(length: int, num_text: int = 0, **changes: Any) -> list[SiteConstants]:
    """Constants of every family; cubes get a grid, if the video tokens fill one."""
    grid = {200: [2, 10, 10], 1000: [10, 10, 10]}.get(length - num_text, [1, 1, length - num_text])
    return [
        CONSTANTS._replace(num_text=num_text, order=order, routing=routing, grid=grid, **changes)
        for order, routing in FAMILIES
    ]


def merged(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, c: SiteConstants) -> Tensor:
    return torch.ops.svg_ear.attention(query, key, value, mask, *c)


def three(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, c: SiteConstants) -> Tensor:
    plan = torch.ops.svg_ear.clustered_permute(query, key, value, mask, *c)
    out, lse = torch.ops.svg_ear.sparse_exact(query, key, value, mask, *plan, *c)
    return torch.ops.svg_ear.centroid_compensation(query, out, lse, *plan, *c)


def lies_by_token(out: Tensor) -> bool:
    """Whether out [B,H,L,D] is [B,L,H,D] in memory."""
    _, heads, length, dim = out.shape
    return out.stride() == (heads * length * dim, dim, heads * dim, 1)


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plans that the ops make."""
    made: list[Plan] = []
    make_plan = ops.make_plan

    def spy(*args: Any) -> Plan:
        made.append(make_plan(*args))
        return made[-1]

    monkeypatch.setattr(ops, "make_plan", spy)
    return made


@pytest.fixture
def strict() -> Iterator[context.Call]:
    """A call in which no error hides behind dense attention."""
    call = context.Call(strict=True)
    with context.active(call):
        yield call


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
    plans: list[Plan],
    strict: context.Call,
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype, plans: list[Plan], strict: context.Call) -> None:
    """At most twice the error of the same formula in the low precision (FlashAttention's rule)."""
    query, key, value = inputs(200, dtype)
    for c in sites(200):
        got = merged(query, key, value, None, c)
        assert got.dtype == dtype
        plan = plans.pop()
        truth = reference.joint_softmax(query, plan, D**-0.5)
        plain = reference.joint_softmax(query, plan, D**-0.5, dtype)
        assert (got.double() - truth).abs().max() <= 2 * (plain.double() - truth).abs().max()


def test_key_padding_mask(plans: list[Plan], strict: context.Call) -> None:
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


def test_large_logits_and_duplicates(plans: list[Plan], strict: context.Call) -> None:
    query, key, value = inputs(200)
    for q, k in ((query * 22, key * 22), (query[:, :, :1].expand_as(query), key[:, :, :1].expand_as(key))):
        for c in sites(200):
            got = merged(q, k, value, None, c)
            truth = reference.joint_softmax(q, plans.pop(), D**-0.5)
            torch.testing.assert_close(got.double(), truth, rtol=1e-3, atol=1e-3)


def test_nan_stays_in_its_head_and_batch_element(strict: context.Call) -> None:
    for c in sites(200):
        for name in range(3):
            clean = inputs(200)
            bad = inputs(200)
            bad[name][1, 0, 17] = torch.nan
            want, got = merged(*clean, None, c), merged(*bad, None, c)
            assert torch.equal(got[0], want[0])
            assert not got[1, 1].isnan().any()
            assert got[1, 0].isnan().any()


def test_same_bits_twice(strict: context.Call) -> None:
    for c in sites(200):
        assert torch.equal(merged(*inputs(200), None, c), merged(*inputs(200), None, c))


def test_totals_count_video_pairs_of_sparse_calls(plans: list[Plan], strict: context.Call) -> None:
    query, key, value = inputs(270)
    c = sites(270, num_text=70)[1]
    merged(query, key, value, None, c)
    merged(query, key, value, None, c)
    plan = plans.pop()
    kept = reference.kept_matrix(plan)[:, :, :2, :4].double()
    area = plan.query_offsets.diff()[..., :2, None] * plan.key_offsets.diff()[..., None, :4]
    totals = strict.totals[c.site]
    assert totals.areas is not None
    exact, executed = totals.areas.tolist()
    assert totals.pairs == 2 * B * H * 200 * 200
    assert exact == 2 * float((kept * area).sum())
    assert executed == 2 * 128 * 64 * float(kept.sum())
    assert 0 < exact <= 0.3 * totals.pairs


# --- registration -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_tags(op: torch._ops.OpOverload) -> None:
    assert torch.Tag.cudagraph_unsafe in op.tags
    assert torch.Tag.needs_fixed_stride_order in op.tags
    assert torch.Tag.needs_exact_strides not in op.tags


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ["splits", "kmeans"])
def test_opcheck(order: str, dtype: torch.dtype, strict: context.Call) -> None:
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
    call = context.Call(dense={c.site: "a test"} if is_dense else {}, strict=True)
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

    def make_plan(*args: Any) -> Plan:
        seen.append(args[-1])
        raise ZeroDivisionError

    monkeypatch.setattr(ops, "make_plan", make_plan)
    c = SiteConstants(0.5, 3, True, [2, 3, 4], "cubes", "svg_ear", False, None, 7, 11)
    with pytest.warns(RuntimeWarning):
        merged(*inputs(27), None, c)
    assert seen == [c]


# --- the dense branch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("whole", [merged, three])
def test_dense_is_what_the_model_asked_for(
    whole: Callable[..., Tensor], masked: bool, by_token: bool
) -> None:
    tensors = [x if by_token else x.contiguous() for x in inputs(70)]
    mask = (torch.arange(70) < 60).expand(B, 1, 1, 70) if masked else None
    call = context.Call(dense={CONSTANTS.site: "a test"})
    with context.active(call):
        got = whole(*tensors, mask, CONSTANTS._replace(scale=0.3))
    expected = F.scaled_dot_product_attention(*tensors, attn_mask=mask, scale=0.3)
    if masked:  # without its hidden keys instead
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    else:
        assert torch.equal(got, expected)
    assert lies_by_token(got)
    assert not call.totals


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
    call = context.Call(dense={CONSTANTS.site: "a test"})
    with context.active(call):
        got = whole(*tensors, mask, CONSTANTS)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert asked == [(seen or 70, seen or 70, seen is not None)]
    assert call.seen_keys == {CONSTANTS.site: seen}


def test_noop_mask_is_dropped_and_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, mask = inputs(70), torch.ones(1, 1, 1, 70, dtype=torch.bool)
    asked = []
    sdpa = F.scaled_dot_product_attention

    def spy(*args: Tensor, **options: Any) -> Tensor:
        asked.append(options["attn_mask"])
        return sdpa(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    call = context.Call(dense={3: "a test", 4: "a test", 5: "a test"}, mask_ids={3: 0, 4: 0, 5: 1})
    with context.active(call):
        merged(*tensors, mask, CONSTANTS)
        assert call.seen_keys == {0: 70}
        mask[:] = False  # would be seen if it were read again
        merged(*tensors, mask, CONSTANTS._replace(site=4))
        assert call.seen_keys == {0: 70}
        merged(*tensors, mask, CONSTANTS._replace(site=5))
        assert call.seen_keys == {0: 70, 1: None}
    assert asked[:2] == [None, None]
    assert asked[2] is not None


def test_autocast_does_not_reach_into_the_ops(strict: context.Call) -> None:
    tensors = inputs(200)
    for whole in (merged, three):
        want = whole(*tensors, None, CONSTANTS)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = whole(*tensors, None, CONSTANTS)
        assert torch.equal(got, want)


# --- failures ---------------------------------------------------------------------------------------------


def raising(error: Exception) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        raise error

    return function


@pytest.mark.parametrize("whole", [merged, three])
def test_a_failure_means_dense_and_one_warning(
    whole: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(route, "route", raising(ValueError("no way")))
    tensors = inputs(70)
    want = F.scaled_dot_product_attention(*tensors)
    first = context.Call()
    with context.active(first), pytest.warns(RuntimeWarning, match=r"site 3 .*no way") as caught:
        assert torch.equal(whole(*tensors, None, CONSTANTS), want)
    assert len(caught) == 1
    assert first.dense == {3: "failed: ValueError"}
    assert first.counters == {"fallback: ValueError": 1}
    second = context.Call(counters=first.counters, warned=first.warned)
    with context.active(second), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(whole(*tensors, None, CONSTANTS), want)
    assert first.counters == {"fallback: ValueError": 2}


@pytest.mark.parametrize("kernel", ["sparse_exact", "centroid_compensation"])
@pytest.mark.parametrize("masked", [True, False])
def test_a_failing_kernel_means_dense(kernel: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, kernel, raising(ValueError("no way")))
    tensors = inputs(70)
    mask = (torch.arange(70) < 60).expand(B, 1, 1, 70) if masked else None
    with context.active(context.Call()), pytest.warns(RuntimeWarning):
        got = three(*tensors, mask, CONSTANTS)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(*tensors, attn_mask=mask))
    assert lies_by_token(got)


def test_outside_of_a_call_the_merged_op_falls_back_and_the_three_raise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(route, "route", raising(ValueError("no way")))
    tensors = inputs(70)
    with pytest.warns(RuntimeWarning):
        got = merged(*tensors, None, CONSTANTS)
    assert torch.equal(got, F.scaled_dot_product_attention(*tensors))
    with pytest.raises(ValueError, match="no way"):
        three(*tensors, None, CONSTANTS)


@pytest.mark.parametrize("whole", [merged, three])
def test_strict_raises(whole: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "route", raising(ValueError("no way")))
    call = context.Call(strict=True, names={3: "blocks.0"})
    with context.active(call), pytest.raises(ops.SiteError, match=r"site 3 \(blocks.0\) failed: .*no way"):
        whole(*inputs(70), None, CONSTANTS)


def test_device_errors_always_propagate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "route", raising(torch.AcceleratorError("device lost")))
    call = context.Call()
    with context.active(call), pytest.raises(torch.AcceleratorError):
        merged(*inputs(70), None, CONSTANTS)
    assert not call.dense


# --- contexts ---------------------------------------------------------------------------------------------


def test_threads_do_not_see_each_other() -> None:
    tensors = inputs(200)
    dense = F.scaled_dot_product_attention(*tensors)
    sparse = merged(*tensors, None, CONSTANTS)
    assert not torch.equal(dense, sparse)
    both_inside = threading.Barrier(2)
    results: dict[bool, Tensor] = {}

    def work(is_dense: bool) -> None:
        torch.set_num_threads(1)
        call = context.Call(dense={CONSTANTS.site: "a test"} if is_dense else {})
        with context.active(call):
            both_inside.wait(timeout=30)
            results[is_dense] = merged(*tensors, None, CONSTANTS)
            both_inside.wait(timeout=30)
            assert context.current() is call

    threads = [threading.Thread(target=work, args=(x,)) for x in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(results[True], dense)
    assert torch.equal(results[False], sparse)
    assert not context.inside()


def test_contexts_nest_and_end_with_an_error() -> None:
    outer, inner = context.Call(), context.Call()
    with context.active(outer):
        with contextlib.suppress(ZeroDivisionError), context.active(inner):
            assert context.current() is inner
            raise ZeroDivisionError
        assert context.current() is outer
    assert context.current() is not outer


def test_kmeans_carries_centroids_in_the_call() -> None:
    c = CONSTANTS._replace(order="kmeans")
    call = context.Call(strict=True)
    with context.active(call):
        merged(*inputs(200), None, c)
        first = call.carried[c.site]
        merged(*inputs(200, seed=1), None, c)
    assert call.carried[c.site] is not first
    assert set(call.carried) == {c.site}


# --- torch.compile ----------------------------------------------------------------------------------------


def model(x: Tensor, whole: Callable[..., Tensor], c: SiteConstants) -> Tensor:
    """x [B,L,3HD] -> [B,L,HD], as models call attention."""
    q, k, v = (y.unflatten(-1, (H, D)).transpose(1, 2) for y in x.chunk(3, dim=-1))
    return whole(q, k, v, None, c).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("whole", [merged, three])
@pytest.mark.parametrize("dynamic", [True, False])
def test_aot_eager(dynamic: bool, whole: Callable[..., Tensor], strict: context.Call) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for c in (CONSTANTS, CONSTANTS._replace(order="kmeans", num_text=4, text_first=True)):
        for length in (70, 133):
            x = torch.randn(B, length, 3 * H * D)
            assert torch.equal(compiled(x, whole, c), model(x, whole, c))


def test_inductor_copies_nothing(strict: context.Call) -> None:
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
