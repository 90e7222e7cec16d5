"""Mochi picks its valid text tokens by nonzero: what becomes of its attention, and what the user can set."""

from __future__ import annotations

import pytest
import torch
from models.capture import Backend, capture, fresh_dynamo
from models.tiny import build

import svg_ear_compile

JOINT = ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]
OUTSIDE = "attention of transformer_mochi that is outside of the graphs (Dynamic shape operator (aten.nonzero"
SETTING = "torch._dynamo.config.capture_dynamic_output_shape_ops = True"


@pytest.mark.slow
def test_attention_between_graphs_is_named() -> None:
    model, arguments = build("mochi")
    others = [name for captured in capture(model, arguments(3, 4, 6)).captured for name in captured.others]
    assert others
    assert all(name.startswith(OUTSIDE) and SETTING in name for name in others)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
@pytest.mark.filterwarnings("ignore")
def test_the_report_says_what_to_set() -> None:
    model, arguments = build("mochi")
    torch.compile(model, backend="svg_ear", options={"inner": "eager", "min_tokens": 1})(**arguments(3, 4, 6))
    text = str(svg_ear_compile.report())
    assert f"left as it is: {OUTSIDE}" in text


@pytest.mark.parametrize(
    ("batch", "scalars"),
    [(1, False), *(pytest.param(*key, marks=pytest.mark.slow) for key in ((1, True), (2, False), (2, True)))],
)
def test_in_one_graph_its_lengths_are_unknown(batch: int, scalars: bool) -> None:
    (model, arguments), (eager, _) = build("mochi"), build("mochi")
    call = arguments(3, 4, 6, batch=batch) | {"return_dict": False}
    backend = Backend(rewrites=True)
    how = {"capture_dynamic_output_shape_ops": True, "capture_scalar_outputs": scalars}
    with torch._dynamo.config.patch(**how), fresh_dynamo():
        got = torch.compile(model, backend=backend, fullgraph=True)(**call)[0]
        torch.testing.assert_close(got, eager(**call)[0])
    joint = [site for site in backend.sites if site.module_path in JOINT]
    assert [site.verdict.reason.name for site in joint] == ["UNKNOWN_SHAPE"] * 2 * batch
    assert len(backend.captured) == 1
