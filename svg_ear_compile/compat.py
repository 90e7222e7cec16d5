"""Which private or unstable parts of torch does svg_ear rely on? All of them, one function each.

Every function here has a test in tests/test_compat.py that fails if torch changes what the function relies on. Unless a
docstring says otherwise, what it uses exists in every torch from 2.10 on, the oldest version that is supported.
Triton's private parts are in kernels/.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from types import CodeType
from typing import Any

import torch
from torch import Tensor, fx, nn

# --- compiling ---


def counters() -> Mapping[str, Counter[str]]:
    """Dynamo's counters, by part of the compiler. Ours are counters()["svg_ear"]."""
    from torch._dynamo.utils import counters

    return counters


def trace_artifact(name: str, text: str) -> None:
    """Adds a text to the trace that TORCH_TRACE=folder writes and tlparse shows."""
    from torch._logging import trace_structured

    trace_structured(
        "artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=lambda: text
    )


def watch_compilations(begin: Callable[[Any], None], end: Callable[[Any], None]) -> None:
    """Calls begin and end around each compilation of this process, until torch._dynamo.reset()."""
    from torch._dynamo import on_compile_end, on_compile_start

    on_compile_start(begin)
    on_compile_end(end)


def is_dynamo_signal(error: BaseException) -> bool:
    """Whether Dynamo raised this to steer itself: restart, skip, unsupported. A ShortenTraceback only wraps errors."""
    from torch._dynamo.exc import ShortenTraceback, TorchDynamoException

    return isinstance(error, TorchDynamoException) and not isinstance(error, ShortenTraceback)


