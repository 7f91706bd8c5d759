"""`report.html`: one page that needs no other file, for everything that a run found.

Images and videos are inside it, up to a size that a browser opens gladly; videos beyond that are links to the files beside it.
"""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.reenactment.published import TABLES
from eval.reenactment.report import (
    MAIN,
    MORE,
    PUBLISHED_WARNING,
    cell,
    columns,
    faces_lines,
    network_line,
    number,
    published_rows,
    refusals,
    speed_lines,
)
from eval.reenactment.scores import Metric

VIDEO_BYTES = 24 * 2**20  # embedded in all
STYLE = """
:root{color-scheme:light dark;--ink:#1d2430;--soft:#69717d;--line:#dfe3e8;--paper:#fff;--wash:#f5f7f9;--accent:#2f6f9f;
--warn:#fff6df}
@media (prefers-color-scheme:dark){:root{--ink:#e3e7ec;--soft:#98a1ad;--line:#333b45;--paper:#14181d;--wash:#1c2127;
--accent:#7db8e0;--warn:#3a3220}}
*{box-sizing:border-box}body{font:15px/1.55 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1180px;
margin:0 auto;padding:2.5rem 1.25rem 4rem;overflow-wrap:anywhere}
h1{font-size:1.9rem;margin:0}h2{font-size:1.2rem;margin:2.6rem 0 .7rem}
h3{font-size:1rem;margin:1.4rem 0 .4rem}p,li{max-width:78ch}.soft{color:var(--soft)}.scroll{overflow-x:auto}
sup{line-height:0}table{border-collapse:collapse;font-variant-numeric:tabular-nums}th,td{padding:.4rem .8rem;text-align:right;
border-bottom:1px solid var(--line);white-space:nowrap;vertical-align:top}th{font-weight:500;color:var(--soft)}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--paper)}tr.ours td{background:var(--wash)}
td small,th small{display:block;color:var(--soft)}td b{color:var(--accent)}
.mode{text-align:center;border-left:1px solid var(--line)}
img,video{max-width:100%;background:#fff;border:1px solid var(--line);border-radius:6px}figure{margin:0 0 1rem}
figcaption{color:var(--soft);font-size:.87rem}.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(330px,100%),1fr));gap:1rem}
.charts svg{width:100%;height:auto}.published{border:1px solid var(--line);border-left:5px solid #d9a62e;background:var(--warn);
border-radius:6px;padding:.4rem 1.2rem 1.2rem;margin-top:3rem}.published td:first-child,.published th:first-child{background:none}
dt{color:var(--soft);margin-top:.5rem}dd{margin:0;max-width:90ch}details{margin:.6rem 0}summary{cursor:pointer;color:var(--accent)}
.videos{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(480px,100%),1fr));gap:1rem}code{font-size:.92em}
"""
COLORS = {"truth": "#8a929c", "ours": "#2f8fd0"}


