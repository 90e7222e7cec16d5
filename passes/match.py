"""Which attention does a graph hold? Every scaled_dot_product_attention call, its arguments by name.

Attention that a model writes out itself (by_hand.py) and flex_attention that is plain attention (flex.py) are
calls of the same kind.

Dynamo leaves F.scaled_dot_product_attention as one call_function node, whatever device and dtype (below AOT
it would have become one of several device-specific ops). Two styles of calls occur in diffusers: everything
by keyword, or query, key and value by position.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .by_hand import Written, by_hand, is_attention_like
from .cut_off import cut_off
from .flex import plain_flex
from .sizes import constant, example, is_inverse_root

SDPA = torch.nn.functional.scaled_dot_product_attention
_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_DEFAULTS = {
    "attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False,
    "mask_hides": False,
}  # fmt: skip
# A choice that allows all of these forces nothing: it is what leaving a `with sdpa_kernel(...)` restores.
_FREE_CHOICE = {"FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"}
_OTHER_ATTENTION = re.compile(
    r"flex_attention|flash_attn|sage_?attn|xformers|memory_efficient", re.IGNORECASE
)


@dataclass(frozen=True)
class Call:
    """One attention call with normalised arguments, and the module it stands in."""

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    attn_mask: fx.Node | None
    dropout_p: Any
    is_causal: Any
    scale: Any
    enable_gqa: Any
    mask_hides: bool
    """Whether attn_mask is True where a key is hidden: written by hand only."""
    module_path: str
    """Readable, e.g. 'blocks.0.attn1'; '' in the root module."""
    module_classes: tuple[str, ...]
    """Qualified class names of the modules around the call, outermost first."""
    source_files: str
    """The stack trace: which files the call was made from."""
    forced_backend: str
    """The SDPA backends that a `with sdpa_kernel(...)` around it allows; '' if there is none."""


@dataclass(frozen=True)
class Matches:
    """All attention of one graph. others: names of attention-like calls that are not SDPA. outside: of what
    may run outside of all graphs, since this one has the rest of a block and no attention; '' if it has."""

    calls: tuple[Call, ...]
    others: tuple[str, ...]
    outside: str = ""


def match(graph: fx.Graph) -> Matches:
    """Finds every call of a graph, in order, and names what else looks like attention."""
    calls, others, forced = [], [], ""
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        if node.target is SDPA:
            calls.append(call_of(node, forced))
        elif written := by_hand(node) or plain_flex(node):
            calls.append(_written_call(node, written))
        elif is_attention_like(node):
            others.append(named("attention written by hand", node))
        elif getattr(node.target, "__name__", "") == "_sdpa_kernel":
            forced = _forced(node)
        elif name := _attention_like(node):
            others.append(name)
    return Matches(tuple(calls), tuple(others), "" if calls or others else cut_off(graph))


def module_stack(node: fx.Node) -> list[tuple[str, str]]:
    """(readable path, qualified class name) of the modules around a node, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return [
        (readable_path(path), cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}")
        for path, cls in stack.values()
    ]


def readable_path(path: str) -> str:
    """`L['self'].__dict__['_modules']['blocks'].0.attn1` -> `blocks.0.attn1`; without a hook's reference."""
    path = re.sub(r"^(L|G)\['\w+'\](.*\.__self__)?", "", path)
    path = re.sub(r"(\.__dict__)?(\['_modules'\]|\._modules)", "", path)
    return re.sub(r"\['?([^'\]]+)'?\]", r".\1", path).strip(".")


def call_of(node: fx.Node, forced: str = "") -> Call:
    """The normalised arguments of an SDPA node."""
    arguments: dict[str, Any] = dict(_DEFAULTS)
    arguments.update(zip(_PARAMETERS, node.args, strict=False))
    arguments.update(node.kwargs)
    return _call(node, arguments, forced)


def _written_call(node: fx.Node, written: Written) -> Call:
    return _call(node, _DEFAULTS | vars(written), "")


def _call(node: fx.Node, arguments: dict[str, Any], forced: str) -> Call:
    stack = module_stack(node)
    arguments["scale"] = _scale(arguments["scale"], arguments["query"])
    dropout = constant(arguments["dropout_p"])
    arguments["dropout_p"] = arguments["dropout_p"] if dropout is None else dropout
    return Call(
        node=node,
        **arguments,
        module_path=stack[-1][0] if stack else "",
        module_classes=tuple(cls for _, cls in stack),
        source_files=node.meta.get("stack_trace") or "",
        forced_backend=forced,
    )


def _scale(scale: Any, query: fx.Node) -> Any:
    """A float; None for 1 / sqrt(head_dim), computed or not; what only a run shows stays a node."""
    known = constant(scale)
    if known is not None or scale is None:
        return known
    return None if is_inverse_root(example(scale), example(query).shape[-1]) else scale


def _forced(node: fx.Node) -> str:
    """The backends that an entered (on leaving: restored) sdpa_kernel context allows; '' if all."""
    backends = node.args[0] if node.args else ()
    names = [str(b.args[0]) if isinstance(b, fx.Node) and b.args else str(b) for b in backends]
    names = [name.rpartition(".")[2] for name in names]
    return "" if set(names) >= _FREE_CHOICE else ", ".join(names)


def _attention_like(node: fx.Node) -> str:
    name = getattr(node.target, "__name__", str(node.target))
    if "mask" in name or not _OTHER_ATTENTION.search(name):
        return ""
    if name == "flex_attention" and any(plain_flex(user) for user in node.users):
        return ""
    return named(name, node)


def named(name: str, node: fx.Node) -> str:
    """A call that is left as it is, with the module it stands in."""
    stack = module_stack(node)
    return f"{name} in {stack[-1][0]}" if stack and stack[-1][0] else name
