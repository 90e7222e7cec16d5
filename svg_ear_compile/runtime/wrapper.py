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
from ..kernels.capture import is_recorded
from ..kernels.context import Decisions, Memo, Results, RunContext, SiteDecision
from ..passes.site import GraphInputs
from ..reporting.records import GraphRecord
from ..settings import Settings
from . import key_padding, step_clock
from .caller import caller
from .density import CallLog, Controller, Decision, logged
from .generations import Generation, ModelCalls
from .key_padding import MaskSource
from .layers import Layer
from .packed import in_words, packed_rows

Grid = tuple[int, int, int]
SAMPLE = 64
"""This many numbers, evenly spread, tell one rotary table from another."""


@dataclass(frozen=True)
class RuntimePlan:
    """What is known at compile time about the calls of a graph.

    sites: the numbers of the rewritten sites, in order. video: the position of the argument whose shape tells
    resolutions apart. mask_ids: sites with the same number share a mask. masks: what each of these masks is computed
    from, if known. needs_grid: whether no site's grid is in the graph. packed: the model's arguments that tell
    which rows of a packed sequence are video; None: no sequence is packed.
    """

    sites: tuple[int, ...]
    inputs: GraphInputs
    video: int | None
    mask_ids: dict[int, int]
    masks: dict[int, MaskSource]
    needs_grid: bool
    read_grid: Callable[[Sequence[Tensor], int], Grid | None]
    packed: tuple[str, str] | None = None


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
    context: RunContext


class SparseCallable:
    """The compiled callable of a graph with rewritten sites."""

    def __init__(
        self, compiled: Callable[..., Any], plan: RuntimePlan, settings: Settings, record: GraphRecord
    ) -> None:
        self.compiled, self.plan, self.settings, self.record = compiled, plan, settings, record
        self._warned: set[str] = set()
        self._made: dict[Any, Any] = {}
        self._grids: dict[str, Grid | None] = {}
        self._lock = threading.Lock()
        self._names = {site.site: site.module_path for site in record.sites}
        self._places = _places(record, plan.sites)

    def __call__(self, *args: Any) -> Any:
        run: _Run | None = None
        try:
            run = self._prepare(args)
            call = run.context
        except Exception as error:  # noqa: BLE001 - whatever it was, dense attention is still right
            self._fail(error, "before a call")
            failed = SiteDecision("failed before the call")
            call = RunContext(Decisions(dict.fromkeys(self.plan.sites, failed), mask_ids=self.plan.mask_ids))
        with context.active(call):
            out = self.compiled(*args)
        try:
            if run is None:
                self.record.count(dense=dict.fromkeys(self.plan.sites, "failures"))
            else:
                self._finish(run, args)
        except Exception as error:  # noqa: BLE001 - the output is right all the same
            self._fail(error, "after a call")
        return out

    def _prepare(self, args: tuple[Any, ...]) -> _Run:
        """Before the call: finds out who calls, decides, and fills the context."""
        plan, settings, record = self.plan, self.settings, self.record
        who = caller()
        generation, calls = step_clock.tick(who, tuple(self._places.values()), settings.num_steps)
        video = None if plan.video is None else args[plan.video]
        shape = None if video is None else tuple(video.shape[1:])
        tensor = next(x for x in args if isinstance(x, Tensor)) if video is None else video
        device, frozen = tensor.device, is_recorded(tensor)
        stream = torch.cuda.current_stream(device) if tensor.is_cuda else None
        grid = packed = None
        if plan.packed is not None:
            packed = packed_rows(who, plan.packed, generation, calls, frozen)
            record.packed = "" if packed is None else in_words(packed)
        elif plan.needs_grid and plan.inputs.rotary:
            grid = record.grid = self._grid([args[i] for i in plan.inputs.rotary], generation, frozen)

        num_steps = generation.num_steps if generation.num_steps is not None else settings.num_steps
        dense_steps = generation.warm_up(settings.dense_steps, num_steps)
        record.steps = _words(generation, settings.num_steps, dense_steps)
        if settings not in generation.memos:
            knows_grid = (
                bool(packed and packed.grids) if plan.packed else not plan.needs_grid or grid is not None
            )
            generation.memos[settings] = Controller(settings, knows_grid)
        controller: Controller = generation.memos[settings]
        controller.begin(generation.step, dense_steps, num_steps)
        layers = {site: calls.layer((id(who.layer), self._places[site])) for site in plan.sites}
        visits = [
            _Visit(site, layer, controller.decide(layer, calls.branch, frozen))
            for site, layer in layers.items()
        ]
        call = RunContext(
            Decisions(
                {visit.site: visit.decision for visit in visits},
                grid, packed, plan.mask_ids, self._names, settings.strict, settings.audit,
            ),
            Results(fallbacks=record.fallbacks, totals=record.totals_on(device)),
            Memo(made=self._made, warned=self._warned),
        )  # fmt: skip
        run = _Run(generation, calls, controller, (shape, device, stream), frozen, visits, call)
        self._recall(run, args)
        return run

    def _recall(self, run: _Run, args: tuple[Any, ...]) -> None:
        """Puts what earlier calls left into the memo."""
        memo, calls = run.context.memo, run.calls
        for number, mask in self.plan.masks.items():
            key_padding.recall(calls.read, memo.seen_keys, number, args, mask)
        for site, layer, decision in run.visits:
            if self._carries(run, decision) and not decision.anew:
                carried = layer.recall(calls.branch, run.stamp)
                if carried is not None:
                    memo.carried[site] = carried

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

    def _finish(self, run: _Run, args: tuple[Any, ...]) -> None:
        """After the call: records which sites ran sparse, what they measured, and what their masks show."""
        record, results, memo = self.record, run.context.results, run.context.memo
        dense, logs = {}, []
        for site, layer, decision in run.visits:
            measured, audited = results.measured.get(site), results.audited.get(site)
            if reason := results.dense.get(site):  # what it measured was meant for a sparse call
                failed = reason.startswith("failed")
                layer.failures += failed
                decision = Decision(reason, counter="failures" if failed else reason)
                measured = audited = None
            elif not decision.dense:
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
            elif self._carries(run, decision) and site in memo.carried:
                layer.keep(run.calls.branch, run.stamp, memo.carried[site])
        record.count(dense, run.generation.number, logs)
        for number, mask in self.plan.masks.items():
            key_padding.keep(run.calls.read, memo.seen_keys, number, args, mask)


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