def page(results: Mapping[str, Any], folder: Path, videos: Sequence[Path]) -> str:
    """The page as text; `folder` holds `grid.png`, `videos` are the files of all pairs, in their order."""
    name, dataset = (html.escape(Path(str(results["run"][key])).name) for key in ("model_name", "dataset_name"))
    counts = ", ".join(f"{count} {mode} pairs" for mode, count in results["num_pairs"].items())
    size = " × ".join(map(str, results["image"]))
    parts = [
        f"<h1>Reenactment bench</h1><p class='soft'>Model {name} on {dataset}: {len(results['subjects'])} subjects, {counts}, "
        f"images of {size} pixels. Small figures are 95 % intervals over subjects.</p>",
        _measured(results),
        "<h2>Intervals</h2>" + _charts(results),
        f"<h2>Images</h2><figure><img alt='grid of sources, drivers and methods' src='{_data(folder / 'grid.png')}'>"
        "<figcaption>The frame in the middle of every clip.</figcaption></figure>",
        "<h2>Videos</h2>" + _videos(videos, folder),
        "<h2>Rows</h2>" + _list((name, row["about"]) for name, row in results["methods"].items()),
        "<h2>Protocol</h2>" + _list(results["protocol"].items()),
        "<h2>Faces that no detector found</h2>" + _lines(line.removeprefix("- ") for line in faces_lines(results)),
        "<h2>Networks</h2>" + _list((name, network_line(found)) for name, found in results["networks"].items()),
        "<h2>Speed</h2>" + _list(speed_lines(results["speed"])),
        "<h2>Versions</h2><p>" + html.escape(", ".join(f"{k} {v}" for k, v in results["versions"].items())) + "</p>",
        "<h2>Subjects</h2>" + _subjects(results),
        _published(),
    ]
    return (
        "<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        f"<title>Reenactment bench: {name}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _measured(results: Mapping[str, Any]) -> str:
    reasons: dict[str, int] = {}
    parts = ["<h2>Measured</h2>", _table(results, MAIN, reasons)]
    parts += ["<details><summary>Further metrics</summary>", _table(results, MORE, reasons), "</details>"]
    if reasons:
        notes = "".join(f"<li value='{mark}'>{html.escape(reason)}</li>" for reason, mark in reasons.items())
        parts += [f"<ol class='soft'>{notes}</ol>"]
    for name, mode, problems in refusals(results):
        parts += [
            f"<details open><summary>{html.escape(name)}, {mode}: refused, {len(problems)} problems</summary>",
            "<p>A mean over the other frames would not be comparable.</p>" + _lines(problems) + "</details>",
        ]
    return "".join(parts)


def _table(results: Mapping[str, Any], which: Mapping[str, Sequence[str]], reasons: dict[str, int]) -> str:
    shown = columns(results, which)
    modes = [(mode, sum(own == mode for own, _ in shown)) for mode in dict.fromkeys(mode for mode, _ in shown)]
    head = "".join(f"<th class='mode' colspan='{count}'>{mode}-reenactment</th>" for mode, count in modes)
    names = "".join(f"<th>{metric.title} {metric.arrow}<small>{metric.unit}</small></th>" for _, metric in shown)
    rows = []
    for name in results["methods"]:
        cells = []
        for mode, metric in shown:
            found = cell(results, name, mode, metric)
            text = f"<b>{found.text}</b>" if found.best else found.text
            if found.reason:
                text += f"<sup>{reasons.setdefault(found.reason, len(reasons) + 1)}</sup>"
            cells.append(f"<td>{text}<small>{found.interval}</small></td>")
        ours = " class='ours'" if name == "ours" else ""
        rows.append(f"<tr{ours}><td>{html.escape(name)}</td>{''.join(cells)}</tr>")
    return (
        f"<div class='scroll'><table><thead><tr><th></th>{head}</tr><tr><th>method</th>{names}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _charts(results: Mapping[str, Any]) -> str:
    """For every metric that has numbers: each method's value as a dot and its interval as a line."""
    every = {mode: (*MAIN[mode], *MORE[mode]) for mode in MAIN}
    drawn = []
    for mode, metric in columns(results, every):
        found = {}
        for name, row in results["methods"].items():
            entry = row[mode].get("metrics", {}).get(metric.key, {})
            if entry.get("low") is not None and entry["value"] != "inf":
                found[name] = (entry["value"], entry["low"], entry["high"])
        if found:
            drawn.append(f"<figure>{_chart(found, metric)}<figcaption>{mode}: {_title(metric)}</figcaption></figure>")
    return (
        f"<div class='charts'>{''.join(drawn)}</div>"
        if drawn
        else "<p class='soft'>None: intervals need two subjects.</p>"
    )


def _chart(found: Mapping[str, tuple[float, float, float]], metric: Metric) -> str:
    low, high = min(min(v) for v in found.values()), max(max(v) for v in found.values())
    span, left, right, step = (high - low) or 1.0, 104, 300, 22

    def x(value: float) -> float:
        return round(left + (value - low) / span * (right - left), 1)

    parts = []
    for index, (name, (value, below, above)) in enumerate(found.items()):
        y, color = 14 + step * index, COLORS.get(name, "#d08a3c")
        parts.append(
            f"<text x='96' y='{y + 4}' text-anchor='end' fill='currentColor' font-size='11'>{html.escape(name[:16])}</text>"
            f"<line x1='{x(below)}' x2='{x(above)}' y1='{y}' y2='{y}' stroke='{color}' stroke-width='3' opacity='.55'/>"
            f"<circle cx='{x(value)}' cy='{y}' r='4' fill='{color}'/>"
            f"<text x='310' y='{y + 4}' fill='currentColor' font-size='11'>{number(value, metric.digits)}</text>"
        )
    return f"<svg viewBox='0 0 360 {step * len(found) + 8}' role='img'>{''.join(parts)}</svg>"


def _videos(videos: Sequence[Path], folder: Path) -> str:
    shown, left = [], VIDEO_BYTES
    for path in videos:
        name = html.escape(f"{path.parent.name}: {path.stem.replace('__', ' ← ')}")
        left -= path.stat().st_size
        if left < 0:
            link = html.escape(str(path.relative_to(folder)))
            shown.append(f"<p><a href='{link}'>{name}</a></p>")
        elif path.suffix == ".gif":
            shown.append(f"<figure><img alt='{name}' src='{_data(path)}'><figcaption>{name}</figcaption></figure>")
        else:
            video = f"<video autoplay controls loop muted playsinline src='{_data(path)}'></video>"
            shown.append(f"<figure>{video}<figcaption>{name}</figcaption></figure>")
    return f"<div class='videos'>{''.join(shown)}</div>"


def _subjects(results: Mapping[str, Any]) -> str:
    """Means of every pair, folded away."""
    parts = []
    for mode in results["modes"]:
        for name, row in results["methods"].items():
            pairs = row[mode].get("pairs", {})
            keys = [metric for m, metric in columns(results, {mode: (*MAIN[mode], *MORE[mode])}) if m == mode]
            keys = [metric for metric in keys if any(metric.key in pair["mean"] for pair in pairs.values())]
            if not keys:
                continue
            head = "".join(f"<th>{html.escape(_title(metric))}</th>" for metric in keys)
            body = "".join(
                f"<tr><td>{html.escape(pair.replace('__', ' ← '))}</td>"
                + "".join(f"<td>{_mean(found['mean'].get(metric.key), metric)}</td>" for metric in keys)
                + "</tr>"
                for pair, found in pairs.items()
            )
            parts.append(
                f"<details><summary>{html.escape(name)}, {mode}</summary><div class='scroll'><table><tr><th>source ← driver</th>"
                f"{head}</tr>{body}</table></div></details>"
            )
    return "".join(parts) or "<p class='soft'>No metric of single frames could be computed.</p>"


def _published() -> str:
    parts = [f"<section class='published'><h2>Published numbers, not measured here</h2><p>{PUBLISHED_WARNING}</p>"]
    for table in TABLES:
        head, *rows = published_rows(table)
        heading = "".join(f"<th>{html.escape(text)}</th>" for text in head)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in rows)
        parts.append(
            f"<h3>{html.escape(table.title)}</h3><div class='scroll'><table><tr>{heading}</tr>{body}</table></div>"
        )
    return "".join(parts) + "</section>"


def _title(metric: Metric) -> str:
    return f"{metric.title} {metric.arrow}" + (f" ({metric.unit})" if metric.unit else "")


def _mean(value: Any, metric: Metric) -> str:
    return "no face" if value is None else number(value, metric.digits)


def _list(items) -> str:
    return "<dl>" + "".join(f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd>" for k, v in items) + "</dl>"


def _lines(lines) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def _data(path: Path) -> str:
    kind = {".png": "image/png", ".gif": "image/gif", ".mp4": "video/mp4"}[path.suffix]
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
