"""What the host lays into the context before a call, with a stand-in for the compiled graph."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from svg_ear_compile import schedule
from svg_ear_compile.calls import CallPlan, SparseCallable
from svg_ear_compile.control import RESPLIT
from svg_ear_compile.errors import call_errors
from svg_ear_compile.forms import ORDERS
from svg_ear_compile.kernels import context
from svg_ear_compile.kernels.context import Measure
from svg_ear_compile.passes.site import GraphInputs
from svg_ear_compile.records import GraphRecord
from svg_ear_compile.seen_keys import MaskSource
from svg_ear_compile.settings import resolve
from svg_ear_compile.state import layers as state

VIDEO, TIME, ROTARY, MASK, WEIGHT = range(5)
SPARSE = {"dense_steps": 0, "dense_layers": 0, "strict": True, "density": 0.25}
STEERED = {**SPARSE, "density": None, "target_error": 0.1, "measure_every": 1}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    schedule.reset()
    yield
    schedule.reset()


class Graph:
    """Records the context of each call, and reads the mask if the context does not know it."""

    def __init__(self) -> None:
        self.contexts: list[context.Call] = []
        self.mask_reads = 0
        self.fail: set[int] = set()
        self.leave: dict[int, tuple[Tensor, Tensor]] = {}
        self.error = 0.0
        """What every call measures, whatever its density."""
        self.trial: Tensor | None = None
        """[orders * forms, heads]: what a trial of one density measures instead, in a dense call."""
        self.look: Callable[[context.Call], Any] = lambda call: None

    def __call__(self, *args: Any) -> str:
        call = context.current()
        self.contexts.append(call)
        self.look(call)
        if 0 not in call.seen_keys:
            self.mask_reads += 1
            call.seen_keys[0] = int(args[MASK].sum())
        call.dense |= dict.fromkeys(self.fail, "failed: ValueError")
        call.carried |= self.leave
        for request in call.measure.values():
            tried = len(request.densities) * len(request.orders or ("its own",)) * (1 + request.first_order)
            own = 0 if call.dense else 1
            errors = torch.full((own + tried,), self.error)
            call.measured[0] = torch.stack([errors**2, torch.ones_like(errors)], 1)[..., None, None]
            if self.trial is not None and request.orders and call.dense:
                lost = self.trial
                call.measured[0] = torch.stack([lost, torch.full_like(lost, 100.0)], 1)[:, :, None]
        return "out"


class Grids:
    def __init__(self) -> None:
        self.reads = 0

    def __call__(self, tables: Sequence[Tensor], tokens: int) -> tuple[int, int, int]:
        self.reads += 1
        return 2, tokens // 4, 2


AS_IT_IS = MaskSource((MASK,), "shown", sized=False)


def block(
    options: dict[str, Any], mask: MaskSource = AS_IT_IS, **inputs: Any
) -> tuple[SparseCallable, Graph, Grids]:
    """The callable of a graph with one site; its arguments are [video, time, rotary, mask, weight]."""
    known: dict[str, Any] = {"timestep": None, "temb": TIME, "rotary": (ROTARY,), "parameters": {0: WEIGHT}}
    graph, grids = Graph(), Grids()
    plan = CallPlan((0,), GraphInputs(**{**known, **inputs}), VIDEO, {0: 0}, {0: mask}, True, grids)
    resolved = resolve({**SPARSE, **options}, {})
    return SparseCallable(graph, plan, resolved.settings, GraphRecord(0, resolved)), graph, grids


def model_call(run: SparseCallable, layers: list[nn.Parameter], time: float, tokens: int = 16) -> None:
    """A model calls its blocks: they share everything but the weight."""
    shared = (
        torch.zeros(1, tokens, 8),
        torch.full((1, 6, 8), time),
        torch.arange(tokens * 4.0).reshape(tokens, 4),
        torch.ones(1, 1, 1, tokens, dtype=torch.bool),
    )
    for weight in layers:
        assert run(*shared, weight) == "out"


@pytest.fixture
def layers() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(8, 8)) for _ in range(3)]


def test_dense_reasons_are_sentences(layers: list[nn.Parameter]) -> None:
    run, graph, _ = block({"dense_steps": 2, "dense_layers": "1-1", "num_steps": 4})
    for time in (9.0, 9.0, 8.0, 7.0):
        model_call(run, layers, time)
    reasons = [call.dense.get(0) for call in graph.contexts]
    first, second = "step 1 of 2 dense warm-up steps", "step 2 of 2 dense warm-up steps"
    assert reasons == [first] * 6 + [second] * 3 + [None, "layer 1 is dense", None]
    assert run.record.sparse[0] == 2
    assert run.record.dense[0] == {"warm-up steps": 9, "dense layers": 1}


def test_a_layer_without_a_parameter_is_counted_in_its_call() -> None:
    run, graph, _ = block({"dense_layers": 1}, parameters={})
    plain = [torch.zeros(8, 8) for _ in range(3)]
    for time in (9.0, 8.0):
        model_call(run, plain, time)  # type: ignore[arg-type]
    assert [call.dense.get(0) for call in graph.contexts] == ["layer 0 is dense", None, None] * 2


def test_a_mask_made_in_each_model_call_is_read_once_in_it(layers: list[nn.Parameter]) -> None:
    run, graph, _ = block({})
    for time in (9.0, 8.0):
        model_call(run, layers, time)
    assert graph.mask_reads == 2
    assert all(call.mask_ids == {0: 0} for call in graph.contexts)


def masked_calls(masks: list[Tensor], times: list[float], each: Any = None) -> tuple[int, list[Any]]:
    """One-block model calls with each of the masks in turn at each time: (reads, what the ops were told)."""
    run, graph, _ = block({})
    weight = nn.Parameter(torch.zeros(8, 8))
    for time in times:
        for mask in masks:
            run(torch.zeros(1, 16, 8), torch.full((1, 6, 8), time), torch.zeros(16, 4), mask, weight)
            if each is not None:
                each(mask)
    return graph.mask_reads, [call.seen_keys[0] for call in graph.contexts]


def prefix(count: int) -> Tensor:
    return (torch.arange(16) < count)[None, None, None]


def test_a_mask_is_read_once_per_generation_and_branch() -> None:
    assert masked_calls([prefix(12)], [9, 8, 7]) == (1, [12] * 3)
    assert masked_calls([prefix(12), prefix(16)], [9, 8, 7]) == (2, [12, 16] * 3)
    assert masked_calls([prefix(12)], [9, 8, 9, 8]) == (2, [12] * 4), "a new generation"


def test_a_mask_changed_in_place_is_read_again() -> None:
    def change(mask: Tensor) -> None:
        mask[..., int(mask.sum()) - 1] = False

    assert masked_calls([prefix(12)], [9, 8, 7], change) == (3, [12, 11, 10])


def test_a_mask_with_other_storage_is_read_again() -> None:
    def change(mask: Tensor) -> None:
        mask.data = prefix(int(mask.sum()) - 1)

    assert masked_calls([prefix(12)], [9, 8, 7], change) == (3, [12, 11, 10])


def reads_of(sources: list[MaskSource], between: Any = None) -> list[int]:
    """How often each of several graphs, called in turn with one mask in one model call, reads it."""
    blocks = [block({}, source) for source in sources]
    shared = [torch.zeros(1, 16, 8), torch.full((1, 6, 8), 9.0), torch.zeros(16, 4), prefix(12)]
    for run, _, _ in blocks:
        run(*shared, nn.Parameter(torch.zeros(8, 8)))
        if between is not None:
            between(shared[MASK])
    return [graph.mask_reads for _, graph, _ in blocks]


def shortened(mask: Tensor) -> None:
    """At the same address, of the same version."""
    mask.data = mask.data[..., :8]


def test_graphs_share_what_a_mask_shows_that_is_an_argument_of_both() -> None:
    assert reads_of([AS_IT_IS, AS_IT_IS]) == [1, 0]
    assert reads_of([AS_IT_IS, AS_IT_IS], lambda mask: mask.logical_not_()) == [1, 1]
    assert reads_of([AS_IT_IS, AS_IT_IS], shortened) == [1, 1]


def test_graphs_share_no_masks_that_they_make_in_other_ways() -> None:
    hidden, (made, here) = AS_IT_IS._replace(function="hidden"), [MaskSource((MASK,), (n, 0)) for n in (0, 1)]
    assert reads_of([AS_IT_IS, hidden, made, here, made]) == [1, 1, 1, 1, 0]


def test_masks_of_inference_mode_have_no_version_and_are_read_in_each_call() -> None:
    with torch.inference_mode():
        mask = prefix(12)
    assert masked_calls([mask], [9, 8, 7]) == (3, [12] * 3)


def test_masks_are_held_weakly() -> None:
    run, graph, _ = block({})
    weight, shared = nn.Parameter(torch.zeros(8, 8)), torch.zeros(1, 6, 8)
    for count in range(1, 17):
        run(torch.zeros(1, 16, 8), shared, torch.zeros(16, 4), prefix(count), weight)  # at one address, maybe
    assert graph.mask_reads == 16
    assert [call.seen_keys[0] for call in graph.contexts] == list(range(1, 17))


def test_a_grid_is_read_once_per_kind_of_rotary_table(layers: list[nn.Parameter]) -> None:
    run, graph, grids = block({})
    for tokens in (16, 16, 32, 16):
        model_call(run, layers, 9.0, tokens)
    assert [call.grid for call in graph.contexts[::3]] == [(2, 4, 2), (2, 4, 2), (2, 8, 2), (2, 4, 2)]
    assert grids.reads == 3
    assert run.record.grid == (2, 4, 2)


def test_centroids_are_carried_until_the_shape_changes(layers: list[nn.Parameter]) -> None:
    run, graph, _ = block({"preset": "svg_ear"})
    left = (torch.zeros(1), torch.ones(1))
    graph.leave = {0: left}
    for time in (9.0, 8.0):
        model_call(run, layers[:1], time)
    graph.leave = {}
    model_call(run, layers[:1], 7.0)
    assert graph.contexts[2].carried[0] is left
    model_call(run, layers[:1], 6.0, tokens=32)
    assert not graph.contexts[3].carried


def test_cubes_carry_nothing(layers: list[nn.Parameter]) -> None:
    run, graph, _ = block({"order": "cubes"})
    graph.leave = {0: (torch.zeros(1), torch.ones(1))}
    model_call(run, layers, 9.0)
    graph.leave = {}
    model_call(run, layers, 8.0)
    assert not graph.contexts[-1].carried


def test_orders_of_splits_are_used_again_and_made_anew_in_turns(layers: list[nn.Parameter]) -> None:
    run, graph, _ = block({"order": "splits", "density": 0.3})
    left = (torch.zeros(1), torch.ones(1))
    graph.leave = {0: left}
    before = []
    graph.look = lambda call: before.append(call.carried.get(0))
    for time in range(2 * RESPLIT):
        model_call(run, layers[:1], 90.0 - time)
    assert before == ([None] + [left] * (RESPLIT - 1)) * 2


def test_heads_go_by_the_forms_that_a_trial_chose(layers: list[nn.Parameter]) -> None:
    options = {"density": 0.3, "dense_steps": 2, "num_steps": 6}
    run, graph, _ = block(options)
    # squared errors of two heads: cubes without and with first-order terms, then splits
    graph.trial = torch.tensor([[4.0, 4.0], [3.9, 2.0], [1.0, 9.0], [1.1, 9.0]])
    for time in (9.0, 8.0, 7.0, 6.0):
        model_call(run, layers[:1], time)
    assert graph.contexts[0].measure[0] == Measure(graph.contexts[0].measure[0].seed, (0.3,), ORDERS, True)
    assert [call.split_heads for call in graph.contexts] == [{}, {}, {0: (True, False)}, {0: (True, False)}]
    chosen = [{}, {}, {0: (False, True)}, {0: (False, True)}]
    assert [call.first_order for call in graph.contexts] == chosen
    shares = {(e.split_share, e.first_order_share) for e in call_errors(run.record) if not e.dense}
    assert shares == {(0.5, 0.5)}


def test_failures_inside_the_ops_count_as_dense(layers: list[nn.Parameter]) -> None:
    run, graph, _ = block({})
    graph.fail = {0}
    model_call(run, layers, 9.0)
    assert (run.record.sparse[0], run.record.dense[0]) == (0, {"failures": 3})


def test_the_largest_timestep_of_all_tokens_counts() -> None:
    run, _, _ = block({"num_steps": 5}, timestep=TIME, temb=None)
    weight = nn.Parameter(torch.zeros(8, 8))
    for timestep in ([[0, 9, 9]], [[0, 9, 9]], [[0, 5, 5]]):
        run(
            torch.zeros(1, 16, 8), torch.tensor(timestep), torch.zeros(16, 4), torch.ones(1, 1, 1, 16), weight
        )
    assert schedule.clock().tick[:2] == (1, 0)


def test_the_context_ends_with_the_call(layers: list[nn.Parameter]) -> None:
    run, graph, _ = block({})
    model_call(run, layers, 9.0)
    assert context.current() is not graph.contexts[-1]


def test_strict_raises_before_a_call(layers: list[nn.Parameter], monkeypatch: pytest.MonkeyPatch) -> None:
    run, graph, _ = block({})
    monkeypatch.setattr(run, "_tick", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model_call(run, layers, 9.0)
    assert not graph.contexts


def seen(graph: Graph) -> list[tuple[float | None, bool]]:
    """(density, whether it measured) of each call; density None: dense."""
    return [(None if call.dense else call.density[0], 0 in call.measure) for call in graph.contexts]


def test_a_set_density_is_laid_out_and_measured(layers: list[nn.Parameter]) -> None:
    run, graph, _ = block({"density": 0.3, "measure_every": 2})
    for time in (9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0):
        model_call(run, layers[:1], time)
    assert seen(graph) == [(0.3, True)] * 3 + [(0.3, False), (0.3, True)] * 2


def test_errors_of_two_steps_ago_steer_each_layer_and_branch_by_itself(layers: list[nn.Parameter]) -> None:
    run, graph, _ = block(STEERED)
    for time in (9.0, 8.0, 7.0):
        for branch in range(2):
            graph.error = 0.12 * branch  # the unconditional calls need more
            model_call(run, layers[:2], time)
    densities = [density or 1.0 for density, _ in seen(graph)]
    cautious = densities[0]
    assert densities[:8] == [cautious] * 8
    assert all(density < cautious for density in densities[8:10])
    assert all(density > cautious for density in densities[10:])
    seeds = [call.measure[0].seed for call in graph.contexts]
    assert len(set(seeds)) == len(seeds), "all draw rows of their own"


def test_warm_up_steps_try_densities_once_and_dense_layers_never(layers: list[nn.Parameter]) -> None:
    run, graph, _ = block({**STEERED, "dense_steps": 3, "num_steps": 5, "dense_layers": "1-1"})
    graph.error = 0.1
    for time in (9.0, 8.0, 7.0, 6.0):
        model_call(run, layers[:2], time)
    assert [(call.dense != {}, 0 in call.measure) for call in graph.contexts] == (
        [(True, False)] * 2
        + [(True, True), (True, False)]
        + [(True, False)] * 2
        + [(False, True), (True, False)]
    )
    assert len(graph.contexts[2].measure[0].densities) == 2


def test_a_new_generation_starts_anew_and_goes_the_same_way(layers: list[nn.Parameter]) -> None:
    run, graph, _ = block({**STEERED, "num_steps": 6})
    graph.error = 0.03
    for _ in range(2):
        for time in (9.0, 8.0, 7.0, 6.0, 5.0, 4.0):
            model_call(run, layers[:1], time)
    first, second = seen(graph)[:6], seen(graph)[6:]
    assert first == second
    assert first[0] != first[-1]
    assert [c.measure for c in graph.contexts[:6]] == [c.measure for c in graph.contexts[6:]]


def test_the_guard_is_named_and_counted(layers: list[nn.Parameter]) -> None:
    run, graph, _ = block({"density": 0.3, "max_error": 0.5, "measure_every": 1})
    graph.error = 0.6
    for time in (9.0, 8.0, 7.0, 6.0):
        model_call(run, layers, time)
    reason = "its error was 0.6, more than max_error 0.5"
    assert [call.dense.get(0) for call in graph.contexts] == [None] * 6 + [reason] * 6
    assert run.record.dense[0] == {"error beyond max_error": 6}


def test_a_failed_call_counts_as_dense_for_the_control(layers: list[nn.Parameter]) -> None:
    run, graph, _ = block({"density": 0.3})
    graph.fail = {0}
    model_call(run, layers[:1], 9.0)
    (control,) = run.record.controls.values()
    assert control.steps[0].decision.counter == "failures"


def test_controls_live_as_long_as_their_layers(layers: list[nn.Parameter]) -> None:
    run, _, _ = block(STEERED)
    model_call(run, layers, 9.0)
    assert len(run.record.controls) == 3
    state.clear()  # as torch._dynamo.reset() does
    gc.collect()
    assert not run.record.controls


def test_audit_asks_for_true_errors(layers: list[nn.Parameter]) -> None:
    for audit in (False, True):
        run, graph, _ = block({"audit": audit})
        model_call(run, layers[:1], 9.0)
        assert graph.contexts[0].audit == audit
