"""What did the user ask for? Every setting, where it came from, and what else goes to Inductor.

Precedence, highest first:

1. `SVG_EAR=0`: everything off, whatever else is set
2. `torch.compile(..., options={"density": 0.3})`
3. the environment, `SVG_EAR_DENSITY=0.3`, read whenever a graph is compiled; empty means unset
4. derived from another setting: presets "svg_ear" and "svg2" set order, routing, compensate, the density and
   the papers' schedule; quality sets target_error
5. the default

How much is computed is said by one of density, target_error and quality. Two of them in options are an error,
and so are two in the environment; one in options wins over another in the environment, and None says nothing.
If nothing says it, it is quality "balanced", or with a paper's preset what its top-p 0.9 finds.

Options that are not ours go to Inductor if Inductor knows them, `mode` too (torch.compile refuses its own
mode= beside options=). Anything else is an error that names the nearest known setting.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

PREFIX = "SVG_EAR"
BOOLEAN = "0, 1, true or false"


class SettingsError(ValueError):
    """A setting's value, or its name, makes no sense."""


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
    return value  # type: ignore[no-any-return]


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
    return text if text.endswith(".json") else _bool(text)


def _setting(default: Any, parse: Callable[[Any], Any], allowed: str, doc: str) -> Any:
    return field(default=default, metadata={"parse": parse, "allowed": allowed, "doc": doc})


QUALITY = {"near-lossless": 0.015, "high": 0.025, "balanced": 0.04, "turbo": 0.06}
"""The target_error that a level stands for."""
ALIASES = {"lossless-ish": "near-lossless"}
DEFAULT_QUALITY = "balanced"
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "svg_ear": {"order": "kmeans", "compensate": True, "first_order": False},
    "svg2": {"order": "kmeans", "compensate": False, "first_order": False},
}
"""What a preset means for other settings."""
PAPER_SCHEDULE = {"dense_steps": 0.2, "dense_layers": ((0, 0),)}
"""Of the papers' presets, unless something else is set."""
ROUTINGS = {"default": "output_error", "svg_ear": "svg_ear", "svg2": "mass"}
GUARD = 4.0
"""Where max_error is not set, it is so many times the target."""


@dataclass(frozen=True)
class Settings:
    """All settings of one compile: each field is an option, and a variable SVG_EAR_<NAME>."""

    quality: str | None = _setting(
        DEFAULT_QUALITY, _optional(_choice(*QUALITY, **ALIASES)), ", ".join(QUALITY),
        "names target_error: " + ", ".join(f"{name} {error:g}" for name, error in QUALITY.items()),
    )  # fmt: skip
    target_error: float | None = _setting(
        QUALITY[DEFAULT_QUALITY], _optional(_share), "0 < target_error <= 1",
        "relative error of the outputs of attention calls, the root mean square over a generation: what its "
        "density is steered to",
    )  # fmt: skip
    density: float | None = _setting(
        None, _optional(_share), "0 < density <= 1",
        "exactly computed video query-key pairs over all of them in a sparse call: the same in all of them",
    )  # fmt: skip
    min_density: float = _setting(0.05, _share, "0 < min_density <= 1", "target_error does not go below it")
    max_density: float = _setting(
        0.6, _share, "0 < max_density <= 1",
        "where target_error needs more than this, sparsity would not pay: such calls run dense",
    )  # fmt: skip
    max_error: float | None = _setting(
        None, _optional(_error), "a number >= 0; 0 switches it off",
        "a layer with a larger measured error gets more density, and where that does not help, or a density is set, "
        f"runs dense to the end of the generation; unset: {GUARD:g} x target_error, and with density off",
    )  # fmt: skip
    measure_every: int = _setting(
        5, _integer(0), "an integer >= 0; 0 means never",
        "the error of every so many sparse calls of a layer is measured on sampled rows, few layers in each step; of "
        "generations of up to 16 steps every second",
    )  # fmt: skip
    audit: bool = _setting(
        False,
        _bool,
        BOOLEAN,
        "each sparse call reports its error over all rows: slow, a check of what is measured",
    )
    min_tokens: int | None = _setting(
        None, _optional(_integer(1)), "an integer >= 1",
        "self attention over fewer video tokens stays dense; unset: 8192, and where speeds were measured for "
        "the GPU as many as make a sparse call faster than a dense one",
    )  # fmt: skip
    sites: tuple[str, ...] = _setting(
        (), _patterns, "module path patterns, comma separated",
        "rewrite the attention modules whose paths match (`blocks.*.attn1`) even without a sign of video",
    )  # fmt: skip
    dense_steps: int | float = _setting(
        0.1, _steps, "a count >= 0, or a fraction below 1 of num_steps",
        "the first steps of a generation run dense; a fraction is rounded to the nearest count, and is at most "
        "2 steps where nothing shows how many there are",
    )  # fmt: skip
    num_steps: int | None = _setting(
        None, _optional(_integer(1)), "an integer >= 1",
        "steps of a generation, for a sampling loop of your own that does not show it; a pipeline's is known",
    )  # fmt: skip
    dense_layers: tuple[tuple[int, int], ...] = _setting(
        (), _layers, "a count of first layers, or ranges such as '0, 38-39'",
        "layers that always run dense",
    )  # fmt: skip
    preset: str = _setting(
        "default", _choice(*PRESETS), "default, svg_ear or svg2",
        "svg_ear: the paper's clusters (order kmeans), error formula and budget; svg2: these clusters, the "
        "blocks with the largest centroid mass, and nothing for the others (compensate 0)",
    )  # fmt: skip
    merge: bool = _setting(
        True, _bool, BOOLEAN, "one op per attention site; 0 keeps the three that make it up"
    )
    inner: str = _setting(
        "inductor", _choice("inductor", "eager"), "inductor or eager", "what compiles the rewritten graph"
    )
    strict: bool = _setting(
        False, _bool, BOOLEAN, "a failure of ours raises, instead of running dense with a warning"
    )
    seed: int = _setting(0, _integer(0), "an integer >= 0", "of everything random in the clustering")
    compensate: bool = _setting(
        True, _bool, BOOLEAN, "skipped blocks count through their centroids; 0 drops them"
    )
    first_order: bool = _setting(
        True, _bool, BOOLEAN,
        "first-order terms besides centroids, for the heads whose measured error is then clearly smaller; "
        "not with compensate 0 or merge 0",
    )  # fmt: skip
    order: str = _setting(
        "auto", _choice("auto", "cubes", "splits", "kmeans"), "auto, cubes, splits or kmeans",
        "how video tokens are put into blocks; auto: splits where no frame grid is known, else cubes, and "
        "splits for the heads whose measured error is then clearly smaller",
    )  # fmt: skip
    report: bool | str = _setting(
        False, _report, "0, 1, or a path that ends in .json",
        "1 prints the report at compile time, a path writes it",
    )  # fmt: skip

    @property
    def routing(self) -> str:
        """How blocks are chosen: follows from the preset."""
        return ROUTINGS[self.preset]

    @property
    def guard(self) -> float:
        """The measured error above which a layer runs dense; infinite: none."""
        if self.max_error is not None:
            return self.max_error or math.inf
        return math.inf if self.target_error is None else GUARD * self.target_error

    def is_dense_layer(self, layer: int) -> bool:
        return any(first <= layer <= last for first, last in self.dense_layers)