def innermost_function(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The function that Dynamo keeps of what a backend returns: without torch.compiler.disable around it."""
    from torch._dynamo.eval_frame import innermost_fn

    return innermost_fn(compiled)


def graph_break_reasons() -> list[Any]:
    """Dynamo's reasons for graph breaks since its last reset, in order.

    Each has `reason`, in Dynamo's words, and `user_stack`, a list of frame summaries.
    """
    from torch._dynamo import utils

    return list(getattr(utils, "graph_break_reasons", ()))


_RESUMED = re.compile(r'File "([^"]+)", line \d+, in torch_dynamo_resume_in_\w+_at_(\d+)')


def resumed_after(stack_trace: str) -> list[tuple[str, int]]:
    """(file, line) of the graph breaks after which the code of a node resumes.

    Dynamo compiles what follows a break as a function of its own, and names it after the line of the break.
    """
    return [(file, int(line)) for file, line in _RESUMED.findall(stack_trace)]


def inductor(options: Mapping[str, Any]) -> Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]:
    """What torch.compile(backend="inductor", options=options) hands graphs to."""
    return torch._TorchCompileInductorWrapper(None, dict(options), None)


def inductor_modes() -> dict[str, dict[str, Any]]:
    """The options that each mode of torch.compile stands for."""
    from torch import _inductor

    return _inductor.list_mode_options()


def inductor_options() -> list[str]:
    """The names of all options of Inductor."""
    from torch import _inductor

    return _inductor.list_options()


def is_compiled_to_be_saved() -> bool:
    """Whether aot_compile is running, whose result is stored without our part of it."""
    from torch._functorch import config

    return bool(config.bundled_autograd_cache)


def leave_out_of_precompile(gm: fx.GraphModule) -> bool:
    """Keeps what a backend returns for gm out of what caching_precompile stores; False if it would not be stored."""
    if getattr(gm, "_backend_id", None) is None:
        return False
    gm._backend_id = None  # type: ignore[assignment]
    return True


def release_arguments(graph: fx.Graph) -> None:
    """Drops the weak references to a call's arguments that the placeholders of a copied graph hold.

    Dynamo drops those of its own graph. A Parameter with a weak reference to it cannot be swapped, as Module.to() does
    with tensor subclasses.
    """
    for node in graph.find_nodes(op="placeholder"):
        node.meta.pop("grapharg", None)


# --- modules and tensors ---


def module_call_code() -> CodeType:
    """The code that runs in a frame for each call of an nn.Module; its locals are self, args and kwargs."""
    return nn.Module._wrapped_call_impl.__code__


def original_module(module: nn.Module) -> nn.Module:
    """The module that torch.compile(module) wraps; any other module itself."""
    original: nn.Module = getattr(module, "_orig_mod", module)
    return original


def version(x: Tensor) -> int:
    """A number that counts up whenever a tensor is changed in place. Inference tensors raise RuntimeError."""
    return int(x._version)


def storage_key(x: Tensor) -> int:
    """Equal for two tensors, fake ones too, exactly if they share memory."""
    return int(x.untyped_storage()._cdata)


def is_compiled(module: nn.Module) -> bool:
    """Whether module.compile() was called, or the module is what torch.compile(module) returned."""
    return module._compiled_call_impl is not None or original_module(module) is not module


def uncompile(module: nn.Module) -> None:
    """Takes module.compile() back."""
    module._compiled_call_impl = None


# --- Dynamo's graphs ---


def example_value(node: fx.Node) -> Any:
    """The fake tensor, symbol or number that Dynamo left on a node; None if there is none."""
    return node.meta.get("example_value")


def source_name(placeholder: fx.Node) -> str | None:
    """Where an input of a graph comes from, `L['kwargs']['hidden_states']`; None if Dynamo left no source.

    `name` is a method up to torch 2.10, and a property after it.
    """
    name = getattr(getattr(placeholder, "_dynamo_source", None), "name", None)
    found = name() if callable(name) else name
    return str(found) if found else None


def copy_source(old: fx.Node, new: fx.Node) -> None:
    """Gives a copied placeholder its source, by which Inductor knows which inputs are weights."""
    if hasattr(old, "_dynamo_source"):
        new._dynamo_source = old._dynamo_source


def copy_codegen(old: fx.Graph, new: fx.Graph) -> None:
    """Gives a copied graph the calling convention of the original."""
    new._codegen = copy(old._codegen)


def is_erased(node: fx.Node) -> bool:
    """Whether a node has been taken out of its graph."""
    return bool(node._erased)


def is_sdpa_kernel(node: fx.Node) -> bool:
    """Whether a node enters or leaves `with torch.nn.attention.sdpa_kernel(...)`."""
    return getattr(node.target, "__name__", "") == "_sdpa_kernel"


def is_higher_order(target: Any) -> bool:
    """Whether an operation runs a graph of its own, such as checkpointing or torch.cond."""
    return isinstance(target, torch._ops.HigherOrderOperator)


def writes_in_place(target: Any) -> bool:
    """Whether the schema of an aten or custom op says that it changes an argument."""
    target = getattr(target, "default", target)
    return isinstance(target, torch._ops.OpOverload) and bool(target._schema.is_mutable)


def process_group(name: str) -> Any:
    """The torch.distributed.ProcessGroup that a collective of a graph names."""
    from torch.distributed import distributed_c10d

    resolve: Any = distributed_c10d._resolve_process_group  # takes a str, whatever newer annotations call it
    return resolve(name)


# --- symbolic sizes ---


def expression(number: torch.SymInt | torch.SymFloat) -> Any:
    """The sympy expression of a symbolic number; reading it installs no guard."""
    return number.node.expr


def size_hint(size: torch.SymInt) -> int | None:
    """The value of a size at compile time; None for a symbol without one (unbacked). Installs no guard.

    Where a node has no hint, symbolic_shapes.optimization_hint gives it, and in older torch ShapeEnv.size_hint.
    """
    from torch.fx.experimental import symbolic_shapes

    if symbolic_shapes.free_unbacked_symbols(size):
        return None
    if size.node.hint is not None:
        return int(size.node.hint)
    if hasattr(symbolic_shapes, "optimization_hint"):
        return int(symbolic_shapes.optimization_hint(size))
    return int(size.node.shape_env.size_hint(size.node.expr))
