"""The step clock against simulated sequences of calls."""

from __future__ import annotations

import threading

import pytest

import svg_ear_compile
from svg_ear_compile.schedule import SEEN, Clock, Tick, clock, dense_count, foreseen_steps, reset


class Thing:
    """Stands for a tensor: something that can be weakly referenced."""


def steps(ticks: list[Tick]) -> list[int]:
    return [tick.step for tick in ticks]


def run(clock: Clock, timesteps: list[float], models: str = "aa", shape: int = 0) -> list[Tick]:
    """Each timestep calls each of `models`."""
    return [clock.advance(model, float(t), shape) for t in timesteps for model in models]


def test_steps_and_branches_of_a_whole_model() -> None:
    ticks = run(Clock(), [999, 952, 900])
    assert [(t.step, t.branch) for t in ticks] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert len({t.generation for t in ticks}) == 1


@pytest.mark.parametrize("timesteps", [[999, 952, 900], [0.0, 0.3, 0.7]], ids=["down", "up"])
def test_a_second_generation_begins_when_time_goes_back(timesteps: list[float]) -> None:
    c = Clock()
    ticks = run(c, timesteps) + run(c, [t * 0.99 + 0.001 for t in timesteps])
    assert steps(ticks) == [0, 0, 1, 1, 2, 2] * 2
    assert len({t.generation for t in ticks}) == 2


def test_a_generation_of_two_steps_ends_at_its_first_timestep() -> None:
    assert steps(run(Clock(), [999, 500, 999, 500], "a")) == [0, 1, 0, 1]


def test_a_model_first_called_in_mid_trajectory_takes_no_warm_up() -> None:
    c = Clock()
    assert steps(run(c, [999, 900, 800], "aa") + run(c, [700, 600], "bb")) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert steps(run(c, [999], "aa")) == [0, 0]


def test_branches_belong_to_a_model() -> None:
    ticks = run(Clock(), [999, 900], "abab")
    assert [t.branch for t in ticks] == [0, 0, 1, 1] * 2


def test_another_resolution_is_another_generation() -> None:
    c = Clock()
    first, second = run(c, [999, 900], "a", shape=1), run(c, [800, 700], "a", shape=2)
    assert steps(first + second) == [0, 1, 0, 1]
    assert first[-1].generation != second[0].generation


def test_fingerprints_have_no_direction_but_a_first_one() -> None:
    c = Clock()
    ticks = [c.advance("a", moment, 0) for moment in ("x", "x", "y", "y", "z", "z", "x", "x", "y")]
    assert steps(ticks) == [0, 0, 1, 1, 2, 2, 0, 0, 1]
    assert c.num_steps(None) == (3, "the previous generation")


def test_a_set_number_of_steps_ends_a_generation_of_fingerprints() -> None:
    c = Clock()
    assert steps([c.advance("a", m, 0, limit=2) for m in ("u", "v", "x", "y")]) == [0, 1, 0, 1]


def test_without_moments_each_call_is_a_step() -> None:
    c = Clock()
    assert steps([c.advance("a", None, 0) for _ in range(4)]) == [0, 1, 2, 3]
    assert steps([Clock().advance("a", None, 0, limit=2) for _ in range(3)]) == [0, 0, 0]
    c = Clock()
    assert steps([c.advance("a", None, 0, limit=2) for _ in range(5)]) == [0, 1, 0, 1, 0]


def test_where_the_number_of_steps_is_from() -> None:
    c = Clock()
    run(c, [999, 990, 980])
    assert c.num_steps(None) == (50, "nothing: 50 is assumed")
    assert c.num_steps(30) == (30, "the setting num_steps")
    run(c, [999])
    assert c.num_steps(None) == (3, "the previous generation")
    run(c, [998.0])
    c.begin(20, None)
    assert c.num_steps(30) == (20, "generation(num_steps=...)")


def sigmas(count: int, shift: float) -> list[float]:
    """Of a schedule with flow shift, without the final 0."""
    linear = [1 - k / count for k in range(count)]
    return [shift * s / (1 + (shift - 1) * s) for s in linear]


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("shift", [1, 3, 5, 7, 12])
@pytest.mark.parametrize("count", [4, 5, 6, 8])
def test_foreseen_steps_are_foreseen_from_the_third_timestep(count: int, shift: float, rounded: bool) -> None:
    timesteps = [int(999 * s) if rounded else 1000 * s for s in sigmas(count, shift)]
    seen = [foreseen_steps([t / timesteps[0] for t in timesteps[: k + 1]]) for k in range(count)]
    assert seen[:2] == [None, None]
    late = 3 if shift == 12 and count == 8 else 2
    for k in range(late, count):
        assert seen[k] is not None
        assert dense_count(0.2, seen[k] or 0) <= dense_count(0.2, count) + (k == 2)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("shift", [1, 3, 5, 7, 12, 17])
