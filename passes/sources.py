"""What does a placeholder of a Dynamo graph stand for? An activation, a parameter, a buffer, a number.

Dynamo makes every parameter and buffer an input of the graph. Where each input comes from is written on the
placeholder (`_dynamo_source`): `L['kwargs']['timestep']`, `L['self']._modules['blocks']...`.

Hooks (diffusers' offloading and caches, accelerate's) wrap forward(*args, **kwargs): arguments by position
are then `L['args'][2]`, and after a graph break in the hook `L['___stack0'][0][2]`. Their names are those of
the wrapped forward, which the stack trace of their first use leads to.
"""

from __future__ import annotations

import ast
import linecache
import re
from functools import lru_cache
from typing import TypeGuard

from torch import fx, nn

from svg_ear_compile import compat

from .sizes import example, is_tensor

TEXT = re.compile(
    r"encoder_hidden|encoder_attention|text|txt|prompt|caption|clip|image_embed|audio|pooled|temb"
)
POSITIONS = re.compile(r"rotary|rope|freqs|pos_emb|pos_embed|image_ids|img_ids|_ids_?$|cos_?$|sin_?$")
# diffusers' files of video transformers. Both the module's class and the stack trace name the file: blocks
# compiled one by one may hold nothing but diffusers' shared Attention class.
_VIDEO_FILES = """
    allegro anyflow anyflow_far chronoedit cosmos cosmos3 easyanimate helios hunyuan_video hunyuan_video15
    hunyuan_video_framepack kandinsky kandinsky6 kandinsky6_sr ltx ltx2 mochi motif_video sana_video sana_wm
    sana_wm_refiner skyreels_v2 wan wan_animate wan_animate_2 wan_vace
"""
VIDEO_FILE = re.compile(
    rf"(transformer_({'|'.join(_VIDEO_FILES.split())})|(cogvideox|consisid|latte)_transformer_3d)(?=\.)"
)

# diffusers' files of models whose sequence is packed: text, sound, videos and images in any order. These arguments of
# the model say which rows are video [n], and at which (time, height, width) each row lies [S,3].
PACKED = {"transformer_minimax_h3": ("video_indices", "position_ids")}

_BY_POSITION = re.compile(r"^L\['(?:args'\]|___stack\d+'\]\[0\])\[(\d+)\]")


def source_name(placeholder: fx.Node) -> str:
    """`L['kwargs']['hidden_states']`, or the placeholder's own name when Dynamo left no source."""
    return compat.source_name(placeholder) or placeholder.name


def is_parameter(node: fx.Node) -> bool:
    """A parameter or a buffer: a tensor that belongs to the model, not to this call."""
    if node.op == "get_attr":
        return True
    if node.op != "placeholder":
        return False
    owned = re.search("_parameters|_buffers", source_name(node))
    return isinstance(example(node), nn.Parameter) or owned is not None


def is_weight(node: fx.Node) -> bool:
    """A parameter, no buffer."""
    return is_parameter(node) and "_buffers" not in source_name(node)


def is_activation(node: fx.Node | None) -> TypeGuard[fx.Node]:
    """A tensor that the caller passes in."""
    return node is not None and node.op == "placeholder" and is_tensor(node) and not is_parameter(node)


def last_key(placeholder: fx.Node) -> str:
    """The argument's name: `L['kwargs']['timestep']` -> timestep, `L['rotary_emb'][0]` -> rotary_emb."""
    source = source_name(placeholder)
    by_position = _BY_POSITION.match(source)
    if by_position and (name := _wrapped_parameter(placeholder, int(by_position[1]))):
        return name
    keys = re.findall(r"\['(\w+)'\]|\.(\w+)", source)
    return (keys[-1][0] or keys[-1][1]) if keys else placeholder.name


def _wrapped_parameter(placeholder: fx.Node, position: int) -> str:
    """The name that the first function inside a wrapper gives to its args[position]; '' if the graph is not that of a
    wrapper, or its source code is missing."""
    traces = (user.meta.get("stack_trace") for user in placeholder.users)
    frames = re.findall(r'File "(.+?)", line (\d+)', next(filter(None, traces), ""))
    for depth, (file, line) in enumerate(frames):
        names, has_varargs = _parameters(file, int(line))
        if depth > 0 and position < len(names):
            return names[position]
        if not has_varargs:
            break
    return ""


@lru_cache(maxsize=256)
def _parameters(file: str, line: int) -> tuple[list[str], bool]:
    """(positional parameters without self and a hook's module, whether there is *args) of its function."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return [], False
    functions = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.lineno <= line <= (node.end_lineno or 0)
    ]
    if not functions:
        return [], False
    around = max(functions, key=lambda node: node.lineno).args
    names = [argument.arg for argument in around.posonlyargs + around.args]
    return [name for name in names if name not in ("self", "module")], around.vararg is not None
