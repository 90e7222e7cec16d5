"""Is an attention call rewritten, and if not, why? One Site with a Verdict for each call.

Self attention is recognised by where its tokens come from: query, key and value must run over the same
tokens (provenance/). Equal lengths prove nothing. A site stays dense if the kernels do not support it, or if nothing
shows that its tokens are video (evidence.py), unless the user names the module.

`sites=` holds patterns of module paths (fnmatch; `*` also matches dots). A graph of a single block knows
only the end of the path ('attn1' for 'blocks.7.attn1'): there a pattern's last components are compared,
as many as the path has.

A graph that takes any length is compiled once, with the length of the first call. What depends on the length is
therefore not decided here: the site is rewritten, and each call with too few tokens, or with one frame, runs dense.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import fx

from svg_ear_compile.settings import Settings

from .evidence import OTHER_TOKENS, Answer, Evidence, find_evidence, packed_layout
from .fx_utils import without_numbers
from .graph_break_hint import break_before, is_resumed
from .layout import is_factorised, read_layout, video_parts
from .masks import read_mask
from .match import AttentionNode, match
from .provenance.axes import Axes, Axis, axis_size
from .provenance.rules import trace_axes
from .site import Layout, Reason, Site, Verdict
from .sizes import example, hint, is_symbolic, shape, shown
from .sources import last_key
from .threshold import least_tokens

HEAD_DIMS = range(16, 257)
_PROJECTED = re.compile(r"query|key|value|q|k|v|___stack\d+")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def classify(gm: fx.GraphModule, settings: Settings, example_inputs: Sequence[object] = ()) -> list[Site]:
    """One Site per SDPA call of a Dynamo graph, in order. Reads the graph only, and installs no guards.

    example_inputs: the arguments that Dynamo hands to a backend; values of rotary tables among them are read.
    """
    axes = trace_axes(gm.graph)
    return [_site(i, call, axes, settings, example_inputs) for i, call in enumerate(match(gm.graph).calls)]


def named(path: str, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns of `sites=` names a module path."""
    count = len(path.split("."))
    return any(fnmatchcase(path, p) or fnmatchcase(path, ".".join(p.split(".")[-count:])) for p in patterns)


def pattern_of(path: str) -> str:
    """A pattern for `sites=` that names a module and all that differ from it only in numbers."""
    return without_numbers(path) or "*"


def _site(
    index: int, call: AttentionNode, axes: Axes, settings: Settings, example_inputs: Sequence[object]
) -> Site:
    q, k, v = (axes.of.get(n) for n in (call.query, call.key, call.value))
    mask, bad_mask, key_mask = read_mask(call)
    if q is None or k is None or v is None or not len(q) == len(k) == len(v) == 4:
        shapes = [shape(n) for n in (call.query, call.key, call.value)]
        reason = Reason.UNKNOWN_SHAPE if None in shapes else Reason.RANK
        return _make(index, call, "unknown", mask, Verdict(False, reason), Layout())
    kind, layout = _kind(q[2], k[2], v[2]), read_layout(axes, q[2])
    packed = packed_layout(call)
    if packed is not None and kind != "cross":
        kind, layout = "joint", packed
    is_named = named(call.module_path, settings.sites)
    obstacle = None if is_named else _other_tokens(call, kind, q[2])
    obstacle = obstacle or _obstacle(call, kind, bad_mask, mask)
    if layout is None:
        return _make(index, call, kind, mask, obstacle or Verdict(False, Reason.SPLIT_TEXT), Layout())
    if obstacle is None and kind == "unknown" and not is_named:
        obstacle = _lost_tokens(call, (q[2], k[2], v[2]))
    if obstacle is not None:
        return _make(index, call, kind, mask, obstacle, layout)

    tokens = axis_size(q[2]) - layout.text_hint
    if is_named:
        evidence = Evidence(Answer.VIDEO, "named in sites=")
    else:
        evidence = find_evidence(call, q[2], layout, example_inputs, tokens)
    if evidence.answer is not Answer.VIDEO:
        return _make(index, call, kind, mask, _no_video(call, evidence, q[2]), layout)
    query = example(call.query)
    least = settings.min_tokens or least_tokens(query)
    per_call = is_symbolic(query.shape[2]) or layout.packed
    return replace(
        _make(index, call, kind, mask, _enough(tokens, least, evidence, query), layout),
        key_mask=key_mask,
        min_tokens=least if per_call and least > 1 else 0,
        min_frames=2 if evidence.frames_may_change else 0,
    )


def _other_tokens(call: AttentionNode, kind: str, axis: Axis) -> Verdict | None:
    is_other = kind == "self" and (not video_parts(axis) or OTHER_TOKENS.search(call.module_path))
    return Verdict(False, Reason.TEXT) if is_other else None


def _lost_tokens(call: AttentionNode, tokens: Sequence[Axis]) -> Verdict:
    names = [last_key(root) for axis in tokens if (root := axis[0][0].root) is not None]
    left_by_break = any(name.startswith("___stack") for name in names)
    if left_by_break or (is_resumed(call.node) and all(map(_is_bare, tokens))):
        return Verdict(False, Reason.AFTER_BREAK, "", break_before(call.node))
    return Verdict(False, Reason.UNKNOWN_TOKENS, "", _advice(call, "if it is self attention over video"))


