"""The C++ kernel for CPUs on random plans: against the float64 joint softmax of the very plan, and who calls it."""

from __future__ import annotations

import subprocess
import threading
import warnings

import pytest
import torch
from torch import Tensor

from svg_ear_compile.kernels import reference
from svg_ear_compile.kernels.attention import cpp
from svg_ear_compile.kernels.attention import torch as attention
from svg_ear_compile.kernels.attention.choice import attention_kernel
from svg_ear_compile.kernels.plan import SparsePlan, Terms

from .plans import random_plan
from .test_attention import assert_accurate, check_nan_stays_in_its_head

B, H = 2, 2
compiled = pytest.mark.skipif(cpp.compiler() is None, reason="there is no C++ compiler")


def inputs(length: int, head_dim: int = 32, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """query, key, value [B,H,L,D], in memory [B,L,H,D]."""
    random = torch.Generator().manual_seed(length)
    return [torch.randn(B, length, H, head_dim, generator=random).to(dtype).transpose(1, 2) for _ in range(3)]


def attend(query: Tensor, plan: SparsePlan, scale: float | None = None, terms: Terms | None = None) -> Tensor:
    out = torch.full_like(query, torch.nan)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    assert cpp.attend(query, plan, scale, out, terms) is out
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
    check_nan_stays_in_its_head(attend, query, plan)
    clean = attend(query, plan)
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
    cpp.attend(query.mT.contiguous().mT, plan, 32**-0.5, other)
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


@pytest.fixture
def build_anew():
    """What was built is forgotten before and after."""
    cpp._built.cache_clear()
    yield
    cpp._built.cache_clear()


@compiled
def test_who_calls_it(monkeypatch: pytest.MonkeyPatch, build_anew: None) -> None:
    """Long calls of equal tiles, where there is a compiler; the report says the same."""
    called = []
    monkeypatch.setattr(cpp, "attend", lambda *a: called.append(a) or a[3])
    cpu, most = torch.device("cpu"), cpp.LEAST_TOKENS

    def runs(length: int, variable: bool) -> str:
        query, key, value = inputs(length)
        before = len(called)
        attention.attend(query, random_plan(query, key, value), 1.0, torch.empty_like(query), variable)
        return "C++" if len(called) > before else "PyTorch"

    def told(length: int, variable: bool) -> str:
        return attention_kernel(cpu, torch.float32, 32, length, variable).name

    for case, expected in (((most, False), "C++"), ((most, True), "PyTorch"), ((most - 1, False), "PyTorch")):
        assert runs(*case) == told(*case) == expected
    assert "fewer than 1,024 tokens" in attention_kernel(cpu, torch.float32, 32, most - 1).reason
    cpp._built.cache_clear()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert runs(most, False) == told(most, False) == "PyTorch"
    assert "no C++ compiler" in attention_kernel(cpu, torch.float32, 32, most).reason
    monkeypatch.undo()
    query, key, value = inputs(most)
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler"):
        cpp.attend(query, random_plan(query, key, value), 1.0, torch.empty_like(query))


def test_a_build_that_fails_is_told_once(monkeypatch: pytest.MonkeyPatch, build_anew: None) -> None:
    def fail(command: list[str], **_: object) -> None:
        raise subprocess.CalledProcessError(1, command, stderr="error: no such option\nmore")

    monkeypatch.setattr(cpp, "compiler", lambda: "c++")
    monkeypatch.setattr(subprocess, "run", fail)
    query, key, value = inputs(cpp.LEAST_TOKENS)
    plan = random_plan(query, key, value)
    with pytest.warns(RuntimeWarning, match="no such option"):
        got = attention.attend(query, plan, 1.0, torch.empty_like(query), False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention.attend(query, plan, 1.0, torch.empty_like(query), False)
        choice = attention_kernel(torch.device("cpu"), torch.float32, 32, cpp.LEAST_TOKENS)
    assert (choice.name, "no such option" in choice.reason) == ("PyTorch", True)
    assert torch.equal(got, attention.attend(query, plan, 1.0, torch.empty_like(query)))
