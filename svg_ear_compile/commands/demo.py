"""Samples one clip densely and with svg_ear, and compares them."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path

from ..cli import size_argument
from . import Outcome


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--steps", type=int, help="sampling steps (default: 10 on a CPU, 30 on a GPU)")
    add("--size", type=size_argument, help="FxHxW in pixels (default: 16x64x64, on a GPU 16x128x128)")
    add("--density", type=float, help="share of the attention computed exactly (default: 0.25)")
    add("--seed", type=int)
    add("--prompt", help='such as "a plain red square moving right, over the rocket photo panning left"')
    add("--guidance", type=float, help="classifier-free guidance (1: none)")
    add("--out", type=Path, default=Path("outputs/demo"), help="folder for what is written")
    add("--device", help="default: a GPU if there is one")
    add("--weights", type=Path, help="folder of another tiny Wan model")
    add("--no-compensation", dest="compensation", action="store_false")


def run(arguments: argparse.Namespace) -> Outcome:
    from .. import demo

    given = {k: v for k, v in vars(arguments).items() if k not in ("command", "json") and v is not None}
    with contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext():
        demo.run(demo.Demo(**given))
    return Outcome(json.loads((arguments.out / "demo.json").read_text()), "")