def _no_video(call: AttentionNode, evidence: Evidence, axis: Axis) -> Verdict:
    if is_factorised(axis):
        return Verdict(False, Reason.FACTORISED, f"{axis_size(axis)} tokens")
    if evidence.answer is Answer.NOT_VIDEO:
        return Verdict(False, Reason.NOT_VIDEO, evidence.words, _advice(call, "anyway"))
    return Verdict(False, Reason.NO_SIGN_OF_VIDEO, evidence.words, _advice(call, "if they are"))


def _advice(call: AttentionNode, when: str) -> str:
    return f'sites="{pattern_of(call.module_path)}" rewrites it {when}'


def _kind(query: Axis, key: Axis, value: Axis) -> str:
    """'self', 'joint' (self attention over video and other tokens), 'cross' or 'unknown'."""
    atoms = [atom for axis in (query, key, value) for part in axis for atom in part]
    if query != key or key != value:
        lost = any(atom.guess for atom in atoms) or all(map(_is_bare, (query, key, value)))
        return "unknown" if lost and axis_size(query) == axis_size(key) else "cross"
    if all(atom.root is None for atom in atoms):
        return "unknown"
    return "joint" if len(query) > 1 else "self"


def _is_bare(axis: Axis) -> bool:
    """Whether these are tokens of an input that is a projection already: [batch, heads, tokens, head_dim],
    or what a graph break left of one, as between the leaves of a group-offloaded model."""
    root = axis[0][0].root
    if root is None or not len(axis) == len(axis[0]) == 1:
        return False
    return axis[0][0].root_rank == 4 or _PROJECTED.fullmatch(last_key(root)) is not None


def _obstacle(call: AttentionNode, kind: str, bad_mask: Reason | None, mask: str) -> Verdict | None:
    """The first thing that the kernels do not support, whatever the tokens are."""
    query, key, value, out = (example(n) for n in (call.query, call.key, call.value, call.node))
    head_dims = [hint(x.shape[3]) for x in (query, key, value)]
    heads = [hint(x.shape[1]) for x in (query, key, value)]
    dtypes = [x.dtype for x in (query, key, value)]
    names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
    autocast = out.dtype in DTYPES and all(d in DTYPES for d in dtypes)
    checks = [
        (kind == "cross", Reason.CROSS, ""),
        (call.is_causal is not False, Reason.CAUSAL, ""),
        (
            call.enable_gqa is not False or len(set(heads)) > 1,
            Reason.GQA,
            f"{heads[0]} heads over {heads[1]}",
        ),
        (out.requires_grad, Reason.GRAD, ""),
        (bool(call.forced_backend), Reason.FORCED_BACKEND, call.forced_backend),
        (call.dropout_p != 0, Reason.DROPOUT, f"p = {call.dropout_p}"),
        (call.scale is not None and not isinstance(call.scale, (int, float)), Reason.SCALE, ""),
        (not autocast or len({x.device for x in (query, key, value)}) > 1, Reason.DTYPE, names),
        (len(set(head_dims)) > 1 or head_dims[0] not in HEAD_DIMS, Reason.HEAD_DIM, f"{head_dims[0]}"),
        (bad_mask is not None, bad_mask, mask),
    ]
    reason, detail = next(((reason, detail) for found, reason, detail in checks if found), (None, ""))
    if reason is None:
        return None
    return Verdict(False, reason, detail, call.forced_by if reason is Reason.FORCED_BACKEND else "")


def _enough(tokens: int, least: int, evidence: Evidence, query: torch.Tensor) -> Verdict:
    """Whether there are enough video tokens. Under dynamic shapes that is decided in each call."""
    if is_symbolic(query.shape[2]):
        checks = ["too few tokens"] * (least > 1) + ["one frame"] * evidence.frames_may_change
        per_call = f"; {' or '.join(checks)}: decided per call" if checks else ""
        return Verdict(True, Reason.REWRITTEN, evidence.words + per_call)
    if tokens < least:
        return Verdict(False, Reason.TOO_FEW_TOKENS, f"{tokens} of at least {least}")
    return Verdict(True, Reason.REWRITTEN, evidence.words)


def _make(index: int, call: AttentionNode, kind: str, mask: str, verdict: Verdict, layout: Layout) -> Site:
    query, key = example(call.query), example(call.key)
    sizes = [*query.shape] if query is not None and query.dim() == 4 else [0, 0, 0, 0]
    k_len = key.shape[-2] if key is not None and key.dim() >= 2 else 0
    return Site(
        index=index,
        node=call.node,
        module_path=call.module_path,
        module_class=call.module_classes[-1].rpartition(".")[2] if call.module_classes else "",
        kind=kind,
        batch=hint(sizes[0]) or 0,
        heads=hint(sizes[1]) or 0,
        head_dim=hint(sizes[3]) or 0,
        q_len=shown(sizes[2]),
        k_len=shown(k_len),
        q_hint=hint(sizes[2]) or 0,
        k_hint=hint(k_len) or 0,
        dtype=str(query.dtype).removeprefix("torch.") if query is not None else "unknown",
        mask=mask,
        verdict=verdict,
        layout=layout,
    )
