"""What only a GPU run has: CUDA graphs of Inductor, streams, offloading, reading masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu.cuda import no_waiting
from torch import Tensor
from toy import SPARSE, calls, compiled

import svg_ear_compile
from svg_ear_compile.kernels import dense

pytest.importorskip("diffusers")
from usage.wan import LAYERS, arguments, error, wan

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("fresh"),
    pytest.mark.filterwarnings("error:svg_ear"),
]
DEVICE = "cuda"
DENSITY_1 = {**SPARSE, "density": 1.0}
SPARSE_3 = {**SPARSE, "density": 0.3}
TIMES = (900, 700, 500)


def on_gpu(model: Any) -> Any:
    return model.to(DEVICE, torch.bfloat16)


def inputs(timestep: float, seed: int = 0) -> dict[str, Any]:
    call = arguments(timestep, seed, dtype=torch.bfloat16)
    return {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in call.items()}


def exact(timestep: float, seed: int = 0) -> Tensor:
    """The same weights (rounded) and inputs in float32, in eager mode."""
    call = inputs(timestep, seed)
    model = on_gpu(wan()).float()
    call = {name: x.float() if isinstance(x, Tensor) else x for name, x in call.items()}
    return model(**call)[0]


def within_the_rule(got: Tensor, timestep: float, seed: int = 0) -> bool:
    """At most twice the error that eager makes in bfloat16."""
    truth = exact(timestep, seed)
    return error(got, truth) <= 2 * error(on_gpu(wan())(**inputs(timestep, seed))[0], truth)


@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_cuda_graphs_of_inductor_are_cut_around_our_op(how: str) -> None:
    """mode="reduce-overhead": the op plans anew in each replay, and dense steps stay dense."""
    options = {**DENSITY_1, "mode": "reduce-overhead", "dense_steps": 1, "num_steps": len(TIMES)}
    model = on_gpu(wan())
    if how == "whole":
        run = compiled(model, options)
    else:
        run = model
        model.compile_repeated_blocks(backend="svg_ear", fullgraph=True, options=options)
    for _ in range(3):  # the first warms up, the second records, the third replays
        for t in TIMES:
            torch.compiler.cudagraph_mark_step_begin()
            assert within_the_rule(run(**inputs(t))[0].clone(), t)
    assert calls() == (3 * LAYERS * (len(TIMES) - 1), {"warm-up steps": 3 * LAYERS})


def test_replays_plan_for_their_own_input() -> None:
    """At a low density a plan of another input would be far off."""
    eager = compiled(on_gpu(wan()), SPARSE_3)
    expected = [eager(**inputs(500, seed))[0].clone() for seed in range(4)]
    run = compiled(on_gpu(wan()), {**SPARSE_3, "mode": "reduce-overhead"})
    for _ in range(2):
        for seed, plain in enumerate(expected):
            torch.compiler.cudagraph_mark_step_begin()
            assert error(run(**inputs(500, seed))[0].clone(), plain) < 2e-2
    assert error(expected[0], expected[1]) > 0.1, "the inputs differ"


def test_two_streams() -> None:
    """Models on streams of their own, queued together, give the bits that they give one after another."""
    given = [inputs(500, seed) for seed in range(2)]
    alone = [compiled(on_gpu(wan()), SPARSE_3) for _ in given]
    expected = [[run(**call)[0].clone() for run, call in zip(alone, given, strict=True)] for _ in range(5)]
    together = [compiled(on_gpu(wan()), SPARSE_3) for _ in given]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in given]
    for of_call in expected:
        got = []
        for run, call, stream in zip(together, given, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append(run(**call)[0])
        torch.cuda.synchronize()
        assert all(torch.equal(ours, one) for ours, one in zip(got, of_call, strict=True))


def test_group_offloading_with_streams() -> None:
    """Weights come to the GPU block by block, on a stream of their own, and go again."""
    from diffusers.hooks import apply_group_offloading

    model = wan().to(torch.bfloat16)
    apply_group_offloading(
        model, onload_device=torch.device(DEVICE), offload_device=torch.device("cpu"),
        offload_type="block_level", num_blocks_per_group=1, use_stream=DEVICE == "cuda",
    )  # fmt: skip
    options = {**DENSITY_1, "dense_steps": 1, "num_steps": len(TIMES)}
    model.compile_repeated_blocks(backend="svg_ear", options=options)
    for t in TIMES:
        assert within_the_rule(model(**inputs(t))[0], t)
    assert calls() == (LAYERS * (len(TIMES) - 1), {"warm-up steps": LAYERS})


def test_a_model_that_comes_and_goes() -> None:
    """As offloading of whole models does, between generations: its layers stay who they are."""
    model = on_gpu(wan())
    model.compile_repeated_blocks(backend="svg_ear", fullgraph=True, options={**SPARSE_3, "dense_layers": 1})
    first = model(**inputs(500))[0]
    model.to("cpu")
    model.to(DEVICE)
    assert torch.equal(model(**inputs(500))[0], first)
    assert calls() == (2 * (LAYERS - 1), {"dense layers": 2})


def test_model_cpu_offloading_of_a_pipeline() -> None:
    for name in ("accelerate", "tokenizers", "transformers"):
        pytest.importorskip(name)
    from pipelines.tiny import build

    def clip(offloaded: bool) -> list[Tensor]:
        tiny = build("wan")
        tiny.pipe.to(torch.bfloat16)
        tiny.pipe.transformer.compile_repeated_blocks(
            backend="svg_ear", fullgraph=True, options={**SPARSE_3, "dense_layers": 1}
        )
        if offloaded:
            tiny.pipe.enable_model_cpu_offload(device=DEVICE)
        else:
            tiny.pipe.to(DEVICE)
        return [tiny().latents.cpu() for _ in range(2)]

    kept = clip(offloaded=False)
    before = calls()
    offloaded = clip(offloaded=True)
    assert all(map(torch.equal, offloaded, kept))
    assert before[0] == before[1]["dense layers"] > 0
    assert calls() == (2 * before[0], {"dense layers": 2 * before[0]})


def test_a_call_waits_for_nothing_but_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the user tells the steps, a mask is read once in each call of the model, and nothing else ever is."""
    from models.tiny import build

    model, arguments_of = build("hunyuan_video")
    torch.manual_seed(1)
    call = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in arguments_of(2, 16, 16).items()}
    run = compiled(model.to(DEVICE), {**DENSITY_1, "min_tokens": 1}, dynamic=False)
    read, reads = dense.read_seen_keys, []

    def waiting(mask: Tensor) -> int | None:
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        reads.append(read(mask))
        torch.cuda.set_sync_debug_mode(mode)
        return reads[-1]

    monkeypatch.setattr(dense, "read_seen_keys", waiting)
    with svg_ear_compile.generation(num_steps=4, branches=1):
        run(**call)
        run(**call)
        torch.cuda.synchronize()
        reads.clear()
        with no_waiting():
            run(**call)
    assert len(reads) == 1
    sparse, dense_calls = calls()
    assert sparse > 0
    assert not dense_calls
