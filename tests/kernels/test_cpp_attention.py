"""The C++ kernel for CPUs on random plans: against the float64 joint softmax of the very plan, and who calls it."""

from __future__ import annotations

import subprocess
import threading
import warnings
from functools import cache

import pytest
import torch
from torch import Tensor

from svg_ear_compile.kernels import reference
from svg_ear_compile.kernels.attention import cpp
from svg_ear_compile.kernels.attention import torch as attention
from svg_ear_compile.kernels.attention.choice import attention_kernel, cpp_compiler
from svg_ear_compile.kernels.plan import SparsePlan, Terms

from .plans import random_plan
from .test_attention import assert_accurate

B, H = 2, 2
compiled = pytest.mark.skipif(cpp_compiler() is None, reason="there is no C++ compiler")


@cache
def library():
    found = cpp._library()
    assert found is not None
    return found


def inputs(length: int, head_dim: int = 32, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """query, key, value [B,H,L,D], in memory [B,L,H,D]."""
    random = torch.Generator().manual_seed(length)
    return [torch.randn(B, length, H, head_dim, generator=random).to(dtype).transpose(1, 2) for _ in range(3)]


def attend(query: Tensor, plan: SparsePlan, scale: float | None = None, terms: Terms | None = None) -> Tensor:
    out = torch.full_like(query, torch.nan)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    assert cpp.attend(library(), query, plan, scale, out, terms) is out
    return out


def check(query: Tensor, plan: SparsePlan) -> None:
    scale = query.shape[-1] ** -0.5
    plain = reference.joint_softmax(query, plan, scale, query.dtype)
    assert_accurate(attend(query, plan), reference.joint_softmax(query, plan, scale), plain)


@compiled
@pytest.mark.parametrize("keep", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 129, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_joint_softmax_of_the_plan(dtype: torch.dtype, length: int, keep: float) -> None:
    query, key, value = inputs(length, dtype=dtype)
    check(query, random_plan(query, key, value, seed=length, keep=keep))


@compiled
@pytest.mark.parametrize("head_dim", [1, 16, 40, 64, 80, 128, 256])
def test_any_head_dim(head_dim: int) -> None:
    query, key, value = inputs(200, head_dim)
    check(query, random_plan(query, key, value))


@compiled
@pytest.mark.parametrize("compensate", [True, False])
def test_text_and_masked_keys(compensate: bool) -> None:
    query, key, value = inputs(300)
    valid = torch.arange(300) < torch.tensor([[250], [300]])
    check(query, random_plan(query, key, value, num_text=70, valid=valid, compensate=compensate))


@compiled
def test_a_query_that_meets_nothing_gets_zero() -> None:
    query, key, value = inputs(200)
    out = attend(query, random_plan(query, key, value, keep=0.0, compensate=False))
    assert torch.equal(out, torch.zeros_like(out))


@compiled
def test_large_logits() -> None:
    query, key, value = inputs(200)
    query, key = query * 22, key * 22
    plan = random_plan(query, key, value)
    check(query, plan)
    hot = plan._replace(key=plan.key.clone())
    hot.key[0, 0, 7] = torch.inf
    want, got = (f(query, hot) for f in (plain_attend, attend))
    assert torch.equal(got.isnan(), want.isnan())
    assert got.isnan().any()


def plain_attend(query: Tensor, plan: SparsePlan, terms: Terms | None = None) -> Tensor:
    return attention.attend(query, plan, query.shape[-1] ** -0.5, torch.empty_like(query), terms=terms)


@compiled
def test_nan_stays_in_its_head_and_what_is_not_kept_is_not_read() -> None:
    query, key, value = inputs(400)
    plan = random_plan(query, key, value, seed=2)
    clean = attend(query, plan)
    for name in ("key", "value", "key_centroids", "value_centroids"):
        bad = getattr(plan, name).clone()
        bad[1, 0] = torch.nan
        got = attend(query, plan._replace(**{name: bad}))
        assert got[1, 0].isnan().any()
        got[1, 0] = clean[1, 0]
        assert torch.equal(got, clean)
    used = (plan.bias > -torch.inf).any(dim=2)
    bad = [x.masked_fill(~used[..., None], torch.nan) for x in (plan.key_centroids, plan.value_centroids)]
    assert torch.equal(attend(query, plan._replace(key_centroids=bad[0], value_centroids=bad[1])), clean)


@compiled
def test_all_keys_of_a_block_are_nan() -> None:
    query, key, value = inputs(64)
    plan = random_plan(query, key * torch.nan, value, keep=1.0)
    assert attend(query, plan).isnan().all()


@compiled
def test_first_order_terms() -> None:
    query, key, value = inputs(400, 40)
    plan = random_plan(query, key, value)
    terms = Terms(torch.tensor([-1, 0]), torch.randn(B, 1, plan.bias.shape[2], 40, 40))
    got, want = attend(query, plan, terms=terms), plain_attend(query, plan, terms)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got[:, 1], attend(query, plan)[:, 1])


@compiled
def test_any_layout_the_same_bits_from_any_number_of_threads() -> None:
    query, key, value = inputs(500)
    plan = random_plan(query, key, value)
    once = attend(query, plan)
    other = torch.empty(B, H, 32, 500).mT  # as no model has it
    cpp.attend(library(), query.mT.contiguous().mT, plan, 32**-0.5, other)
    assert torch.equal(other, once)
    threads, found = torch.get_num_threads(), []
    try:
        torch.set_num_threads(3)
        callers = [threading.Thread(target=lambda: found.append(attend(query, plan))) for _ in range(3)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 3
    assert all(torch.equal(x, once) for x in found)


@compiled
def test_larger_blocks_are_refused() -> None:
    query, key, value = inputs(1000)
    with pytest.raises(ValueError, match="more than"):
        attend(query, random_plan(query, key, value, equal=False))


@compiled
def test_who_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long calls of equal tiles, where there is a compiler; the report says the same."""
    called = []
    monkeypatch.setattr(cpp, "attend", lambda *a: called.append(a) or a[4])
    query, key, value = inputs(cpp.LEAST_TOKENS)
    plan = random_plan(query, key, value)
    for variable in (True, False):
        attention.attend(query, plan, 1.0, torch.empty_like(query), variable)
        assert len(called) == (not variable)
    short = [x[:, :, :200] for x in (query, key, value)]
    attention.attend(short[0], random_plan(*short), 1.0, torch.empty_like(short[0]), False)
    assert len(called) == 1
    cpu = torch.device("cpu")
    assert attention_kernel(cpu, torch.float32, 128).name == "C++"
    assert attention_kernel(cpu, torch.float32, 128, variable=True).name == "PyTorch"
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    attention.attend(query, plan, 1.0, torch.empty_like(query), False)
    assert len(called) == 1
    assert "no C++ compiler" in attention_kernel(cpu, torch.float32, 128).reason


def test_a_build_that_fails_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **_: object) -> None:
        raise subprocess.CalledProcessError(1, command, stderr="error: no such option\nmore")

    cpp._library.cache_clear()
    monkeypatch.setattr(cpp, "cpp_compiler", lambda: "c++")
    monkeypatch.setattr(subprocess, "run", fail)
    try:
        query, key, value = inputs(cpp.LEAST_TOKENS)
        plan = random_plan(query, key, value)
        with pytest.warns(RuntimeWarning, match="no such option"):
            got = attention.attend(query, plan, 1.0, torch.empty_like(query), False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attention.attend(query, plan, 1.0, torch.empty_like(query), False)
        assert torch.equal(got, attention.attend(query, plan, 1.0, torch.empty_like(query)))
    finally:
        cpp._library.cache_clear()
