"""docs/MODELS.md, made from verdicts.txt: which attention of which model is rewritten."""

from __future__ import annotations

import re

from models.golden import NO_VIDEO, SHARED, ULYSSES, read
from models.tiny import BUILDERS, build
from torch_versions import PAGE, kept

from svg_ear_compile.passes.site import Reason

_HEAD = """# Models

Every video transformer class of the installed diffusers, compiled as a whole and by
`compile_repeated_blocks`, in tiny configurations. This page and `tests/models/verdicts.txt` are written by
`python tests/models/golden.py`; tests compare them with the code. Cross attention and attention over text,
sound or images stays dense everywhere and is not listed.

- whole, regional: how many calls of attention over video tokens are rewritten, of how many (and the number of
  graphs, if there is more than one). "-": the class names no repeated blocks, or they cannot be compiled alone.
- Ulysses: the same of blocks compiled one by one, on one of two GPUs that share the sequence
  (`model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))`). "plan": diffusers has a plan for the
  class; it was not tried here. HunyuanVideo has none, and was tried with the one of `tests/parallel/worlds.py`,
  passed as `cp_plan=`; other classes need one, too.
- text: where other tokens lie in the same sequence. They are always exact.
- mask: which part of the attention mask becomes the key padding of the ops.
- grid: how the frame grid is known (regional: always from the rotary tables, or the arguments of the model's call).

One frame is an image: such calls stay dense.

Each model with rewritten attention is also run at density 0.3, against the fp64 joint softmax of the plans
that the run used (`tests/models/test_plans.py`), with `inner="eager"`: `make test` runs two of them,
`make test-all` all, and one of them through Inductor. All through Inductor, whole and regional:

    SVG_EAR_TEST_ALL_INDUCTOR=1 pytest tests/models/test_plans.py -k through_inductor
"""

_WHY = """
Why these are left as they are:

- Latte attends within single frames, and along time at a single place: these sequences are short.
- Kandinsky 6 SR was trained with a block mask of its own (NABLA), by which flex_attention skips already. To skip more
  would be another model.
- SkyReels-V2 with diffusion forcing and AnyFlow FAR attend causally over blocks of frames. The kernels keep or skip
  whole blocks of keys; one that straddles two blocks of frames would need a mask for each token.
- Cosmos 3 attends from the generated tokens alone to these and to text, with fewer heads of keys than of queries: not
  the self attention that the ops compute. Its text attends causally.
- Mochi picks its text by `nonzero`. With `torch._dynamo.config.capture_dynamic_output_shape_ops = True` it is one
  graph, but no length in it is known when it is compiled.
- WanAnimate 2 reads its frame grid from the device inside of each attention: a graph break between the projections and
  the attention call.
"""


def page() -> str:
    sections = read()
    rows, notes = [], []
    for builder in BUILDERS:
        name = builder.__name__
        if name in NO_VIDEO:
            continue
        whole, regional = sections[name, "whole"], sections.get((name, "regional"))
        kind = type(build(name)[0])
        plan = "plan" if getattr(kind, "_cp_plan", None) else ""
        ulysses = _count(sections[name, ULYSSES]) if name in SHARED else plan
        text, mask, grid, reasons = _facts(whole if _video(whole) else regional or whole)
        rows.append([f"{kind.__name__} ({name})", _count(whole), _count(regional), ulysses, text, mask, grid])
        notes += [f"- {name}: {reason}" for reason in reasons]
        if _graphs(whole) > 1:
            notes.append(f"- {name}: compiled as a whole it breaks into {_graphs(whole)} graphs")
    head = ["class (test)", "whole", "regional", "Ulysses", "text", "mask", "grid"]
    lines = [head, ["---"] * len(head), *rows]
    table = "\n".join("| " + " | ".join(row) + " |" for row in lines)
    reasons = "\n".join(dict.fromkeys(notes))
    return f"{_HEAD}\n{table}\n\nWhat stays dense, and why:\n\n{reasons}\n{_WHY}{kept(PAGE.read_text())}"


def _graphs(section: list[str]) -> int:
    return int(section[0].split()[0])


def _video(section: list[str]) -> list[str]:
    """Lines over video tokens: neither cross attention nor text."""
    return [
        line for line in section[1:] if not re.search(r" (CROSS|TEXT|NOT_VIDEO|NO_SIGN_OF_VIDEO)\b", line)
    ]


def _count(section: list[str] | None) -> str:
    if section is None:
        return "-"
    lines = [line for line in _video(section) if "outside of the graphs" not in line]
    counts = [(int(line.split(" x ")[0]), " REWRITTEN" in line) for line in lines]
    graphs = f" ({section[0]})" if _graphs(section) > 1 else ""
    return f"{sum(n for n, yes in counts if yes)} of {sum(n for n, _ in counts)}{graphs}"


def _facts(section: list[str]) -> tuple[str, str, str, list[str]]:
    """(text, mask, grid, why what stays dense does)."""
    lines = _video(section)
    text = next((m[1] for line in lines if (m := re.search(r"text=\d+ (first|last)", line))), "")
    packed = any(" packed " in line for line in lines)
    left = [line for line in lines if line.endswith("not rewritable")]
    masks = {re.sub(r" ?\[.*?\].*", "", line.partition(" | ")[2]) for line in lines if line not in left} - {
        "none"
    }
    grid = "shapes" if any(re.search(r"\d+x\d+x\d+ \|", line) for line in lines) else "rotary tables"
    reasons = []
    for line in lines:
        known = next((r for r in Reason if re.search(rf" {r.name}\b", line)), None)
        where = line.split(" x ", 1)[1].split(" ")[0]
        if known is None:
            reasons.append(line.split(" x ", 1)[1].partition(" | ")[0] + " is not rewritten")
        elif known is not Reason.REWRITTEN:
            reasons.append(f"`{where}` {known.sentence}")
    if packed:
        text, grid = "anywhere", "arguments"
    if not any(" REWRITTEN" in line for line in lines):
        grid = ""
    return text, ", ".join(sorted(m for m in masks if m)), grid, reasons
