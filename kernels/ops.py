"""The four ops that a rewritten graph calls.

A site is three calls, so that a reader of the graph sees what happens:

    plan = svg_ear::clustered_permute(query, key, value, ...)       cluster, permute, probe, route
    out, lse = svg_ear::sparse_exact(query, ..., plan)              the kept blocks, exactly
    out = svg_ear::centroid_compensation(query, out, lse, plan)     the skipped blocks, by their centroids

or, merged (the default), one: svg_ear::attention. All of them ask the context of the running call whether
their site is dense at this step; then attention is what the model asked for, scaled_dot_product_attention.

Layout of every query, key, value and output: [B, H, L, D]. Outputs are [B, L, H, D] in memory, because
every model goes on with out.transpose(1, 2).flatten(2).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import attention as attention_torch
from . import cluster, context, measure, permute, probe, route
from .plan import KEY_BLOCK, QUERY_BLOCK, Plan, block_counts, empty_plan

# Decisions and carried centroids are read in Python at every call: a CUDA graph must not record one call's
# choice, so graphs are cut around the ops. Strides: the kernels read any, so Inductor has only to keep their
# order, and need not copy what it laid out differently from eager (exact strides are a custom op's default).
_TAGS = (torch.Tag.cudagraph_unsafe, torch.Tag.needs_fixed_stride_order)


class SiteError(RuntimeError):
    """An op of a site failed, and strict is set. The cause is the error itself."""


class SiteConstants(NamedTuple):
    """What is fixed for a site when its graph is compiled: the trailing arguments of its ops.

    scale: of the logits, 1/sqrt(head_dim) when None. num_text: text tokens of the sequence, first or last
    in it. grid: (frames, height, width) of the video tokens, or empty. order: how video tokens are put into
    blocks, "auto" (cubes where a grid is known, else splits), "cubes", "splits", "kmeans". routing: which
    blocks are exact, "output_error" (one budget for a batch element) or "svg_ear" (the paper). compensate:
    whether centroids stand for skipped blocks. density: exact video query-key pairs over all of them, where
    the call's context says nothing else; None: as the routing finds. site: the number of the site in its
    graph.
    """

    scale: float | None
    num_text: int
    text_first: bool
    grid: list[int]
    order: str
    routing: str
    compensate: bool
    density: float | None
    seed: int
    site: int


_T = TypeVar("_T")

_QKV = "Tensor query, Tensor key, Tensor value, Tensor? attn_mask"
_CONSTANTS = (
    "float? scale, SymInt num_text, bool text_first, SymInt[] grid, str order, str routing, "
    "bool compensate, float? density, int seed, int site"
)
_PLAN = (
    "Tensor key_p, Tensor value_p, Tensor query_order, Tensor query_offsets, Tensor key_order, "
    "Tensor key_offsets, Tensor key_centroids, Tensor value_centroids, Tensor bias, Tensor kept_count, "
    "Tensor kept_blocks"
)


def like_output(query: Tensor) -> Tensor:
    """An uninitialised [B,H,L,D] tensor that lies as [B,L,H,D] in memory."""
    B, H, L, D = query.shape
    return query.new_empty((B, L, H, D)).transpose(1, 2)


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float | None
) -> Tensor:
    """softmax(query key^T * scale + mask) value, by the call that the model itself made."""
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, scale=scale)
    _, H, L, D = query.shape
    # Some of its implementations answer in the layout of the query.
    return out if out.stride() == (H * L * D, D, H * D, 1) else like_output(query).copy_(out)


def _seen_keys(attn_mask: Tensor, site: int) -> int | None:
    """How many keys a mask shows, if these are the first ones, as many in each batch element; else None.

    Read once per mask and call, or less: seen_keys.py knows some masks from calls before.
    """
    call = context.current()
    number = call.mask_ids.get(site, site)
    if number not in call.seen_keys:
        if attn_mask.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        call.seen_keys[number] = _read_seen_keys(attn_mask)
    return call.seen_keys[number]


def _read_seen_keys(attn_mask: Tensor) -> int | None:
    """Reads one number from the device, and so waits for it."""
    shown = attn_mask[:, 0, 0, :]
    counts = shown.sum(-1, keepdim=True)
    is_first = shown == (torch.arange(shown.shape[-1], device=shown.device) < counts[:1])
    return int(torch.where(is_first.all(), counts[0, 0], 0)) or None


def _drop_noop_mask(attn_mask: Tensor | None, site: int) -> Tensor | None:
    """None where the mask hides nothing."""
    if attn_mask is None or _seen_keys(attn_mask, site) == attn_mask.shape[-1]:
        return None
    return attn_mask


def _dense_keys(
    key: Tensor, value: Tensor, attn_mask: Tensor | None, site: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """key, value and mask for dense attention: no mask where the first keys are all there is to see, since
    kernels without a mask are faster."""
    seen = None if attn_mask is None else _seen_keys(attn_mask, site)
    if seen is None:
        return key, value, attn_mask
    return key[:, :, :seen], value[:, :, :seen], None


def make_plan(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, c: SiteConstants) -> Plan:
    """Clusters, permutes, probes and routes one call; carries centroids over in the running call's context.

    attn_mask: [B or 1, 1, 1, L] bool, True where a key may be seen, or None.
    """
    call = context.current()
    B, H, L, D = query.shape
    scale = 1 / math.sqrt(D) if c.scale is None else c.scale
    valid = None if attn_mask is None else attn_mask[:, 0, 0, :].expand(B, L)
    (vq, tq), (vk, tk) = block_counts(L, c.num_text, c.order)
    grid = tuple(c.grid) or call.grid
    if grid is not None and math.prod(grid) != L - c.num_text:
        grid = None
    carried = call.carried.get(c.site, (None, None))
    arrange = (c.num_text, c.text_first, c.order, grid, c.seed, call.remember)
    queries, query_state = cluster.make_blocks(query, None, (vq, tq), QUERY_BLOCK, carried[0], *arrange)
    keys, key_state = cluster.make_blocks(key, valid, (vk, tk), KEY_BLOCK, carried[1], *arrange)
    if query_state is not None and key_state is not None:
        call.carried[c.site] = (query_state, key_state)

    kernels = _kernels(query)
    key_p, value_p, key_centroids, value_centroids = kernels.permute.gather_with_means(
        key, value, keys.order, keys.offsets, valid is not None
    )
    density = call.density.get(c.site, c.density)
    scores = kernels.probe.probe(
        kernels.permute.gathered_means(query, queries.order, queries.offsets),
        key_p,
        value_p,
        keys.offsets,
        key_centroids,
        value_centroids,
        scale,
        c.routing,
        largest_block=None if c.order == "kmeans" else KEY_BLOCK,
        with_mass=c.routing == "svg_ear" or density is None,
    )
    routed = kernels.route.select(
        scores, queries.offsets, keys.offsets, (vq, vk), c.routing, density, c.compensate
    )
    call.totals.setdefault(c.site, context.SiteTotals()).add(routed.areas, B * H * (L - c.num_text) ** 2)
    plan = Plan(
        key_p, value_p, queries.order, queries.offsets, keys.order, keys.offsets,
        key_centroids.to(query.dtype), value_centroids.to(query.dtype), *routed[:3],
    )  # fmt: skip
    return _checked_plan(plan, query, c)


class _Kernels(NamedTuple):
    """The modules with the functions of kernels/permute.py, probe.py, route.py and attention.py.

    The last argument of attention's, variable: whether blocks may be of any size (kmeans); Triton cannot
    see from a plan on the device.
    """

    permute: ModuleType
    probe: ModuleType
    route: ModuleType
    attention: ModuleType


def _kernels(query: Tensor) -> _Kernels:
    """For the query's device: Triton on CUDA, else PyTorch."""
    if query.is_cuda:
        from . import triton_attention, triton_permute, triton_probe, triton_route

        return _Kernels(triton_permute, triton_probe, triton_route, triton_attention)
    return _Kernels(permute, probe, route, attention_torch)