class Resolved(NamedTuple):
    """switch: 'on', 'off' or 'report'. inductor_options: to be patched into Inductor's configuration.

    sources: where each setting's value came from, in words.
    """

    settings: Settings
    inductor_options: dict[str, Any]
    switch: str
    sources: dict[str, str]


def switch(environ: Mapping[str, str]) -> str:
    """What SVG_EAR says: 'on' (also when unset: somebody named the backend), 'off' or 'report'."""
    value = environ.get(PREFIX, "").strip().lower()
    try:
        return {"": "on", "1": "on", "true": "on", "0": "off", "false": "off", "report": "report"}[value]
    except KeyError:
        raise SettingsError(f"{PREFIX}={environ[PREFIX]!r}: allowed are 0, 1 and report") from None


def resolve(
    options: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    mode: str | None = None,
) -> Resolved:
    """The settings of one compile; see the head of this file for what wins over what."""
    options, environ = dict(options or {}), os.environ if environ is None else environ
    state = switch(environ)
    known = {f.name: f for f in fields(Settings)}
    others = {key: value for key, value in options.items() if key not in known}
    inductor = _inductor_options(others, mode, set(known))
    if state == "off":  # the way out must work whatever else is set; only what compiles still counts
        known = {"inner": known["inner"]}
    else:
        _check_variables(environ, known)

    values, sources = {}, dict.fromkeys(known, "default")
    for name, f in known.items():
        variable = f"{PREFIX}_{name.upper()}"
        if name in options:
            values[name], sources[name] = _parse(f, options[name], f"options[{name!r}]"), "options"
        elif environ.get(variable, "").strip():
            values[name], sources[name] = _parse(f, environ[variable], variable), variable
    derived: dict[str, str] = {}
    preset = values.get("preset", "default")
    for name, value in PRESETS[preset].items():
        if values.setdefault(name, value) != value:
            raise SettingsError(
                f"{name}={values[name]!r} ({sources[name]}) contradicts preset {preset!r} "
                f"({sources['preset']}), which means {name}={value!r}"
            )
        derived[name] = "preset"
    if preset != "default":
        for name, value in PAPER_SCHEDULE.items():
            values.setdefault(name, value)
            derived[name] = "preset"
    derived |= _how_much(values, sources)
    derived |= _without_first_order(values, sources)
    sources |= {name: source for name, source in derived.items() if sources[name] == "default"}
    settings = Settings(**values)
    _check_error_settings(settings, sources)
    return Resolved(settings, inductor, state, sources)


