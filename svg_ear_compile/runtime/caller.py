"""Who calls a compiled graph? The sampling loop of a pipeline, the model and the layer, read off the call stack.

Nothing in a graph says how many steps a generation has, or which layer a graph of a single block stands for. The
callers know: a diffusers pipeline loops `for i, t in enumerate(timesteps)`, and every nn.Module is called through
`Module._wrapped_call_impl`. All of them are on the stack of the calling thread. So what they show is exact, and needs
no cooperation: no hook, no patch, no argument.

Why looking is safe:
- It reads `f_back`, `f_code`, `f_lasti` and the `f_locals` of a few frames, and keeps no frame.
- Up to Python 3.12 `f_locals` leaves a dictionary on its frame that keeps the values alive until the frame returns.
  Only the frames of `_wrapped_call_impl` are read, whose `args` and `kwargs` live as long anyway, and the frame of the
  pipeline, which holds latents and embeddings; never a model's `forward`, whose intermediate tensors are large.
- One entry is added to the pipeline's frame (`Loop.memory`). It keeps what belongs to one call of the pipeline, and is
  freed when that call returns or raises. Debuggers keep values in frames in the same way.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import lru_cache
from types import CodeType, FrameType
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..compat import module_call_code, original_module

_MEMORY = "__svg_ear__"
_MODULE_CALL = module_call_code()
_COUNTERS = ("i", "index", "step", "idx")
"""Names of the loop variable that counts steps; diffusers uses `i` or `index`."""
_TIMESTEP = ("timestep", "timesteps", "t", "sigma", "sigmas", "time")
"""Names of the argument that holds a model's timestep."""


class Loop(NamedTuple):
    """The sampling loop of a pipeline. `schedule` holds the timesteps; `line` tells the calls of one step apart.

    memory: a dictionary that lives as long as this call of the pipeline.
    """

    step: int
    num_steps: int
    line: int
    schedule: Any
    memory: dict[str, Any]


class Caller(NamedTuple):
    """model: the outermost module that is being called (below the loop); layer: the innermost. None: there is none.

    arguments: (args, kwargs) of the call of the model.
    """

    model: nn.Module | None
    layer: nn.Module | None
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    loop: Loop | None


def caller() -> Caller:
    """Who called the function that calls this one. Takes about 5 microseconds; does not raise on unusual callers."""
    inner = outer = None
    loop: Loop | None = None
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code is _MODULE_CALL:
            outer = frame
            inner = inner or frame
        elif _may_loop(code):
            loop = _loop(frame)
            if loop is not None:
                break
        frame = frame.f_back
    try:
        if inner is None or outer is None:
            return Caller(None, None, ((), {}), loop)
        found = outer.f_locals
        arguments = found["args"], found["kwargs"]
        return Caller(
            original_module(found["self"]), original_module(inner.f_locals["self"]), arguments, loop
        )
    finally:
        del frame, inner, outer  # a frame that refers to itself would live until the garbage collector comes


def argument(who: Caller, *names: str) -> Any:
    """What the model is called with under the first of these names that it was given; None: under none."""
    args, kwargs = who.arguments
    for name in names:
        if kwargs.get(name) is not None:
            return kwargs[name]
    known = () if who.model is None else _parameters(who.model.__class__.forward)
    places = [known.index(name) for name in names if name in known]
    return next((args[place] for place in places if place < len(args)), None)


def timestep(who: Caller) -> Any:
    """The timestep that a model is called with, by the usual names of that argument; None: not found."""
    return argument(who, *_TIMESTEP)


@lru_cache(maxsize=256)
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a forward's arguments, without self."""
    try:
        return tuple(inspect.signature(forward).parameters)[1:]
    except (TypeError, ValueError):  # a forward written in C has none
        return ()


_seen: dict[int, tuple[CodeType, bool]] = {}
"""What `_may_loop` found, by the id of the code, which the entry keeps alive: hashing code takes a microsecond."""


def _may_loop(code: CodeType) -> bool:
    """Whether a method with this code may be a sampling loop, judging by the names of its variables."""
    known = _seen.get(id(code))
    if known is None:
        arguments = code.co_argcount + code.co_kwonlyargcount
        made = {
            *code.co_varnames[arguments:],
            *code.co_cellvars,
        }  # in a step of a modular pipeline t is an argument
        schedules = {"timesteps", "block_state"} & {*code.co_varnames, *code.co_cellvars}
        is_method = code.co_varnames[:1] == ("self",) and code.co_name != "forward"  # whose tensors are large
        loops = is_method and "t" in made and bool(schedules)
        if len(_seen) > 4096:
            _seen.clear()
        known = _seen[id(code)] = (code, loops)
    return known[1]


def _loop(frame: FrameType) -> Loop | None:
    """The loop that runs in this frame: in a pipeline, in a block of a modular one, or where t was taken from the
    timesteps. None if there is none."""
    found = frame.f_locals
    schedule, t = found.get("timesteps"), found.get("t")
    if schedule is None:
        schedule = getattr(found.get("block_state"), "timesteps", None)
    if t is None or schedule is None or not hasattr(schedule, "__len__"):
        return None
    place = _place(t, schedule)
    pipeline = found.get("components", found["self"])
    if place is None and not hasattr(pipeline, "scheduler"):
        return None
    step = next((found[name] for name in _COUNTERS if isinstance(found.get(name), int)), place)
    if step is None:
        return None
    memory = found.get(_MEMORY)
    if memory is None:
        memory = found[_MEMORY] = {}
    return Loop(step, max(len(schedule), step + 1), frame.f_lasti, schedule, memory)


def _place(t: Any, schedule: Any) -> int | None:
    """The position of a number in the tensor that it was taken from by iteration, which makes it a view of that."""
    if not isinstance(t, Tensor) or not isinstance(schedule, Tensor) or t.numel() != 1:
        return None
    same = t.untyped_storage().data_ptr() == schedule.untyped_storage().data_ptr()
    return int(t.storage_offset()) - int(schedule.storage_offset()) if same else None
