"""Runs a script with SVG_EAR=1, and shows what became of its attention.

The script is not changed. With --compile, the video transformers of diffusers that it makes are compiled when they are
first called, for scripts that never call torch.compile.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import runpy
import sys
import traceback
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import Outcome

VIDEO = ("3D", "Video", "Omni")
"""One of them is in the name of each of diffusers' video transformers."""
NOTHING = (
    "svg_ear: nothing was compiled. If the script never calls torch.compile, add --compile, or write "
    "svg_ear_compile.enable(pipe) after it makes its pipeline"
)


def add_arguments(parser: argparse.ArgumentParser, switch: str = "1") -> None:
    parser.set_defaults(switch=switch)
    parser.add_argument(
        "--compile", action="store_true", help="compile diffusers' video transformers when first called"
    )
    parser.add_argument(
        "--report", metavar="PATH", help="also write the report, to a path that ends in .html or .json"
    )
    parser.add_argument("script", type=Path)
    parser.add_argument("args", nargs=argparse.REMAINDER, help="arguments of the script")


def run(arguments: argparse.Namespace) -> Outcome:
    script: Path = arguments.script
    if not script.is_file():
        raise FileNotFoundError(f"{script} is no file: pass the path of a Python script")
    os.environ["SVG_EAR"] = arguments.switch
    if arguments.report:
        os.environ["SVG_EAR_REPORT"] = arguments.report
    import torch  # noqa: F401 - now, so that SVG_EAR is seen (activation.py)

    from ..reporting import diagnostics

    diagnostics.collect()
    status = 0
    sys.argv, sys.path[0] = [str(script), *arguments.args], str(script.parent.resolve())
    aside = contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext()
    with aside, compiling_transformers() if arguments.compile else contextlib.nullcontext():
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:  # its code may be None, a number, or a message
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except Exception:  # noqa: BLE001 - the script's own; what was found until then is shown all the same
            traceback.print_exc()
            status = 1
    report = diagnostics.collected()
    text = str(report) if report.graphs else NOTHING
    if arguments.switch == "report" and not report.graphs:
        status = status or 1
    return Outcome(json.loads(report.to_json()), text, status)


@contextlib.contextmanager
def compiling_transformers() -> Iterator[None]:
    """Each video transformer of diffusers that is made inside is compiled in its first call, if it is not yet."""
    from torch.nn.modules.module import register_module_module_registration_hook

    seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def on_submodule(module: Any, name: str, submodule: Any) -> None:
        """A transformer that is being made is seen when it gets its first part."""
        from ..pipelines import is_transformer

        if (
            is_transformer(module)
            and any(word in type(module).__name__ for word in VIDEO)
            and module not in seen
        ):
            seen.add(module)
            module.register_forward_pre_hook(_Compile())

    handle = register_module_module_registration_hook(on_submodule)
    try:
        yield
    finally:
        handle.remove()


class _Compile:
    """A forward hook that compiles its module in the first call."""

    def __init__(self) -> None:
        self.done: weakref.WeakSet[Any] = weakref.WeakSet()

    def __call__(self, module: Any, args: Any) -> None:
        import torch

        if torch.compiler.is_compiling() or module in self.done:
            return
        self.done.add(module)
        from .. import compat
        from ..pipelines import compile_model

        if not any(compat.is_compiled(part) for part in module.modules()):
            how, why = compile_model(module, {})
            print(f"svg_ear: {type(module).__name__} {how}: {why}", file=sys.stderr)
