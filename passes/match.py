"""Which attention does a graph hold? Every scaled_dot_product_attention call, with its arguments by name.

Dynamo leaves F.scaled_dot_product_attention as one call_function node, whatever device and dtype (below AOT
it would have become one of several device-specific ops). Two styles of calls occur in diffusers: everything
by keyword, or query, key and value by position.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import fx

from svg_ear_compile.compat import is_sdpa_kernel

from .fx_utils import SDPA, module_stack, without_numbers
from .graph_break_hint import missing_attention
from .sizes import constant, example, is_inverse_root
from .subgraphs import nested_attention
from .unfused_attention import unfused_attention

_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
# A choice that allows all of these forces nothing: leaving a `with sdpa_kernel(...)` restores it.
_FREE_CHOICE = {"FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"}


@dataclass(frozen=True)
class AttentionNode:
    """One attention call with normalised arguments, and the module that makes it."""

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    attn_mask: fx.Node | None
    dropout_p: Any
    is_causal: Any
    scale: Any
    enable_gqa: Any
    module_path: str
    """Readable, e.g. 'blocks.0.attn1'; '' in the root module."""
    module_classes: tuple[str, ...]
    """Qualified class names of the modules around the call, outermost first."""
    source_files: str
    """The stack trace: which files the call was made from."""
    forced_backend: str
    """The SDPA backends that a `with sdpa_kernel(...)` around it allows; '' if there is none."""

    @property
    def forced_by(self) -> str:
        """What to do about forced_backend: a setting of diffusers forces it, or the script does."""
        by_diffusers = re.search(
            r'attention_dispatch\.py", line \d+, in _native_(?!attention)', self.source_files
        )
        return 'call model.set_attention_backend("native")' if by_diffusers else ""


class OtherAttention(NamedTuple):
    """Attention that is left as it is: what it is, what to do about it, and the module that runs it."""

    kind: str
    advice: str
    module_path: str


@dataclass(frozen=True)
class Matches:
    """All attention of one graph. others: what is left as it is. outside: attention that seems to run outside of the
    graphs, since this one holds the rest of its block; '' if there is none."""

    calls: tuple[AttentionNode, ...]
    others: tuple[OtherAttention, ...]
    outside: str = ""


def match(graph: fx.Graph) -> Matches:
    """Finds every call of a graph, in order, and names what else looks like attention."""
    calls, others = [], []
    forced = ""
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        if node.target is SDPA:
            calls.append(_attention_node(node, forced))
        elif is_sdpa_kernel(node):
            forced = _forced(node)
        elif other := unfused_attention(node):
            others.append(_other(*other, node))
    if graph.owning_module is not None:
        others += [_other(*nested) for nested in nested_attention(graph.owning_module)]
    return Matches(tuple(calls), tuple(others), "" if calls or others else missing_attention(graph))


def _attention_node(node: fx.Node, forced_backend: str) -> AttentionNode:
    """The normalised arguments of an SDPA node."""
    arguments: dict[str, Any] = dict(_DEFAULTS)
    arguments.update(zip(_PARAMETERS, node.args, strict=False))
    arguments.update(node.kwargs)
    arguments["scale"] = _scale(arguments["scale"], arguments["query"])
    dropout = constant(arguments["dropout_p"])
    arguments["dropout_p"] = arguments["dropout_p"] if dropout is None else dropout
    stack = module_stack(node)
    return AttentionNode(
        node=node,
        **arguments,
        module_path=stack[-1][0] if stack else "",
        module_classes=tuple(cls for _, cls in stack),
        source_files=node.meta.get("stack_trace") or "",
        forced_backend=forced_backend,
    )


def _scale(scale: Any, query: fx.Node) -> Any:
    """A float; None for 1 / sqrt(head_dim), computed or not; a node if only a run shows the value."""
    known = constant(scale)
    if known is not None or scale is None:
        return known
    return None if is_inverse_root(example(scale), example(query).shape[-1]) else scale


def _forced(node: fx.Node) -> str:
    """The backends that an entered (on leaving: restored) sdpa_kernel context allows; '' if all."""
    backends: Any = node.args[0] if node.args else ()
    names = [str(b.args[0]) if isinstance(b, fx.Node) and b.args else str(b) for b in backends]
    names = [name.rpartition(".")[2] for name in names]
    return "" if set(names) >= _FREE_CHOICE else ", ".join(names)


def _other(kind: str, advice: str, node: fx.Node) -> OtherAttention:
    stack = module_stack(node)
    return OtherAttention(kind, advice, stack[-1][0] if stack else "")


def in_words(others: Sequence[OtherAttention]) -> list[str]:
    """'flex_attention in blocks.*.attn1 (what to do)': layers that differ only in their number are named once."""
    paths: dict[tuple[str, str], dict[str, None]] = {}
    for kind, advice, path in others:
        paths.setdefault((kind, advice), {})[without_numbers(path)] = None
    return [
        kind + (f" in {', '.join(filter(None, where))}" if any(where) else "") + f" ({advice})"
        for (kind, advice), where in paths.items()
    ]
