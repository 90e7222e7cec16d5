"""Does SVG_EAR in the environment switch us on? Runs at the end of `import torch`: it must be quick and never raise."""

from __future__ import annotations


def activate() -> None:
    """Entry point of group torch.backends."""
