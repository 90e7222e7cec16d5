"""Which rows of a packed sequence are video: read off the model's call once, and again when they change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from svg_ear_compile.runtime import packed
from svg_ear_compile.runtime.caller import Caller
from svg_ear_compile.runtime.generations import Generation, ModelCalls

NAMES = ("video_indices", "position_ids")


def positions(*videos: tuple[list[float], list[float], list[float]]) -> Tensor:
    """[n,3] of videos of these times, heights and widths, one after another."""
    axes = [[torch.tensor(x, dtype=torch.float64) for x in video] for video in videos]
    return torch.cat([torch.stack(torch.meshgrid(*x, indexing="ij"), -1).reshape(-1, 3) for x in axes])


CLIP = ([7.0, 8.7, 15.3], [0.0, 0.5], [-1.0, 0.0, 1.0])


@pytest.mark.parametrize(
    ("videos", "grids"),
    [
        ([CLIP], ((3, 2, 3),)),
        ([([7.0], *CLIP[1:]), CLIP], ((1, 2, 3), (3, 2, 3))),  # a keyframe at the time of the first frame
        ([([6.0], *CLIP[1:]), CLIP], ((4, 2, 3),)),
        ([([1.0, 2.0], [0.0, 1.0, 2.0], [0.0, 1.0]), CLIP], ((2, 3, 2), (3, 2, 3))),  # of another shape
        ([([1.0, 2.0], [0.0], [0.0, 1.0]), ([3.0], [0.0], [0.0, 1.0])], ((3, 1, 2),)),
        ([([1.0], [0.0], [0.0])], ((1, 1, 1),)),
    ],
)
def test_grids(videos: list[Any], grids: Any) -> None:
    assert packed.find_grids(positions(*videos)) == grids


def test_rows_that_form_no_grid() -> None:
    rows = positions(CLIP)
    assert packed.find_grids(rows[:-1]) == (), "a frame that is not full"
    rows[1, 1] = 0.1
    assert packed.find_grids(rows) == (), "a row that is not straight"


def test_rows_column_by_column_form_no_grid() -> None:
    """Each column would be a grid of its own, and each grid has an order of its own to be made."""
    rows = positions((list(range(9)), list(range(8)), list(range(8)))).view(9, 8, 8, 3)
    assert packed.find_grids(rows.reshape(-1, 3)) == ((9, 8, 8),)
    assert packed.find_grids(rows.transpose(1, 2).reshape(-1, 3)) == ()


@pytest.mark.parametrize("video", [[0, 0, 1], [-1, 0, 1], [0, 1, 40], []])
def test_what_is_no_list_of_rows(video: list[int]) -> None:
    assert packed.read(torch.tensor(video, dtype=torch.int64), torch.zeros(20, 3)) is None
    assert packed.read(torch.tensor([0, 1]), torch.zeros(20, 2)) is None


class Model:
    """The calls of a model in one generation, and how often its arguments were read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.generation, self.calls, self.reads = Generation(None, ""), ModelCalls(0), 0
        read = packed.read

        def spy(*tensors: Tensor) -> Any:
            self.reads += 1
            return read(*tensors)

        monkeypatch.setattr(packed, "read", spy)

    def __call__(self, frozen: bool = False, **arguments: Any) -> packed.Packed | None:
        who = Caller(None, None, ((), arguments), None)
        return packed.packed_rows(who, NAMES, self.generation, self.calls, frozen)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    return Model(monkeypatch)


def arguments() -> dict[str, Tensor]:
    return {
        "video_indices": torch.arange(2, 20),
        "position_ids": torch.cat([torch.zeros(2, 3), positions(CLIP)]),
    }


def test_read_once_per_generation(model: Model) -> None:
    call = arguments()
    found = model(**call)
    assert found is not None
    assert (found.grids, found.length, found.frames) == (((3, 2, 3),), 20, 3)
    assert found.places.other.tolist() == [0, 1]
    assert model(**call) is found
    assert model.reads == 1
    model.generation = Generation(None, "")
    model(**call)
    assert model.reads == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda call: call["video_indices"].copy_(torch.arange(18)),
        lambda call: call.update(video_indices=torch.arange(18)),
        lambda call: call["position_ids"].mul_(2),
    ],
)
def test_a_change_is_noticed(model: Model, change: Callable[[dict[str, Tensor]], Any]) -> None:
    call = arguments()
    before = model(**call)
    change(call)
    after = model(**call)
    assert model.reads == 2
    assert before is not None
    assert after is not None
    same = torch.equal(before.places.video, after.places.video)
    assert (before.places.name == after.places.name) == same


def test_inference_tensors_are_read_in_each_call_of_the_model(model: Model) -> None:
    with torch.inference_mode():
        call = arguments()
    for step in range(2):
        model.calls.hear("a block", step, 0, False)
        model(**call)
        model(**call)
    assert model.reads == 2


def test_no_such_arguments(model: Model) -> None:
    assert model() is None
    assert model(video_indices=torch.arange(3)) is None
    assert model(video_indices=3, position_ids=torch.zeros(20, 3)) is None


def test_nothing_is_read_while_a_cuda_graph_is_recorded(model: Model) -> None:
    call = arguments()
    assert model(frozen=True, **call) is None
    known = model(**call)
    assert model(frozen=True, **call) is known is not None
    assert model.reads == 1
