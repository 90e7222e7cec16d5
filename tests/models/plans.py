"""What a model must give when its sites computed the fp64 joint softmax of the plans that a run used.

`Kept` writes down every plan of a run, in the order of the graphs. `Truth` runs the model on the graphs as
Dynamo made them: where a site was rewritten, the formula of kernels/reference.py over the model's own query,
key and value takes the place of scaled_dot_product_attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models.capture import Backend, Knobs, compiled
from torch import Tensor, fx, nn

from svg_ear_compile.kernels import context, planning, reference
from svg_ear_compile.kernels.plan import SparsePlan
from svg_ear_compile.passes.match import AttentionNode, match
from svg_ear_compile.passes.site import Site

Formula = Callable[[Tensor, SparsePlan, float], Tensor]


class Kept(list[SparsePlan]):
    """The plans of all sparse calls, oldest first; those of one call of a graph in the order of its sites:
    Inductor may compute two that do not depend on each other (sana_wm has them) in either order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        make_plan = planning.make_plan
        made: list[tuple[context.RunContext, int]] = []

        def spy(*arguments: Any) -> SparsePlan:
            call, site = context.current(), arguments[-1].site
            at = len(self)
            while at and made[at - 1][0] is call and made[at - 1][1] > site:
                at -= 1
            made.insert(at, (call, site))
            self.insert(at, make_plan(*arguments))
            return self[at]

        patch.setattr(planning, "make_plan", spy)


def compensates(plan: SparsePlan) -> bool:
    """Whether a centroid stands for every block of keys that is not computed exactly."""
    filled = (plan.key_offsets.diff(dim=-1) > 0)[..., None, :]
    return bool((plan.bias.isfinite() | reference.kept_matrix(plan) | ~filled).all())


def skips(plan: SparsePlan) -> bool:
    """Whether some block of keys is not computed exactly."""
    return bool(plan.bias.isfinite().any())


def dropped(query: Tensor, plan: SparsePlan, scale: float) -> Tensor:
    """What the same plan gives when nothing stands for the blocks it skips."""
    return reference.joint_softmax(query, plan._replace(bias=torch.full_like(plan.bias, -torch.inf)), scale)


class Truth:
    """A model whose rewritten sites are computed by a formula over plans; compiled once, called as often as
    wanted."""

    def __init__(self, model: nn.Module, regional: bool) -> None:
        self.plans: Iterator[SparsePlan] = iter(())
        self.formula: Formula = reference.joint_softmax
        self.backend = Backend(Knobs(), inner=self._inner)
        self.run = compiled(model, self.backend, regional)

    def __call__(self, arguments: dict[str, Any], plans: list[SparsePlan], formula: Formula) -> Tensor:
        self.plans, self.formula = iter(plans), formula
        out: Tensor = self.run(**arguments)[0]
        assert next(self.plans, None) is None, "as many calls as plans"
        return out

    def _inner(self, gm: fx.GraphModule, _: list[Any]) -> Any:
        sites = self.backend.captured[-1].sites
        return lambda *args: _Run(gm, sites, self).run(*args)


class _Run(fx.Interpreter):
    """A graph in which some calls of attention are computed otherwise."""

    def __init__(self, gm: fx.GraphModule, sites: list[Site], truth: Truth) -> None:
        super().__init__(gm, garbage_collect_values=False)
        calls = {call.node: call for call in match(gm.graph).calls}
        self.rewritten: dict[fx.Node, tuple[Site, AttentionNode]] = {
            site.node: (site, calls[site.node]) for site in sites if site.verdict.rewrite
        }
        self.truth = truth

    def run_node(self, node: fx.Node) -> Any:
        if node not in self.rewritten:
            return super().run_node(node)
        site, call = self.rewritten[node]
        query, key, value = (self.env[n] for n in (call.query, call.key, call.value))
        plan = reference.remade(next(self.truth.plans), key, value)
        out = self.truth.formula(query, plan, query.shape[-1] ** -0.5 if call.scale is None else call.scale)
        if site.key_mask is not None and site.key_mask.zero_rows:
            out = out * self.env[site.key_mask.node].reshape(-1, 1, out.shape[2], 1)
        return out.to(node.meta["example_value"].dtype)
