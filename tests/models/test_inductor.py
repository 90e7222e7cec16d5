"""Inductor sees the same inputs with us as without us: the same weights, never to move."""

from __future__ import annotations

from typing import Any

import pytest
from models.capture import Backend, compiled, fresh_dynamo
from models.tiny import build
from torch import fx
from torch._inductor.compile_fx import compile_fx


def static_inputs(name: str, regional: bool, rewrites: bool) -> list[tuple[int, list[int]]]:
    """Per graph: its number of inputs, and which of them Inductor takes for weights that stay put."""
    seen: list[tuple[int, list[int]]] = []

    def inner_compile(gm: fx.GraphModule, example_inputs: Any, **kwargs: Any) -> Any:
        seen.append((len(example_inputs), sorted(kwargs["static_input_idxs"])))

        def run(arguments: list[Any]) -> Any:
            values = list(arguments)
            arguments.clear()
            return gm(*values)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    model, arguments = build(name)
    backend = Backend(
        rewrites=rewrites, inner=lambda gm, inputs: compile_fx(gm, inputs, inner_compile=inner_compile)
    )
    with fresh_dynamo():
        compiled(model, backend, regional)(**arguments(3, 4, 6))
    assert any(site.verdict.rewrite for site in backend.sites)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(("name", "regional"), [("wan", False), ("hunyuan_video", True)])
def test_weights_stay_static(name: str, regional: bool) -> None:
    plain, ours = static_inputs(name, regional, False), static_inputs(name, regional, True)
    assert plain == ours
    assert all(len(static) > 0.5 * count for count, static in ours)
