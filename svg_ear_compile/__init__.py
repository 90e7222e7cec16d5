"""svg-ear-compile: a torch.compile backend that rewrites the attention of video diffusion transformers.

    model = torch.compile(model, backend="svg_ear")  # or, for a diffusers pipeline: svg_ear_compile.enable(pipe)
    ...
    print(svg_ear_compile.report())

This module is imported by every `import torch` (activation.py), so it imports nothing itself.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backend import svg_ear
    from .exceptions import SettingsError
    from .functional import attention
    from .pipelines import disable, enable
    from .reporting import Report, report
    from .runtime.step_clock import generation
    from .settings import Settings

__all__ = [
    "Report",
    "Settings",
    "SettingsError",
    "attention",
    "disable",
    "enable",
    "generation",
    "report",
    "svg_ear",
]

_HOMES = {
    "Report": "reporting",
    "Settings": "settings",
    "SettingsError": "exceptions",
    "attention": "functional",
    "disable": "pipelines",
    "enable": "pipelines",
    "generation": "runtime.step_clock",
    "report": "reporting",
    "svg_ear": "backend",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("svg-ear-compile")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
