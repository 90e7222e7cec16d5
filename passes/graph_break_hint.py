"""Which graph break keeps attention out of the graphs, and what can the user do about it?

If a model prints, computes with numbers that only the data shows, or is wrapped by a hook that Dynamo cannot trace,
Dynamo breaks the graph, and may leave whole functions to eager Python. It remembers why and where. Code after a break
is compiled as a function of its own, whose name holds the line of the break. So the cause is looked up, not guessed.
"""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any

from torch import fx

from svg_ear_compile.compat import graph_break_reasons, resumed_after

from .sources import VIDEO_FILE, is_weight, source_name

_FEED_FORWARD = re.compile(r"\W(ffn?|ff_\w+|mlp|feed_forward)\W")
_KNOWN = {
    r"group_offloading\.py": 'group offloading with offload_type="block_level" breaks no block',
    r"MagCache|SeaCache": "this cache switches torch.compile off around the blocks, with every backend",
}
"""What to do about breaks that are known: a pattern of the reason or of the files, and advice."""
_UNKNOWN = "TORCH_LOGS=graph_breaks shows why"


def missing_attention(graph: fx.Graph) -> str:
    """The attention that is missing from a graph without any, in words; '' if none is missing.

    A graph with the feed-forward layer of a video transformer but without attention is part of a broken block.
    """
    for node in graph.find_nodes(op="placeholder"):
        if is_weight(node) and _FEED_FORWARD.search(source_name(node)):
            for user in node.users:
                if known := VIDEO_FILE.search(user.meta.get("stack_trace") or ""):
                    return (
                        f"attention of {known.group(0)} that is outside of the graphs ({break_before(user)})"
                    )
    return ""


def is_resumed(node: fx.Node) -> bool:
    """Whether the code of this node resumes after a graph break."""
    return bool(resumed_after(node.meta.get("stack_trace") or ""))


def break_before(node: fx.Node) -> str:
    """The graph break after which the code of this node resumes: why, where, and what to do."""
    places = set(resumed_after(node.meta.get("stack_trace") or ""))
    for reason in reversed(graph_break_reasons()):
        if places & {(frame.filename, frame.lineno) for frame in reason.user_stack or ()}:
            return _words(reason)
    return _UNKNOWN


def graph_breaks() -> list[str]:
    """All graph breaks since the last torch._dynamo.reset(): why, where, and what to do. Each one once."""
    return list(dict.fromkeys(map(_words, graph_break_reasons())))


def _words(reason: Any) -> str:
    """'Dynamic shape operator (aten.nonzero.default) at diffusers/models/attention_processor.py:989; Enable ...'."""
    text, stack = str(reason.reason), list(reason.user_stack or ())
    title = text.strip().split("\n")[0] or "a graph break"
    if context := re.search(r"Developer debug context: (?:<function )?([\w<>]+\.[\w.<>]+)", text):
        title += f" ({context[1]})"
    own = [frame for frame in stack if "/torch/" not in frame.filename.replace("\\", "/")]
    where = ""
    if own:
        where = f" at {'/'.join(PurePath(own[-1].filename).parts[-3:])}:{own[-1].lineno}"
    searched = "\n".join([text, *(frame.filename for frame in stack)])
    known = next((advice for pattern, advice in _KNOWN.items() if re.search(pattern, searched)), None)
    hints = re.findall(r"Hint: (.+)", text)
    return f"{title}{where}; {known or (hints[0] if hints else _UNKNOWN)}"
