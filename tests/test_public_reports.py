"""Situations that people report to projects of this field: does this one do what it should in them?

Each test is named after what people do; nothing is told unless the test says so.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from pipelines.runs import (
    DEFAULT_SCHEDULE,
    UNMEASURED,
    expected,
    in_threads,
    logged,
    said,
    values,
    views,
    word,
)
from pipelines.tiny import wan_transformer
from torch import Tensor
from toy import ToyInputs, ToyVideo, compiled

import svg_ear_compile

pytestmark = [pytest.mark.usefixtures("fresh"), pytest.mark.filterwarnings("error:svg_ear")]

STEERED = {**DEFAULT_SCHEDULE, "density": None, "target_error": 0.005, "max_density": 0.95}
"""A target for which the toy model needs about half of the pairs."""


def toy(**options: Any) -> Callable[..., Tensor]:
    return compiled(ToyVideo(layers=1).eval(), {**DEFAULT_SCHEDULE, **options})


def sample(model: Callable[..., Tensor], timesteps: list[Tensor], seed: int = 0, turns: Any = None) -> Tensor:
    """A clip by Euler steps, with guidance in two calls. turns: a barrier before each step."""
    with torch.no_grad():
        x, _, text = ToyInputs()(seed=seed)
        for t in timesteps:
            if turns is not None:
                turns.wait()
            x = x - 0.05 * (3 * model(x, t, text) - 2 * model(x, t, -text))
        return x


def has_steered() -> bool:
    """Whether the last generation learnt what density it needs."""
    return len({e.density for e in svg_ear_compile.report().errors() if not e.dense}) > 1


@pytest.mark.parametrize(("timesteps", "dense"), [(views, 3), (values, 2)], ids=["shown", "unknown"])
def test_a_short_run_to_compile_before_the_real_one(timesteps: Any, dense: int) -> None:
    model = toy(**UNMEASURED)
    assert word(model, timesteps(2)) in ("ss", "..")
    assert word(model, timesteps(30)) == dense * "." + (30 - dense) * "s"


@pytest.mark.parametrize("options", [DEFAULT_SCHEDULE, STEERED], ids=["density", "target"])
@pytest.mark.parametrize("timesteps", [views, values], ids=["shown", "unknown"])
def test_a_run_that_the_user_stops(timesteps: Any, options: dict[str, Any]) -> None:
    model = toy(**options)
    first = sample(model, timesteps(12))
    assert has_steered() == (options is STEERED)
    sample(model, timesteps(12)[:3], seed=1)
    assert torch.equal(sample(model, timesteps(12)), first)


def test_more_than_8_calls_a_step() -> None:
    """Context windows over a long clip, each with guidance."""
    model = toy(**STEERED)
    for t in views(20):
        for window in range(5):
            sample(model, [t], seed=window)
    assert logged() == [expected(range(20), 2, range(10))]
    errors = svg_ear_compile.report().errors()
    assert len(errors) == 20 * 10
    sparse = [e for e in errors if not e.dense]
    assert sum(e.error is not None for e in sparse) < 0.4 * len(sparse), "not each is taken for the first"
    assert has_steered(), "and what they find is used"


@pytest.mark.parametrize("name", ["t", "sigma"])
def test_the_timestep_has_another_name(name: str) -> None:
    scope: dict[str, Any] = {"ToyVideo": ToyVideo}
    exec(
        "class Named(ToyVideo):\n"
        f"    def forward(self, x, {name}, context):\n"
        f"        return super().forward(x, {name}, context)\n",
        scope,
    )
    model = compiled(scope["Named"](layers=1).eval(), {**DEFAULT_SCHEDULE, **UNMEASURED})
    for _ in range(2):
        assert word(model, values(8), 2) == "..ssssss"
        assert word(model, views(10), 2) == ".sssssssss"


def test_weights_are_moved_after_a_run() -> None:
    """As tensor subclasses are: by swapping, which nobody may prevent by a weak reference."""
    model = ToyVideo(layers=1).eval()
    run = compiled(model, DEFAULT_SCHEDULE)
    before = word(run, views(5))
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(torch.float64).to(torch.float32)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert word(run, views(5)) == before == ".ssss"


def test_quantized_weights_are_moved_after_a_run() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = ToyVideo(layers=1).eval()
    quantization.quantize_(model.blocks, quantization.Int8WeightOnlyConfig())
    run = compiled(model, DEFAULT_SCHEDULE)
    before = word(run, views(5))
    model.to("cpu")
    assert word(run, views(5)) == before == ".ssss"


def blocks_of_wan(offloaded: bool) -> list[Any]:
    """What the report says of each call of a generation of Wan, whose blocks are compiled one by one."""
    torch.manual_seed(0)
    model = wan_transformer().eval()
    if offloaded:
        from accelerate import cpu_offload

        cpu_offload(model, torch.device("cpu"), preload_module_classes=["WanTransformerBlock"])
    model.compile_repeated_blocks(backend="svg_ear", options={**STEERED, "target_error": 0.1})
    noise = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 4, 3, 32, 32, generator=noise), torch.randn(1, 8, 16, generator=noise)
    for t in views(10):
        x = x - 0.1 * model(x, t, text, return_dict=False)[0]
    return svg_ear_compile.report().errors()


def test_weights_are_other_objects_in_each_call() -> None:
    """A hook around each block puts new Parameters into it: layers are known by their place."""
    pytest.importorskip("accelerate")
    fixed = blocks_of_wan(offloaded=False)
    torch._dynamo.reset()
    assert blocks_of_wan(offloaded=True) == fixed
    assert has_steered()


def test_timesteps_in_half_precision() -> None:
    """Of 50 steps at a flow shift of 12 many have one timestep."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    model, scheduler = toy(**UNMEASURED), FlowMatchEulerDiscreteScheduler(shift=12.0)
    scheduler.set_timesteps(50)
    timesteps = scheduler.timesteps.to(torch.bfloat16)
    assert len(timesteps.unique()) < 50
    assert word(model, [t.expand(1) for t in timesteps]) == 5 * "." + 45 * "s"
    assert logged() == [expected(range(50), 5, [0])]


