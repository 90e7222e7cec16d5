"""enable(pipe) compiles what samples the video, and disable(pipe) leaves nothing of it."""

from __future__ import annotations

import re
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines.runs import DEFAULT_SCHEDULE, generate, sharing
from pipelines.tiny import Tiny, build
from toy import EAGER, ToyVideo, calls
from usage.wan import ROUNDING, error

import svg_ear_compile
from svg_ear_compile.pipelines import BETTER_WHOLE, BLOCKS, LEFT, REGIONAL, WHOLE, Enabled

pytestmark = [pytest.mark.usefixtures("fresh"), pytest.mark.filterwarnings("error:svg_ear")]
STEPS = 2
DENSITY_1 = {**EAGER, "density": 1.0}
slow = pytest.mark.slow


def hows(done: Enabled) -> dict[str, str]:
    return {model.name: model.how for model in done.models}


def state(tiny: Tiny) -> dict[int, set[str]]:
    """The attributes that are set on each module."""
    modules = (
        m
        for part in tiny.pipe.components.values()
        if isinstance(part, torch.nn.Module)
        for m in part.modules()
    )
    return {id(m): {name for name, value in vars(m).items() if value is not None} for m in modules}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("wan", {"transformer": REGIONAL}),
        pytest.param("wan22", {"transformer": REGIONAL, "transformer_2": REGIONAL}, marks=slow),
        pytest.param("cogvideox", {"transformer": REGIONAL}, marks=slow),
        pytest.param("hunyuan_video", {"transformer": REGIONAL}, marks=slow),
    ],
)
def test_on_and_off(name: str, how: dict[str, str]) -> None:
    tiny = build(name)
    steps = 8 if name == "wan22" else STEPS  # the first step of 8 is its first transformer's
    dense, before = generate(tiny, steps), state(tiny)
    done = svg_ear_compile.enable(tiny.pipe, **DENSITY_1)
    assert hows(done) == how
    assert all(model in str(done) for model in how)
    assert error(generate(tiny, steps), dense) < 10 * ROUNDING
    layers = 2
    assert calls() == (layers * steps * tiny.guided, {})
    svg_ear_compile.disable(tiny.pipe)
    assert torch.equal(generate(tiny, steps), dense)
    assert state(tiny) == before
    assert calls()[0] == layers * steps * tiny.guided, "no more than before"


def test_quality_and_settings_go_on_as_options() -> None:
    tiny = build("wan")
    with pytest.raises(
        svg_ear_compile.SettingsError, match=r"quality='high' .* contradicts|contradicts quality='high'"
    ):
        svg_ear_compile.enable(tiny.pipe, "high", density=0.3)
    with pytest.raises(svg_ear_compile.SettingsError, match="did you mean 'density'"):
        svg_ear_compile.enable(tiny.pipe, densty=0.3)
    svg_ear_compile.enable(tiny.pipe, "high", **DEFAULT_SCHEDULE | {"density": None})
    generate(tiny, 1)
    (record, *_) = svg_ear_compile.report().graphs
    assert record.resolved.settings.quality == "high"
    assert record.resolved.sources["quality"] == "options"


def test_again_with_other_settings_and_for_a_pipeline_of_the_same_models() -> None:
    tiny = build("wan")
    svg_ear_compile.enable(tiny.pipe, **DENSITY_1)
    svg_ear_compile.enable(sharing(tiny).pipe, **{**EAGER, "density": 0.3})
    generate(tiny, 1)
    assert {graph.resolved.settings.density for graph in svg_ear_compile.report().graphs} == {0.3}
    svg_ear_compile.disable(tiny.pipe.transformer)
    assert not any(module._compiled_call_impl for module in tiny.pipe.transformer.modules())


@pytest.mark.parametrize("first", ["enable", pytest.param("offload", marks=slow)])
def test_with_whole_models_offloaded(first: str) -> None:
    """As enable_model_cpu_offload() does on a GPU; before or after."""
    from accelerate import cpu_offload_with_hook

    tiny = build("wan")
    dense = generate(tiny, STEPS)
    steps = [
        lambda: svg_ear_compile.enable(tiny.pipe, **DENSITY_1),
        lambda: cpu_offload_with_hook(tiny.pipe.transformer, execution_device="cpu"),
    ]
    for step in steps if first == "enable" else reversed(steps):
        step()
    assert error(generate(tiny, STEPS), dense) < 10 * ROUNDING
    assert calls() == (2 * STEPS * 2, {})