def _scale(query: Tensor, c: SiteConstants) -> float:
    return 1 / math.sqrt(query.shape[-1]) if c.scale is None else c.scale


def _unpack(plan_and_constants: tuple[Any, ...]) -> tuple[Plan, SiteConstants]:
    n = len(Plan._fields)
    return Plan(*plan_and_constants[:n]), SiteConstants(*plan_and_constants[n:])


def _sparse_or_dense(
    query: Tensor, c: SiteConstants, sparse: Callable[[], _T], dense: Callable[[], _T], alone: bool = True
) -> _T:
    """sparse(), or dense() where this call wants it or sparse() fails.

    A site that failed is dense for the rest of the call, and counted. Each kind of error is warned of once.
    alone: dense() is right whatever the other ops of the site do; otherwise, outside of any call's context,
    where they would not hear of it, the error is raised. Autocast is switched off: the fakes promise the
    query's dtype, and what is float32 here must stay float32.
    """
    call = context.current()
    with torch.autocast(query.device.type, enabled=False):
        if c.site not in call.dense:
            try:
                return sparse()
            except Exception as error:
                # After a CUDA error every further call fails too: falling back would only hide its origin.
                if isinstance(error, torch.AcceleratorError) or not (alone or context.inside()):
                    raise
                if call.strict:
                    raise SiteError(f"svg_ear: {call.name_of(c.site)} failed: {error!r}") from error
                _record_failure(call, c.site, error)
        return dense()


