"""In which form do the heads err least, and how long are a choice and orders of splits good? One table.

    python benchmarks/orders.py [--noise .9,.87,.8,.5,.2 --densities .2 --rows 256 --size 16x128x128]
    python benchmarks/orders.py --model hunyuan --weights outputs/tiny_hunyuan/export

One clip of the scenes that the models learned is mixed with the same noise to each level, from noisy to clean
as in sampling. The model runs densely, and the inputs of its self attention are planned as a sparse call
would, at one density for all. A call's error: sampled rows of every head, the same ones for all columns,
against exact attention (`kernels/measuring/errors.py`). Printed are geometric means over the layers, without the
first, which is dense by default.

    cubes, splits, kmeans   all heads alike; with +: and with first-order terms
    chosen                  each head by the controller's rule (`head_variants.best`), tried at the first level on
                            other rows; chosen again: tried at the level before
    by head                 each head as errs least on the measured rows: what no choice of heads can beat
    splits of S             splits by the orders made at level S, over splits made anew

The rows are a sample: 256 a head give an error to about 10%, its ratios to less. The model runs on the CPU in
float32, about ten minutes with all levels.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor
from torch.overrides import TorchFunctionMode

from svg_ear_compile import tiny_wan
from svg_ear_compile.cli import size_argument
from svg_ear_compile.kernels import context, planning
from svg_ear_compile.kernels.constants import SiteConstants
from svg_ear_compile.kernels.measuring import errors as measure
from svg_ear_compile.runtime.density import TRIAL
from svg_ear_compile.runtime.head_variants import ORDERS, best, losses

sys.path.append(str(Path(__file__).parents[1] / "examples" / "tiny_wan"))
from kinds import KINDS, PATCH
from scenes import Scenes

SEED = 5  # of the clip and its noise, and of the rows that choose
OTHER_ROWS = 1000  # seeds further on: the rows that judge are others


@dataclass
class Inputs(TorchFunctionMode):
    """Keeps (query, key, value, mask) of every attention call with `tokens` queries and keys or more."""

    tokens: int
    found: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key, value = [*args, *(kwargs[n] for n in ("query", "key", "value")[len(args) :])][:3]
            if min(query.shape[2], key.shape[2]) >= self.tokens:
                mask = kwargs.get("attn_mask")
                self.found.append((query, key, value, None if mask is None else mask[:, :, :1]))
        return func(*args, **kwargs)


@torch.no_grad()
def inputs_at(
    noise: Sequence[float], model: str, weights: Path, size: tuple[int, int, int]
) -> Iterator[tuple[float, list[tuple[Tensor, Tensor, Tensor, Tensor | None]]]]:
    """(level, attention inputs of each layer) for each level of noise."""
    kind, generator = KINDS[model], torch.Generator().manual_seed(SEED)
    network = kind.load(weights)
    clip, ids = Scenes("cpu").batch(1, *size, generator)
    other = torch.randn(clip.shape, generator=generator)
    for level in noise:
        with Inputs(math.prod(_grid(size))) as inputs:
            kind.velocity(network, clip.lerp(other, level), torch.tensor([1000 * level]), ids)
        yield level, inputs.found


def _grid(size: tuple[int, int, int]) -> list[int]:
    return [size[0], size[1] // PATCH, size[2] // PATCH]


@dataclass
class Layer:
    """Attention inputs at one level, and exact answers for some of their rows."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    grid: list[int]
    text_first: bool

    def draw(self, rows: int, seed: int) -> tuple[Tensor, Tensor]:
        """(tokens [B,H,n], exact outputs [B,H,n,D] at them), n = rows, rounded up to whole draws."""
        draws, length = range(-(-rows // measure.ROWS)), self.query.shape[2]
        tokens = torch.cat([measure.sample(length, self.query, seed + i, measure.ROWS) for i in draws], -1)
        queries = measure.rows(self.query, tokens)
        return tokens, F.scaled_dot_product_attention(queries, self.key, self.value, attn_mask=self.mask)

    def sums(
        self, drawn: tuple[Tensor, Tensor], order: str, density: float,
        carried: dict[int, tuple[Tensor, Tensor]] | None = None, terms: bool = False,
    ) -> Tensor:  # fmt: skip
        """(lost, whole) [1 or, with first-order terms, 2,2,H] of a sparse call. carried: orders of splits to
        use; if empty, takes them."""
        num_text = self.query.shape[2] - math.prod(self.grid)
        c = SiteConstants(
            None, num_text, self.text_first, self.grid, order, "output_error", True, density, 0, 0
        )
        with context.active(context.RunContext(memo=context.Memo({} if carried is None else carried))):
            plan = planning.make_plan(self.query, self.key, self.value, self.mask, c)
        tokens, exact = drawn
        return measure.planned_errors(self.query, [plan], exact, tokens, c.scale_of(self.query), terms).sum(2)

    def choice(self) -> tuple[Tensor, Tensor]:
        """(order, form) of each head after a trial of a dense call (`density.py`)."""
        drawn = self.draw(measure.count(self.query, trial=True), SEED)
        of_orders = [
            torch.stack([self.sums(drawn, order, density, terms=True) for density in TRIAL])
            for order in ORDERS
        ]
        return best(losses(torch.stack(of_orders)[..., None, :].double()))


def error(sums: Tensor) -> float:
    """Of a whole call."""
    return float((sums[0].sum() / sums[1].sum()).sqrt())


def compare(
    noise: Sequence[float], model: str, weights: Path, size: tuple[int, int, int],
    densities: Sequence[float], rows: int,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One table row per level and density."""
    made: dict[tuple[float, int], dict[int, tuple[Tensor, Tensor]]] = {}  # orders, by level and layer
    choices: dict[int, list[tuple[Tensor, Tensor]]] = {}  # of each layer, level by level
    for level, inputs in inputs_at(noise, model, weights, size):
        found: dict[float, list[dict[str, float]]] = {density: [] for density in densities}
        for number, tensors in enumerate(inputs[1:], 1):
            layer = Layer(*tensors, _grid(size), text_first=model == "cogvideox")
            drawn = layer.draw(rows, SEED + OTHER_ROWS)
            choices.setdefault(number, []).append(layer.choice())
            orders = made.setdefault((level, number), {})
            for density in densities:
                cubes = layer.sums(drawn, "cubes", density, terms=True)
                splits = layer.sums(drawn, "splits", density, orders, terms=True)
                forms = torch.stack([cubes, splits])  # [orders,forms,2,H]
                heads = torch.arange(forms.shape[-1])
                first, before = choices[number][0], choices[number][max(len(choices[number]) - 2, 0)]
                least = forms[:, :, 0].flatten(0, 1).argmin(0)
                errors = {"cubes": error(cubes[0]), "splits": error(splits[0])}
                errors["kmeans"] = error(layer.sums(drawn, "kmeans", density)[0])
                errors |= {"cubes +": error(cubes[1]), "splits +": error(splits[1])}
                errors["chosen"] = error(forms[first[0], first[1], :, heads].mT)
                errors["chosen again"] = error(forms[before[0], before[1], :, heads].mT)
                errors["by head"] = error(forms.flatten(0, 1)[least, :, heads].mT)
                for old in noise[: noise.index(level)]:
                    again = layer.sums(drawn, "splits", density, dict(made[old, number]))
                    errors[f"splits of {old:g}"] = error(again[0]) / errors["splits"]
                found[density].append(errors)
        for density, layers in found.items():
            means = {name: statistics.geometric_mean(e[name] for e in layers) for name in layers[0]}
            yield {"model": model, "noise": level, "density": density, **means}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def numbers(text: str) -> list[float]:
        return [float(x) for x in text.split(",")]

    parser.add_argument("--model", choices=list(KINDS), default="wan")
    parser.add_argument("--weights", type=Path, help="export folder of train.py; default: the packaged Wan")
    parser.add_argument("--noise", type=numbers, default=[0.9, 0.87, 0.8, 0.5, 0.2])
    parser.add_argument("--densities", type=numbers, default=[0.2])
    parser.add_argument("--size", type=size_argument, default=(16, 128, 128), help="FxHxW in pixels")
    parser.add_argument("--rows", type=int, default=256, help="of each head")
    told = vars(parser.parse_args(argv))
    if told["weights"] is None:
        if told["model"] != "wan":
            parser.error("--weights: the folder of a trained model (examples/tiny_wan/train.py)")
        told["weights"] = Path(tiny_wan.__file__).parent
    digits = ("", "g", "g", *[".4f"] * 8, *[".3f"] * len(told["noise"]))
    print(tabulate(list(compare(**told)), headers="keys", floatfmt=digits))


if __name__ == "__main__":
    main()
