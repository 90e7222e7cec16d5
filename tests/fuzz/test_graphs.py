"""Whatever form attention has: dense where it must be, the plan's softmax where it is sparse, and no crash.

120 examples, always the same; `make test` has the first 20. HYPOTHESIS_PROFILE=fuzz_nightly draws 5,000 new ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fuzz.graphs import Form, Model, forms
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from svg_ear_compile import backend
from svg_ear_compile.kernels import planning, reference
from svg_ear_compile.kernels.constants import SiteConstants
from svg_ear_compile.kernels.plan import SparsePlan
from svg_ear_compile.reporting import records

pytestmark = [
    pytest.mark.usefixtures("fresh"),
    pytest.mark.filterwarnings("ignore:svg_ear rewrote none"),
]
CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
settings.register_profile(
    "fuzz", max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=CHECKS
)
settings.register_profile("fuzz_quick", settings.get_profile("fuzz"), max_examples=10)
settings.register_profile(
    "fuzz_nightly", max_examples=2500, deadline=None, print_blob=True, suppress_health_check=CHECKS
)
PROFILE = settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "fuzz"))
VARIANTS = [(1.0, True), (1.0, False), (0.3, True), (0.3, False)]
"""(density, merged)"""


class Variants:
    """A Dynamo backend: one graph, compiled by svg_ear in each of the variants; `chosen` is run."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.chosen = VARIANTS[0]
        self.rewritten: set[int] = set()
        self.runs: dict[tuple[float, bool], Callable[..., Any]] = {}

    def __call__(self, gm: torch.fx.GraphModule, inputs: Any) -> Any:
        assert not self.runs, "one graph, compiled once"
        for density, merge in VARIANTS:
            options = {**self.options, "density": density, "merge": merge}
            own = torch.fx.GraphModule(gm, gm.graph)
            self.runs[density, merge] = backend.svg_ear(own, inputs, options=options)
        found = [{site.site for site in record.rewritten()} for record in records.live_records()]
        assert all(sites == found[0] for sites in found)
        self.rewritten = found[0]
        return lambda *args: self.runs[self.chosen](*args)


@pytest.fixture(scope="module")
def plans() -> Iterator[dict[int, SparsePlan]]:
    """Per site, the plan that was used last."""
    used: dict[int, SparsePlan] = {}
    make_plan = planning.make_plan

    def spy(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, c: SiteConstants
    ) -> SparsePlan:
        used[c.site] = make_plan(query, key, value, attn_mask, c)
        return used[c.site]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "make_plan", spy)
        yield used


def run(model: Callable[..., Any], arguments: Any, dtype: torch.dtype) -> list[Tensor]:
    """Both outputs and the input afterwards; arguments are copied."""
    hidden, text = arguments[0].to(dtype).clone(), arguments[1].to(dtype)
    masks = {k: m if m.dtype == torch.bool else m.to(dtype) for k, m in arguments[2].items()}
    return [*model(hidden, text, masks), hidden]


def by_plans(form: Form, plans: dict[int, SparsePlan], dtype: torch.dtype) -> Model:
    """The model, with the joint softmax of its plan at each site that has one."""

    def attend(
        site: int, q: Tensor, k: Tensor, v: Tensor, mask: Any, is_causal: bool, scale: float | None
    ) -> Tensor:
        if site not in plans:
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return reference.joint_softmax(q, reference.remade(plans[site], k, v), scale, dtype)

    model = Model(form).to(dtype).eval()
    for site in model.sites:
        site.attend = attend
    return model


def check(form: Form, plans: dict[int, SparsePlan]) -> None:
    torch._dynamo.reset()
    backend.reset()
    torch.set_num_threads(1)
    options = {"inner": "eager", "min_tokens": 1, "dense_steps": 0, "dense_layers": 0, "strict": True}
    variants = Variants({**options, "sites": "" if form.clip else "*", "first_order": False})
    model = Model(form).to(form.dtype).eval()
    arguments = model.arguments()
    eager = run(model, arguments, form.dtype)
    exact = run(Model(form).double().eval(), arguments, torch.float64)
    compiled = torch.compile(model, backend=variants, fullgraph=True, dynamic=form.dynamic)
    for variants.chosen in VARIANTS:
        plans.clear()
        got = run(compiled, arguments, form.dtype)
        assert torch.equal(got[-1], eager[-1]), "inputs are written once"
        assert set(plans) == variants.rewritten
        truth, plain = exact, eager
        if not variants.rewritten:
            assert all(map(torch.equal, got, eager))
        elif variants.chosen[0] < 1:
            truth, plain = (
                run(by_plans(form, plans, dtype), arguments, dtype) for dtype in (torch.float64, form.dtype)
            )
        for a, b, c in zip(got, truth, plain, strict=True):
            slack = 2 * torch.finfo(form.dtype).eps * (1 + b.abs().max() if b.numel() else 0)
            allowed = slack + 2 * ((c.double() - b).abs().max() if b.numel() else 0)
            assert ((a.double() - b).abs() <= allowed).all(), variants.chosen
    expected = {i for i, site in enumerate(form.sites) if form.expects_rewrite(site)}
    assert expected <= variants.rewritten, [site.sentence for site in records.live_records()[0].sites]


@given(form=forms(clip=True))
@settings(parent=PROFILE)
def test_clips(form: Form, plans: dict[int, SparsePlan]) -> None:
    check(form, plans)


@given(form=forms(clip=False))
@settings(parent=PROFILE)
def test_packed_tokens(form: Form, plans: dict[int, SparsePlan]) -> None:
    check(form, plans)
