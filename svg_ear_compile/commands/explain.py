"""Runs a script and shows which attention would be rewritten, and why the rest would not. Nothing is rewritten.

The exit status is that of the script, or 1 if nothing was compiled.
"""

from __future__ import annotations

import argparse

from . import Outcome
from . import run as runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    runs.add_arguments(parser, switch="report")


def run(arguments: argparse.Namespace) -> Outcome:
    return runs.run(arguments)
