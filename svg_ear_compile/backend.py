"""The backend: what happens when Dynamo hands over a graph. The only file that knows all parts.

    settings -> passes (which attention, what is decided, the rewritten graph) -> Inductor -> a callable that
    looks at its arguments before each call

If our passes fail, the graph is compiled as plain Inductor would compile it.
"""

from __future__ import annotations

import os
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from . import compat, other_backends
from .exceptions import PassError
from .kernels.attention.choice import attention_kernel
from .passes.classify import classify
from .passes.graph_break_hint import graph_breaks
from .passes.inputs import mask_arguments, read_inputs
from .passes.layout import grid_reader
from .passes.match import in_words, match
from .passes.rewrite import rewrite
from .passes.site import KeyMask, Reason, Site, Verdict
from .passes.sources import is_activation
from .passes.subgraphs import inline_regions
from .precedence import Resolved, resolve
from .reporting import GraphRecord, SiteRecord, diagnostics, records
from .runtime import generations
from .runtime.key_padding import MaskSource
from .runtime.wrapper import RuntimePlan, SparseCallable
from .settings import Settings

Compiled = Callable[..., Any]


def svg_ear(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compiles one Dynamo graph: torch.compile(model, backend="svg_ear", options={...})."""
    other_backends.reached()
    resolved = resolve(options, os.environ, mode)
    inner = _inner(resolved)
    if resolved.switch == "off":
        return inner(gm, example_inputs)
    record, graph = records.new_record(resolved), gm.graph
    try:
        begin = time.perf_counter()
        plan = _apply_passes(gm, example_inputs, resolved, record)
        middle = time.perf_counter()
        compiled, plan = _compile(inner, gm, graph, example_inputs, plan, record)
        record.passes_seconds, record.compiling_seconds = middle - begin, time.perf_counter() - middle
    except BaseException:
        records.drop(record)
        raise
    if plan is not None:
        compiled = SparseCallable(compiled, plan, resolved.settings, record)
    # Dynamo keeps the innermost function; and a bound method (gm.forward) lives as long as its object.
    kept = compat.innermost_function(compiled)
    record.owner = weakref.ref(getattr(kept, "__self__", kept))
    diagnostics.announce(record)
    return compiled


def _inner(resolved: Resolved) -> Callable[[fx.GraphModule, Sequence[Any]], Compiled]:
    """What compiles a graph in the end: Inductor, or nothing."""
    if resolved.settings.inner == "eager":
        return lambda gm, _: gm.forward
    return compat.inductor(resolved.inductor_options)


def _compile(
    inner: Callable[[fx.GraphModule, Sequence[Any]], Compiled],
    gm: fx.GraphModule,
    graph: fx.Graph,
    example_inputs: Sequence[Any],
    plan: RuntimePlan | None,
    record: GraphRecord,
) -> tuple[Compiled, RuntimePlan | None]:
    """The compiled gm and its plan; the plan is None if the rewritten graph was rejected and `graph` put back."""
    if plan is None:
        return inner(gm, example_inputs), None
    if compat.leave_out_of_precompile(gm):  # it would be stored without what decides each call
        diagnostics.not_stored()
    try:
        return inner(gm, list(example_inputs)), plan
    except Exception as error:
        if _is_not_ours(error):
            raise
        rejected = error
    finally:
        compat.release_arguments(gm.graph)
    # Dynamo's own graph, not a copy: its placeholders know which inputs are weights.
    gm.graph = graph
    try:
        compiled = inner(gm, example_inputs)  # what fails here fails with plain Inductor too
        _give_up(record, rejected, "is compiled again as it was")
    finally:
        del rejected  # its traceback holds this frame, and with it the graph
    return compiled, None


def _apply_passes(
    gm: fx.GraphModule, example_inputs: Sequence[Any], resolved: Resolved, record: GraphRecord
) -> RuntimePlan | None:
    """Rewrites gm in place. None if there is nothing to rewrite, or after an error, and then gm is untouched."""
    settings = resolved.settings
    sites: list[Site] = []
    try:
        whole = inline_regions(gm)
        found = diagnostics.timed(match, whole.graph)
        diagnostics.log.debug("svg_ear: graph %s has %s attention calls", record.number, len(found.calls))
        record.other_attention = in_words(found.others)
        if found.outside and not records.has_attention_alone():
            record.other_attention.append(found.outside)
        if not found.calls:
            record.graph_breaks = graph_breaks()
        sites = diagnostics.timed(classify, whole, settings, example_inputs)
        saved = Reason.SAVED if compat.is_compiled_to_be_saved() else None
        instead = Reason.REPORT_ONLY if resolved.switch == "report" else saved
        if instead is not None:
            sites = [replace(s, verdict=Verdict(False, instead)) if s.verdict.rewrite else s for s in sites]
        chosen = [site for site in sites if site.verdict.rewrite]
        plan = None
        if chosen:
            plan = _call_plan(whole, example_inputs, chosen, record)
            record.kernels = _kernels(chosen, settings)
            diagnostics.log_graph("before", gm)
            gm.graph = diagnostics.timed(rewrite, whole, sites, settings)
            diagnostics.log.debug("svg_ear: graph %s: %s calls rewritten", record.number, len(chosen))
            diagnostics.log_graph("after", gm)
    except Exception as error:
        if _is_not_ours(error):
            raise
        record.sites = [SiteRecord.of(site) for site in sites]
        _give_up(record, error, "is compiled without being rewritten")
        return None
    record.sites = [SiteRecord.of(site) for site in sites]
    return plan


def _kernels(sites: list[Site], settings: Settings) -> list[str]:
    """Which attention kernels these sites run on, and why no faster ones do."""
    queries = [site.node.args[0] if site.node.args else site.node.kwargs["query"] for site in sites]
    values = [query.meta["example_value"] for query in queries if isinstance(query, fx.Node)]
    kinds = dict.fromkeys((x.device, x.dtype, int(x.shape[-1])) for x in values)
    choices = [attention_kernel(*kind, variable=settings.order == "kmeans") for kind in kinds]
    return list(dict.fromkeys(c.name + (f" ({c.reason})" if c.reason else "") for c in choices))


def _is_not_ours(error: Exception) -> bool:
    """Whether to raise it on: a signal of Dynamo to itself, or an error of the device, after which everything fails."""
    return compat.is_dynamo_signal(error) or isinstance(error, torch.AcceleratorError)


def _give_up(record: GraphRecord, error: Exception, consequence: str) -> None:
    """Marks all sites as not rewritten because of an error of ours, and warns. With strict set it raises."""
    wanted = record.rewritten()
    if record.resolved.settings.strict:
        names = ", ".join(f"{site.site} ({site.module_path})" for site in wanted) or "unknown"
        raise PassError(f"svg_ear: a graph was not rewritten, attention sites {names}: {error!r}") from error
    record.failure, record.kernels, reason = repr(error), [], Reason.OUR_FAILURE
    sentence = str(Verdict(False, reason, repr(error)))
    failed: dict[str, Any] = {
        "rewritten": False,
        "reason": reason.name,
        "sentence": sentence,
        "hint": reason.hint,
    }
    record.sites = [replace(site, **failed) if site in wanted else site for site in record.sites]
    text = f"svg_ear: a graph {consequence}, because of {error!r}"
    warnings.warn(text, RuntimeWarning, stacklevel=3)
    diagnostics.log.debug(text, exc_info=error)


def _call_plan(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    sites: list[Site],
    record: GraphRecord,
) -> RuntimePlan:
    """What the host has to look at in each call. Read off the graph before it is rewritten."""
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    inputs = read_inputs(gm, sites)
    numbers: dict[KeyMask, int] = {}
    mask_ids = {
        site.index: numbers.setdefault(site.key_mask, len(numbers))
        for site in sites
        if site.key_mask is not None
    }
    sources = {number: _mask_source(mask, (record.number, number)) for mask, number in numbers.items()}
    return RuntimePlan(
        sites=tuple(site.index for site in sites),
        inputs=inputs,
        video=_video_position(placeholders, example_inputs),
        mask_ids=mask_ids,
        masks={number: source for number, source in sources.items() if source is not None},
        needs_grid=all(site.layout.grid is None and not site.layout.packed for site in sites),
        packed=next((site.layout.packed for site in sites if site.layout.packed), None),
        read_grid=grid_reader(inputs),
    )


def _mask_source(mask: KeyMask, name: tuple[int, int]) -> MaskSource | None:
    """name: of the mask, in case only its own graph knows the function that computes it."""
    positions = mask_arguments(mask.node)
    if positions is None:
        return None
    if mask.node.op == "placeholder":
        return MaskSource(positions, "shown", sized=False)
    return MaskSource(positions, name)


def _video_position(placeholders: list[fx.Node], example_inputs: Sequence[Any]) -> int | None:
    """The argument whose shape shows the resolution: a 5-D one, else the largest that is not a parameter."""
    tensors = [
        (value.dim() == 5, value.numel(), position)
        for position, (node, value) in enumerate(zip(placeholders, example_inputs, strict=True))
        if isinstance(value, Tensor) and is_activation(node)
    ]
    return max(tensors)[-1] if tensors else None


def reset() -> None:
    """What torch._dynamo.reset() calls: nothing of svg_ear outlives it."""
    records.clear()
    generations.end_all()
    diagnostics.clear()


svg_ear.reset = reset  # type: ignore[attr-defined]
