"""Did the graph break before or after an attention, so that it runs outside of any graph, unseen by us?

Where a model computes with numbers that only the data shows (Mochi picks the valid text tokens by nonzero, in
a loop), Dynamo leaves the whole function to eager Python: not even the projections are in a graph. What is
left is the rest of the block. So a graph with the feed forward layer of a video transformer and without
attention tells.
"""

from __future__ import annotations

import re

from torch import fx

from .sources import VIDEO_FILE, is_weight, source_name

HINT = "torch._dynamo.config.capture_dynamic_output_shape_ops or capture_scalar_outputs may bring it back"
_FEED_FORWARD = re.compile(r"\W(ffn?|ff_\w+|mlp|feed_forward)\W")


def cut_off(graph: fx.Graph) -> str:
    """The attention that a graph without any lacks, in words; '' if it lacks none."""
    for node in graph.find_nodes(op="placeholder"):
        if is_weight(node) and _FEED_FORWARD.search(source_name(node)):
            for user in node.users:
                if known := VIDEO_FILE.search(user.meta.get("stack_trace") or ""):
                    return f"attention of {known.group(0)} that is outside of the graphs ({HINT})"
    return ""
