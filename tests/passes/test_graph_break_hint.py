"""A hint names the graph break that was, where it was, and what to do; not the likeliest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models.capture import Backend, Knobs, fresh_dynamo
from models.graphs import heads, tokens, video
from models.tiny import build
from torch import Tensor, nn

from svg_ear_compile.passes.graph_break_hint import graph_breaks


def print_hook(model: nn.Module) -> None:
    for block in model.blocks:
        block.attn1.register_forward_pre_hook(lambda module, args: print(end=""))


def disabled(model: nn.Module) -> None:
    for block in model.blocks:
        processor = block.attn1.processor
        block.attn1.set_processor(Disabled(processor))


class Disabled:
    def __init__(self, processor: Any) -> None:
        self.processor = processor

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.processor(*args, **kwargs)


def mag_cache(model: Any) -> None:
    from diffusers import MagCacheConfig

    model.enable_cache(MagCacheConfig(num_inference_steps=4, mag_ratios=[1.0] * 8))


def run(name: str, change: Callable[[Any], None] | None = None) -> tuple[Backend, list[str]]:
    """What the passes say of a model's graphs, and what broke them."""
    model, arguments = build(name)
    if change is not None:
        change(model)
    backend = Backend(Knobs())
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(**arguments(3, 4, 6))
    found = graph_breaks()
    torch._dynamo.reset()
    assert graph_breaks() == []
    return backend, found


@pytest.mark.parametrize(
    ("change", "what", "where", "advice"),
    [
        (
            print_hook,
            "Failed to trace builtin operator",
            "test_graph_break_hint.py",
            "calling builtin `print`",
        ),
        (disabled, "Disabled.__call__", "models/transformers/transformer_wan.py", "torch.compiler.disable"),
        (mag_cache, "MagCacheHeadHook", "diffusers/hooks/hooks.py", "this cache switches torch.compile off"),
    ],
)
def test_what_broke_a_graph(change: Callable[[Any], None], what: str, where: str, advice: str) -> None:
    (words,) = run("wan", change)[1]
    title, _, rest = words.partition(" at ")
    place, _, hint = rest.partition("; ")
    assert what in title
    assert where in place
    assert advice in hint


def test_between_projections_and_attention() -> None:
    def f(clip: Tensor) -> Tensor:
        x = tokens(clip)
        query, key, value = x * 0.5, x + 1, x * 2
        print(end="")
        return F.scaled_dot_product_attention(heads(query), heads(key), heads(value))

    def broken_elsewhere(clip: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return clip

    backend = Backend(Knobs())
    with fresh_dynamo():
        torch.compile(broken_elsewhere, backend=backend)(video())
        torch.compile(f, backend=backend)(video())
        hints = [site.verdict.hint for site in backend.sites]
    assert len(hints) == 1
    assert hints[0].startswith("Failed to trace builtin operator at ")
    assert "test_graph_break_hint.py:" in hints[0]


def test_attention_that_runs_outside() -> None:
    backend, _ = run("mochi")
    (other,) = {other for graph in backend.captured for other in graph.others}
    name, _, why = other.partition(" (")
    assert name == "attention of transformer_mochi that is outside of the graphs"
    assert why.startswith(
        "Dynamic shape operator (aten.nonzero.default) at diffusers/models/attention_processor.py"
    )
    assert "capture_dynamic_output_shape_ops" in why
