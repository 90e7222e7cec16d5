"""Which part may know which: the arrows of docs/ARCHITECTURE.md, read off the import statements."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
from benchmark import ROOT, import_script

import svg_ear_compile

architecture = import_script(ROOT / "docs", "architecture")
PACKAGE, MODULES, GRAPH = architecture.PACKAGE, architecture.modules(), architecture.between_files()
SETTINGS = {f"{PACKAGE}.{stem}" for stem in ("compat", "exceptions", "presets", "settings", "precedence")}


def within(names: set[str], module: str) -> set[str]:
    return {name for name in names if name == module or name.startswith(module + ".")}


@pytest.mark.parametrize("name", MODULES)
def test_arrows(name: str) -> None:
    names, stem = architecture.imports(name, MODULES[name]), name.rpartition(".")[2]
    home = architecture.folder(name)
    passes, kernels = (within(GRAPH[name], f"{PACKAGE}.{part}") for part in ("passes", "kernels"))
    root = GRAPH[name] - passes - kernels

    is_triton = home.startswith("kernels") and bool({"triton", "hopper"} & {*stem.split("_")})
    assert is_triton or not within(names, "triton"), "triton is imported by triton and hopper files alone"
    if home == "passes":
        assert kernels <= {f"{PACKAGE}.kernels.ops"}, "passes see the kernels through their ops"
        assert root <= {f"{PACKAGE}.compat", f"{PACKAGE}.settings"}
    elif home == "passes/provenance":
        outside = {other for other in passes if architecture.folder(other) != home}
        assert outside <= {f"{PACKAGE}.passes.{stem}" for stem in ("fx_utils", "sizes", "sources")}
        assert not kernels
        assert root <= {f"{PACKAGE}.compat"}
    elif home.startswith("kernels"):
        for part in ("torch.fx", "torch._dynamo", "torch._inductor"):
            assert not within(names, part)
        assert not passes
        assert root <= {f"{PACKAGE}.exceptions"}
    elif stem != "backend":
        assert passes <= {f"{PACKAGE}.passes.site"}, "backend.py alone knows all parts"
        own = {
            "functional": {"ops", "planning", "reference", "constants"},
            "doctor": {"attention.choice"},
            "bench": {"attention.choice"},
            "packed": {"blocks.places"},
        }.get(stem, {"context", "capture"})
        assert kernels <= {f"{PACKAGE}.kernels.{part}" for part in own}
    if name in SETTINGS:
        assert GRAPH[name] <= SETTINGS


def test_the_kernels_of_the_papers_are_theirs() -> None:
    """What presets svg_ear and svg2 need, nothing else imports but what chooses between them."""
    importers = {name for name, others in GRAPH.items() if within(others, f"{PACKAGE}.kernels.papers")}
    homes = {architecture.folder(name) for name in importers} - {"kernels/papers"}
    assert homes <= {"kernels", "kernels/blocks", "kernels/routing"}


def test_nothing_imports_in_a_circle() -> None:
    assert architecture.circle(GRAPH) == []
    assert architecture.circle(architecture.between_rooms(GRAPH)) == [], "neither files nor rooms"


def test_the_picture_and_the_list_are_of_this_code() -> None:
    assert architecture.PICTURE.read_text() == architecture.draw(GRAPH), "run python docs/architecture.py"
    page = architecture.PAGE.read_text()
    assert page == architecture.with_table(page), "run python docs/architecture.py"


def test_a_room_that_is_left_and_entered_again_has_floors() -> None:
    graph = {f"{PACKAGE}.{name}": set() for name in ("backend", "settings", "runtime.wrapper")}
    graph[f"{PACKAGE}.backend"] = {f"{PACKAGE}.runtime.wrapper"}
    graph[f"{PACKAGE}.runtime.wrapper"] = {f"{PACKAGE}.settings"}
    assert architecture.between_rooms(graph) == {
        f"{PACKAGE}, floor 1": {f"{PACKAGE}/runtime"},
        f"{PACKAGE}/runtime": {f"{PACKAGE}, floor 0"},
        f"{PACKAGE}, floor 0": set(),
    }
    graph[f"{PACKAGE}.settings"] = {f"{PACKAGE}.backend"}
    assert architecture.circle(graph) == sorted(graph)


@pytest.mark.slow
def test_the_walk_of_a_call_climbs_at_most_once() -> None:
    """The op hands its sparse and its dense branch to the fallback, which calls one of them."""
    command = [sys.executable, str(architecture.ROOT / "docs" / "walk.py")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    phases = dict(line.split(": ") for line in text.strip().split("\n"))
    climbs = {phase: int(figures.split()[-2]) for phase, figures in phases.items()}
    assert list(climbs) == ["compiling", "around a call", "in the op"]
    assert climbs["compiling"] == climbs["around a call"] == 0
    assert climbs["in the op"] <= 1


@pytest.mark.parametrize("stem", ["__init__", "activation"])
def test_what_every_import_of_torch_imports_is_nothing(stem: str) -> None:
    tree = ast.parse(MODULES[f"{PACKAGE}.{stem}"].read_text())
    top = {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
    top |= {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    assert top <= {"__future__", "importlib", "os", "typing"}


@pytest.mark.parametrize("name", svg_ear_compile.__all__)
def test_no_module_takes_the_place_of_a_public_name(name: str) -> None:
    """Importing a submodule binds its name in the package: `svg_ear_compile.report` would become a module."""
    assert f"{PACKAGE}.{name}" not in {*MODULES, *(name.rpartition(".")[0] for name in MODULES)}
    assert getattr(svg_ear_compile, name).__name__ == name