def _how_much(values: dict[str, Any], sources: dict[str, str]) -> dict[str, str]:
    """Leaves one of density, target_error and quality in values, with what follows from it.

    Returns the sources of what follows.
    """
    rivals = ("density", "target_error", "quality")
    said = [name for name in rivals if values.get(name) is not None]
    for name in set(rivals) - set(said):
        values.pop(name, None)
    chosen = [name for name in said if sources[name] == "options"] or said
    if len(chosen) > 1:
        first, second = (f"{name}={values[name]!r} ({sources[name]})" for name in chosen[:2])
        raise SettingsError(f"{first} contradicts {second}: each says how much is computed, so set one")
    for name in set(said) - set(chosen):
        sources[name] = "default"
    if not chosen:
        if values.get("preset", "default") != "default":
            values |= dict.fromkeys(rivals)
            return dict.fromkeys(rivals, "preset")
        return {}
    (only,) = chosen
    values |= {name: values[name] if name == only else None for name in rivals}
    derived = dict.fromkeys(rivals, only)
    if only == "quality":
        values["target_error"] = QUALITY[values["quality"]]
    return derived


def _without_first_order(values: dict[str, Any], sources: dict[str, str]) -> dict[str, str]:
    """Centroids that do not count have no first-order terms, nor has the op that adds centroids alone."""
    for name in ("compensate", "merge"):
        if values.get(name) is False:
            if values.get("first_order"):
                raise SettingsError(
                    f"first_order=True ({sources['first_order']}) contradicts {name}=False ({sources[name]})"
                )
            if "first_order" not in values:
                values["first_order"] = False
                return {"first_order": name}
    return {}


def _check_error_settings(settings: Settings, sources: dict[str, str]) -> None:
    """What is steered or guarded must be measured."""

    def said(name: str) -> str:
        return f"{name}={getattr(settings, name)!r} ({sources[name]})"

    if settings.min_density > settings.max_density:
        raise SettingsError(f"{said('min_density')} is more than {said('max_density')}")
    needs = "target_error" if settings.target_error is not None else "max_error" if settings.max_error else ""
    if needs and not settings.measure_every:
        raise SettingsError(f"{said('measure_every')} contradicts {said(needs)}, which needs measurements")


def _parse(f: Any, value: Any, source: str) -> Any:
    try:
        return f.metadata["parse"](value)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise SettingsError(f"{source} = {value!r}: allowed is {f.metadata['allowed']}") from None


def _check_variables(environ: Mapping[str, str], known: Mapping[str, Any]) -> None:
    """A variable that is nearly one of ours is a typing error; other people's SVG_EAR_* are left alone."""
    ours = [f"{PREFIX}_{name.upper()}" for name in known]
    for variable in environ:
        if variable.startswith(PREFIX + "_") and variable not in ours and environ[variable].strip():
            near = difflib.get_close_matches(variable, ours, n=1, cutoff=0.85)
            if near:
                raise SettingsError(f"{variable} is not a setting; did you mean {near[0]}?")


def _inductor_options(options: dict[str, Any], mode: str | None, ours: set[str]) -> dict[str, Any]:
    """What is left over for Inductor, with the mode spelled out; explicit options win over the mode's."""
    mode = options.pop("mode", None) or mode
    if not options and mode in (None, "default"):
        return {}
    from torch import _inductor

    modes = _inductor.list_mode_options()
    if mode is not None and mode not in modes:
        raise SettingsError(f"mode = {mode!r}: allowed is one of {', '.join(modes)}")
    known = _inductor.list_options()
    for key in options:
        if key.replace("-", "_") not in known:
            near = [match for names in (ours, known) for match in difflib.get_close_matches(key, names, n=1)]
            guess = f"; did you mean {near[0]!r}?" if near else ""
            raise SettingsError(f"options[{key!r}] is neither a setting of svg_ear nor of Inductor{guess}")
    return {**modes.get(mode, {}), **options}


def markdown_table() -> str:
    """The table of docs/ENVS.md."""
    rows = ["| variable | option | default | allowed | meaning |", "|---|---|---|---|---|"]
    for f in fields(Settings):
        written: dict[Any, str] = {(): "none", None: "none", True: "1", False: "0"}
        cells = [f"`{PREFIX}_{f.name.upper()}`", f"`{f.name}`", str(written.get(f.default, f.default))]
        rows.append(f"| {' | '.join([*cells, f.metadata['allowed'], f.metadata['doc']])} |")
    return "\n".join(rows) + "\n"
