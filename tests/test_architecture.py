"""Which part may know which: the arrows of docs/DESIGN.md, read off the import statements."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import svg_ear_compile

ROOT = Path(__file__).parents[1]
PACKAGE = "svg_ear_compile"
FOLDERS = {
    PACKAGE: ROOT / PACKAGE,
    f"{PACKAGE}.reporting": ROOT / PACKAGE / "reporting",
    f"{PACKAGE}.runtime": ROOT / PACKAGE / "runtime",
    f"{PACKAGE}.passes": ROOT / "passes",
    f"{PACKAGE}.passes.provenance": ROOT / "passes" / "provenance",
    f"{PACKAGE}.kernels": ROOT / "kernels",
}
MODULES = {
    f"{package}.{path.stem}": path
    for package, folder in FOLDERS.items()
    for path in sorted(folder.glob("*.py"))
}


def imports(name: str, path: Path) -> set[str]:
    """Full names of all modules (and of names that may be modules) that a file imports, wherever in it."""
    package = name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def within(names: set[str], module: str) -> set[str]:
    return {name for name in names if name == module or name.startswith(module + ".")}


def ours(names: set[str], folder: str) -> set[str]:
    """Names of the modules of one folder of ours among imported names."""
    return {module for module in MODULES if module.rpartition(".")[0] == folder and within(names, module)}


@pytest.mark.parametrize("name", MODULES)
def test_arrows(name: str) -> None:
    package, _, stem = name.rpartition(".")
    names = imports(name, MODULES[name])
    root, reporting, runtime, passes, provenance, kernels = (ours(names, folder) for folder in FOLDERS)

    is_triton = package == f"{PACKAGE}.kernels" and stem.startswith("triton_")
    assert is_triton or not within(names, "triton"), "triton is imported by kernels/triton_*.py alone"
    if package == f"{PACKAGE}.passes":
        assert kernels <= {f"{PACKAGE}.kernels.ops"}, "passes see the kernels through their ops"
        assert root <= {f"{PACKAGE}.settings"}
        assert not reporting | runtime
    elif package == f"{PACKAGE}.passes.provenance":
        assert passes <= {f"{PACKAGE}.passes.{stem}" for stem in ("fx_utils", "sizes", "sources")}
        assert not root | kernels | reporting | runtime
    elif package == f"{PACKAGE}.kernels":
        assert not within(names, "torch.fx")
        assert not within(names, "torch._dynamo")
        assert not within(names, "torch._inductor")
        assert not passes | provenance
        assert not root | reporting | runtime
    elif stem != "backend":
        assert passes | provenance <= {f"{PACKAGE}.passes.site"}, "backend.py alone knows all parts"
        assert kernels <= {f"{PACKAGE}.kernels.context"}
    if stem == "settings":
        assert not root | passes | kernels | reporting | runtime


@pytest.mark.parametrize("stem", ["__init__", "activation"])
def test_what_every_import_of_torch_imports_is_nothing(stem: str) -> None:
    tree = ast.parse(MODULES[f"{PACKAGE}.{stem}"].read_text())
    top = {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
    top |= {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    assert top <= {"__future__", "importlib", "os", "typing"}


@pytest.mark.parametrize("name", svg_ear_compile.__all__)
def test_no_module_takes_the_place_of_a_public_name(name: str) -> None:
    """Importing a submodule binds its name in the package: `svg_ear_compile.report` would become a module."""
    assert f"{PACKAGE}.{name}" not in {*MODULES, *FOLDERS}
    assert getattr(svg_ear_compile, name).__name__ == name
