"""What does the host do around one call of a compiled graph? It finds out who calls, decides, runs and counts.

For each rewritten site it decides whether this call is dense, its density otherwise, and whether its error is measured
(density.py). It puts that, the frame grid and carried orders into the context that the ops read. From the device it
reads errors that were measured a step earlier; outside of a pipeline one timestep per call of the model; and a few
numbers of a rotary table, if only that shows the frame grid.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import context
from ..passes.site import GraphInputs
from ..reporting.records import GraphRecord
from ..settings import Settings
from . import key_padding, step_clock
from .caller import caller
from .density import CallLog, Controller, Decision, logged
from .generations import Generation, ModelCalls
from .key_padding import MaskSource
from .layers import Layer

Grid = tuple[int, int, int]
SAMPLE = 64
"""This many numbers, evenly spread, tell one rotary table from another."""


@dataclass(frozen=True)
class RuntimePlan:
    """What is known at compile time about the calls of a graph.

    sites: the numbers of the rewritten sites, in order. video: the position of the argument whose shape tells
    resolutions apart. mask_ids: sites with the same number share a mask. masks: what each of these masks is computed
    from, if known. needs_grid: whether no site's grid is in the graph.
    """

    sites: tuple[int, ...]
    inputs: GraphInputs
    video: int | None
    mask_ids: dict[int, int]
    masks: dict[int, MaskSource]
    needs_grid: bool
    read_grid: Callable[[Sequence[Tensor], int], Grid | None]


class _Visit(NamedTuple):
    """A site in one call: its layer, and what was decided for it."""

    site: int
    layer: Layer
    decision: Decision


class _Run(NamedTuple):
    """One call.

    stamp: the shape, device and stream that carried tensors belong to. frozen: whether a CUDA graph is being recorded,
    which keeps its tensors to itself.
    """

    generation: Generation
    calls: ModelCalls
    controller: Controller
    stamp: Any
    frozen: bool
    visits: list[_Visit]


class SparseCallable:
    """The compiled callable of a graph with rewritten sites."""

    def __init__(
        self, compiled: Callable[..., Any], plan: RuntimePlan, settings: Settings, record: GraphRecord
    ) -> None:
        self.compiled, self.plan, self.settings, self.record = compiled, plan, settings, record
        self._warned: set[str] = set()
        self._fixed: dict[Any, Any] = {}
        self._grids: dict[str, Grid | None] = {}
        self._lock = threading.Lock()
        self._names = {site.site: site.module_path for site in record.sites}
        self._places = _places(record, plan.sites)

    def __call__(self, *args: Any) -> Any:
        call = context.RunContext(
            strict=self.settings.strict, warned=self._warned, names=self._names, fixed=self._fixed,
            counters=self.record.fallbacks, mask_ids=self.plan.mask_ids,
        )  # fmt: skip
        run: _Run | None = None
        try:
            run = self._prepare(call, args)
        except Exception as error:  # noqa: BLE001 - whatever it was, dense attention is still right
            self._fail(error, "before a call")
            call.dense = dict.fromkeys(self.plan.sites, "failed before the call")
        planned = set(call.dense)
        with context.active(call):
            out = self.compiled(*args)
        try:
            self._finish(call, args, planned, run)
        except Exception as error:  # noqa: BLE001 - the output is right all the same
            self._fail(error, "after a call")
        return out

    def _prepare(self, call: context.RunContext, args: tuple[Any, ...]) -> _Run:
        """Fills the context."""
        plan, settings, record = self.plan, self.settings, self.record
        who = caller()
        generation, calls = step_clock.tick(who, tuple(self._places.values()), settings.num_steps)
        video = None if plan.video is None else args[plan.video]
        shape = None if video is None else tuple(video.shape[1:])
        device = next(x.device for x in args if isinstance(x, Tensor)) if video is None else video.device
        is_cuda = device.type == "cuda"
        frozen = is_cuda and torch.cuda.is_current_stream_capturing()
        stream = torch.cuda.current_stream(device) if is_cuda else None
        call.totals = None if frozen else record.totals_on(device)
        call.audit = settings.audit and not frozen
        if plan.needs_grid and plan.inputs.rotary:
            call.grid = record.grid = self._grid([args[i] for i in plan.inputs.rotary], generation, frozen)
        for number, mask in plan.masks.items():
            key_padding.recall(calls.key_padding, call.seen_keys, number, args, mask)

        num_steps = generation.num_steps if generation.num_steps is not None else settings.num_steps
        dense_steps = generation.warm_up(settings.dense_steps, num_steps)
        record.steps = _words(generation, settings.num_steps, dense_steps)
        knows_grid = not plan.needs_grid or call.grid is not None
        if settings not in generation.memos:
            generation.memos[settings] = Controller(settings, knows_grid)
        controller: Controller = generation.memos[settings]
        controller.begin(generation.step, dense_steps, num_steps)
        run = _Run(generation, calls, controller, (shape, device, stream), frozen, [])
        for site in plan.sites:
            layer = calls.layer((id(who.layer), self._places[site]))
            decision = controller.decide(layer, calls.branch, frozen)
            run.visits.append(_Visit(site, layer, decision))
            self._lay_out(call, run, run.visits[-1])
        return run

    def _lay_out(self, call: context.RunContext, run: _Run, visit: _Visit) -> None:
        """Puts a decision into the context."""
        site, layer, decision = visit
        if decision.measure is not None:
            seed = hash((self.settings.seed, layer.number, run.calls.branch, run.generation.step)) % 2**63
            call.measure[site] = context.Measure(seed, decision.measure, decision.orders, decision.terms)
        if decision.dense:
            call.dense[site] = decision.dense
        else:
            call.density[site] = decision.density
            call.split_heads[site] = decision.split_heads
            call.first_order[site] = decision.first_order
        if self._carries(run, decision) and not decision.anew:
            carried = layer.recall(run.calls.branch, run.stamp)
            if carried is not None:
                call.carried[site] = carried

    def _carries(self, run: _Run, decision: Decision) -> bool:
        """Whether this call clusters tokens, and may use the result again."""
        clusters = not decision.dense or decision.measure is not None
        return clusters and not run.frozen and self.settings.order != "cubes"

    def _grid(self, tables: list[Tensor], generation: Generation, frozen: bool) -> Grid | None:
        """The frame grid that rotary tables show. Tables are sampled once per generation, and read if they are new."""
        shapes = str([tuple(table.shape) for table in tables])
        key = ("grid", self.record.number, shapes)
        if key not in generation.memos:
            if frozen:
                return None
            table = tables[0].detach().reshape(-1)
            name = shapes + str(table[:: max(1, table.numel() // SAMPLE)].tolist())
            with self._lock:
                if name not in self._grids:
                    self._grids.clear()
                    self._grids[name] = self.plan.read_grid(tables, max(tables[0].shape[:-1]))
                generation.memos[key] = self._grids[name]
        grid: Grid | None = generation.memos[key]
        return grid

    def _fail(self, error: Exception, when: str) -> None:
        """Counts a failure outside of the ops, and warns of it once."""
        if self.settings.strict or isinstance(error, torch.AcceleratorError):
            raise error
        kind = type(error).__name__
        self.record.count_fallback(f"{when}: {kind}")
        if (when + kind) not in self._warned:
            self._warned.add(when + kind)
            what = "a graph runs dense" if when == "before a call" else "a call was not counted"
            warnings.warn(f"svg_ear: {what} because of {error!r}", RuntimeWarning, stacklevel=3)

    def _finish(
        self, call: context.RunContext, args: tuple[Any, ...], planned: set[int], run: _Run | None
    ) -> None:
        """After the call: records which sites ran sparse, what they measured, and what their masks show."""
        record = self.record
        if run is None:
            record.count(dense=dict.fromkeys(self.plan.sites, "failures"))
            return
        dense, logs = {}, []
        for site, layer, decision in run.visits:
            measured, audited = call.measured.get(site), call.audited.get(site)
            if site in call.dense and site not in planned:  # what it measured was meant for a sparse call
                failed = call.dense[site].startswith("failed")
                layer.failures += failed
                decision = Decision(call.dense[site], "failures" if failed else call.dense[site])
                measured = audited = None
            elif site not in call.dense:
                layer.failures = 0
            if decision.dense:
                dense[site] = decision.counter
            log = CallLog(
                site, run.calls.number, layer.number, run.calls.branch, run.generation.step, decision,
                logged(measured), logged(audited),
            )  # fmt: skip
            logs.append(log)
            run.controller.ran(layer, log)
            if run.calls.ends:
                layer.carried.clear()
            elif self._carries(run, decision) and site in call.carried:
                layer.keep(run.calls.branch, run.stamp, call.carried[site])
        record.count(dense, run.generation.number, logs)
        for number, mask in self.plan.masks.items():
            key_padding.keep(run.calls.key_padding, call.seen_keys, number, args, mask)


def _places(record: GraphRecord, sites: Sequence[int]) -> dict[int, Any]:
    """Where sites lie in the module whose graph this is: what stays when the graph is compiled again. Without module
    paths, and where one module has several, they are counted."""
    seen: Counter[Any] = Counter()
    places = {}
    for site in record.sites:
        path = site.module_path or ("graph", record.number)
        if site.site in sites:
            places[site.site] = (path, seen[path])
            seen[path] += 1
    return places


def _words(generation: Generation, setting: int | None, dense_steps: int) -> str:
    """For the report: how many steps are dense, out of how many, and where that number comes from."""
    if generation.is_timed:
        return "no dense step: many calls at one timestep were taken for a benchmark, or a model of one step"
    if generation.num_steps is not None:
        return f"{dense_steps} dense first steps, of {generation.num_steps} ({generation.source})"
    if setting is not None:
        return f"{dense_steps} dense first steps, of {setting} (the setting num_steps)"
    return (
        f"{dense_steps} dense first steps; the number of steps is unknown outside of a pipeline: "
        "set it with svg_ear_compile.generation(num_steps=...), or the setting num_steps"
    )
