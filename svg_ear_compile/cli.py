"""The console script `svg-ear`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def size_argument(text: str) -> tuple[int, int, int]:
    """16x64x64 as (16, 64, 64)."""
    try:
        frames, height, width = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not FRAMESxHEIGHTxWIDTH, such as 16x64x64") from None
    return frames, height, width


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    from .demo import PROMPT, Demo, run
    from .tiny_wan import GUIDANCE

    parser = argparse.ArgumentParser(
        prog="svg-ear", description="Block-sparse attention for video transformers."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="sample one clip densely and with svg_ear, and compare them")
    demo.add_argument("--steps", type=int, help="sampling steps (default: 10 on a CPU, 30 on a GPU)")
    demo.add_argument(
        "--size", type=size_argument, help="FxHxW in pixels (default: 16x64x64, on a GPU 16x128x128)"
    )
    demo.add_argument("--density", type=float, default=0.25, help="share of the attention computed exactly")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--prompt", default=PROMPT, help="default: %(default)s")
    demo.add_argument(
        "--guidance", type=float, help=f"classifier-free guidance (default: {GUIDANCE:g}; 1: none)"
    )
    demo.add_argument("--out", type=Path, default=Path("outputs/demo"), help="folder for what is written")
    demo.add_argument("--device", default="auto")
    demo.add_argument("--weights", type=Path, help="folder of another tiny Wan model")
    demo.add_argument("--no-compensation", dest="compensation", action="store_false")
    given = vars(parser.parse_args(argv))
    del given["command"]
    try:
        run(Demo(**given))
    except (FileNotFoundError, ValueError) as problem:
        print(f"svg-ear: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
