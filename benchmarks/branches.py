"""Should the two calls of guidance have densities of their own? Trained tiny models, one table.

    python benchmarks/branches.py [--density .2 --shares 1.5,1.25,1,.75 --clips 4]
    python benchmarks/branches.py --model hunyuan --weights outputs/tiny_hunyuan/export

v = u + g (c - u) weighs errors of the call with the caption g times and those of the other g - 1 times: at
equal errors the first deserves more. Clips as in `quality.py`; a share s gives the call with the caption s
times the density, and the other 2 - s times. There is no such setting: here densities are changed on their
way to the ops.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from quality import DENSE_STEPS
from tabulate import tabulate
from tiny_clips import Clips, add_arguments, clips_of

from svg_ear_compile import quality, report
from svg_ear_compile.calls import SparseCallable
from svg_ear_compile.kernels.context import Call


@contextmanager
def shared_out(share: float) -> Iterator[None]:
    """Inside, branch 0 (the caption's call comes first) has share times its density, branch 1 the rest."""
    lay_out = SparseCallable._lay_out

    def other(self: SparseCallable, call: Call, visit: Any) -> None:
        lay_out(self, call, visit)
        density = call.density.get(visit.site)
        if density is not None:
            call.density[visit.site] = density * (2 - share if visit.tick.branch else share)

    with mock.patch.object(SparseCallable, "_lay_out", other):
        yield


def measure(clips: Clips, density: float, shares: Sequence[float]) -> Iterator[dict[str, Any]]:
    """A row as soon as it is known."""
    dense = list(clips.sampled("dense", None))
    for share in shares:
        with shared_out(share):
            found = [
                (quality.psnr(reference, clip), quality.ssim(reference, clip))
                for reference, clip in zip(
                    dense,
                    clips.sampled(f"share {share:g}", {"dense_steps": DENSE_STEPS, "density": density}),
                    strict=True,
                )
            ]
        psnr, ssim = zip(*found, strict=True)
        yield {
            "model": clips.model, "caption": density * share, "empty caption": density * (2 - share),
            "density": report().totals()["measured_density"], "PSNR dB": statistics.mean(psnr),
            "worst": min(psnr), "SSIM": statistics.mean(ssim),
        }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--density", type=float, default=0.2)
    numbers = {"type": lambda text: tuple(map(float, text.split(",")))}
    parser.add_argument("--shares", default=(1.5, 1.25, 1.0, 0.75), **numbers)
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    rows = list(measure(clips_of(arguments), arguments.density, arguments.shares))
    print(tabulate(rows, headers="keys", floatfmt=("", ".3f", ".3f", ".3f", ".2f", ".2f", ".4f")))


if __name__ == "__main__":
    main()
