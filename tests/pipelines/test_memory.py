"""What of ours is alive after a pipeline has returned, and while it decodes?"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from pipelines.runs import BLOCKWISE, after, generate, logged, make, stop
from torch import Tensor
from toy import EAGER, ToyInputs, ToyVideo

import svg_ear_compile
from svg_ear_compile.runtime.generations import Generation
from svg_ear_compile.runtime.layers import Layer

pytestmark = [pytest.mark.usefixtures("fresh"), pytest.mark.filterwarnings("error:svg_ear")]

CARRIES = {"order": "splits", "dense_steps": 1}


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    """What is freed late would be memory that the decoder lacks."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def alive(kind: type) -> list[Any]:
    return [found for found in gc.get_objects() if type(found) is kind]


def carried() -> list[Tensor]:
    return [x for layer in alive(Layer) for _, kept in layer.carried.values() for x in kept]


def fail(pipe: Any) -> None:
    raise RuntimeError("stopped")


def test_nothing_of_a_generation_outlives_the_call_of_its_pipeline() -> None:
    tiny = make("wan", BLOCKWISE, **CARRIES)
    seen: list[int] = []

    def look(pipe: Any) -> None:
        seen.append(len(alive(Generation)))

    generate(tiny, 4, **after(1, look))
    assert alive(Generation) == []
    generate(tiny, 4, **after(1, stop))
    assert alive(Generation) == []
    try:
        generate(tiny, 4, **after(2, fail))
    except RuntimeError as error:
        assert str(error) == "stopped"  # noqa: PT017 - pytest.raises would keep the frames
    assert alive(Generation) == []
    assert len(logged(3)[-1]) == 3 * 2, "the last one failed in its third step"
    assert seen == [1], "there is one while it runs"


def test_no_order_is_carried_while_the_clip_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Wan 2.2's first transformer not even while the second one runs."""
    tiny = make("wan22", BLOCKWISE, **CARRIES)
    held: dict[str, int] = {}
    decode = tiny.pipe.vae.decode

    def look(where: str) -> None:
        held[where] = len(carried())

    def spy(*args: Any, **kwargs: Any) -> Any:
        look("in the decoder")
        return decode(*args, **kwargs)

    def each(pipe: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        look(f"after step {i}")
        return tensors

    monkeypatch.setattr(tiny.pipe.vae, "decode", spy)
    generate(tiny, 8, output_type="pt", callback_on_step_end=each)
    layers, branches, queries_and_keys = 2, 2, 2
    of_one_model = layers * branches * queries_and_keys
    assert held["after step 1"] == held["after step 6"] == of_one_model
    assert held["in the decoder"] == 0


class Named(ToyVideo):
    """Its forward has variables of the names that a sampling loop has."""

    def forward(self, hidden_states: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        t = self.time(timesteps[:, None] / 1000)
        x = self.patch(hidden_states).flatten(2).transpose(1, 2)
        before = weakref.ref(x)
        x = self.blocks[0](x, encoder_hidden_states, t)
        self.is_alive = before() is not None
        return self.out(x)


def test_tensors_of_a_model_whose_block_is_compiled_live_no_longer(toy_inputs: ToyInputs) -> None:
    """To look at the variables of a frame keeps them alive, up to Python 3.12."""
    model = Named(layers=1).eval()
    model.blocks[0].compile(backend="svg_ear", options={**EAGER, "sites": "attn1"})
    model(*toy_inputs())
    assert svg_ear_compile.report().totals()["sparse_calls"] == 1
    assert not model.is_alive