@pytest.mark.parametrize("preset", ["default", "svg_ear"])
def test_another_default_dtype(preset: str) -> None:
    model, inputs = toy(preset=preset, dense_steps=0, dense_layers=0), ToyInputs()(seed=0)
    usual = model(*inputs)
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            found = model(*inputs)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(found, usual)
    totals = svg_ear_compile.report().totals()
    assert (totals["sparse_calls"], totals["dense_calls"]) == (3, {})


def test_a_benchmark_with_the_same_inputs() -> None:
    """And a model of one step is one of those."""
    model, inputs = toy(**UNMEASURED), ToyInputs()(timestep=1)
    for _ in range(6):
        model(*inputs)
    assert list(logged()[0].values()) == 2 * [False] + 4 * [True]
    assert "many calls at one timestep were taken for a benchmark" in next(iter(said()))


def test_each_request_in_a_thread_of_its_own() -> None:
    model = toy(**UNMEASURED)
    for timesteps, right in ((views(10), "." + 9 * "s"), (values(10), ".." + 8 * "s")):
        assert [in_threads(partial(word, model, timesteps))[0] for _ in range(2)] == [right] * 2


def test_told_around_a_call_in_a_worker_thread() -> None:
    model = toy(**UNMEASURED)

    async def serve() -> str:
        with svg_ear_compile.generation(num_steps=30, branches=2):
            return await asyncio.to_thread(word, model, values(30), 2)

    assert asyncio.run(serve()) == 3 * "." + 27 * "s"
    with svg_ear_compile.generation(num_steps=30, branches=2):
        assert in_threads(partial(word, model, values(30), 2)) == [3 * "." + 27 * "s"]


@pytest.mark.parametrize("options", [{"order": "splits"}, STEERED], ids=["density", "target"])
def test_three_requests_at_once_on_one_model(options: dict[str, Any]) -> None:
    model = toy(**options)
    timesteps = [views(8) for _ in range(3)]
    alone = [sample(model, timesteps[seed], seed) for seed in range(3)]
    assert has_steered() == (options is STEERED)
    turns = threading.Barrier(3, timeout=60)
    together = in_threads(*(partial(sample, model, timesteps[seed], seed, turns) for seed in range(3)))
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
