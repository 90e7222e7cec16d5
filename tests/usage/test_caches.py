"""A cache of diffusers beside us: at some steps it leaves out layers, attention, or half of the batch."""

from __future__ import annotations

from typing import Any

import pytest
from pipelines.tiny import Run, Tiny, build
from toy import EAGER, calls

import svg_ear_compile

pytestmark = [pytest.mark.usefixtures("fresh"), pytest.mark.filterwarnings("error:svg_ear")]
STEPS, DENSE, LAYERS = 6, 2, 2


def first_block(tiny: Any) -> Any:
    """The other layers run where the first one's output has changed."""
    from diffusers import FirstBlockCacheConfig

    return FirstBlockCacheConfig(threshold=0.1)


def broadcast(tiny: Any) -> Any:
    """Self attention runs at every other step."""
    from diffusers import PyramidAttentionBroadcastConfig

    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 2000),
        spatial_attention_block_identifiers=("blocks",),
        current_timestep_callback=lambda: tiny.pipe.current_timestep,
    )  # fmt: skip


def faster(tiny: Any) -> Any:
    """At all steps but 0 and 3 half of the batch, the unconditional one, is left out; and of these steps at
    every other one self attention."""
    from diffusers import FasterCacheConfig

    return FasterCacheConfig(
        unconditional_batch_skip_range=3, unconditional_batch_timestep_skip_range=(-1, 2000),
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 2000),
        attention_weight_callback=lambda _: 0.3, tensor_format="BFCHW",
        current_timestep_callback=lambda: tiny.pipe.current_timestep,
    )  # fmt: skip


CACHES = {first_block: "wan", broadcast: "wan", faster: "cogvideox"}
"""Which pipeline has the cache."""


def cached(cache: Any, options: dict[str, Any]) -> Tiny:
    """A pipeline with a cache, compiled: block by block where diffusers can."""
    tiny = build(CACHES[cache])
    transformer, options = tiny.pipe.transformer, {**EAGER, **options}
    transformer.enable_cache(cache(tiny))
    if transformer._repeated_blocks:
        transformer.compile_repeated_blocks(backend="svg_ear", options=options)
    else:
        transformer.compile(backend="svg_ear", options=options)
    return tiny


def alone(cache: Any) -> tuple[Run, list[int]]:
    """One clip with a cache and without us, and the step of each self attention that ran."""
    tiny, steps = build(CACHES[cache]), list[int]()
    transformer = tiny.pipe.transformer

    def note(*_: Any) -> None:
        steps.append(tiny.pipe.scheduler.timesteps.tolist().index(float(tiny.pipe.current_timestep)))

    transformer.enable_cache(cache(tiny))
    for name, module in transformer.named_modules():
        if name.endswith("attn1.to_q"):
            module.register_forward_hook(note)
    run = tiny(steps=STEPS)
    assert len(steps) < STEPS * LAYERS * tiny.guided, "it leaves out some"
    return run, steps


def in_warm_up(steps: list[int]) -> int:
    """How many of these self attentions are in the first DENSE steps."""
    return sum(step < DENSE for step in steps)


def difference(got: Run, expected: Run) -> float:
    return ((got.latents - expected.latents).norm() / expected.latents.norm()).item()


@pytest.mark.parametrize(
    "cache", [broadcast, *(pytest.param(cache, marks=pytest.mark.slow) for cache in (first_block, faster))]
)
def test_calls_that_it_leaves_out_are_not_counted_and_steps_are_the_pipeline_s(cache: Any) -> None:
    """Also where attention is a graph of its own, inside of the hooks of all but first_block."""
    expected, steps = alone(cache)
    beside = cached(cache, {"density": 1.0, "dense_steps": DENSE, "measure_every": 1})
    assert difference(beside(steps=STEPS), expected) < 1e-5, "rounding, over all steps"
    dense = in_warm_up(steps)
    assert calls() == (len(steps) - dense, {"warm-up steps": dense})
    report = svg_ear_compile.report()
    assert f"{DENSE} dense first steps, of {STEPS} (the pipeline)" in str(report)
    assert "3 x 16 x 16, read off the rotary tables" in str(report)
    assert "left as it is" not in str(report)
    assert report.totals()["measured_calls"] == len(steps) - dense, "each in the graph that made it"


def test_each_generation_begins_anew() -> None:
    expected, steps = alone(broadcast)
    beside, dense = cached(broadcast, {"density": 1.0, "dense_steps": DENSE}), in_warm_up(steps)
    for count in (1, 2):
        assert difference(beside(steps=STEPS), expected) < 1e-5
        assert calls() == (count * (len(steps) - dense), {"warm-up steps": count * dense})


@pytest.mark.parametrize(
    "cache", [broadcast, *(pytest.param(cache, marks=pytest.mark.slow) for cache in (first_block, faster))]
)
def test_sparse_beside_it(cache: Any) -> None:
    expected, steps = alone(cache)
    beside = cached(cache, {"density": 0.3})(steps=STEPS)
    assert 1e-6 < difference(beside, expected) < 0.1, "blocks were skipped and compensated"
    totals = svg_ear_compile.report().totals()
    if cache is not first_block:  # it decides by values, of which some are a little different
        assert totals["sparse_calls"] == len(steps)
    assert totals["measured_density"] == pytest.approx(0.3, abs=0.05)
    assert not totals["fallbacks"]


@pytest.mark.slow
def test_the_paper_s_clusters_beside_half_a_batch() -> None:
    """Centroids of another batch size are not carried on."""
    expected, steps = alone(faster)
    beside = cached(faster, {"preset": "svg_ear"})(steps=STEPS)
    assert 1e-6 < difference(beside, expected) < 0.1
    totals = svg_ear_compile.report().totals()
    assert (totals["sparse_calls"], totals["fallbacks"]) == (len(steps), {})
