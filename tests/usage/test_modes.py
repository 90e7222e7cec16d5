"""Gradients or none, number formats, batches, shapes, schedules of few steps."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from toy import ToyInputs, ToyVideo, calls, compiled
from usage.wan import DENSITY_1, LAYERS, ROUNDING, SPARSE_3, arguments, error, wan

import svg_ear_compile

pytestmark = [pytest.mark.usefixtures("fresh"), pytest.mark.filterwarnings("error:svg_ear")]


def graphs() -> int:
    return len(svg_ear_compile.report().graphs)


# --- gradients ---


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(toy: ToyVideo, toy_inputs: ToyInputs, mode: Any) -> None:
    with torch.enable_grad(), mode():
        assert error(compiled(toy, DENSITY_1)(*toy_inputs()), toy(*toy_inputs())) < ROUNDING
    assert calls() == (LAYERS, {})


def test_frozen_weights_need_no_no_grad(toy: ToyVideo, toy_inputs: ToyInputs) -> None:
    with torch.enable_grad():
        out = compiled(toy.requires_grad_(False), DENSITY_1)(*toy_inputs())
        assert error(out, toy(*toy_inputs())) < ROUNDING
    assert calls() == (LAYERS, {})


def test_training_stays_dense(toy: ToyVideo, toy_inputs: ToyInputs) -> None:
    eager = copy.deepcopy(toy)
    run = compiled(toy, SPARSE_3)
    with torch.enable_grad():
        for model in (run, eager):
            model(*toy_inputs()).square().mean().backward()
    for ours, theirs in zip(toy.parameters(), eager.parameters(), strict=True):
        assert theirs.grad is not None
        assert ours.grad is not None
        assert torch.equal(ours.grad, theirs.grad)
    assert calls() == (0, {})
    assert {site.decision.reason for site in svg_ear_compile.report().sites} == {"GRAD", "CROSS"}
    run(*toy_inputs())
    assert calls() == (LAYERS, {}), "and sampling in between is sparse"


def test_gradients_of_the_input_alone(toy: ToyVideo, toy_inputs: ToyInputs) -> None:
    clip, timestep, text = toy_inputs()
    clip.requires_grad_()
    toy.requires_grad_(False)
    with torch.enable_grad():
        ours, theirs = (
            torch.autograd.grad(run(clip, timestep, text).square().mean(), clip)[0]
            for run in (compiled(toy, SPARSE_3), toy)
        )
    assert torch.equal(ours, theirs)
    assert calls() == (0, {})


# --- numbers ---


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        pytest.param(torch.float16, False, id="float16"),
        pytest.param(torch.bfloat16, True, id="bfloat16 by autocast"),
        pytest.param(torch.float16, True, id="float16 by autocast", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, False, id="bfloat16", marks=pytest.mark.slow),
    ],
)
def test_half_precision_is_as_exact_as_dense(dtype: torch.dtype, autocast: bool) -> None:
    model = wan() if autocast else wan().to(dtype)
    exact = copy.deepcopy(model).double()(**arguments(dtype=torch.float64))[0]
    inside: AbstractContextManager[Any] = torch.autocast("cpu", dtype) if autocast else nullcontext()
    with inside:
        call = arguments(dtype=torch.float32 if autocast else dtype)
        dense = model(**call)[0]
        ours = compiled(model, DENSITY_1)(**call)[0]
    assert ours.dtype == dense.dtype
    assert error(ours, exact) < 1.5 * error(dense, exact)
    assert calls() == (LAYERS, {})


# --- shapes ---


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(DENSITY_1, id="density 1", marks=pytest.mark.slow),
        pytest.param(SPARSE_3, id="density 0.3"),
    ],
)
def test_a_batch_is_its_elements(options: dict[str, Any]) -> None:
    model = wan()
    run, call = compiled(model, options), arguments(batch=2)
    both = run(**call)[0]
    each = [
        run(**{name: x[i : i + 1] if isinstance(x, torch.Tensor) else x for name, x in call.items()})[0]
        for i in range(2)
    ]
    assert error(both, torch.cat(each)) < ROUNDING
    if options is DENSITY_1:
        assert error(both, model(**call)[0]) < ROUNDING
    assert calls() == (3 * LAYERS, {})


@pytest.mark.parametrize(
    "dynamic",
    [
        pytest.param(None, id="automatic"),
        pytest.param(True, id="dynamic", marks=pytest.mark.slow),
        pytest.param(False, id="static", marks=pytest.mark.slow),
    ],
)
def test_no_compilation_that_would_not_be_anyway(toy_inputs: ToyInputs, dynamic: bool | None) -> None:
    sizes, timesteps = (16, 24, 20), (999, 900, 500)
    plain, counter = ToyVideo().eval(), CompileCounter()
    run = torch.compile(plain, backend=counter, dynamic=dynamic)
    for size in sizes:
        for timestep in timesteps:
            run(*toy_inputs(timestep, size=size))
    torch._dynamo.reset()
    eager = ToyVideo().eval()
    run = compiled(copy.deepcopy(eager), DENSITY_1, dynamic=dynamic)
    for size in sizes:
        for timestep in timesteps:
            got = run(*toy_inputs(timestep, size=size))
            assert error(got, eager(*toy_inputs(timestep, size=size))) < ROUNDING
    assert graphs() == counter.frame_count
    assert calls() == (LAYERS * len(sizes) * len(timesteps), {})
