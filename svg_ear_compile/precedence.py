"""Which value wins where several are given? Every setting, where it came from, and what else goes to Inductor.

Precedence, highest first:

1. `SVG_EAR=0`: everything is off, whatever else is set
2. `torch.compile(..., options={"density": 0.3})`
3. the environment, `SVG_EAR_DENSITY=0.3`, read whenever a graph is compiled; empty means unset
4. what follows from another setting: presets "svg_ear" and "svg2" set order, routing, compensate, the density and
   the papers' schedule; quality sets target_error
5. the default

One of density, target_error and quality says how much is computed. Two of them in options are an error, and so are
two in the environment. One in options wins over another in the environment. None counts as not set. If none of them is
set, quality is "balanced", or with a paper's preset the density is what its top-p of 0.9 finds.

Options that are not ours go to Inductor if it knows them, and so does `mode` (torch.compile refuses its own mode=
beside options=). Anything else is an error that names the closest known setting.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from .exceptions import SettingsError
from .presets import PAPER_SCHEDULE, PRESETS, QUALITY
from .settings import PREFIX, Settings


class Resolved(NamedTuple):
    """The settings of one compilation.

    inductor_options: patched into Inductor's configuration. switch: 'on', 'off' or 'report'. sources: where the value
    of each setting came from, in words.
    """

    settings: Settings
    inductor_options: dict[str, Any]
    switch: str
    sources: dict[str, str]


def switch(environ: Mapping[str, str]) -> str:
    """What SVG_EAR says: 'on' (even when unset, since the backend was named), 'off' or 'report'."""
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
    """The settings of one compilation; the docstring of this file says what wins. Raises SettingsError."""
    options, environ = dict(options or {}), os.environ if environ is None else environ
    state = switch(environ)
    known = {f.name: f for f in fields(Settings)}
    others = {key: value for key, value in options.items() if key not in known}
    inductor = _inductor_options(others, mode, set(known))
    if state == "off":  # switching off must work whatever else is set; only the inner compiler still counts
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
    """Keeps only one of density, target_error and quality in values, and adds what follows from it.

    Returns the sources of what was added.
    """
    rivals = ("density", "target_error", "quality")
    said = [name for name in rivals if values.get(name) is not None]
    for name in set(rivals) - set(said):
        values.pop(name, None)
    chosen = [name for name in said if sources[name] == "options"] or said
    if len(chosen) > 1:
        first, second = (f"{name}={values[name]!r} ({sources[name]})" for name in chosen[:2])
        raise SettingsError(
            f"{first} contradicts {second}: each of them says how much is computed, so set only one"
        )
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
    """Dropped centroids have no first-order terms, and the three ops without merge do not compute them."""
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
    """An error that is steered or guarded must be measured."""

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
    """A variable that is almost one of ours is taken for a typing error; any other SVG_EAR_* is left alone."""
    ours = [f"{PREFIX}_{name.upper()}" for name in known]
    for variable in environ:
        if variable.startswith(PREFIX + "_") and variable not in ours and environ[variable].strip():
            near = difflib.get_close_matches(variable, ours, n=1, cutoff=0.85)
            if near:
                raise SettingsError(f"{variable} is not a setting; did you mean {near[0]}?")


def _inductor_options(options: dict[str, Any], mode: str | None, ours: set[str]) -> dict[str, Any]:
    """What is left for Inductor, with the mode written out as options; explicit options win over the mode."""
    mode = options.pop("mode", None) or mode
    if not options and mode in (None, "default"):
        return {}
    from . import compat

    modes = compat.inductor_modes()
    if mode is not None and mode not in modes:
        raise SettingsError(f"mode = {mode!r}: allowed is one of {', '.join(modes)}")
    known = compat.inductor_options()
    for key in options:
        if key.replace("-", "_") not in known:
            near = [match for names in (ours, known) for match in difflib.get_close_matches(key, names, n=1)]
            guess = f"; did you mean {near[0]!r}?" if near else ""
            raise SettingsError(f"options[{key!r}] is neither a setting of svg_ear nor of Inductor{guess}")
    return {**modes.get(mode or "default", {}), **options}
