"""Does SVG_EAR in the environment switch us on? Runs whenever torch is imported; never raises."""

from __future__ import annotations

import os


def activate() -> None:
    """Entry point of group torch.backends: SVG_EAR=1 (or report) makes svg_ear torch.compile's default.

    Unset, this is one look into a dictionary. Whatever goes wrong is a warning: an exception here would break
    `import torch` for every program of the environment.
    """
    value = os.environ.get("SVG_EAR")
    if not value:
        return
    try:
        _activate(value.strip().lower())
    except Exception as error:  # noqa: BLE001 - see above
        _warn(f"SVG_EAR={value} had no effect: {error!r}")


def _activate(value: str) -> None:
    if value in ("", "0", "false"):
        return
    if value not in ("1", "true", "report"):
        _warn(f"SVG_EAR={value!r} is ignored: allowed are 0, 1 and report")
        return
    import torch

    set_default_backend = getattr(torch.compiler, "set_default_backend", None)
    if set_default_backend is None:
        _warn(
            f"SVG_EAR={value} needs torch.compiler.set_default_backend, not in torch {torch.__version__}: "
            "use torch 2.13 or newer, or write torch.compile(model, backend='svg_ear')"
        )
        return
    set_default_backend("svg_ear")
    from .other_backends import watch

    watch()


def _warn(text: str) -> None:
    import warnings

    try:
        warnings.warn("svg-ear-compile: " + text, RuntimeWarning, stacklevel=3)
    except Warning:  # `python -W error`: a warning must not become the exception that breaks `import torch`
        import sys

        print("svg-ear-compile: " + text, file=sys.stderr)