def _record_failure(call: context.Call, site: int, error: Exception) -> None:
    kind = type(error).__name__
    call.dense[site] = f"failed: {kind}"
    call.counters[f"fallback: {kind}"] += 1
    _warn_once(call, kind, f"{call.name_of(site)} ran dense because of {error!r}")


def _warn_once(call: context.Call, kind: str, message: str) -> None:
    if kind not in call.warned:
        call.warned.add(kind)
        warnings.warn(f"svg_ear: {message}", RuntimeWarning, stacklevel=4)


def _measure_call(
    query: Tensor, keys: Callable[[], tuple[Tensor, Tensor, Tensor | None]], out: Tensor, plan: Plan,
    c: SiteConstants,
) -> None:  # fmt: skip
    """Measures the error of a sparse call's output, on a sample and on all rows, where the host asked for it.

    keys: makes key and value, in any order, and which of them there are (None: all).
    """
    call = context.current()
    request = call.measure.get(c.site)
    if request is not None:

        def sampled() -> Tensor:
            slots = measure.sample(query.shape[2], query, request.seed)
            tokens = plan.query_order.gather(-1, slots).long()
            return measure.output_error(query, *keys(), out, tokens, _scale(query, c))[None]

        _lay(call.measured, c, sampled)
    if call.audit:
        _lay(call.audited, c, lambda: measure.true_error(query, *keys(), out, _scale(query, c))[None])


def _try_densities(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, out: Tensor, c: SiteConstants
) -> None:
    """In a dense call: measures what sparse ones would have lost, if the host asked for it."""
    call = context.current()
    request = call.measure.get(c.site)
    if request is None or not request.densities:
        return

    def sums() -> Tensor:
        mask = _drop_noop_mask(attn_mask, c.site)
        slots, errors = measure.sample(query.shape[2], query, request.seed), []
        for density in request.densities:
            # These plans compute no output: their areas count nowhere.
            with context.active(replace(call, density={c.site: density}, totals={})):
                plan = make_plan(query, key, value, mask, c)
            errors.append(measure.planned_error(query, plan, out, slots, _scale(query, c)))
        return torch.stack(errors)

    _lay(call.measured, c, sums)


def _lay(place: dict[int, Tensor], c: SiteConstants, sums: Callable[[], Tensor]) -> None:
    """Lays sums() there. If that fails there is no measurement: the output is right all the same."""
    call = context.current()
    try:
        place[c.site] = sums()
    except Exception as error:
        if isinstance(error, torch.AcceleratorError):
            raise
        if call.strict:
            raise SiteError(f"svg_ear: measuring {call.name_of(c.site)} failed: {error!r}") from error
        kind = type(error).__name__
        call.counters[f"not measured: {kind}"] += 1
        _warn_once(call, f"measuring: {kind}", f"{call.name_of(c.site)} was not measured: {error!r}")


def _checked(out: Tensor, query: Tensor) -> Tensor:
    """A kernel's output, if it is what the fakes promise: whatever comes after it relies on that."""
    _, H, L, D = query.shape
    if (out.shape, out.stride(), out.dtype) != (query.shape, (H * L * D, D, H * D, 1), query.dtype):
        raise RuntimeError(f"a kernel returned {out.dtype} {[*out.shape]} for {query.dtype} {[*query.shape]}")
    return out


def _checked_plan(plan: Plan, query: Tensor, c: SiteConstants) -> Plan:
    """A plan, if its tensors have their shapes: the kernels do not look before they read."""
    B, H, L, D = query.shape
    (vq, tq), (vk, tk) = block_counts(L, c.num_text, c.order)
    Cq, Ck = vq + tq, vk + tk
    sizes = ((L, D), (L, D), (L,), (Cq + 1,), (L,), (Ck + 1,), (Ck, D), (Ck, D), (Cq, Ck), (Cq,), (Cq, Ck))
    for name, tensor, size in zip(plan._fields, plan, sizes, strict=True):
        if tensor.shape != (B, H, *size):
            raise RuntimeError(f"{name} of a plan is {[*tensor.shape]}, not {[B, H, *size]}")
    return plan


@torch.library.custom_op(
    "svg_ear::clustered_permute",
    mutates_args=(),
    schema=f"({_QKV}, {_CONSTANTS}) -> ({', '.join(['Tensor'] * len(Plan._fields))})",
    tags=_TAGS,
)
def clustered_permute(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *constants: Any
) -> Plan:
    """The plan of one call (kernels/plan.py). In a dense call its tensors are uninitialised and unused."""
    c = SiteConstants(*constants)

    def sparse() -> Plan:
        plan = make_plan(query, key, value, _drop_noop_mask(attn_mask, c.site), c)
        # What the call remembers stays its own: whoever gets the plan may reuse its memory.
        shared = ("query_order", "query_offsets", "key_order", "key_offsets")
        return plan._replace(**{name: getattr(plan, name).clone() for name in shared})

    return _sparse_or_dense(query, c, sparse, lambda: empty_plan(query, c.num_text, c.order), alone=False)


