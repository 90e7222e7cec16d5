"""A stage of an op that fails in a compiled model: dense, one warning, a counter; strict names the site."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy import EAGER, ToyInputs, ToyVideo, calls, compiled

import svg_ear_compile
from svg_ear_compile.exceptions import SiteError
from svg_ear_compile.kernels import ops
from svg_ear_compile.kernels.attention import torch as attention
from svg_ear_compile.kernels.blocks import cluster
from svg_ear_compile.kernels.blocks import permute_torch as permute
from svg_ear_compile.kernels.probe import torch as probe
from svg_ear_compile.kernels.routing import torch as route

pytestmark = pytest.mark.usefixtures("fresh")
LENIENT = {**EAGER, "strict": False}
SHARED: list[tuple[Any, str]] = [
    (cluster, "make_blocks"), (permute, "gather_with_means"), (permute, "gathered_means"), (probe, "probe"),
    (route, "route"), (route, "centroid_bias"), (route, "kept_lists"),
]  # fmt: skip
FIRST, MERGED = (SHARED[0], True), ((attention, "attend"), True)
THREE = [((attention, "sparse_exact"), False), ((attention, "centroid_compensation"), False)]
ALL = [*((stage, True) for stage in SHARED), MERGED, *THREE]
"""(stage, whether the op is merged). What follows a failure is one code: not every test has every stage."""
ERRORS = [ZeroDivisionError("no way"), torch.OutOfMemoryError("full")]


def stages(chosen: list[tuple[tuple[Any, str], bool]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("stage", "merge"), chosen, ids=lambda x: x[1] if isinstance(x, tuple) else x
    )


def broken(monkeypatch: pytest.MonkeyPatch, stage: tuple[Any, str], error: BaseException) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(*stage, fail)


def of_ours(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if "svg_ear" in str(w.message)]


@pytest.mark.parametrize(
    ("stage", "merge", "error"),
    [*((*stage, ERRORS[0]) for stage in ALL), (*MERGED, ERRORS[1])],
    ids=lambda x: x[1] if isinstance(x, tuple) else str(x) if isinstance(x, bool) else type(x).__name__,
)
def test_dense_one_warning_and_a_counter(
    toy: ToyVideo,
    toy_inputs: ToyInputs,
    monkeypatch: pytest.MonkeyPatch,
    stage: tuple[Any, str],
    merge: bool,
    error: Exception,
) -> None:
    run = compiled(toy, {**LENIENT, "merge": merge})
    broken(monkeypatch, stage, error)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outs = [run(*toy_inputs()) for _ in range(2)]
    for out in outs:
        torch.testing.assert_close(out, toy(*toy_inputs()), rtol=1e-5, atol=1e-5)
    assert len(of_ours(caught)) == 1
    assert f"attention site 0 (blocks.0.attn1) ran dense because of {error!r}" in of_ours(caught)[0]
    assert calls() == (0, {"failures": 4})
    assert svg_ear_compile.report().totals()["fallbacks"] == {f"fallback: {type(error).__name__}": 4}


@stages([FIRST, MERGED, THREE[0]])
def test_sparse_again_when_the_failure_is_over(
    toy: ToyVideo,
    toy_inputs: ToyInputs,
    monkeypatch: pytest.MonkeyPatch,
    stage: tuple[Any, str],
    merge: bool,
) -> None:
    run = compiled(toy, {**LENIENT, "merge": merge})
    want = run(*toy_inputs())
    with monkeypatch.context() as patch:
        broken(patch, stage, ERRORS[0])
        with pytest.warns(RuntimeWarning, match="ran dense"):
            run(*toy_inputs())
    assert torch.equal(run(*toy_inputs()), want)
    assert calls() == (4, {"failures": 2})


@stages([FIRST, MERGED, THREE[1]])
def test_strict_names_the_site(
    toy: ToyVideo,
    toy_inputs: ToyInputs,
    monkeypatch: pytest.MonkeyPatch,
    stage: tuple[Any, str],
    merge: bool,
) -> None:
    broken(monkeypatch, stage, ERRORS[0])
    with pytest.raises(SiteError, match=r"attention site 0 \(blocks.0.attn1\) failed: .*no way") as caught:
        compiled(toy, {**EAGER, "merge": merge})(*toy_inputs())
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@stages([MERGED, THREE[0]])
@pytest.mark.parametrize("error", [torch.AcceleratorError("device lost"), KeyboardInterrupt()], ids=repr)
def test_what_is_not_ours_to_handle_propagates(
    toy: ToyVideo,
    toy_inputs: ToyInputs,
    monkeypatch: pytest.MonkeyPatch,
    stage: tuple[Any, str],
    merge: bool,
    error: BaseException,
) -> None:
    broken(monkeypatch, stage, error)
    with pytest.raises(type(error)):
        compiled(toy, {**LENIENT, "merge": merge})(*toy_inputs())


# --- wrong shapes ---


def _first(change: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    """Changes a tensor, or the first one of a tuple."""

    def changed(out: Any) -> Any:
        if isinstance(out, Tensor):
            return change(out)
        parts = (change(out[0]), *out[1:])
        return type(out)(*parts) if hasattr(out, "_fields") else parts

    return changed


SHAPES = {
    "shorter": lambda x: x[..., :-1, :],
    "other layout": lambda x: x.contiguous(),
    "other dtype": lambda x: x.double(),
    "one element": lambda x: x[:1, :1, :1, :1],
}


@pytest.mark.parametrize(
    ("stage", "merge", "change"),
    [
        *(("attend", True, change) for change in SHAPES),
        ("sparse_exact", False, "shorter"),
        ("centroid_compensation", False, "other layout"),
    ],
)
def test_a_kernel_that_returns_something_else(
    toy: ToyVideo,
    toy_inputs: ToyInputs,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    merge: bool,
    change: str,
) -> None:
    kernel, change_of = getattr(attention, stage), _first(SHAPES[change])
    monkeypatch.setattr(attention, stage, lambda *a, **k: change_of(kernel(*a, **k)))
    with pytest.warns(RuntimeWarning, match="a kernel returned"):
        out = compiled(toy, {**LENIENT, "merge": merge, "first_order": False})(*toy_inputs())
    torch.testing.assert_close(out, toy(*toy_inputs()), rtol=1e-5, atol=1e-5)
    assert calls() == (0, {"failures": 2})


@pytest.mark.parametrize("stage", SHARED, ids=lambda stage: stage[1])
def test_a_stage_that_returns_too_little(
    toy: ToyVideo, toy_inputs: ToyInputs, monkeypatch: pytest.MonkeyPatch, stage: tuple[Any, str]
) -> None:
    """Whatever is missing, it never comes to a kernel that would read past its end."""
    function = getattr(*stage)

    def fewer(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x[:, :0]
        if isinstance(x, tuple):
            parts = [fewer(part) for part in x]
            return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
        return x

    monkeypatch.setattr(*stage, lambda *a, **k: fewer(function(*a, **k)))
    monkeypatch.setattr(attention, "attend", lambda *a: pytest.fail("a kernel was called"))
    with pytest.warns(RuntimeWarning, match="ran dense"):
        out = compiled(toy, LENIENT)(*toy_inputs())
    torch.testing.assert_close(out, toy(*toy_inputs()), rtol=1e-5, atol=1e-5)
    assert calls() == (0, {"failures": 2})


@pytest.mark.parametrize(
    ("wrong", "strict"),
    [
        pytest.param(lambda q: q.new_empty(q.shape), False, id="layout"),
        pytest.param(lambda q: q.new_empty(q.shape[:-1]), True, id="shape, strict", marks=pytest.mark.slow),
    ],
)
def test_a_wrong_fake_ends_in_the_compilers_own_error(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Tensor], Tensor], strict: bool
) -> None:
    """Inductor compares what it gets with what it was promised: no wrong result comes out."""
    monkeypatch.setattr(ops.attention, "_abstract_fn", lambda query, *_: wrong(query))
    options = {**LENIENT, "inner": "inductor", "sites": "*", "strict": strict}
    with torch._inductor.config.patch(force_disable_caches=True):
        run = compiled(Writing().eval(), options)
        with pytest.raises(AssertionError, match=r"stride|size|dimensions"):
            run(torch.randn(1, 90, 96))


# --- a call that writes into its input ---


class Writing(nn.Module):
    """Writes into its input before the attention and after it."""

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2.0)
        q, k, v = (y.unflatten(-1, (2, 16)).transpose(1, 2) for y in x.chunk(3, dim=-1))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x.add_(1.0)
        return out


@pytest.mark.parametrize(("merge", "strict"), [(True, True), (True, False), (False, False)])
def test_a_call_that_writes_into_its_input_is_not_run_again(
    monkeypatch: pytest.MonkeyPatch, merge: bool, strict: bool
) -> None:
    broken(monkeypatch, (route, "route"), ERRORS[0])
    model, x = Writing(), torch.randn(1, 90, 96)
    y = x.clone()
    run = compiled(model, {**EAGER, "sites": "*", "merge": merge, "strict": strict})
    if strict:
        with pytest.raises(SiteError):
            run(x)
        assert torch.equal(x, 2 * y)
    else:
        with pytest.warns(RuntimeWarning, match="ran dense"):
            got = run(x)
        want = model(y)
        assert torch.equal(got, want)
        assert torch.equal(x, y)


def test_an_error_of_the_compiled_graph_itself_is_not_ours(toy: ToyVideo, toy_inputs: ToyInputs) -> None:
    """It comes up once, as it is: the graph is not run a second time."""
    runs = []

    @torch.library.custom_op("svg_ear_tests::failing", mutates_args=())
    def failing(x: Tensor) -> Tensor:
        runs.append(1)
        raise ZeroDivisionError("theirs")

    @failing.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    def model(x: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, 16)).transpose(1, 2)
        return failing(F.scaled_dot_product_attention(q, q, q).contiguous())

    run = compiled(model, {**LENIENT, "sites": "*"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ZeroDivisionError, match="theirs"):
            run(torch.randn(1, 90, 32))
    assert len(runs) == 1
