"""Backends for tests: one that keeps what the passes say of each graph, and runs it rewritten or as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from svg_ear_compile.kernels import context
from svg_ear_compile.passes.classify import classify
from svg_ear_compile.passes.inputs import read_inputs
from svg_ear_compile.passes.match import Matches, in_words, match
from svg_ear_compile.passes.rewrite import rewrite
from svg_ear_compile.passes.site import GraphInputs, Site
from svg_ear_compile.passes.subgraphs import inline_regions
from svg_ear_compile.settings import Settings

Knobs = partial(Settings, density=1.0, min_tokens=1)
"""Settings for tiny models."""


@dataclass
class Captured:
    """One graph: the module (rewritten or not), its graph as Dynamo made it, and what the passes found."""

    gm: fx.GraphModule
    graph: fx.Graph
    example_inputs: list[Any]
    sites: list[Site]
    inputs: GraphInputs
    placeholders: list[str]
    found: Matches

    @property
    def others(self) -> tuple[str, ...]:
        """Attention that is no site, as the report names it."""
        return (*in_words(self.found.others), *filter(None, [self.found.outside]))


def hosted(run: Callable[..., Any]) -> Callable[..., Any]:
    """Calls it within a context, as our backend does, so that its sites are sparse."""

    def call(*args: Any) -> Any:
        with context.active(context.RunContext()):
            return run(*args)

    return call


@dataclass
class Backend:
    """A torch.compile backend. inner: what runs a graph at last, by default its own forward."""

    knobs: Settings = field(default_factory=Knobs)
    rewrites: bool = False
    inner: Callable[[fx.GraphModule, list[Any]], Any] = field(default=lambda gm, _: gm.forward)
    captured: list[Captured] = field(default_factory=list)

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any], **_: Any) -> Any:
        whole = inline_regions(gm)
        graph, sites = whole.graph, classify(whole, self.knobs, example_inputs)
        names = [node.name for node in graph.find_nodes(op="placeholder")]
        inputs, found = read_inputs(whole, sites), match(graph)
        self.captured.append(Captured(gm, graph, example_inputs, sites, inputs, names, found))
        if self.rewrites:
            gm.graph = rewrite(whole, sites, self.knobs)
        return hosted(self.inner(gm, example_inputs))

    @property
    def sites(self) -> list[Site]:
        return [site for captured in self.captured for site in captured.sites]


@contextmanager
def fresh_dynamo() -> Iterator[None]:
    """No compiled code from before, and none left behind; no gradients."""
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def compiled(model: nn.Module, backend: Backend, regional: bool = False, dynamic: bool | None = None) -> Any:
    """The model, compiled as a whole or block class by block class, as a user would."""
    if not regional:
        return torch.compile(model, backend=backend, dynamic=dynamic)
    model.compile_repeated_blocks(backend=backend, fullgraph=True, dynamic=dynamic)
    return model


def capture(model: nn.Module, *calls: dict[str, Any], **how: Any) -> Backend:
    """What the passes say about the graphs of these calls, which run as they are."""
    backend = Backend(how.pop("knobs", None) or Knobs())
    with fresh_dynamo():
        run = compiled(model, backend, **how)
        for arguments in calls:
            run(**arguments)
    return backend


def described(site: Site) -> str:
    """A site in one line, for tables of expectations."""
    layout = site.layout
    words = [site.module_path, site.kind, site.verdict.reason.name]
    if layout.text_hint:
        words.append(f"text={layout.text_hint} {'first' if layout.text_first else 'last'}")
    if layout.packed:
        words.append("packed")
    if layout.grid_hint:
        words.append("x".join(map(str, layout.grid_hint)))
    return " ".join(words)
