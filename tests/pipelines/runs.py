"""What did each call of a generation do? Pipelines that are compiled once for many tests, and what the report logs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from pipelines.tiny import Tiny, build, wan_transformer
from torch import Tensor
from toy import EAGER, ToyInputs, compiled

import svg_ear_compile
from svg_ear_compile.runtime.density import CallLog

WHOLE, BLOCKWISE = "whole", "blockwise"
DEFAULT_SCHEDULE = {
    name: value for name, value in EAGER.items() if name not in ("dense_steps", "dense_layers")
}
UNMEASURED = {"order": "cubes", "first_order": False, "measure_every": 0}
"""Nothing is measured or tried: for tests of the clock alone."""
SMALL = {"height": 32, "width": 32}
"""3 x 8 x 8 tokens."""

Call = tuple[int, int, int, int]
"""(model, layer, branch, step)."""
Model = Callable[..., Tensor]
"""A compiled ToyVideo."""


def make(
    name: str, how: str = WHOLE, parts: Iterable[str] = ("transformer", "transformer_2"), **options: Any
) -> Tiny:
    """A pipeline with these parts compiled. Wan's transformer has one layer."""
    tiny, options = build(name), {**DEFAULT_SCHEDULE, **options}
    if name == "wan":
        torch.manual_seed(0)
        tiny.pipe.transformer = wan_transformer(num_layers=1).eval()
    for part in parts:
        model = getattr(tiny.pipe, part, None)
        if model is not None and how == WHOLE:
            setattr(tiny.pipe, part, compiled(model, options))
        elif model is not None:
            model.compile_repeated_blocks(backend="svg_ear", fullgraph=True, options=options)
    return tiny


def sharing(tiny: Tiny) -> Tiny:
    """Another pipeline of the same models, as a server has for each request: with a scheduler of its own."""
    pipe = tiny.pipe
    scheduler = pipe.scheduler.from_config(pipe.scheduler.config)
    return Tiny(type(pipe)(**{**pipe.components, "scheduler": scheduler}), tiny.arguments, tiny.guided)


def generate(tiny: Tiny, steps: int | None = None, seed: int = 0, **changes: Any) -> Tensor:
    """The latents of a small clip. steps: None where the changes say it by sigmas or timesteps."""
    tiny.pipe.set_progress_bar_config(disable=True)
    count = {} if steps is None else {"num_inference_steps": steps}
    return tiny.pipe(
        **{**tiny.arguments, **SMALL, **count, "output_type": "latent", **changes},
        generator=torch.Generator().manual_seed(seed),
    ).frames  # fmt: skip


def after(step: int, do: Callable[[Any], Any]) -> dict[str, Any]:
    """Arguments of a pipeline: do(pipe) after this step."""

    def callback(pipe: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if i == step:
            do(pipe)
        return tensors

    return {"callback_on_step_end": callback}


def stop(pipe: Any) -> None:
    pipe._interrupt = True


def in_threads(*works: Callable[[], Any]) -> list[Any]:
    """What each returns, all of them at once, each in a thread of its own. Raises what one of them raises."""
    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result() for future in [pool.submit(work) for work in works]]


def logged(last: int = 1) -> list[dict[Call, bool]]:
    """Which calls of the last few generations were sparse, the one that began last at the end."""
    found: dict[int, list[CallLog]] = {}
    for graph in svg_ear_compile.report().graphs:
        for number, logs in graph.logs.items():
            found.setdefault(number, []).extend(logs)
    return [_calls(found[number]) for number in sorted(found)[-last:]]


def _calls(logs: list[CallLog]) -> dict[Call, bool]:
    calls = {(log.model, log.layer, log.branch, log.step): not log.decision.dense for log in logs}
    assert len(calls) == len(logs), "no two calls are one"
    return calls


def expected(
    steps: Iterable[int], dense: int, branches: Iterable[int] = (0, 1), layers: int = 1, model: int = 0
) -> dict[Call, bool]:
    """What `logged` should find: the first `dense` steps are dense, the others sparse."""
    calls = itertools.product([model], range(layers), branches, steps)
    return {call: call[-1] >= dense for call in calls}


def said() -> set[str]:
    """What the report says about the steps of the generation that began last."""
    graphs = [graph for graph in svg_ear_compile.report().graphs if graph.logs]
    last = max(max(graph.logs) for graph in graphs)
    return {graph.steps for graph in graphs if max(graph.logs) == last}


def views(steps: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """As `for t in scheduler.timesteps: ... t.expand(1)` has them."""
    return [t.expand(1) for t in torch.linspace(1000, 980, steps).to(dtype)]


def values(steps: int) -> list[Tensor]:
    return [torch.tensor([float(t)]) for t in views(steps)]


def word(model: Model, timesteps: Iterable[Any], calls: int = 1, batch: int = 1) -> str:
    """A letter for each step: s where all of its calls were sparse, . where none was, ? otherwise."""
    found = ""
    for step, t in enumerate(timesteps):
        before = svg_ear_compile.report().totals()["sparse_calls"]
        for call in range(calls):
            with torch.no_grad():
                clip, _, text = ToyInputs()(seed=100 * step + call)
                model(clip.expand(batch, -1, -1, -1, -1), t, text.expand(batch, -1, -1))
        more = svg_ear_compile.report().totals()["sparse_calls"] - before
        found += {0: ".", calls: "s"}.get(more, "?")
    return found
