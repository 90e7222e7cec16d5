"""A compiled model in a CUDA graph that the user records: whatever runs in between, replays stay right."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import SPARSE, calls, compiled

from svg_ear_compile.backend import reset

pytest.importorskip("diffusers")
from usage.wan import arguments, error, wan

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("fresh"),
]
STEERED = {name: value for name, value in SPARSE.items() if name != "density"}
FORMS = {
    "cubes": {**SPARSE, "order": "cubes"},
    "splits": {**SPARSE, "order": "splits"},
    "measured": {**STEERED, "target_error": 0.05, "audit": True},
    "svg_ear": {**SPARSE, "preset": "svg_ear"},
    "svg2": {**STEERED, "preset": "svg2"},
}


def model() -> Any:
    """Heads of 128, as the kernel for Hopper takes them."""
    return wan(attention_head_dim=128).to("cuda", torch.bfloat16)


def inputs(seed: int) -> dict[str, Any]:
    call = arguments(500, seed, dtype=torch.bfloat16)
    return {name: x.cuda() if isinstance(x, Tensor) else x for name, x in call.items()}


class Recorded:
    """One call of `run` in a CUDA graph, with inputs of its own."""

    def __init__(self, run: Any) -> None:
        self.inputs, self.graph = inputs(seed=0), torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are compiled, tables made
            for _ in range(3):
                run(**self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph):
            self.out = run(**self.inputs)[0]

    def __call__(self, seed: int) -> Tensor:
        for name, x in inputs(seed).items():
            if isinstance(x, Tensor):
                self.inputs[name].copy_(x)
        self.graph.replay()
        return self.out.clone()


def overwrite_free_memory() -> list[Tensor]:
    """Gives what is cached back to the driver; then whatever an allocation can get is NaN."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    sizes = {2**9: 200, 2**13: 200, 2**17: 100, 2**20: 100, 2**22: 50, 2**28: 4}
    several = ((n, i) for n, times in sizes.items() for i in range(times))
    return [torch.full((n // 4,), torch.nan, device="cuda") for n, _ in several]


@pytest.mark.parametrize("form", FORMS)
def test_after_other_calls_and_allocations(form: str) -> None:
    run = compiled(model(), FORMS[form])
    recorded = Recorded(run)
    assert calls()[0] > 0
    wanted = [recorded(seed) for seed in (0, 1)]
    dense = [model()(**inputs(seed))[0] for seed in (0, 1)]
    assert error(wanted[0], dense[0]) < 0.5 * error(dense[1], dense[0]), "a replay is of its own input"
    assert error(wanted[1], dense[1]) < 0.5 * error(dense[0], dense[1])
    for seed in (2, 3, 4):  # which keep things of their own, and drop those of before
        run(**inputs(seed))
    kept = overwrite_free_memory()
    assert torch.equal(recorded(1), wanted[1])
    reset()  # frees what calls of ours have left, but neither weights nor Inductor's constants
    kept += overwrite_free_memory()
    assert torch.equal(recorded(0), wanted[0])
    assert torch.equal(recorded(1), wanted[1])


def test_a_replay_gives_what_a_call_gives() -> None:
    run = compiled(model(), FORMS["cubes"])
    recorded = Recorded(run)
    for seed in (1, 2):
        assert torch.equal(recorded(seed), run(**inputs(seed))[0])
    sparse, dense = calls()
    assert sparse
    assert not dense
