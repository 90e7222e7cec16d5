"""What can the user set? Every setting with its default, what it allows and what it means.

Each field of Settings is an option (`torch.compile(..., options={"density": 0.3})`) and an environment variable
(`SVG_EAR_DENSITY=0.3`). precedence.py says which of them wins.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from .presets import DEFAULT_QUALITY, PRESETS, QUALITY, QUALITY_ALIASES, ROUTINGS

PREFIX = "SVG_EAR"
BOOLEAN = "0, 1, true or false"
GUARD = 4.0
"""If max_error is not set, it is this many times the target."""


def _bool(value: Any) -> bool:
    return {"0": False, "false": False, "1": True, "true": True}[str(value).strip().lower()]


def _integer(least: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        if isinstance(value, (bool, float)) or int(value) < least:
            raise ValueError
        return int(value)

    return parse


def _optional(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else parse(value)


def _choice(*names: str, **aliases: str) -> Callable[[Any], str]:
    known = {name: name for name in names} | aliases
    return lambda value: known[value.strip().lower()]


def _share(value: Any) -> float:
    if isinstance(value, bool) or not 0 < float(value) <= 1:
        raise ValueError
    return float(value)


def _error(value: Any) -> float:
    if isinstance(value, bool) or not 0 <= float(value) < math.inf:
        raise ValueError
    return float(value)


def _patterns(value: Any) -> tuple[str, ...]:
    parts = value.split(",") if isinstance(value, str) else list(value)
    return tuple(part.strip() for part in parts if part.strip())


def _steps(value: Any) -> int | float:
    """'6' and 6 are counts, '0.2' and 0.2 fractions; 1.0 would be either, so it is refused."""
    if isinstance(value, str):
        value = float(value) if "." in value else int(value)
    if isinstance(value, bool) or value < 0 or (isinstance(value, float) and value >= 1):
        raise ValueError
    return value


def _layers(value: Any) -> tuple[tuple[int, int], ...]:
    """2 -> the first two layers, ((0, 1),);  '0, 38-39' -> ((0, 0), (38, 39));  '5,' -> layer 5 alone."""
    if isinstance(value, bool):
        raise ValueError
    if isinstance(value, int) or str(value).strip().isdigit():
        count = _integer(0)(value)
        return ((0, count - 1),) if count else ()
    ranges = []
    for part in filter(None, (part.strip() for part in value.split(","))):
        first, _, last = part.partition("-")
        ranges.append((int(first), int(last or first)))
        if not 0 <= ranges[-1][0] <= ranges[-1][1]:
            raise ValueError
    return tuple(ranges)


def _report(value: Any) -> bool | str:
    text = os.fspath(value) if not isinstance(value, (bool, int)) else str(value)
    return text if text.endswith((".html", ".json")) else _bool(text)


def _setting(default: Any, parse: Callable[[Any], Any], allowed: str, doc: str) -> Any:
    return field(default=default, metadata={"parse": parse, "allowed": allowed, "doc": doc})


@dataclass(frozen=True)
class Settings:
    """All settings of one compile: each field is an option, and a variable SVG_EAR_<NAME>."""

    quality: str | None = _setting(
        DEFAULT_QUALITY, _optional(_choice(*QUALITY, **QUALITY_ALIASES)), ", ".join(QUALITY),
        "sets target_error by name: " + ", ".join(f"{name} {error:g}" for name, error in QUALITY.items()),
    )  # fmt: skip
    target_error: float | None = _setting(
        QUALITY[DEFAULT_QUALITY], _optional(_share), "0 < target_error <= 1",
        "the relative error that attention outputs may have, as the root mean square over a generation; the density "
        "is adjusted to meet it",
    )  # fmt: skip
    density: float | None = _setting(
        None, _optional(_share), "0 < density <= 1",
        "the share of the video query-key pairs that a sparse call computes exactly; the same in every sparse call",
    )  # fmt: skip
    min_density: float = _setting(
        0.05, _share, "0 < min_density <= 1", "target_error never takes the density below this"
    )
    max_density: float = _setting(
        0.6, _share, "0 < max_density <= 1",
        "calls that would need more than this to meet target_error run dense: sparsity would not pay",
    )  # fmt: skip
    max_error: float | None = _setting(
        None, _optional(_error), "a number >= 0; 0 switches it off",
        "a layer whose measured error is larger gets more density; if that does not help, or if density is set, it "
        f"runs dense for the rest of the generation; unset: {GUARD:g} x target_error, or off if density is set",
    )  # fmt: skip
    measure_every: int = _setting(
        5, _integer(0), "an integer >= 0; 0 means never",
        "measure the error of a layer in every n-th sparse call, on sampled rows and for a few layers in each step; "
        "every second call in generations of up to 16 steps",
    )  # fmt: skip
    audit: bool = _setting(
        False, _bool, BOOLEAN,
        "also measure the error of each sparse call over all rows: slow, to check the sampled measurements",
    )  # fmt: skip
    min_tokens: int | None = _setting(
        None, _optional(_integer(1)), "an integer >= 1",
        "self attention over fewer video tokens stays dense; unset: 8192, or, on GPUs whose speeds were measured, "
        "the number from which a sparse call is faster than a dense one",
    )  # fmt: skip
    sites: tuple[str, ...] = _setting(
        (), _patterns, "module path patterns, comma separated",
        "rewrite the attention modules whose paths match (`blocks.*.attn1`), even if nothing shows that their tokens "
        "are video",
    )  # fmt: skip
    dense_steps: int | float = _setting(
        0.1, _steps, "a count >= 0, or a fraction below 1 of num_steps",
        "the first steps of a generation run dense; a fraction is rounded to the nearest count, and is at most "
        "2 steps if the number of steps is unknown",
    )  # fmt: skip
    num_steps: int | None = _setting(
        None, _optional(_integer(1)), "an integer >= 1",
        "the number of steps in a generation, for a sampling loop of your own; a diffusers pipeline shows its number",
    )  # fmt: skip
    dense_layers: tuple[tuple[int, int], ...] = _setting(
        (), _layers, "a count of first layers, or ranges such as '0, 38-39'",
        "layers that always run dense",
    )  # fmt: skip
    preset: str = _setting(
        "default", _choice(*PRESETS), "default, svg_ear or svg2",
        "svg_ear: the clusters (order kmeans), error formula and budget of the SVG-EAR paper; svg2: the same clusters, "
        "the blocks with the largest centroid mass, and nothing in place of the others (compensate 0)",
    )  # fmt: skip
    merge: bool = _setting(
        True, _bool, BOOLEAN, "one op per attention site; 0 keeps the three ops that make it up"
    )
    inner: str = _setting(
        "inductor", _choice("inductor", "eager"), "inductor or eager", "what compiles the rewritten graph"
    )
    strict: bool = _setting(
        False, _bool, BOOLEAN, "a failure inside svg_ear raises, instead of running dense with a warning"
    )
    seed: int = _setting(0, _integer(0), "an integer >= 0", "seeds everything random in the clustering")
    compensate: bool = _setting(
        True, _bool, BOOLEAN, "centroids stand in for the skipped blocks; 0 drops these blocks"
    )
    first_order: bool = _setting(
        True, _bool, BOOLEAN,
        "add first-order terms to the centroids: in all heads until errors are measured, then where they are clearly "
        "smaller; not possible with compensate 0 or merge 0",
    )  # fmt: skip
    order: str = _setting(
        "auto", _choice("auto", "cubes", "splits", "kmeans"), "auto, cubes, splits or kmeans",
        "how video tokens are grouped into blocks; auto: cubes if the frame grid is known, with splits in heads whose "
        "measured error is then clearly smaller; else splits",
    )  # fmt: skip
    report: bool | str = _setting(
        False, _report, "0, 1, or a path that ends in .html or .json",
        "1 prints the report at compile time; a path writes it there, then and at exit, as a web page or as JSON",
    )  # fmt: skip

    @property
    def routing(self) -> str:
        """How blocks are chosen. Follows from the preset."""
        return ROUTINGS[self.preset]

    @property
    def guard(self) -> float:
        """The measured error above which a layer runs dense; infinite if there is none."""
        if self.max_error is not None:
            return self.max_error or math.inf
        return math.inf if self.target_error is None else GUARD * self.target_error

    def is_dense_layer(self, layer: int) -> bool:
        return any(first <= layer <= last for first, last in self.dense_layers)


def markdown_table() -> str:
    """The table of docs/ENVS.md."""
    rows = ["| variable | option | default | allowed | meaning |", "|---|---|---|---|---|"]
    for f in fields(Settings):
        written: dict[Any, str] = {(): "none", None: "none", True: "1", False: "0"}
        cells = [f"`{PREFIX}_{f.name.upper()}`", f"`{f.name}`", str(written.get(f.default, f.default))]
        rows.append(f"| {' | '.join([*cells, f.metadata['allowed'], f.metadata['doc']])} |")
    return "\n".join(rows) + "\n"
