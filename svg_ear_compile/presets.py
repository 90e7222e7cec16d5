"""What do the names of quality levels and presets stand for?"""

from __future__ import annotations

from typing import Any

QUALITY = {"near-lossless": 0.015, "high": 0.025, "balanced": 0.04, "turbo": 0.06}
"""The target_error of each level."""
QUALITY_ALIASES = {"lossless-ish": "near-lossless"}
DEFAULT_QUALITY = "balanced"

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "svg_ear": {"order": "kmeans", "compensate": True, "first_order": False},
    "svg2": {"order": "kmeans", "compensate": False, "first_order": False},
}
"""The settings that a preset fixes: setting one of them to another value is an error."""
PAPER_SCHEDULE = {"dense_steps": 0.2, "dense_layers": ((0, 0),)}
"""The schedule of the papers' presets, where nothing else is set."""
ROUTINGS = {"default": "output_error", "svg_ear": "svg_ear", "svg2": "mass"}
"""How each preset chooses the blocks that are computed exactly."""
