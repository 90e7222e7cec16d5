"""How does the report look as a web page? One file that asks nothing of the network: styles and pictures are in it.

Whatever a model, a script or an error may have named is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from .charts import bars, density_map, error_map

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --paper: #fff; --box: #f6f8fa;
  --low: #ddf4ff; --high: #0550ae; --over: #ffb77c; --far: #bc4c00; --dense: #c8cdd3; --good: #1a7f37; --bad: #cf222e }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --paper: #0d1117;
  --box: #151b23; --low: #10233f; --high: #79c0ff; --over: #9a5b1f; --far: #ffb77c; --dense: #3d444d; --good: #3fb950;
  --bad: #f85149 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.2rem; max-width: 70rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.4rem; margin: 0 } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem }
h3 { font-size: .9rem; margin: .8rem 0 .3rem }
p, li { color: var(--soft); margin: .2rem 0; overflow-wrap: anywhere } ul { padding-left: 1.2rem }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .7rem; margin: 1rem 0 }
.tile { background: var(--box); border: 1px solid var(--line); border-radius: 8px; padding: .7rem .8rem }
.tile b { display: block; font-size: 1.35rem } .tile span { color: var(--soft); font-size: .82rem }
.warning { color: var(--ink); background: var(--box); border-left: 4px solid var(--bad) }
.warning { padding: .5rem .8rem; margin: .4rem 0; overflow-wrap: anywhere }
.warning.mild { border-color: var(--over) } .warning span { display: block; color: var(--soft) }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .82rem; width: 100% }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top }
th { color: var(--soft); font-weight: 600 } td { white-space: nowrap }
td.sparse { color: var(--good); font-weight: 600 }
td.long { white-space: normal; overflow-wrap: anywhere; min-width: 14rem }
details { margin: .4rem 0 } summary { cursor: pointer; color: var(--soft) }
.maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 0 1.5rem }
svg { display: block; max-width: 100%; height: auto } svg text { font: 10px system-ui, sans-serif; fill: var(--soft) }
.dense { fill: var(--dense) } .bar { fill: var(--high) }
"""
STYLE += "".join(
    f".in{i} {{ fill: color-mix(in oklab, var(--high) {14 * i + 2}%, var(--low)) }}\n" for i in range(8)
)
STYLE += "".join(
    f".over{i} {{ fill: color-mix(in oklab, var(--far) {33 * i}%, var(--over)) }}\n" for i in range(4)
)