@clustered_permute.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *constants: Any) -> Plan:
    c = SiteConstants(*constants)
    return empty_plan(query, c.num_text, c.order)


@torch.library.custom_op(
    "svg_ear::sparse_exact",
    mutates_args=(),
    schema=f"({_QKV}, {_PLAN}, {_CONSTANTS}) -> (Tensor, Tensor)",
    tags=_TAGS,
)
def sparse_exact(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *plan_and_constants: Any
) -> tuple[Tensor, Tensor]:
    """Softmax over the kept key blocks alone: (out [B,H,L,D], lse [B,H,L] float32), in token order.

    lse_q = log sum_{j kept} sum_{t in j} exp(s_t),  out_q = sum_{j kept} sum_{t in j} exp(s_t - lse_q) v_t

    A query with no kept block has out 0 and lse -inf. In a dense call: dense attention, and lse unspecified.
    """
    plan, c = _unpack(plan_and_constants)

    def sparse() -> tuple[Tensor, Tensor]:
        out, variable = like_output(query), c.order == "kmeans"
        out, lse = _kernels(query).attention.sparse_exact(query, plan, _scale(query, c), out, variable)
        return _checked(out, query), lse

    def dense() -> tuple[Tensor, Tensor]:
        out = dense_attention(query, *_dense_keys(key, value, attn_mask, c.site), c.scale)
        _try_densities(query, key, value, attn_mask, out, c)
        return out, query.new_empty(query.shape[:-1], dtype=torch.float32)

    return _sparse_or_dense(query, c, sparse, dense, alone=False)


@sparse_exact.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    return like_output(query), query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.custom_op(
    "svg_ear::centroid_compensation",
    mutates_args=(),
    schema=f"(Tensor query, Tensor out, Tensor lse, {_PLAN}, {_CONSTANTS}) -> Tensor",
    tags=_TAGS,
)
def centroid_compensation(query: Tensor, out: Tensor, lse: Tensor, *plan_and_constants: Any) -> Tensor:
    """Adds the skipped blocks to an exact part: one joint softmax over kept tokens and centroids.

    With w_j = exp(s(q, kc_j) + bias_ij):  (exp(lse) out + sum_j w_j vc_j) / (exp(lse) + sum_j w_j)

    In a dense call: a copy of out. Where it fails: dense attention over the plan's own keys, since the order
    of keys does not matter.
    """
    plan, c = _unpack(plan_and_constants)
    out_is_dense = c.site in context.current().dense

    def keys() -> tuple[Tensor, Tensor, Tensor]:
        slots = torch.arange(query.shape[2], device=query.device)
        return plan.key, plan.value, (slots < plan.key_offsets[..., -1:])[:, :, None, :]

    def sparse() -> Tensor:
        merged, variable = like_output(query), c.order == "kmeans"
        merged = _kernels(query).attention.centroid_compensation(
            query, out, lse, plan, _scale(query, c), merged, variable
        )
        _measure_call(query, keys, _checked(merged, query), plan, c)
        return merged

    def dense() -> Tensor:
        if out_is_dense:
            return like_output(query).copy_(out)
        return dense_attention(query, *keys(), c.scale)

    return _sparse_or_dense(query, c, sparse, dense)


@centroid_compensation.register_fake
def _(query: Tensor, out: Tensor, lse: Tensor, *_: Any) -> Tensor:
    return like_output(query)


@torch.library.custom_op(
    "svg_ear::attention", mutates_args=(), schema=f"({_QKV}, {_CONSTANTS}) -> Tensor", tags=_TAGS
)
def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *constants: Any) -> Tensor:
    """The three ops in one call; dense attention in a dense call."""
    c = SiteConstants(*constants)

    def sparse() -> Tensor:
        mask = _drop_noop_mask(attn_mask, c.site)
        plan = make_plan(query, key, value, mask, c)
        out = like_output(query)
        out = _kernels(query).attention.attend(query, plan, _scale(query, c), out, c.order == "kmeans")
        _measure_call(query, lambda: (key, value, mask), _checked(out, query), plan, c)
        return out

    def dense() -> Tensor:
        out = dense_attention(query, *_dense_keys(key, value, attn_mask, c.site), c.scale)
        _try_densities(query, key, value, attn_mask, out, c)
        return out

    return _sparse_or_dense(query, c, sparse, dense)


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *_: Any) -> Tensor:
    return like_output(query)
