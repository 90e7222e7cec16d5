"""Are the tokens of a site video? Yes, no, or nothing says so.

An image transformer, a VAE, a vision encoder or a language model also runs long self attention, and users would not
expect sparse attention there. So only what is known to be video is rewritten.

- VIDEO: tokens that span several frames of a 5-D input, rotary tables over a grid of several frames, or a
  diffusers class that is known to be a video transformer.
- NOT_VIDEO: pixels of a 4-D input, one frame in a 5-D input or in rotary tables, positions of a sequence.
- UNKNOWN: none of these.

A module that the user names in `sites=` counts as video.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import fx

from .layout import is_clip, video_parts
from .match import AttentionNode
from .provenance.axes import Axis, Part
from .rotary import grid_from_rotary, is_sequence
from .site import Layout
from .sizes import Extent, example, is_symbolic, shape
from .sources import PACKED, POSITIONS, TEXT, VIDEO_FILE, is_activation, last_key

# A refiner of text tokens; SanaWMLTX2RefinerTransformerBlock refines video.
OTHER_TOKENS = re.compile(
    r"refiner(?!transformer)|text|context_embed|caption|audio|image_embed|vision|clip", re.IGNORECASE
)


class Answer(Enum):
    VIDEO = "video"
    NOT_VIDEO = "not video"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Evidence:
    """What says that tokens are video, or that they are not, in words.

    frames_may_change: the graph takes other numbers of frames too: any length, or values that nothing guards.
    """

    answer: Answer
    words: str
    frames_may_change: bool = False


def find_evidence(
    call: AttentionNode, axis: Axis, layout: Layout, example_inputs: Sequence[object], video_tokens: int
) -> Evidence:
    """axis: the tokens of the query. video_tokens: how many of them are not text."""
    if layout.packed:
        return Evidence(Answer.VIDEO, f"the rows that {layout.packed[0]} names", frames_may_change=True)
    if _packed_names(call):
        return Evidence(Answer.NOT_VIDEO, "no positions come with them, as with text that is refined")
    named = _other_name(call)
    if named is not None:
        return Evidence(Answer.UNKNOWN, f"{named} may be about text or images")
    any_length = is_symbolic(example(call.query).shape[2])
    return (
        _from_shapes(axis, layout, any_length)
        or _from_tables(call, layout, example_inputs, video_tokens, any_length)
        or _from_class(call)
        or Evidence(Answer.UNKNOWN, f"{video_tokens} tokens")
    )


def _from_shapes(axis: Axis, layout: Layout, any_length: bool) -> Evidence | None:
    """From the dimensions of the inputs that the tokens come from, and a grid that is known from them."""
    parts = video_parts(axis)
    clips = [part for part in parts if is_clip(part)]
    if clips:
        name = next(last_key(atom.root) for atom in clips[0] if atom.root is not None and atom.root_rank == 5)
        may_change = any_length and layout.grid is not None and isinstance(layout.grid[0], Extent)
        if not may_change and sum(map(_frames, clips)) < 2:
            return Evidence(Answer.NOT_VIDEO, f"one frame of a 5-D input, {name}")
        return Evidence(Answer.VIDEO, f"frames of a 5-D input, {name}", may_change)
    for part in parts:
        for atom in part:
            if atom.root_rank == 5:
                return Evidence(Answer.NOT_VIDEO, "a part of the dimensions of a 5-D input")
            if atom.root_rank == 4 and is_activation(atom.root) and (len(part) > 1 or atom.root_dim < 0):
                return Evidence(Answer.NOT_VIDEO, f"pixels of a 4-D input, {last_key(atom.root)}")
    if layout.grid is not None and layout.grid[0] == 1:
        return Evidence(Answer.NOT_VIDEO, f"one frame in its {layout.grid_source}")
    return None


def _frames(part: Part) -> int:
    """The number of frames in a part that spans a clip, as far as its dimensions show."""
    if len(part) > 2:
        return max(atom.size for atom in part[:-2])
    root = next(atom.root for atom in part if atom.root_rank == 5)
    return min((shape(root) or ())[1:3])  # frames are one of these two dimensions, the other one are channels


def _from_tables(
    call: AttentionNode, layout: Layout, example_inputs: Sequence[object], video_tokens: int, any_length: bool
) -> Evidence | None:
    """From the values of rotary tables among the inputs: all that the graph of a single block has."""
    of_share = video_tokens // layout.shards
    places = rotary_placeholders(call.node.graph, {video_tokens, of_share})
    tables: list[Any] = [
        x for place in places if place < len(example_inputs) and _has_values(x := example_inputs[place])
    ]
    grid = grid_from_rotary(tables, video_tokens, layout.shards, layout.shard) if tables else None
    if grid is not None:
        size = f"rotary tables over {grid[0]} x {grid[1]} x {grid[2]} tokens"
        is_video = grid[0] > 1 or (any_length and _known_class(call))
        return Evidence(Answer.VIDEO if is_video else Answer.NOT_VIDEO, size, frames_may_change=True)
    if tables and is_sequence(tables, of_share):
        return Evidence(Answer.NOT_VIDEO, "its positions are those of a sequence, as of text")
    return None


def _from_class(call: AttentionNode) -> Evidence | None:
    known = _known_class(call)
    return Evidence(Answer.VIDEO, f"diffusers' {known}") if known else None


def packed_layout(call: AttentionNode) -> Layout | None:
    """The layout of a site of a packed sequence; None if it is not known to be one."""
    names = _packed_names(call)
    placeholders = call.node.graph.find_nodes(op="placeholder")
    has_positions = any(is_activation(node) and POSITIONS.search(last_key(node)) for node in placeholders)
    if names is None or _other_name(call) is not None or not has_positions:
        return None
    rows, positions = names
    words = f"all rows but {rows}"
    return Layout(text_source=words, grid_source=f"{positions} of a call", packed=names)


def _packed_names(call: AttentionNode) -> tuple[str, str] | None:
    texts = (*call.module_classes, call.source_files)
    return next((PACKED[name] for name in PACKED if any(f"{name}." in text for text in texts)), None)


def _other_name(call: AttentionNode) -> str | None:
    """The name of a module around the call that says that its tokens may be text or images."""
    names = [call.module_path, *(cls.rpartition(".")[2] for cls in call.module_classes)]
    return next((name for name in names if OTHER_TOKENS.search(name)), None)


def _known_class(call: AttentionNode) -> str:
    """The file of diffusers that the call stands in, if it is that of a video transformer; else ''."""
    texts = (*call.module_classes, call.source_files)
    return next((found.group(0) for text in texts if (found := VIDEO_FILE.search(text))), "")


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
