"""How is a diffusers pipeline switched on in one line, and off again?

print(svg_ear_compile.enable(pipe, quality="balanced"))
pipe(...)
svg_ear_compile.disable(pipe)
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from . import compat
from .precedence import resolve

REGIONAL, WHOLE, LEFT = "block by block", "as a whole", "left as it is"
BLOCKS = {
    "CogVideoXTransformer3DModel": ["CogVideoXBlock"],
    "ConsisIDTransformer3DModel": ["ConsisIDBlock"],
    "EasyAnimateTransformer3DModel": ["EasyAnimateTransformerBlock"],
}
"""Repeated blocks that diffusers does not name, and of which alone as much attention is rewritten as of the model."""
BETTER_WHOLE = {"SanaWMTransformer3DModel"}
"""Of which more attention is rewritten in the whole model than in its blocks alone (docs/MODELS.md)."""
_enabled: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass(frozen=True)
class EnabledModel:
    """One model of a pipeline. name: of the component. how: "block by block", "as a whole" or "left as it is"."""

    name: str
    model: str
    how: str
    why: str


@dataclass(frozen=True)
class Enabled:
    """What `enable` did. options: what the backend gets; settings that are not in it come from the environment."""

    models: tuple[EnabledModel, ...]
    options: dict[str, Any]

    def __str__(self) -> str:
        lines = [
            f"{m.name} ({m.model}) {'is' if m.how == LEFT else 'compiled'} {m.how}: {m.why}"
            for m in self.models
        ]
        given = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return "\n".join(["svg_ear: " + (given or "default settings"), *lines])


def enable(pipe: Any, quality: str | None = None, **options: Any) -> Enabled:
    """Compiles the video transformers of a diffusers pipeline, or one transformer, with backend="svg_ear".

    Compilation itself happens in the first call, so offloading, LoRA, caches and `enable_parallelism` may come before
    or after. A model is compiled block by block where its repeated blocks are known, which takes much less time,
    and else as a whole. A second `enable` replaces the first.

    quality: "near-lossless", "high", "balanced" or "turbo". options: any other settings (docs/ENVS.md), and options of
    Inductor. What is not given comes from SVG_EAR_* variables, else from the defaults: quality "balanced".

    Returns what it did, to be printed. A pipeline that makes images is left as it is, and so are models whose layers
    are offloaded one by one. Raises SettingsError for settings that make no sense, ValueError for what holds no
    diffusers transformer or is compiled already.
    """
    options = options if quality is None else {"quality": quality, **options}
    resolve(options)  # raises now instead of in the first call
    models = dict(transformers_of(pipe))
    if not models:
        raise ValueError(
            f"{type(pipe).__name__} has no diffusers transformer: pass a video pipeline of diffusers or its "
            'transformer, or call torch.compile(model, backend="svg_ear") for a model of your own'
        )
    for name, model in models.items():
        if any(compat.is_compiled(m) and m not in _enabled for m in model.modules()):
            raise ValueError(f"{name} is compiled already: leave out torch.compile or .compile() on it")
    images = not isinstance(pipe, nn.Module) and not _takes_video(pipe)
    done = []
    for name, model in models.items():
        how, why = LEFT, "this pipeline makes no video, so there is nothing to do"
        if not images:
            disable(model)
            how, why = compile_model(model, options)
        done.append(EnabledModel(name, type(model).__name__, how, why))
    return Enabled(tuple(done), options)


def disable(pipe: Any) -> None:
    """Takes `enable` back: the models run as before. Their graphs stay in the report until torch._dynamo.reset()."""
    for _, model in transformers_of(pipe):
        for module in model.modules():
            if module in _enabled:
                compat.uncompile(module)
                _enabled.discard(module)


def transformers_of(pipe: Any) -> Iterator[tuple[str, nn.Module]]:
    """The diffusers transformers of a pipeline by component name, or the one that is passed."""
    parts = {"model": pipe} if isinstance(pipe, nn.Module) else getattr(pipe, "components", {})
    return ((name, part) for name, part in parts.items() if is_transformer(compat.original_module(part)))


def is_transformer(module: Any) -> bool:
    """Whether this is one of diffusers' transformers, not a text encoder or a VAE."""
    return hasattr(module, "compile_repeated_blocks") and "Transformer" in type(module).__name__


def compile_model(model: nn.Module, options: dict[str, Any]) -> tuple[str, str]:
    """Compiles one transformer; returns how, and why so."""
    if any(_is_offloaded_alone(module) for module in model.modules()):
        return LEFT, (
            "its layers are offloaded one by one, and graphs end at each of them: use enable_model_cpu_offload(), or "
            'group offloading with offload_type="block_level"'
        )
    names = repeated_blocks(model)
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    named = any(type(block).__name__ in names for blocks in lists for block in blocks)
    regional = named and type(model).__name__ not in BETTER_WHOLE
    how: dict[str, Any] = {"backend": "svg_ear", "options": options or None}
    for part in [m for m in model.modules() if type(m).__name__ in names] if regional else [model]:
        part.compile(**how)
    _enabled.update(module for module in model.modules() if compat.is_compiled(module))
    if regional:
        return REGIONAL, f"blocks of a kind share their graphs ({', '.join(names)})"
    return (
        WHOLE,
        "more of it is rewritten so" if named else "diffusers names no repeated blocks of this model",
    )


def repeated_blocks(model: nn.Module) -> list[str]:
    """The classes of its blocks that are compiled alone; [] if the model is better compiled as a whole."""
    return getattr(model, "_repeated_blocks", None) or BLOCKS.get(type(model).__name__, [])


def _takes_video(pipe: Any) -> bool:
    """Whether a pipeline has an argument about frames or a video. A modular one lists its arguments in its blocks."""
    inputs = getattr(getattr(pipe, "blocks", None), "inputs", ())
    names = [*inspect.signature(type(pipe).__call__).parameters, *(str(x.name) for x in inputs)]
    return any(word in name for name in names for word in ("frame", "video"))


def _is_offloaded_alone(module: nn.Module) -> bool:
    """Whether a linear layer has a hook that moves its weights: sequential offloading, or groups of leaves."""
    if not isinstance(module, nn.Linear):
        return False
    registry = getattr(module, "_diffusers_hook", None)
    return hasattr(module, "_hf_hook") or (
        registry is not None and registry.get_hook("group_offloading") is not None
    )
