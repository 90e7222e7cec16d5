"""Every setting: what is allowed, what wins over what, and whether docs/ENVS.md says so."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from svg_ear_compile.exceptions import SettingsError
from svg_ear_compile.precedence import resolve, switch
from svg_ear_compile.settings import Settings, markdown_table

DEFAULTS = Settings()


def test_defaults() -> None:
    resolved = resolve({}, {})
    assert resolved.settings == DEFAULTS
    assert (resolved.inductor_options, resolved.switch) == ({}, "on")
    assert set(resolved.sources.values()) == {"default"}


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("density", "0.5", 0.5),
        ("density", "1", 1.0),
        ("quality", "Turbo", "turbo"),
        ("target_error", "0.03", 0.03),
        ("min_density", "0.1", 0.1),
        ("max_density", "1", 1.0),
        ("max_error", "0", 0.0),
        ("measure_every", "2", 2),
        ("audit", "1", True),
        ("first_order", "0", False),
        ("min_tokens", "512", 512),
        ("sites", "blocks.*.attn1, *.attn", ("blocks.*.attn1", "*.attn")),
        ("dense_steps", "6", 6),
        ("dense_steps", "0", 0),
        ("dense_steps", "0.1", 0.1),
        ("num_steps", "30", 30),
        ("dense_layers", "2", ((0, 1),)),
        ("dense_layers", "0", ()),
        ("dense_layers", "0, 38-39", ((0, 0), (38, 39))),
        ("dense_layers", "5,", ((5, 5),)),
        ("preset", "svg_ear", "svg_ear"),
        ("preset", "SVG2", "svg2"),
        ("merge", "0", False),
        ("merge", "TRUE", True),
        ("inner", "eager", "eager"),
        ("strict", "1", True),
        ("seed", "7", 7),
        ("compensate", "false", False),
        ("order", "splits", "splits"),
        ("report", "1", True),
        ("report", "0", False),
        ("report", "/tmp/x.json", "/tmp/x.json"),
        ("report", "x.html", "x.html"),
    ],
)
def test_an_option_and_its_variable_mean_the_same(name: str, text: str, expected: object) -> None:
    variable = f"SVG_EAR_{name.upper()}"
    by_environment, by_option = resolve({}, {variable: text}), resolve({name: text}, {})
    assert getattr(by_environment.settings, name) == expected
    assert by_environment.settings == by_option.settings
    assert (by_environment.sources[name], by_option.sources[name]) == (variable, "options")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("density", "x"),
        ("density", 0),
        ("density", 1.01),
        ("density", "nan"),
        ("density", True),
        ("quality", "best"),
        ("target_error", 0),
        ("target_error", 1.5),
        ("min_density", 0),
        ("max_density", 2),
        ("max_error", -1),
        ("max_error", "inf"),
        ("measure_every", 1.5),
        ("audit", "maybe"),
        ("min_tokens", 0),
        ("min_tokens", 1.5),
        ("sites", 3),
        ("dense_steps", -1),
        ("dense_steps", 1.0),
        ("dense_steps", "1.5"),
        ("dense_steps", True),
        ("num_steps", 0),
        ("dense_layers", "3-1"),
        ("dense_layers", "a"),
        ("dense_layers", -1),
        ("preset", "paper"),
        ("merge", "maybe"),
        ("inner", "aot_eager"),
        ("strict", 2),
        ("seed", -1),
        ("compensate", "no"),
        ("order", "random"),
        ("report", "report.txt"),
    ],
)
def test_nonsense_names_the_setting_the_value_and_what_is_allowed(name: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=name) as caught:
        resolve({name: value}, {})
    assert repr(value) in str(caught.value) or str(value) in str(caught.value)
    assert "allow" in str(caught.value)


def test_nonsense_in_the_environment_names_the_variable() -> None:
    with pytest.raises(SettingsError, match=r"SVG_EAR_DENSITY = 'x': allowed is 0 < density <= 1"):
        resolve({}, {"SVG_EAR_DENSITY": "x"})


@pytest.mark.parametrize(
    ("options", "environ", "density", "source"),
    [
        ({}, {}, None, "default"),
        ({}, {"SVG_EAR_DENSITY": ""}, None, "default"),
        ({}, {"SVG_EAR_DENSITY": "0.3"}, 0.3, "SVG_EAR_DENSITY"),
        ({"density": 0.4}, {"SVG_EAR_DENSITY": "0.3"}, 0.4, "options"),
        ({"density": 0.4}, {"SVG_EAR_DENSITY": "nonsense"}, 0.4, "options"),
        ({"preset": "svg_ear"}, {}, None, "preset"),
        ({}, {"SVG_EAR_PRESET": "svg_ear"}, None, "preset"),
        ({"preset": "svg2"}, {}, None, "preset"),
        ({"preset": "svg_ear"}, {"SVG_EAR_DENSITY": "0.3"}, 0.3, "SVG_EAR_DENSITY"),
        ({"preset": "svg_ear", "density": None}, {"SVG_EAR_DENSITY": "0.3"}, None, "options"),
    ],
)
def test_precedence(
    options: dict[str, Any], environ: dict[str, str], density: float | None, source: str
) -> None:
    resolved = resolve(options, environ)
    assert (resolved.settings.density, resolved.sources["density"]) == (density, source)


HOW_MUCH: list[tuple[dict[str, Any], dict[str, str], tuple[Any, ...]]] = [
    # options, environment, (quality, target_error, density, dense_steps)
    ({}, {}, ("balanced", 0.04, None, 0.1)),
    ({"quality": "turbo"}, {}, ("turbo", 0.06, None, 0.1)),
    ({"quality": "turbo", "dense_steps": 3}, {}, ("turbo", 0.06, None, 3)),
    ({"quality": "near-lossless"}, {"SVG_EAR_DENSE_STEPS": "0"}, ("near-lossless", 0.015, None, 0)),
    ({"quality": "lossless-ish"}, {}, ("near-lossless", 0.015, None, 0.1)),
    ({}, {"SVG_EAR_QUALITY": "high"}, ("high", 0.025, None, 0.1)),
    ({"density": None}, {}, ("balanced", 0.04, None, 0.1)),
    ({"target_error": 0.03}, {}, (None, 0.03, None, 0.1)),
    ({"density": 0.3}, {}, (None, None, 0.3, 0.1)),
    ({"density": 0.3}, {"SVG_EAR_QUALITY": "high"}, (None, None, 0.3, 0.1)),
    (
        {"quality": "high"},
        {"SVG_EAR_TARGET_ERROR": "0.3", "SVG_EAR_DENSITY": "1"},
        ("high", 0.025, None, 0.1),
    ),
    ({"preset": "svg_ear"}, {}, (None, None, None, 0.2)),
    ({"preset": "svg_ear", "density": 0.2}, {}, (None, None, 0.2, 0.2)),
    ({"preset": "svg2", "dense_steps": 1}, {}, (None, None, None, 1)),
    ({"preset": "svg_ear", "target_error": 0.05}, {}, (None, 0.05, None, 0.2)),
    ({"preset": "svg_ear"}, {"SVG_EAR_QUALITY": "turbo"}, ("turbo", 0.06, None, 0.2)),
]


@pytest.mark.parametrize(("options", "environ", "expected"), HOW_MUCH)
def test_one_of_density_target_error_and_quality_says_how_much(
    options: dict[str, Any], environ: dict[str, str], expected: tuple[Any, ...]
) -> None:
    s = resolve(options, environ).settings
    assert (s.quality, s.target_error, s.density, s.dense_steps) == expected


def test_where_values_come_from() -> None:
    sources = resolve({"quality": "high"}, {"SVG_EAR_DENSITY": "0.3"}).sources
    names = ("quality", "target_error", "density", "dense_steps")
    assert [sources[name] for name in names] == ["options", "quality", "quality", "default"]
    assert resolve({"density": 0.3}, {}).sources["target_error"] == "density"


@pytest.mark.parametrize(
    ("options", "environ", "first", "second"),
    [
        (
            {"density": 0.2, "target_error": 0.1},
            {},
            r"density=0.2 \(options\)",
            r"target_error=0.1 \(options\)",
        ),
        ({"density": 0.2, "quality": "high"}, {}, "density=0.2", r"quality='high' \(options\)"),
        ({"target_error": 0.1, "quality": "high"}, {}, "target_error=0.1", "quality='high'"),
        (
            {},
            {"SVG_EAR_DENSITY": ".2", "SVG_EAR_QUALITY": "high"},
            r"density=0.2 \(SVG_EAR_DENSITY\)",
            r"quality='high' \(SVG_EAR_QUALITY\)",
        ),
        ({"min_density": 0.7}, {}, r"min_density=0.7 \(options\)", r"max_density=0.6 \(default\)"),
        ({"measure_every": 0}, {}, "measure_every=0", r"target_error=0.04 \(default\)"),
        ({"density": 0.2, "max_error": 0.1, "measure_every": 0}, {}, "measure_every=0", "max_error=0.1"),
    ],
)
def test_conflicts_name_both(
    options: dict[str, Any], environ: dict[str, str], first: str, second: str
) -> None:
    with pytest.raises(SettingsError, match=f"{first}.*{second}"):
        resolve(options, environ)


def test_the_guard() -> None:
    assert resolve({"target_error": 0.05}, {}).settings.guard == pytest.approx(0.2)
    assert resolve({"target_error": 0.05, "max_error": 0.2}, {}).settings.guard == 0.2
    assert resolve({"density": 0.2}, {}).settings.guard == math.inf
    assert resolve({"max_error": 0}, {}).settings.guard == math.inf
    assert resolve({"density": 0.2, "measure_every": 0}, {}).settings.measure_every == 0


def test_off_wins_over_everything_even_over_nonsense() -> None:
    resolved = resolve({"density": 7}, {"SVG_EAR": "0", "SVG_EAR_SEED": "x"})
    assert (resolved.switch, resolved.settings) == ("off", DEFAULTS)
    assert resolve({"inner": "eager"}, {"SVG_EAR": "0"}).settings.inner == "eager"
    assert resolve({"max_autotune": True}, {"SVG_EAR": "0"}).inductor_options == {"max_autotune": True}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "on"),
        ("", "on"),
        ("1", "on"),
        ("true", "on"),
        ("0", "off"),
        ("False", "off"),
        ("report", "report"),
    ],
)
def test_switch(value: str | None, expected: str) -> None:
    assert switch({} if value is None else {"SVG_EAR": value}) == expected


def test_switch_refuses_nonsense() -> None:
    with pytest.raises(SettingsError, match="SVG_EAR='2'"):
        resolve({}, {"SVG_EAR": "2"})


def test_presets_are_the_papers() -> None:
    settings = resolve({"preset": "svg_ear"}, {}).settings
    assert (settings.order, settings.routing, settings.compensate) == ("kmeans", "svg_ear", True)
    settings = resolve({"preset": "svg2"}, {}).settings
    assert (settings.order, settings.routing, settings.compensate) == ("kmeans", "mass", False)
    assert (DEFAULTS.order, DEFAULTS.routing) == ("auto", "output_error")
    assert settings.dense_layers == ((0, 0),), "and their schedule"
    assert not resolve({"preset": "svg2", "dense_layers": 0}, {}).settings.dense_layers
    assert not DEFAULTS.dense_layers


@pytest.mark.parametrize(
    ("options", "environ"),
    [
        ({"preset": "svg_ear", "order": "cubes"}, {}),
        ({"preset": "svg_ear", "compensate": False}, {}),
        ({"preset": "svg_ear"}, {"SVG_EAR_ORDER": "splits"}),
        ({"order": "auto"}, {"SVG_EAR_PRESET": "svg_ear"}),
        ({"preset": "svg2", "order": "cubes"}, {}),
        ({"preset": "svg_ear", "first_order": True}, {}),
        ({"preset": "svg2", "compensate": True}, {}),
        ({"compensate": True}, {"SVG_EAR_PRESET": "svg2"}),
    ],
)
def test_conflicts_with_the_preset(options: dict[str, Any], environ: dict[str, str]) -> None:
    preset = options.get("preset") or environ["SVG_EAR_PRESET"]
    with pytest.raises(SettingsError, match=f"contradicts preset '{preset}'"):
        resolve(options, environ)


@pytest.mark.parametrize("name", ["compensate", "merge"])
def test_first_order_terms_need_centroids_and_one_op(name: str) -> None:
    assert DEFAULTS.first_order
    found = resolve({name: False}, {})
    assert (found.settings.first_order, found.sources["first_order"]) == (False, name)
    assert not resolve({name: False, "first_order": False}, {}).settings.first_order
    with pytest.raises(SettingsError, match=f"first_order=True \\(options\\) contradicts {name}=False"):
        resolve({name: False, "first_order": True}, {})


def test_the_rest_goes_to_inductor() -> None:
    assert resolve({"max_autotune": True, "density": 0.5}, {}).inductor_options == {"max_autotune": True}
    assert resolve({"mode": "reduce-overhead"}, {}).inductor_options == {"triton.cudagraphs": True}
    assert resolve({}, {}, mode="reduce-overhead").inductor_options == {"triton.cudagraphs": True}
    both = {"mode": "max-autotune-no-cudagraphs", "max_autotune": False}
    assert resolve(both, {}).inductor_options["max_autotune"] is False
    assert resolve({"mode": "default"}, {}).inductor_options == {}


@pytest.mark.parametrize(
    ("key", "guess"),
    [("densty", "density"), ("dense_layer", "dense_layers"), ("max_autotun", "max_autotune")],
)
def test_an_unknown_key_gets_a_guess(key: str, guess: str) -> None:
    with pytest.raises(SettingsError, match=rf"options\['{key}'\] is neither .*did you mean '{guess}'\?"):
        resolve({key: 1}, {})


def test_an_unknown_mode() -> None:
    with pytest.raises(SettingsError, match=r"mode = 'fast': allowed is one of .*max-autotune"):
        resolve({"mode": "fast"}, {})


def test_a_mistyped_variable_gets_a_guess_and_strangers_are_left_alone() -> None:
    with pytest.raises(SettingsError, match="SVG_EAR_DENSTY is not a setting; did you mean SVG_EAR_DENSITY"):
        resolve({}, {"SVG_EAR_DENSTY": "0.3"})
    assert resolve({}, {"SVG_EAR_SOMETHING_ELSE": "1"}).settings == DEFAULTS


def test_dense_layers_as_numbers() -> None:
    settings = resolve({"dense_layers": "0, 38-39"}, {}).settings
    assert [n for n in range(50) if settings.is_dense_layer(n)] == [0, 38, 39]
    assert [n for n in range(50) if DEFAULTS.is_dense_layer(n)] == []


def test_each_setting_is_documented() -> None:
    assert all(f.metadata["doc"] and f.metadata["allowed"] for f in fields(Settings))
    page = (Path(__file__).parents[1] / "docs" / "ENVS.md").read_text()
    assert markdown_table() in page, (
        "run: python -c 'import svg_ear_compile.settings as s; print(s.markdown_table())'"
    )