@pytest.mark.parametrize("count", [20, 30, 50])
def test_many_steps_are_foreseen_from_the_middle(count: int, shift: float, rounded: bool) -> None:
    timesteps = [int(999 * s) if rounded else 1000 * s for s in sigmas(count, shift)]
    seen = [foreseen_steps([t / timesteps[0] for t in timesteps[: k + 1]]) for k in range(count)]
    assert set(seen[: int(SEEN * (count - 1))]) == {None}, "never taken for few"
    late = seen[count * 3 // 4 :]
    assert all(found is not None and abs(found - count) <= 1 for found in late)
    assert set(seen[-3:]) == {count}


@pytest.mark.parametrize("timesteps", [[0.0, 0.3, 0.7], [999, 999.5, 999.9], [999, 999, 999], [9, 0, 0]])
def test_what_is_no_schedule_foresees_nothing(timesteps: list[float]) -> None:
    c = Clock()
    run(c, [float(t) for t in timesteps], "a")
    assert c.num_steps(None) == (50, "nothing: 50 is assumed")


def test_the_first_generation_of_foreseen_steps() -> None:
    c, known = Clock(), []
    for sigma in sigmas(4, 7.0):
        run(c, [1000 * sigma])
        known.append(c.num_steps(None))
    assumed = (50, "nothing: 50 is assumed")
    assert known == [assumed, assumed, *[(4, "the timesteps so far")] * 2]
    run(c, [1000])
    assert c.num_steps(None) == (4, "the previous generation")


def test_the_helper_counts_calls_whatever_their_moments() -> None:
    c = Clock()
    c.begin(3, 2)
    ticks = [c.advance("a", moment, 0) for moment in "abcdef"]
    assert [(t.step, t.branch) for t in ticks] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert c.advance("a", "g", 0).step == 0


def test_the_helper_as_a_context_manager() -> None:
    reset()
    before = clock().tick
    with svg_ear_compile.generation(num_steps=4, branches=1):
        assert steps([clock().advance("a", None, 0) for _ in range(4)]) == [0, 1, 2, 3]
        assert clock().num_steps(None)[0] == 4
    assert clock().num_steps(None)[0] == 50
    assert clock().advance("a", None, 0).step == 0
    assert clock().tick.generation != before.generation
    with pytest.raises(ValueError, match="num_steps = 0"), svg_ear_compile.generation(num_steps=0):
        pass


def test_blocks_that_share_a_living_token_are_one_call() -> None:
    c, layers = Clock(), [Thing(), Thing()]
    new = []
    for _ in range(3):
        token = Thing()
        for layer in layers:
            new.append(not c.is_running(token, layer))
            if new[-1]:
                c.advance("a", None, 0, token=token, layer=layer)
        del token
    assert new == [True, False] * 3


def test_a_token_used_twice_is_two_calls() -> None:
    c, layers, token = Clock(), [Thing(), Thing()], Thing()
    new = []
    for layer in layers * 2:
        new.append(not c.is_running(token, layer))
        if new[-1]:
            c.advance("a", "x", 0, token=token, layer=layer)
    assert new == [True, False] * 2
    assert c.tick[:2] == (0, 1)


def test_without_a_token_the_first_layer_begins_a_call() -> None:
    c, layers = Clock(), [Thing(), Thing(), Thing()]
    new = []
    for layer in layers * 2:
        new.append(not c.is_running(None, layer))
        if new[-1]:
            c.advance("a", None, 0, layer=layer)
    assert new == [True, False, False] * 2
    assert c.tick.step == 1


@pytest.mark.parametrize(
    ("dense_steps", "num_steps", "expected"),
    [
        (0.2, 30, 6),
        (0.2, 50, 10),
        (0.2, 4, 1),
        (0.2, 2, 0),
        (0.25, 10, 3),
        (0.0, 50, 0),
        (6, 50, 6),
        (60, 50, 60),
    ],
)
def test_dense_count(dense_steps: int | float, num_steps: int, expected: int) -> None:
    assert dense_count(dense_steps, num_steps) == expected


def test_each_thread_has_its_clock_and_reset_reaches_all() -> None:
    mine = clock()
    others: list[Clock] = []
    thread = threading.Thread(target=lambda: others.append(clock()))
    thread.start()
    thread.join()
    assert others[0] is not mine
    reset()
    assert clock() is not mine
