"""What says that a site's tokens are video? Without a sign, only very long sequences are touched.

An image transformer, a VAE or a vision encoder also runs long self attention; sparse attention there would
be a surprise. Signs of video, each enough: tokens that span the frames of a 5-D input, rotary tables over a
grid of several frames, or a diffusers class that is known to be a video transformer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import fx

from .axes import Axis
from .layout import is_packed_video, video_parts
from .match import Call
from .rotary import grid_from_rotary, is_sequence
from .sizes import shape
from .sources import POSITIONS, TEXT, VIDEO_FILE, is_activation, last_key

# A refiner of text tokens; SanaWMLTX2RefinerTransformerBlock refines video.
NOT_VIDEO = re.compile(
    r"refiner(?!transformer)|text|context_embed|caption|audio|image_embed|vision|clip", re.IGNORECASE
)


def sign_of_video(call: Call, axis: Axis, example_inputs: Sequence[object], video_tokens: int) -> str:
    """The sign in words, '' if there is none."""
    names = [call.module_path, *(cls.rpartition(".")[2] for cls in call.module_classes)]
    if any(NOT_VIDEO.search(name) for name in names):
        return ""
    for part in video_parts(axis):
        root = next((atom.root for atom in part if len(shape(atom.root) or ()) == 5), None)
        if root is not None:
            return f"frames of a 5-D input, {last_key(root)}" if is_packed_video(part) else ""
        if any(is_activation(atom.root) and len(shape(atom.root) or ()) == 4 for atom in part):
            return ""  # pixels of images
    placeholders = rotary_placeholders(call.node.graph, {video_tokens})
    tables = [t for i in placeholders if i < len(example_inputs) and _has_values(t := example_inputs[i])]
    grid = grid_from_rotary(tables, video_tokens) if tables else None  # type: ignore[arg-type]
    if grid is not None:
        return f"rotary tables over {grid[0]} x {grid[1]} x {grid[2]} tokens" if grid[0] > 1 else ""
    if tables and is_sequence(tables, video_tokens):  # type: ignore[arg-type]
        return ""
    known = next(
        (m for text in (*call.module_classes, call.source_files) if (m := VIDEO_FILE.search(text))), None
    )
    return f"diffusers' {known.group(0)}" if known else ""


def rotary_placeholders(graph: fx.Graph, token_counts: set[int]) -> list[int]:
    """Positions of the inputs that are tables over as many tokens: named like rotary tables, not text's."""
    found = []
    for i, node in enumerate(graph.find_nodes(op="placeholder")):
        sizes = shape(node) or ()
        name = last_key(node)
        is_table = is_activation(node) and POSITIONS.search(name) and not TEXT.search(name)
        if is_table and token_counts & {*sizes[:-1]}:
            found.append(i)
    return found


def _has_values(value: object) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and type(value) in (torch.Tensor, torch.nn.Parameter)
        and not value.is_meta
    )
