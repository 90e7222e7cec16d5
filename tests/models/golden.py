"""What the passes say of every model, kept in verdicts.txt; docs/MODELS.md is written from it.

    python tests/models/golden.py              writes both anew (four minutes)
    python tests/models/golden.py wan ltx      looks at these models only, the others' sections stay

min_tokens is 1, so what stays dense does so for what it is. A section per model and way of compiling, with
the number of graphs; a line per kind of site: path, self or joint or cross, REASON, text, grid | mask. Sites
that differ in nothing but numbers in their paths share a line. Videos are of 3 x 4 x 6 tokens, or LARGER.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from models.capture import Backend, Knobs, capture, described, fresh_dynamo
from models.tiny import BUILDERS, build
from models.tiny_others import BREAKS_WHEN_REGIONAL
from parallel import worlds

from svg_ear_compile.passes.fx_utils import without_numbers

FILE = Path(__file__).with_name("verdicts.txt")
SIZE = (3, 4, 6)
# Of models with a history before the video, one large enough that its coarse tokens form rows as well.
LARGER = {"helios": (3, 16, 24), "hunyuan_video_framepack": (3, 16, 24)}
NO_VIDEO = ("flux", "image_vae", "video_vae", "llama", "vit")
ULYSSES = "ulysses"
"""Block by block, on one of two ranks that share the sequence."""
SHARED = ("wan", "wan_i2v", "hunyuan_video", "ltx", "chronoedit", "minimax_h3")
"""These are tried. HunyuanVideo has no plan in diffusers; worlds.py has one."""


def lines(backend: Backend) -> list[str]:
    """The section of one model compiled in one way, its header line without the name first."""
    found: Counter[str] = Counter()
    for site in backend.sites:
        path, _, rest = described(site).partition(" ")
        found[f"{without_numbers(path)} {rest} | {site.mask}"] += 1
    matches = [captured.found for captured in backend.captured]
    others = Counter(
        f"{other.kind} in {without_numbers(other.module_path)}" for found in matches for other in found.others
    )
    others += Counter(found.outside.partition(" (")[0] for found in matches if found.outside)
    graphs = f"{len(backend.captured)} graph" + "s" * (len(backend.captured) > 1)
    rows = [f"{count} x {row.strip()}" for row, count in found.items()]
    left = [f"{count} x {name} | not rewritable" for name, count in others.items()]
    return [graphs, *rows, *left]


def ways(name: str) -> list[str]:
    regional = bool(getattr(build(name)[0], "_repeated_blocks", None)) and name not in BREAKS_WHEN_REGIONAL
    return ["whole"] + ["regional"] * regional + [ULYSSES] * (name in SHARED)


def verdicts(name: str, way: str) -> list[str]:
    if way == ULYSSES:
        return lines(on_two_ranks(name))
    model, arguments = build(name)
    return lines(capture(model, arguments(*LARGER.get(name, SIZE)), regional=way == "regional"))


def on_two_ranks(name: str) -> Backend:
    """What the passes say on the first rank. Its collectives are fakes."""
    backend = Backend(Knobs())
    with worlds.fake_world(2), fresh_dynamo():
        model, call = worlds.tiny(name, LARGER.get(name, SIZE))
        worlds.spread(model, ulysses_degree=2)
        model.compile_repeated_blocks(backend=backend)
        model(**call)
    return backend


def read() -> dict[tuple[str, str], list[str]]:
    """(model, way) -> its section."""
    sections: dict[tuple[str, str], list[str]] = {}
    for block in FILE.read_text().strip().split("\n\n"):
        head, *rest = block.split("\n")
        name, way, graphs = head.strip("[]").split(" ", 2)
        sections[name, way] = [graphs, *rest]
    return sections


def write(names: Collection[str]) -> None:
    """Looks at these models, or if there are none at all of them."""
    blocks, known = [], read()
    for name in (builder.__name__ for builder in BUILDERS):
        for way in ways(name):
            stays = names and name not in names and (name, way) in known
            graphs, *rows = known[name, way] if stays else verdicts(name, way)
            blocks.append("\n".join([f"[{name} {way} {graphs}]", *rows]))
            if not stays:
                print(blocks[-1], flush=True)
    FILE.write_text("\n\n".join(blocks) + "\n")


if __name__ == "__main__":
    from models.matrix import PAGE, page

    write(sys.argv[1:])
    PAGE.write_text(page())
