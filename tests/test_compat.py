"""Each private or unstable part of torch is still what compat.py says: a test per function."""

from __future__ import annotations

import ast
import gc
import inspect
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.compile_fx as compile_fx
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch._functorch import config as functorch_config

from svg_ear_compile import compat

ROOT = Path(__file__).parents[1]
FUNCTIONS = [
    name for name, f in vars(compat).items() if inspect.isfunction(f) and f.__module__ == compat.__name__
]
FILES = [path for folder in ("svg_ear_compile", "passes") for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def captured(f: Callable[..., Any], *args: Any, **options: Any) -> list[fx.GraphModule]:
    """The graphs that Dynamo hands to a backend."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    torch.compile(f, backend=backend, **options)(*args)
    return graphs


def one(graphs: list[fx.GraphModule], op: str, **where: Any) -> fx.Node:
    (node,) = graphs[0].graph.find_nodes(op=op, **where)
    return node


# --- compat.py itself ---


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_says_what_it_is_for_and_has_a_test(name: str) -> None:
    assert inspect.getdoc(getattr(compat, name))
    assert f"def test_{name}" in Path(__file__).read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_private_parts_of_torch_are_named_in_compat_alone(path: Path) -> None:
    if path.name == "compat.py" or "kernels" in path.relative_to(ROOT).parts:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if (
            isinstance(node, ast.ImportFrom)
            and node.level == 0
            and (node.module or "").split(".")[0] == "torch"
        ):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "torch"]
        elif (
            isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch"
        ):
            names = [f"torch.{node.attr}"]
        for name in names:
            private = [part for part in name.split(".") if part.startswith("_") and not part.endswith("__")]
            assert not private, f"line {node.lineno}: {name}"
            assert "experimental" not in name


# --- compiling ---


def test_counters() -> None:
    """Ours can be added; other_backends.py counts the compilations that reach AOTAutograd."""
    found = compat.counters()
    found["svg_ear"]["compat"] += 1
    assert compat.counters()["svg_ear"]["compat"] == 1
    del found["svg_ear"]["compat"]
    before = found["aot_autograd"]["total"]
    torch.compile(torch.sin, backend="aot_eager")(torch.ones(2))
    captured(torch.cos, torch.ones(2))
    assert found["aot_autograd"]["total"] == before + 1


@pytest.mark.slow  # test_by_the_environment_alone shows it, too
def test_trace_artifact(tmp_path: Path) -> None:
    script = (
        "import torch\nfrom svg_ear_compile.compat import trace_artifact\ntrace_artifact('name', 'the text')"
    )
    environment = {"PATH": "", "PYTHONPATH": ":".join(sys.path), "TORCH_TRACE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    text = "".join(path.read_text() for path in tmp_path.iterdir())
    assert '"artifact": {"name": "name", "encoding": "string"}' in text
    assert "the text" in text


def test_watch_compilations() -> None:
    calls: list[str] = []
    compat.watch_compilations(lambda _: calls.append("begin"), lambda _: calls.append("end"))
    captured(torch.sin, torch.ones(2))
    assert calls == ["begin", "end"]
    torch._dynamo.reset()
    captured(torch.sin, torch.ones(2))
    assert calls == ["begin", "end"]


def test_is_dynamo_signal() -> None:
    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        raise ValueError("ours")

    def breaks(x: Tensor) -> Tensor:
        print(end="")
        return x + 1

    with pytest.raises(Exception, match="ours") as ours:
        torch.compile(torch.sin, backend=backend)(torch.ones(2))
    with pytest.raises(Exception, match="print") as unsupported:
        torch.compile(breaks, backend="eager", fullgraph=True)(torch.ones(2))
    assert type(ours.value).__name__ == "BackendCompilerFailed"
    assert not compat.is_dynamo_signal(ours.value), "a wrapper of an error"
    assert not compat.is_dynamo_signal(ValueError())
    assert compat.is_dynamo_signal(unsupported.value)


def test_innermost_function() -> None:
    def f(x: Tensor) -> Tensor:
        return x

    assert compat.innermost_function(torch.compiler.disable(f)) is f
    assert compat.innermost_function(f) is f


def test_graph_break_reasons() -> None:
    def f(x: Tensor) -> Tensor:
        y = x + 1
        print(end="")
        return y * 2

    assert len(captured(f, torch.ones(2))) == 2
    (reason,) = compat.graph_break_reasons()
    assert "print" in reason.reason
    assert Path(reason.user_stack[-1].filename) == Path(__file__)
    torch._dynamo.reset()
    assert compat.graph_break_reasons() == []


def test_resumed_after() -> None:
    def f(x: Tensor) -> Tensor:
        y = x + 1
        print(end="")
        return y * 2

    first, second = captured(f, torch.ones(2))
    (reason,) = compat.graph_break_reasons()
    (node,) = (node for node in second.graph.nodes if node.op == "call_function")
    assert compat.resumed_after(node.meta["stack_trace"]) == [(__file__, reason.user_stack[-1].lineno)]
    (node,) = (node for node in first.graph.nodes if node.op == "call_function")
    assert compat.resumed_after(node.meta["stack_trace"]) == []


def test_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[dict[str, Any]] = []

    def compiled(gm: fx.GraphModule, inputs: Any, config_patches: dict[str, Any], **others: Any) -> Any:
        found.append(config_patches)
        return gm.forward

    monkeypatch.setattr(compile_fx, "compile_fx", compiled)
    torch.compile(torch.sin, backend=compat.inductor({"triton.cudagraphs": True}))(torch.ones(2))
    assert found == [{"triton.cudagraphs": True}], "options are patched in while Inductor compiles"
    with pytest.raises(RuntimeError, match="nonsense"):
        compat.inductor({"nonsense": 1})


def test_inductor_modes() -> None:
    modes = compat.inductor_modes()
    assert modes["reduce-overhead"]["triton.cudagraphs"] is True
    assert modes["default"] == {}


def test_inductor_options() -> None:
    assert {"max_autotune", "triton.cudagraphs", "fallback_random"} <= set(compat.inductor_options())


def test_is_compiled_to_be_saved() -> None:
    assert not compat.is_compiled_to_be_saved()
    with functorch_config.patch(bundled_autograd_cache=True):
        assert compat.is_compiled_to_be_saved()


def test_is_compiled_to_be_saved_while_aot_compile_runs() -> None:
    seen: list[bool] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        seen.append(compat.is_compiled_to_be_saved())
        raise ValueError("seen enough")

    with torch._dynamo.config.patch(enable_aot_compile=True):  # the default from torch 2.12 on
        model = torch.compile(nn.Linear(2, 2), backend=backend, fullgraph=True)
    with pytest.raises(Exception, match="seen enough"):
        model.forward.aot_compile(((torch.ones(1, 2),), {}))
    assert seen == [True]


def test_leave_out_of_precompile() -> None:
    with torch._dynamo.config.patch(caching_precompile=True):
        (gm,) = captured(lambda x: x.sin(), torch.ones(2))
    assert compat.leave_out_of_precompile(gm)
    assert not compat.leave_out_of_precompile(gm), "now it is left out"
    torch._dynamo.reset()
    (gm,) = captured(torch.sin, torch.ones(2))
    assert not compat.leave_out_of_precompile(gm)


@pytest.mark.parametrize("released", [True, False])
def test_release_arguments(released: bool) -> None:
    graphs: list[fx.Graph] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        new = fx.Graph()
        new.output(new.graph_copy(gm.graph, {}))
        graphs.append(new)
        if released:
            compat.release_arguments(new)
        return gm.forward

    parameter = nn.Parameter(torch.ones(2))
    torch.compile(lambda x: x * 2, backend=backend)(parameter)
    before = weakref.getweakrefcount(parameter)
    graphs.clear()
    gc.collect()
    assert (weakref.getweakrefcount(parameter) < before) == (not released)


# --- modules and tensors ---


def test_module_call_code() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, *, scale: float) -> dict[str, Any]:
            frame = sys._getframe()
            while frame.f_code is not compat.module_call_code():
                assert frame.f_back is not None
                frame = frame.f_back
            return dict(frame.f_locals)

    model, x = Model(), torch.ones(2)
    found = model(x, scale=2.0)
    assert found["self"] is model
    assert found["args"] == (x,)
    assert found["kwargs"] == {"scale": 2.0}


def test_original_module() -> None:
    model = nn.Linear(2, 2)
    assert compat.original_module(torch.compile(model)) is model  # type: ignore[arg-type]
    assert compat.original_module(model) is model


def test_is_compiled() -> None:
    model = nn.Linear(2, 2)
    assert not compat.is_compiled(model)
    assert compat.is_compiled(torch.compile(model))  # type: ignore[arg-type]
    model.compile()
    assert compat.is_compiled(model)


def test_uncompile() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sin()

    model, graphs = Model(), list[fx.GraphModule]()

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    model.compile(backend=backend)
    compat.uncompile(model)
    model(torch.ones(2))
    assert not graphs
    model.compile(backend=backend)
    model(torch.ones(2))
    assert graphs, "else nothing would be shown"


def test_version() -> None:
    x = torch.zeros(2)
    before = compat.version(x)
    x.add_(1)
    assert compat.version(x) > before
    with torch.inference_mode():
        y = torch.zeros(2)
    with pytest.raises(RuntimeError, match="version"):
        compat.version(y)


def test_storage_key() -> None:
    (gm,) = captured(lambda x: (x[1:], x + 1), torch.ones(3))
    x, view, other = (compat.storage_key(compat.example_value(n)) for n in gm.graph.nodes if n.op != "output")
    assert x == view != other, "of fake tensors"
    base = torch.ones(3)
    assert compat.storage_key(base) == compat.storage_key(base[1:]) != compat.storage_key(base + 1)


# --- Dynamo's graphs ---


def test_example_value() -> None:
    (gm,) = captured(lambda x: x.transpose(0, 1), torch.ones(2, 3))
    node = one([gm], "call_method")
    value = compat.example_value(node)
    assert isinstance(value, Tensor)
    assert value.shape == (3, 2)
    assert compat.example_value(fx.Graph().placeholder("x")) is None


def test_source_name() -> None:
    model = nn.Linear(2, 2)
    (gm,) = captured(model, torch.ones(1, 2))
    names = [compat.source_name(node) for node in gm.graph.find_nodes(op="placeholder")]
    assert sum("_parameters" in (name or "") and "weight" in (name or "") for name in names) == 1
    assert any((name or "").startswith("L['") and "_parameters" not in (name or "") for name in names)
    assert compat.source_name(fx.Graph().placeholder("x")) is None


def test_copy_source() -> None:
    (gm,) = captured(torch.sin, torch.ones(2))
    old = one([gm], "placeholder")
    new = fx.Graph().placeholder("x")
    compat.copy_source(new, new)
    assert compat.source_name(new) is None
    compat.copy_source(old, new)
    assert compat.source_name(new) == compat.source_name(old) is not None


def test_copy_codegen() -> None:
    def f(x: Tensor, pair: dict[str, Tensor]) -> Tensor:
        return x + pair["y"]

    exported = torch.export.export(_Module(f), (torch.ones(2), {"y": torch.ones(2)})).module()
    new = fx.Graph()
    result = new.graph_copy(exported.graph, {})
    new.output(result)
    compat.copy_codegen(exported.graph, new)
    assert type(new._codegen) is type(exported.graph._codegen) is not type(fx.Graph()._codegen)
    assert new._codegen is not exported.graph._codegen


class _Module(nn.Module):
    def __init__(self, f: Callable[..., Any]) -> None:
        super().__init__()
        self.f = f

    def forward(self, *args: Any) -> Any:
        return self.f(*args)


def test_is_erased() -> None:
    graph = fx.Graph()
    node = graph.placeholder("x")
    assert not compat.is_erased(node)
    graph.erase_node(node)
    assert compat.is_erased(node)


def test_is_sdpa_kernel() -> None:
    def f(x: Tensor) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    (gm,) = captured(f, torch.ones(1, 1, 4, 8))
    nodes = [node for node in gm.graph.nodes if compat.is_sdpa_kernel(node)]
    assert len(nodes) == 2, "entered and left"
    assert nodes[0].args[0][0].args[0] == "MATH"


def test_is_higher_order() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=False) + 1

    with torch.enable_grad():
        (gm,) = captured(f, torch.ones(2, requires_grad=True))
    found = [node for node in gm.graph.nodes if compat.is_higher_order(node.target)]
    assert [node.target.__name__ for node in found] == ["tag_activation_checkpoint"]


def test_writes_in_place() -> None:
    aten = torch.ops.aten
    assert compat.writes_in_place(aten.add_.Tensor)
    assert compat.writes_in_place(aten.relu_), "a packet stands for its default overload"
    assert not compat.writes_in_place(aten.add.Tensor)
    assert not compat.writes_in_place(torch.add)


def test_process_group(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        assert compat.process_group(dist.group.WORLD.group_name) is dist.group.WORLD
    finally:
        dist.destroy_process_group()


# --- symbolic sizes ---


def test_expression() -> None:
    (gm,) = captured(lambda x: x.sin(), torch.ones(6, 8), dynamic=True)
    value = compat.example_value(one([gm], "call_method"))
    size = value.shape[0]
    assert isinstance(size, torch.SymInt)
    assert str(compat.expression(size * 2)) == f"2*{compat.expression(size)}"
    assert not compat.expression(size).is_number


def test_size_hint() -> None:
    hints: list[int | None] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        for node in gm.graph.nodes:
            value = node.meta.get("example_value")
            if isinstance(value, Tensor):
                hints.extend(compat.size_hint(n) for n in value.shape if isinstance(n, torch.SymInt))
        return gm.forward

    compiled = torch.compile(lambda x: torch.nonzero(x), backend=backend, dynamic=True, fullgraph=True)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled(torch.ones(6, 8))
        assert set(hints) == {6, 8, None}, "None: how many are not zero is seen in a run only"
        graphs = compat.counters()["stats"]["unique_graphs"]
        compiled(torch.ones(7, 9))
        assert compat.counters()["stats"]["unique_graphs"] == graphs, "no guard was installed"
