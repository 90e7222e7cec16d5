"""What a checkout and a wheel hold: ours under one name, the entry points, the package data."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("svg_ear_compile", "passes", "kernels"):
        ignored = shutil.ignore_patterns("__pycache__", ".*_cache")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    build = "import setuptools.build_meta as b, sys; b.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=source, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return zipfile.ZipFile(built)


@pytest.mark.skipif((ROOT / "svg_ear_compile" / "kernels").is_file(), reason="git made no symlinks")
def test_a_checkout_is_a_package_without_an_install() -> None:
    """-S: no site-packages, so no editable install helps."""
    code = "import svg_ear_compile.kernels, svg_ear_compile.passes"
    subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, check=True)


def test_everything_is_under_one_name(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"svg_ear_compile"}


def test_all_modules_and_data_are_in(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for package, folder in (("", "svg_ear_compile"), ("passes/", "passes"), ("kernels/", "kernels")):
        for path in (ROOT / folder).rglob("*.py"):
            assert f"svg_ear_compile/{package}{path.relative_to(ROOT / folder)}" in names
    for path in (ROOT / "svg_ear_compile").rglob("*"):
        if path.suffix in (".safetensors", ".json", ".typed"):
            assert str(path.relative_to(ROOT)) in names


def test_entry_points(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    text = wheel.read(name).decode()
    assert "[torch_dynamo_backends]\nsvg_ear = svg_ear_compile.backend:svg_ear" in text
    assert "[torch.backends]\nsvg_ear = svg_ear_compile.activation:activate" in text
    assert "svg-ear = svg_ear_compile.cli:main" in text
