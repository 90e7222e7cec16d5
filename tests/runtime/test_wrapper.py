"""What the host lays into the context before a call, and what it does after it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from runtime.callers import AS_IT_IS, MASK, STEERED, Model, Pipeline, callable_of
from torch import Tensor

from svg_ear_compile.kernels import context
from svg_ear_compile.runtime import generations
from svg_ear_compile.runtime.generations import Generation
from svg_ear_compile.runtime.head_variants import RESPLIT
from svg_ear_compile.runtime.key_padding import MaskSource


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    generations.end_all()
    yield
    generations.end_all()


def test_dense_reasons_are_sentences() -> None:
    run, graph, _ = callable_of({"dense_steps": 2, "dense_layers": "1-1"})
    Pipeline(Model(run, run, run))(3, guided=1)
    first, second = "step 1 of 2 dense warm-up steps", "step 2 of 2 dense warm-up steps"
    assert graph.decided("dense") == [first] * 3 + [second] * 3 + ["", "layer 1 is dense", ""]
    assert run.record.sparse[0] == 2
    assert run.record.dense[0] == {"warm-up steps": 6, "dense layers": 1}
    assert run.record.steps == "2 dense first steps, of 3 (the pipeline)"


def test_layers_are_numbered_by_their_place_in_the_model() -> None:
    run, graph, _ = callable_of({"dense_layers": "0-0"})
    Pipeline(Model(run, run))(2)
    assert graph.decided("dense") == ["layer 0 is dense", ""] * 4


def test_a_mask_is_read_once_in_a_call_of_the_model() -> None:
    run, graph, _ = callable_of({})
    Pipeline(Model(run, run, run))(2, guided=1)
    assert graph.mask_reads == 2
    assert all(call.decisions.mask_ids == {0: 0} for call in graph.contexts)


def prefix(count: int) -> Tensor:
    return (torch.arange(16) < count)[None, None, None]


def reads_of(sources: list[MaskSource], between: Any = None, mask: Tensor | None = None) -> list[int]:
    """How often each of several graphs, called in turn with one mask in one call of a model, reads it."""
    mask = prefix(12) if mask is None else mask
    made = [callable_of({}, source, number) for number, source in enumerate(sources)]

    def then(run: Any) -> Any:
        def call(*args: Any) -> Any:
            out = run(*args)
            if between is not None:
                between(args[MASK])
            return out

        return call

    Model(*(then(run) for run, _, _ in made))(torch.zeros(1, 16, 8), torch.tensor([1.0]), mask)
    return [graph.mask_reads for _, graph, _ in made]


def test_graphs_share_what_a_mask_shows_that_is_an_argument_of_both() -> None:
    assert reads_of([AS_IT_IS, AS_IT_IS]) == [1, 0]
    assert reads_of([AS_IT_IS, AS_IT_IS], lambda mask: mask.logical_not_()) == [1, 1], "changed in place"


def test_graphs_share_no_masks_that_they_make_in_other_ways() -> None:
    hidden, (made, here) = AS_IT_IS._replace(function="hidden"), [MaskSource((MASK,), (n, 0)) for n in (0, 1)]
    assert reads_of([AS_IT_IS, hidden, made, here, made]) == [1, 1, 1, 1, 0]


def test_masks_of_inference_mode_have_no_version_and_are_read_in_each_call() -> None:
    with torch.inference_mode():
        mask = prefix(12)
    assert reads_of([AS_IT_IS, AS_IT_IS], mask=mask) == [1, 1]


def test_a_grid_is_read_once_per_kind_of_rotary_table() -> None:
    run, graph, grids = callable_of({})
    model = Model(run)
    for tokens in (16, 16, 32, 16):
        Pipeline(model)(1, tokens=tokens)
    assert [call.decisions.grid for call in graph.contexts[::2]] == [
        (2, 4, 2),
        (2, 4, 2),
        (2, 8, 2),
        (2, 4, 2),
    ]
    assert grids.reads == 3
    assert run.record.grid == (2, 4, 2)


def carried_in(options: dict[str, Any], steps: int, **changes: Any) -> list[Any]:
    """What each call of the one layer finds of what all of them leave."""
    run, graph, _ = callable_of(options)
    graph.leave = {0: (torch.zeros(1), torch.ones(1))}
    before: list[Any] = []
    graph.look = lambda call: before.append(call.memo.carried.get(0))
    Pipeline(Model(run))(steps, guided=1, **changes)
    return [None if x is None else x is graph.leave[0] for x in before]


def test_what_clustering_leaves_is_used_again() -> None:
    assert carried_in({"preset": "svg_ear", "dense_steps": 0, "dense_layers": 0}, 3) == [None, True, True]
    again = [None] + [True] * (RESPLIT - 1)
    assert carried_in({"order": "splits"}, 2 * RESPLIT + 1) == again * 2 + [None], "made anew in turns"
    assert carried_in({"order": "cubes"}, 3) == [None] * 3


def test_nothing_is_kept_after_the_last_step_nor_after_the_pipeline_returned() -> None:
    run, graph, _ = callable_of({"order": "splits"})
    left = torch.zeros(1)
    alive = weakref.ref(left)
    graph.leave = {0: (left, left)}
    del left
    seen: list[bool] = []

    def each(i: int) -> None:
        graph.leave.clear()
        graph.contexts.clear()
        gc.collect()
        seen.append(alive() is not None)

    Pipeline(Model(run))(3, guided=1, each=each)
    assert seen == [True, True, False], "it is gone before the clip is decoded"
    generations = [x for x in gc.get_objects() if isinstance(x, Generation)]
    assert not [g for g in generations if g.num_steps == 3]


def test_failures_inside_the_ops_count_once_as_dense_and_a_third_in_a_row_ends_it() -> None:
    run, graph, _ = callable_of({})
    graph.fail = True
    Pipeline(Model(run))(5, guided=1)
    assert (run.record.sparse[0], run.record.dense[0]) == (0, {"failures": 3, "failed too often": 2})
    assert graph.decided("dense")[-1] == "it failed 3 times in a row"
    graph.fail = False
    Pipeline(Model(run))(1, guided=1)
    assert run.record.sparse[0] == 1, "another generation tries again"


def test_what_the_ops_call_too_small_is_counted_by_that_name() -> None:
    run, graph, _ = callable_of({})
    graph.look = lambda call: call.results.dense.update({0: "too few tokens"})
    Pipeline(Model(run))(5, guided=1)
    assert run.record.dense[0] == {"too few tokens": 5}


def test_the_context_ends_with_the_call() -> None:
    run, graph, _ = callable_of({})
    Pipeline(Model(run))(1)
    assert context.current() is not graph.contexts[-1]


@pytest.mark.parametrize("name", ["_prepare", "_finish"])
def test_failures_around_a_call_are_counted_warned_of_once_and_raised_by_strict(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, graph, _ = callable_of({"strict": False})
    monkeypatch.setattr(run, name, lambda *a: 1 / 0)
    with pytest.warns(RuntimeWarning, match="svg_ear: a .* because of ZeroDivisionError") as heard:
        Pipeline(Model(run))(3, guided=1)
    assert len(heard) == 1
    assert sum(run.record.fallbacks.values()) == 3
    assert all(bool(dense) == (name == "_prepare") for dense in graph.decided("dense"))
    run, graph, _ = callable_of({"strict": True})
    monkeypatch.setattr(run, name, lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Pipeline(Model(run))(1)


def test_the_error_of_a_step_steers_the_next_for_all_layers_and_branches() -> None:
    run, graph, _ = callable_of({**STEERED, "max_density": 0.95})
    graph.error = 0.12
    Pipeline(Model(run, run))(3)
    densities = graph.decided("density")
    assert [len(set(densities[4 * step : 4 * step + 4])) for step in range(3)] == [1, 1, 1]
    assert densities[4] != densities[0]
    seeds = [measure.seed for measure in graph.decided("measure") if measure is not None]
    assert len(set(seeds)) == len(seeds), "all draw rows of their own"


def test_a_new_generation_goes_the_same_way_whatever_ran_before() -> None:
    run, graph, _ = callable_of({**STEERED, "max_density": 0.95})
    graph.error, model = 0.06, Model(run)
    pipeline = Pipeline(model)
    pipeline(6)
    alone = [call.decisions for call in graph.contexts]
    for before in (
        lambda: pipeline(2),
        lambda: pipeline(6, each=lambda i: setattr(pipeline, "interrupt", i > 1)),
    ):
        before()
        graph.contexts.clear()
        pipeline(6)
        assert [call.decisions for call in graph.contexts] == alone


def test_audit_asks_for_true_errors() -> None:
    for audit in (False, True):
        run, graph, _ = callable_of({"audit": audit})
        Pipeline(Model(run))(1)
        assert graph.contexts[0].decisions.audit == audit
