"""The backend: what happens when Dynamo hands over a graph. The only file that knows all parts.

    settings -> passes (which attention, what is decided, the rewritten graph) -> Inductor -> a callable that
    looks at its arguments before each call

Whatever goes wrong in our passes, the graph is compiled as plain Inductor would compile it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.eval_frame import innermost_fn
from torch._dynamo.exc import TorchDynamoException

from . import announce, records
from .kernels.choice import attention_kernel
from .passes.classify import classify
from .passes.inputs import mask_arguments, read_inputs
from .passes.layout import grid_from_rotary
from .passes.match import match
from .passes.rewrite import rewrite
from .passes.site import KeyMask, Reason, Site, Verdict
from .passes.sources import is_activation
from .passes.subgraphs import inline_regions
from .records import GraphRecord, SiteRecord
from .runtime import clock
from .runtime.key_padding import MaskSource
from .runtime.wrapper import CallPlan, SparseCallable
from .settings import Resolved, Settings, resolve

Compiled = Callable[..., Any]


class PassError(RuntimeError):
    """A pass failed, and strict is set. The cause is the error itself."""


def svg_ear(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compiles one Dynamo graph: torch.compile(model, backend="svg_ear", options={...})."""
    resolved = resolve(options, os.environ, mode)
    inner = _inner(resolved)
    if resolved.switch == "off":
        return inner(gm, example_inputs)
    record = records.new_record(resolved)
    try:
        plan = _apply_passes(gm, example_inputs, resolved, record)
        compiled = inner(gm, example_inputs)
        if plan is not None:
            _let_go(gm)
    except BaseException:
        records.drop(record)
        raise
    if plan is not None:
        compiled = SparseCallable(compiled, plan, resolved.settings, record)
    # Dynamo keeps the innermost function; and a bound method (gm.forward) lives as long as its object.
    kept = innermost_fn(compiled)
    records.owned_by(record, getattr(kept, "__self__", kept))
    announce.announce(record)
    return compiled


def _let_go(gm: fx.GraphModule) -> None:
    """Drops the weak references to the arguments that nodes of a copied graph hold; Dynamo drops those of its own.
    A Parameter that somebody refers to weakly cannot be swapped, as Module.to() does with tensor subclasses."""
    for node in gm.graph.find_nodes(op="placeholder"):
        node.meta.pop("grapharg", None)


def _inner(resolved: Resolved) -> Callable[[fx.GraphModule, Sequence[Any]], Compiled]:
    """What compiles a graph in the end: torch.compile(backend="inductor") makes it, or nothing."""
    if resolved.settings.inner == "eager":
        return lambda gm, _: gm.forward
    return torch._TorchCompileInductorWrapper(None, resolved.inductor_options, None)  # type: ignore[no-any-return]


def _apply_passes(
    gm: fx.GraphModule, example_inputs: Sequence[Any], resolved: Resolved, record: GraphRecord
) -> CallPlan | None:
    """Rewrites gm in place; None if there is nothing to rewrite, or after an error: then gm is untouched."""
    settings = resolved.settings
    sites: list[Site] = []
    try:
        whole = inline_regions(gm)
        found = match(whole.graph)
        record.other_attention = [*found.others]
        if found.outside and not records.has_attention_alone():
            record.other_attention.append(found.outside)
        sites = classify(whole, settings, example_inputs)
        if resolved.switch == "report":
            for site in sites:
                if site.verdict.rewrite:
                    site.verdict = Verdict(False, Reason.REPORT_ONLY)
        chosen = [site for site in sites if site.verdict.rewrite]
        plan = None
        if chosen:
            plan = _call_plan(whole, example_inputs, chosen, record)
            record.kernels = _kernels(chosen, settings)
            gm.graph = rewrite(whole, sites, settings)
    except TorchDynamoException:
        raise  # Dynamo steers by these: restart, skip, unsupported
    except Exception as error:
        if isinstance(error, torch.AcceleratorError):
            raise
        if settings.strict:
            names = [f"{site.index} ({site.module_path})" for site in sites if site.verdict.rewrite]
            text = f"svg_ear: a graph was not rewritten, attention sites {', '.join(names) or 'unknown'}"
            raise PassError(f"{text}: {error!r}") from error
        record.failure = repr(error)
        plan = None
        for site in sites:
            if site.verdict.rewrite:
                site.verdict = Verdict(False, Reason.OUR_FAILURE, repr(error))
        text = f"svg_ear: a graph is compiled without being rewritten, because of {error!r}"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
        announce.log.debug(text, exc_info=True)
    record.sites = [SiteRecord.of(site) for site in sites]
    return plan


def _kernels(sites: list[Site], settings: Settings) -> list[str]:
    """Which attention kernels these sites run by, and why no faster ones."""
    queries = [site.node.args[0] if site.node.args else site.node.kwargs["query"] for site in sites]
    values = [query.meta["example_value"] for query in queries if isinstance(query, fx.Node)]
    kinds = dict.fromkeys((x.device, x.dtype, int(x.shape[-1])) for x in values)
    choices = [attention_kernel(*kind, variable=settings.order == "kmeans") for kind in kinds]
    return list(dict.fromkeys(c.name + (f" ({c.reason})" if c.reason else "") for c in choices))


def _call_plan(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    sites: list[Site],
    record: GraphRecord,
) -> CallPlan:
    """What the host has to look at in each call; read off the graph before it is rewritten."""
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    inputs = read_inputs(gm, sites)
    numbers: dict[KeyMask, int] = {}
    mask_ids = {
        site.index: numbers.setdefault(site.key_mask, len(numbers))
        for site in sites
        if site.key_mask is not None
    }
    sources = {number: _mask_source(mask, (record.number, number)) for mask, number in numbers.items()}
    return CallPlan(
        sites=tuple(site.index for site in sites),
        inputs=inputs,
        video=_video_position(placeholders, example_inputs),
        mask_ids=mask_ids,
        masks={number: source for number, source in sources.items() if source is not None},
        needs_grid=all(site.layout.grid is None for site in sites),
        read_grid=grid_from_rotary,
    )


def _mask_source(mask: KeyMask, name: tuple[int, int]) -> MaskSource | None:
    """name: of the mask, for a function that only its own graph knows."""
    positions = mask_arguments(mask.node)
    if positions is None:
        return None
    if mask.node.op == "placeholder":
        return MaskSource(positions, "shown", sized=False)
    return MaskSource(positions, name)


def _video_position(placeholders: list[fx.Node], example_inputs: Sequence[Any]) -> int | None:
    """The argument whose shape shows the resolution: the 5-D one, else the largest that is no parameter."""
    tensors = [
        (value.dim() == 5, value.numel(), position)
        for position, (node, value) in enumerate(zip(placeholders, example_inputs, strict=True))
        if isinstance(value, Tensor) and is_activation(node)
    ]
    return max(tensors)[-1] if tensors else None


def reset() -> None:
    """What torch._dynamo.reset() calls: nothing of ours outlives it."""
    records.clear()
    clock.reset()
    announce.clear()


svg_ear.reset = reset  # type: ignore[attr-defined]
