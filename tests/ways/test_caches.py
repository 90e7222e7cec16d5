"""A cache of diffusers beside us: it leaves out layers, or attention, at some steps."""

from __future__ import annotations

from typing import Any

import pytest
from pipelines.tiny import Run, build
from toy import EAGER, calls

import svg_ear_compile

pytestmark = [pytest.mark.usefixtures("fresh"), pytest.mark.filterwarnings("error:svg_ear")]
STEPS, DENSE, LAYERS, BRANCHES = 6, 2, 2, 2


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


def run(cache: Any, options: dict[str, Any] | None = None) -> tuple[Run, list[int]]:
    """One clip with a cache: what it shows, and the step of each self attention that ran, if not compiled."""
    tiny, steps, seen = build("wan"), list[int](), list[float]()
    transformer = tiny.pipe.transformer

    def note(*_: Any) -> None:
        now = float(tiny.pipe.current_timestep)
        if now not in seen:
            seen.append(now)
        steps.append(seen.index(now))

    transformer.enable_cache(cache(tiny))
    if options is None:
        for block in transformer.blocks:
            block.attn1.to_q.register_forward_hook(note)
    else:
        transformer.compile_repeated_blocks(backend="svg_ear", options={**EAGER, **options})
    return tiny(steps=STEPS), steps


def difference(got: Run, expected: Run) -> float:
    return ((got.latents - expected.latents).norm() / expected.latents.norm()).item()


CLOCK = {first_block: "reads the timestep embedding", broadcast: "each call counts as a step"}


@pytest.mark.parametrize("cache", CLOCK)
def test_steps_and_calls_that_it_leaves_out_are_not_counted(cache: Any) -> None:
    """Compiled block by block. Inside of broadcast's hooks attention is a graph of its own."""
    alone, steps = run(cache)
    assert len(steps) < STEPS * LAYERS * BRANCHES, "it leaves out some"
    beside, _ = run(cache, {"density": 1.0, "dense_steps": DENSE})
    assert difference(beside, alone) < 1e-5, "rounding, over all steps"
    dense = sum(step < DENSE for step in steps)
    assert calls() == (len(steps) - dense, {"warm-up steps": dense})
    report = svg_ear_compile.report()
    assert CLOCK[cache] in str(report)
    assert "3 x 16 x 16, read off the rotary tables" in str(report)


@pytest.mark.parametrize("cache", CLOCK)
def test_sparse_beside_it(cache: Any) -> None:
    alone, steps = run(cache)
    beside, _ = run(cache, {"density": 0.3})
    assert 1e-6 < difference(beside, alone) < 0.1, "blocks were skipped and compensated"
    totals = svg_ear_compile.report().totals()
    assert totals["sparse_calls"] == len(steps)
    assert totals["measured_density"] == pytest.approx(0.3, abs=0.05)
    assert not totals["fallbacks"]
