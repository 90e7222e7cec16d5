"""The console script `svg-ear`: parses, calls a command of commands/, and prints what it found."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "doctor": "what runs on this machine, and why not more; with a self-test",
    "run": "run a script with sparse attention, unchanged",
    "explain": "run a script densely, and show what would be rewritten and why not more",
    "bench": "how fast attention is on this machine, and from how many tokens on sparsity pays",
    "compare": "PSNR, SSIM and VMAF between two clips, and pictures of the difference",
    "demo": "sample one clip densely and with svg_ear, and compare them",
}


def size_argument(text: str) -> tuple[int, int, int]:
    """16x64x64 as (16, 64, 64)."""
    try:
        frames, height, width = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not FRAMESxHEIGHTxWIDTH, such as 16x64x64") from None
    return frames, height, width


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit status: 0, 1 if something is wrong, 2 for wrong arguments.

    `run` and `explain` return the status of their script.
    """
    parser = argparse.ArgumentParser(
        prog="svg-ear", description="Block-sparse attention for video transformers."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    modules = {name: import_module(f"{__package__}.commands.{name}") for name in COMMANDS}
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=modules[name].__doc__)
        command.add_argument("--json", action="store_true", help="print JSON, and everything else to stderr")
        modules[name].add_arguments(command)
    arguments = parser.parse_args(argv)
    try:
        found = modules[arguments.command].run(arguments)
    except (FileNotFoundError, ValueError) as problem:
        print(f"svg-ear: {problem}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as problem:
        print(
            f"svg-ear: {problem}; pip install 'svg-ear-compile[video]' has all that it needs", file=sys.stderr
        )
        return 1
    if arguments.json:
        print(json.dumps(found.data, indent=1))
    elif found.text:
        print(found.text)
    return int(found.status)


if __name__ == "__main__":
    sys.exit(main())