def page(
    data: Mapping[str, Any], head: Sequence[str], rows: Sequence[Sequence[Any]], lines: Sequence[str]
) -> str:
    """data: what the JSON report holds. head, rows: the table of attention sites. lines: what the text report says."""
    graphs = data["graphs"]
    errors = [{**error, "graph": graph["graph"]} for graph in graphs for error in graph["errors"]]
    parts = [
        f"<h1>svg-ear report</h1><p>{_text(data['written'])}</p>",
        _tiles(data),
        *_warnings(data),
        "<h2>What was rewritten, and why not the rest</h2>",
        _table([h.replace("\n", " ") for h in head], rows),
        _list(lines),
        *_maps(errors, graphs),
        *_time(data["time"]),
        "<h2>Settings</h2>",
        *_settings(graphs),
        "<h2>Where it ran</h2>",
        _pairs({**data["hardware"], **data["versions"]}),
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>svg-ear report</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _text(value: Any) -> str:
    return escape(str(value))


def _tiles(data: Mapping[str, Any]) -> str:
    """The figures that one looks for first."""
    t, time = data["totals"], data["time"]
    found = [
        (
            f"{t['rewritten']} of {t['sites']}",
            f"attention sites rewritten, with {t['coverage']:.1%} of the FLOPs",
        )
    ]
    if t["flops_of_calls"]:
        computed = t["flops_computed"] / t["flops_of_calls"]
        saved = t["flops_of_calls"] - t["flops_computed"]
        found.append(
            (f"{computed:.1%}", f"of these sites' FLOPs were computed; {saved / 1e12:.3g} TFLOP saved")
        )
    if t["measured_density"] is not None:
        found.append(
            (
                f"{t['measured_density']:.3f}",
                f"density of sparse calls; {t['mean_density']:.3f} over all calls",
            )
        )
    if t["measured_error"] is not None:
        found.append((f"{t['measured_error']:.3g}", f"median measured error; largest {t['worst_error']:.3g}"))
    if time["sparse_step_seconds"] is not None:
        label, dense = "seconds for a sparse step", time["dense_step_seconds"]
        label += (
            ""
            if dense is None
            else f"; {dense:.3g} for a dense one ({dense / time['sparse_step_seconds']:.2f}x)"
        )
        found.append((f"{time['sparse_step_seconds']:.3g}", label))
    for name, peak in data["peak_memory_gib"].items():
        found.append((f"{peak:.3g} GiB", f"peak memory, {name}"))
    tiles = (
        f'<div class="tile"><b>{_text(value)}</b><span>{_text(label)}</span></div>' for value, label in found
    )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _warnings(data: Mapping[str, Any]) -> Iterable[str]:
    """Failures first, then what stays dense although it might not."""
    graphs = data["graphs"]
    found = {
        (True, f"A graph was left as it was: {g['failure']}", "please report this")
        for g in graphs
        if g["failure"]
    }
    found |= {
        (True, f"{count} dense calls after a failure: {reason}", "please report this")
        for reason, count in data["totals"]["fallbacks"].items()
    }
    found |= {(False, f"Left as it is: {name}", "") for g in graphs for name in g["other_attention"]}
    found |= {(False, f"Graph break: {name}", "") for g in graphs for name in g["graph_breaks"]}
    sites = [site for graph in graphs for site in graph["sites"] if site["hint"]]
    found |= {(False, site["sentence"].split(" (")[0], site["hint"]) for site in sites}
    for severe, text, hint in sorted(found, reverse=True):
        mild = "" if severe else " mild"
        yield (
            f'<div class="warning{mild}">{_text(text)}'
            + (f"<span>{_text(hint)}</span>" if hint else "")
            + "</div>"
        )


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        kind = "sparse" if value == "sparse" else "long" if len(str(value)) > 30 else ""
        return f'<td class="{kind}">{_text(value)}</td>' if kind else f"<td>{_text(value)}</td>"

    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    top = "".join(f"<th>{_text(name)}</th>" for name in head)
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def _list(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{_text(line)}</li>' for line in lines)}</ul>"


def _pairs(pairs: Mapping[str, Any]) -> str:
    return _table(("", ""), pairs.items())


def _maps(errors: Sequence[Mapping[str, Any]], graphs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """Step x layer, a pair of maps for each model and guidance branch of the last generation."""
    if not errors:
        return
    targets = {g["settings"]["target_error"] for g in graphs} - {None}
    largest = max((e["error"] for e in errors if e["error"] is not None), default=0.0)
    limit = min(targets) if targets else largest / 2
    yield "<h2>Step by step, layer by layer</h2>"
    yield "<p>Each square is one attention layer (down) in one step (across) of the last generation.</p>"
    models = {key: number for number, key in enumerate(sorted({e["model"] for e in errors}))}
    for model, branch in sorted({(e["model"], e["branch"]) for e in errors}):
        chosen = [e for e in errors if (e["model"], e["branch"]) == (model, branch)]
        yield f'<h3>Model {models[model] + 1}, guidance branch {branch + 1}</h3><div class="maps">'
        yield f"<div>{density_map(chosen)}</div><div>{error_map(chosen, limit, bool(targets))}</div></div>"


def _time(time: Mapping[str, Any]) -> Iterable[str]:
    yield "<h2>Where the time went</h2>"
    passes, inner = time["passes_seconds"], time["compiling_seconds"]
    yield f"<p>Compiling: {passes:.2f} s in our passes, {inner:.1f} s in Inductor.</p>"
    if time["steps"]:
        yield "<p>Seconds per step, from the second on, as the host saw them. Grey: dense, often with trials.</p>"
        yield bars([(step["step"] + 1, step["seconds"], step["sparse"] > 0.5) for step in time["steps"]])


def _settings(graphs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """Of each set of settings: what was given, and the rest folded away."""
    shown = []
    for graph in graphs:
        settings, sources = graph["settings"], graph["sources"]
        if settings not in shown:
            shown.append(settings)
            rows = [(name, value, sources.get(name, "default")) for name, value in settings.items()]
            head = ("setting", "value", "from")
            given = [row for row in rows if row[2] != "default"]
            yield _table(head, given) if given else "<p>All settings have their defaults.</p>"
            rest = _table(head, [row for row in rows if row[2] == "default"])
            yield f"<details><summary>The settings that were not given</summary>{rest}</details>"
