"""Which arguments of the compiled graph does the host look at before a call?

The step clock needs the timestep (graphs of whole models) or the timestep embedding (graphs of blocks), the
layer is known by the Parameter that the query projection receives, and the frame grid may stand in rotary
tables. Positions are counted among the graph's placeholders, which are the arguments of the compiled
callable: under dynamic shapes SymInts come among them, so a fixed position would be wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import fx

from .signs import rotary_placeholders
from .site import GraphInputs, Site
from .sources import is_activation, last_key

_TEMB = re.compile(r"^(temb|time_embed\w*|timestep_proj|t_emb|time_emb\w*|temb_\w+|timestep_embedding)$")


def read_inputs(gm: fx.GraphModule, sites: Sequence[Site]) -> GraphInputs:
    """Finds the inputs that the host reads, for the sites that are rewritten."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    position = {node: i for i, node in enumerate(placeholders)}
    names = {node: last_key(node) for node in placeholders if is_activation(node)}
    timestep = [position[node] for node, name in names.items() if name.endswith("timestep")]
    temb = [position[node] for node, name in names.items() if _TEMB.match(name)]
    rewritten = [site for site in sites if site.verdict.rewrite]
    tokens = {site.q_hint - site.layout.text_hint for site in rewritten}
    return GraphInputs(
        timestep=timestep[0] if timestep else None,
        temb=temb[0] if temb else None,
        rotary=tuple(rotary_placeholders(gm.graph, tokens)),
        parameters={s.index: position[s.parameter] for s in rewritten if s.parameter in position},
    )