@pytest.mark.parametrize("way", ["accelerate", "leaf_level"])
def test_layers_offloaded_one_by_one_are_left_with_advice(way: str) -> None:
    tiny = build("wan")
    if way == "accelerate":
        from accelerate import cpu_offload

        cpu_offload(tiny.pipe.transformer, execution_device=torch.device("cpu"))
    else:
        from usage.test_adapters import offloaded

        offloaded(tiny.pipe.transformer, way)
    done = svg_ear_compile.enable(tiny.pipe, **DENSITY_1)
    assert hows(done) == {"transformer": LEFT}
    assert "enable_model_cpu_offload()" in str(done)


@pytest.mark.parametrize("name", ["hunyuan_video_token_replace", pytest.param("sana_wm", marks=slow)])
def test_models_that_are_better_whole(name: str) -> None:
    """Token replacement has blocks that diffusers does not name as repeated; of Sana-WM blocks alone show less."""
    assert hows(svg_ear_compile.enable(tiny_model(name))) == {"model": WHOLE}


@pytest.mark.parametrize(
    "name", ["cogvideox", *(pytest.param(n, marks=slow) for n in ("consisid", "easyanimate"))]
)
def test_blocks_that_diffusers_does_not_name(name: str) -> None:
    """Alone they show as much as the whole model does: each layer's attention, and the frame grid."""
    from models.tiny import build as build_model

    model, arguments = build_model(name)
    assert type(model).__name__ in BLOCKS
    assert not model._repeated_blocks, "diffusers names them by now: out of the table"
    call = {**arguments(5, 8, 8), "return_dict": False}
    with torch.no_grad():
        expected = model(**call)[0]
        assert hows(svg_ear_compile.enable(model, **DENSITY_1)) == {"model": REGIONAL}
        assert error(model(**call)[0], expected) < ROUNDING
    assert calls() == (2, {})
    assert "frame grid: 5 x 8 x 8, read off the rotary tables" in str(svg_ear_compile.report())


def test_the_table_of_models_says_which_are_better_whole() -> None:
    """Of those that diffusers can compile block by block; `(3 graphs)` and the like are left out."""
    page = (Path(__file__).parents[2] / "docs" / "MODELS.md").read_text()
    row = r"^\| (\w+) \((\w+)\) \| (\d+) of \d+[^|]*\| (\d+) of (\d+)"
    rows = re.findall(row, page, flags=re.MULTILINE)
    assert len(rows) > 15
    worse = {cls for cls, name, _, found, all_ in rows if 0 < int(found) < int(all_)}
    assert worse == BETTER_WHOLE


def test_a_model_alone() -> None:
    assert hows(svg_ear_compile.enable(build("wan").pipe.transformer)) == {"model": REGIONAL}


def tiny_model(name: str) -> Any:
    from models.tiny import BUILDERS

    (builder,) = (b for b in BUILDERS if b.__name__ == name)
    return builder()[0]


class Images:
    """A pipeline that makes images."""

    def __init__(self, transformer: Any) -> None:
        self.components = {"transformer": transformer, "vae": None}

    def __call__(self, prompt: str, num_images_per_prompt: int = 1) -> None: ...


def test_a_pipeline_of_images_has_nothing_to_do() -> None:
    model = tiny_model("flux")
    done = svg_ear_compile.enable(Images(model))
    assert hows(done) == {"transformer": LEFT}
    assert "nothing to do" in str(done)
    assert not any(module._compiled_call_impl for module in model.modules())


@slow
def test_modular_pipelines_list_their_arguments_in_their_blocks() -> None:
    from diffusers import MiniMaxH3Blocks
    from diffusers.modular_pipelines import FluxAutoBlocks

    for blocks, name, how in ((MiniMaxH3Blocks, "minimax_h3", REGIONAL), (FluxAutoBlocks, "flux", LEFT)):
        pipe = blocks().init_pipeline()
        pipe.update_components(transformer=tiny_model(name))
        assert hows(svg_ear_compile.enable(pipe)) == {"transformer": how}


def test_what_cannot_be_enabled_says_what_to_do() -> None:
    for other in (ToyVideo(), types.SimpleNamespace(components={"vae": None}), 3):
        with pytest.raises(ValueError, match="pass a video pipeline of diffusers"):
            svg_ear_compile.enable(other)
    tiny = build("wan")
    tiny.pipe.transformer.compile()
    with pytest.raises(ValueError, match=r"transformer is compiled already: leave out torch\.compile"):
        svg_ear_compile.enable(tiny.pipe)
    tiny.pipe.transformer = torch.compile(build("wan").pipe.transformer)
    with pytest.raises(ValueError, match="transformer is compiled already"):
        svg_ear_compile.enable(tiny.pipe)
