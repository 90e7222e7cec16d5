"""SVG_EAR in the environment, in processes of their own: `import torch` must never notice."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

BACKEND = "import torch; from torch._dynamo.backends.registry import get_default_backend as g; print(g())"


def python(code: str, *arguments: str, flags: tuple[str, ...] = (), **environ: str) -> tuple[str, str]:
    """stdout and stderr of a process that must succeed. SVG_EAR_* of this process are not passed on."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SVG_EAR")}
    done = subprocess.run(
        [sys.executable, *flags, "-c", code, *arguments],
        env={**clean, **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


def test_unset_nothing_of_ours_but_the_hook_is_imported() -> None:
    code = "import torch, sys; print([m for m in sys.modules if m.startswith(('svg_ear', 'torch._dynamo'))])"
    assert python(code)[0] == "['svg_ear_compile', 'svg_ear_compile.activation']"


@pytest.mark.parametrize(
    ("value", "backend"),
    [
        pytest.param("1", "svg_ear", marks=pytest.mark.slow),  # test_by_the_environment_alone shows it, too
        pytest.param("0", "inductor", marks=pytest.mark.slow),
        pytest.param("report", "svg_ear", marks=pytest.mark.slow),
        pytest.param("", "inductor", marks=pytest.mark.slow),
    ],
)
def test_default_backend(value: str, backend: str) -> None:
    out, err = python(BACKEND, SVG_EAR=value)
    assert out == backend
    assert "svg" not in err


@pytest.mark.parametrize("flags", [pytest.param((), marks=pytest.mark.slow), ("-W", "error")])
def test_nonsense_is_a_warning_and_torch_works(flags: tuple[str, ...]) -> None:
    out, err = python("import torch; print(torch.ones(1).item())", flags=flags, SVG_EAR="maybe")
    assert out == "1.0"
    assert "SVG_EAR='maybe' is ignored: allowed are 0, 1 and report" in err


def test_an_older_torch_is_told_the_version_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from svg_ear_compile.activation import activate

    monkeypatch.delattr(torch.compiler, "set_default_backend")
    monkeypatch.setenv("SVG_EAR", "1")
    with pytest.warns(RuntimeWarning, match=r"use torch 2\.13 or newer"):
        activate()


def test_whatever_fails_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from svg_ear_compile.activation import activate

    def fail(name: str) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(torch.compiler, "set_default_backend", fail)
    monkeypatch.setenv("SVG_EAR", "1")
    with pytest.warns(RuntimeWarning, match=r"SVG_EAR=1 had no effect: RuntimeError\('no'\)"):
        activate()


NAMED = """
import sys, torch
for backend in sys.argv[1:]:
    torch.compile(lambda x: x + len(backend), backend=None if backend == "default" else backend)(torch.ones(3))
    torch._dynamo.utils.counters.clear()
"""


@pytest.mark.parametrize(
    ("backends", "told"),
    [
        (["eager", "default", "aot_eager", "aot_eager"], 1),
        pytest.param(["eager", "default"], 0, marks=pytest.mark.slow),
    ],
)
def test_a_program_that_names_another_backend_is_told_once(backends: list[str], told: int) -> None:
    _, err = python(NAMED, *backends, SVG_EAR="1", SVG_EAR_INNER="eager")
    assert err.count("the program names another backend") == told
    assert err.count("svg_ear") == 2 * told, "that line, and no other"


@pytest.mark.slow
def test_a_program_that_compiles_nothing_is_told_nothing() -> None:
    _, err = python("import diffusers.models.transformers.transformer_wan", SVG_EAR="1", SVG_EAR_REPORT="1")
    assert "svg" not in err
