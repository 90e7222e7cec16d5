"""What does the host do around one call of a compiled graph? Looks at its arguments, decides, runs, counts.

For each rewritten site it decides whether this call is dense, how dense otherwise and whether its error is
measured (control.py), and lays that, the frame grid and carried centroids into the context that the ops read.
It reads from the device at most: one timestep per call (graphs of whole models), or a few numbers of the
timestep embedding and of a rotary table per model call; and errors that were measured two steps before.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import schedule
from .control import Control, Decision
from .kernels import context
from .passes.site import GraphInputs
from .records import GraphRecord
from .seen_keys import MaskSource, seen_keys
from .settings import Settings
from .state import Layer, layers

Grid = tuple[int, int, int]
SAMPLE = 64
"""So many numbers, evenly spread, tell one embedding or rotary table from another."""


@dataclass(frozen=True)
class CallPlan:
    """What is known at compile time about the calls of a graph.

    sites: the numbers of the rewritten sites, in their order. video: the position of the argument whose
    shape tells one resolution from another. mask_ids: sites with one number share a mask. masks: per such
    number, what it is made from, where that is known. needs_grid: whether no
    site's grid was in the graph.
    """

    sites: tuple[int, ...]
    inputs: GraphInputs
    video: int | None
    mask_ids: dict[int, int]
    masks: dict[int, MaskSource]
    needs_grid: bool
    read_grid: Callable[[Sequence[Tensor], int], Grid | None]


@dataclass
class _Thread:
    """What one thread remembers of the last calls of one graph."""

    rotary: weakref.ref[Tensor] | None = None
    grids: dict[str, Grid | None] = field(default_factory=dict)
    grid: Grid | None = None


class _Visit(NamedTuple):
    """A site in one call: which layer it is, what controls it, and what was decided at which step.

    stamp: the generation, the shape and the device. frozen: a CUDA graph is being recorded, whose tensors
    are its own.
    """

    site: int
    layer: Layer
    control: Control
    tick: schedule.Tick
    stamp: Any
    decision: Decision
    frozen: bool


class SparseCallable:
    """The compiled callable of a graph with rewritten sites."""

    def __init__(
        self, compiled: Callable[..., Any], plan: CallPlan, settings: Settings, record: GraphRecord
    ) -> None:
        self.compiled, self.plan, self.settings, self.record = compiled, plan, settings, record
        self._threads = threading.local()
        self._warm_steps = 0
        self._warned: set[str] = set()
        self._fixed: dict[Any, Any] = {}
        self._names = {site.site: site.module_path for site in record.sites}
        self._unnamed: dict[tuple[int, int], Layer] = {}

    def __call__(self, *args: Any) -> Any:
        call = context.Call(
            strict=self.settings.strict, warned=self._warned, names=self._names, fixed=self._fixed
        )
        visits: list[_Visit] = []
        try:
            visits = self._prepare(call, args)
        except Exception as error:  # noqa: BLE001 - whatever it was, dense attention is still right
            self._give_up(call, error)
        planned = dict(call.dense)
        with context.active(call):
            out = self.compiled(*args)
        self._count(call, args, planned, visits)
        return out

    def _prepare(self, call: context.Call, args: tuple[Any, ...]) -> list[_Visit]:
        """Fills the context; returns what to do with what the call leaves in it."""
        clock = schedule.clock()
        plan, settings, record = self.plan, self.settings, self.record
        video = None if plan.video is None else args[plan.video]
        shape = None if video is None else tuple(video.shape[1:])
        device = next(x.device for x in args if isinstance(x, Tensor)) if video is None else video.device
        frozen = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        self._tick(clock, args, shape)
        tick = clock.tick
        num_steps, source = clock.num_steps(settings.num_steps)
        first = schedule.dense_count(settings.dense_steps, num_steps)
        if tick.step == 0 or tick.step < first:
            self._warm_steps = min(tick.step + 1, first)
        dense = max(self._warm_steps, first)  # more than there should be, if the timesteps show that too late
        record.steps = f"{dense} dense first steps, of {num_steps} ({source})"
        call.totals = record.totals_on(device)
        call.mask_ids = plan.mask_ids
        call.counters = record.fallbacks
        call.audit = settings.audit and not frozen
        known = self._known()
        if plan.needs_grid and plan.inputs.rotary:
            call.grid = record.grid = self._grid(known, [args[i] for i in plan.inputs.rotary])
        masks = seen_keys()
        masks.begin(tick.generation)
        for number, mask in plan.masks.items():
            masks.recall(call.seen_keys, number, args, mask)

        stamp = (tick.generation, shape, device)
        visits = []
        for site in plan.sites:
            weight = plan.inputs.parameters.get(site)
            layer = self._layer(None if weight is None else args[weight], site, clock)
            clock.position += 1
            control = layers.control(
                layer, tick.branch, stamp,
                lambda: Control(settings, grid=not plan.needs_grid or call.grid is not None),
            )  # fmt: skip
            is_dense = settings.is_dense_layer(layer.number)
            if tick.step < first:
                decision = control.warm_up(tick.step, first, tries=not (is_dense or frozen))
            elif is_dense:
                decision = Decision(f"layer {layer.number} is dense", "dense layers")
            else:
                decision = control.decide(tick.step, frozen, num_steps)
            visits.append(_Visit(site, layer, control, tick, stamp, decision, frozen))
            record.controls[site, layer.model.number, layer.number, tick.branch] = control
            self._lay_out(call, visits[-1])
        return visits

    def _layer(self, parameter: Any, site: int, clock: schedule.Clock) -> Layer:
        """The layer of a site; where no Parameter names it, it is the next of the running call."""
        if isinstance(parameter, torch.nn.Parameter):
            return layers.layer(parameter, clock.model)
        key = (site, clock.position)
        if key not in self._unnamed:
            self._unnamed[key] = Layer(clock.model, clock.position)
        return self._unnamed[key]

    def _lay_out(self, call: context.Call, visit: _Visit) -> None:
        """Puts a decision into the context."""
        site, decision, tick = visit.site, visit.decision, visit.tick
        if decision.measure is not None:
            seed = hash((self.settings.seed, visit.layer.number, tick.branch, tick.step)) % 2**63
            call.measure[site] = context.Measure(seed, decision.measure, decision.orders, decision.terms)
        if decision.dense:
            call.dense[site] = decision.dense
            self.record.dense[site][decision.counter] += 1
        else:
            call.density[site] = decision.density
            call.split_heads[site] = decision.split_heads
            call.first_order[site] = decision.first_order
        if self._carries(visit) and not decision.anew:
            carried = layers.carried(visit.layer, tick.branch, visit.stamp)
            if carried is not None:
                call.carried[site] = carried

    def _carries(self, visit: _Visit) -> bool:
        """Whether tokens are clustered in this call, for a layer that can be told again."""
        runs = not visit.decision.dense or visit.decision.measure is not None
        told = not visit.frozen and (visit.site, visit.layer.number) not in self._unnamed
        return runs and told and self.settings.order != "cubes"

    def _tick(self, clock: schedule.Clock, args: tuple[Any, ...], shape: Any) -> None:
        """Tells the clock, if this call is the first of a call of its model."""
        inputs = self.plan.inputs
        parameters = (args[inputs.parameters[site]] for site in self.plan.sites if site in inputs.parameters)
        first = next((p for p in parameters if isinstance(p, torch.nn.Parameter)), None)
        whole = inputs.timestep is not None
        token = None if whole or inputs.temb is None else args[inputs.temb]
        if not whole and clock.is_running(token, first):
            return
        source = token if inputs.timestep is None else args[inputs.timestep]
        moment: schedule.Moment = None
        if _is_recorded(source):
            source = None  # each call is a step
        if source is not None and not clock.told_branches:
            moment = _largest(source) if whole else _fingerprint(source)
        model = layers.model_of(first) if first is not None else clock.model or layers.new_model()
        clock.advance(model, moment, shape, self.settings.num_steps, token, first)

    def _known(self) -> _Thread:
        known: _Thread | None = getattr(self._threads, "known", None)
        if known is None:
            known = self._threads.known = _Thread()
        return known

    def _grid(self, known: _Thread, tables: list[Tensor]) -> Grid | None:
        """The frame grid that rotary tables show; a table never seen is sampled, and read if that is new."""
        if (known.rotary is None or known.rotary() is not tables[0]) and not _is_recorded(tables[0]):
            known.rotary = weakref.ref(tables[0])
            key = f"{[tuple(table.shape) for table in tables]} {_fingerprint(tables[0])}"
            if key not in known.grids:
                known.grids.clear()
                known.grids[key] = self.plan.read_grid(tables, max(tables[0].shape[:-1]))
            known.grid = known.grids[key]
        return known.grid

    def _give_up(self, call: context.Call, error: Exception) -> None:
        """This whole call is dense: a failure of ours outside of the ops."""
        if self.settings.strict or isinstance(error, torch.AcceleratorError):
            raise error
        call.dense = dict.fromkeys(self.plan.sites, f"failed: {type(error).__name__}")
        self.record.fallbacks[f"before a call: {type(error).__name__}"] += 1
        for site in self.plan.sites:
            self.record.dense[site]["failures"] += 1
        kind = type(error).__name__
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"svg_ear: a graph runs dense because of {error!r}", RuntimeWarning, stacklevel=2)

    def _count(
        self, call: context.Call, args: tuple[Any, ...], planned: dict[int, str], visits: list[_Visit]
    ) -> None:
        """Afterwards: which sites ran sparse, what they measured and found, what their masks show."""
        for site in self.plan.sites:
            if site not in call.dense:
                self.record.sparse[site] += 1
            elif site not in planned:
                self.record.dense[site]["failures"] += 1
        for visit in visits:
            site, decision = visit.site, visit.decision
            if site in call.dense and site not in planned:
                decision = Decision(call.dense[site], "failures")
            measured, audited = call.measured.get(site), call.audited.get(site)
            visit.control.ran(visit.tick.step, decision, measured, audited, self.record.number)
            if self._carries(visit) and site in call.carried:
                layers.keep(visit.layer, visit.tick.branch, visit.stamp, call.carried[site])
        for number, mask in self.plan.masks.items():
            seen_keys().keep(call.seen_keys, number, args, mask)


def _is_recorded(value: Any) -> bool:
    """Whether somebody records a CUDA graph by hand just now: then nothing can be read from the device."""
    return isinstance(value, Tensor) and value.is_cuda and torch.cuda.is_current_stream_capturing()


def _largest(timestep: Any) -> float:
    """The timestep of a call: the largest, where each token has its own."""
    return float(timestep.max()) if isinstance(timestep, Tensor) else float(timestep)


def _fingerprint(tensor: Tensor) -> str:
    """A few numbers spread over a tensor, as text, so that NaN equals NaN."""
    flat = tensor.detach().reshape(-1)
    return str(flat[:: max(1, flat.numel() // SAMPLE)].tolist())
