"""The results in words: which cells a table has, what stands in them, and `results.md` with the layout of the paper's Table S1.

Measured numbers come first; published ones follow in a block of their own that says what they are. `results` is the content of
`results.json`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.reenactment.published import TABLES, PublishedTable
from eval.reenactment.scores import METRIC, Metric

# Table S1: self LPIPS, FID, AKD, APD; cross FID, CLIP, AKD, APD. PSNR and SSIM are added in front.
MAIN = {"self": ("psnr", "ssim", "lpips", "fid", "akd", "apd"), "cross": ("fid", "clip", "akd", "apd")}
MORE = {"self": ("clip", "csim", "apd_geodesic", "aed"), "cross": ("csim", "apd_geodesic", "aed")}
PUBLISHED_WARNING = (
    "Published numbers, not measured here: other data, other code, unpublished definitions of AKD, APD, CLIP and FID. "
    "They must not be compared digit by digit with the measured ones."
)


@dataclass(frozen=True)
class Cell:
    """What stands in one place of a table."""

    text: str
    interval: str = ""  # "[low, high]"
    reason: str = ""  # why there is no number
    best: bool = False


def columns(results: Mapping[str, Any], which: Mapping[str, Sequence[str]] = MAIN) -> list[tuple[str, Metric]]:
    """(mode, metric) of the columns, for the modes that were run."""
    return [(mode, METRIC[key]) for mode in which if mode in results["modes"] for key in which[mode]]


def cell(results: Mapping[str, Any], name: str, mode: str, metric: Metric) -> Cell:
    """The number of a method, or why there is none."""
    row = results["methods"][name][mode]
    if "absent" in row:
        return Cell("—", reason=_summary(row["absent"]))
    entry = row["metrics"][metric.key]
    if "na" in entry:
        return Cell("n/a", reason=entry["na"])
    interval = ""
    if entry["low"] is not None:
        interval = f"[{number(entry['low'], metric.digits)}, {number(entry['high'], metric.digits)}]"
    return Cell(number(entry["value"], metric.digits), interval, best=name == _best(results, mode, metric))


def number(value: float | str, digits: int) -> str:
    """A value of the results, where infinity is the word "inf"."""
    return "∞" if value in ("inf", math.inf) else f"{value:.{digits}f}"


def heading(mode: str, metric: Metric) -> str:
    unit = f" ({metric.unit})" if metric.unit else ""
    return f"{mode} {metric.title}{unit} {metric.arrow}"


def measured_block(results: Mapping[str, Any]) -> str:
    """The table, its footnotes and what was refused, in Markdown: what is printed at the end of a run."""
    footnotes: dict[str, str] = {}
    table = _methods_table(results, columns(results), footnotes, with_intervals=False)
    pairs = ", ".join(f"{mode} {count} pairs" for mode, count in results["num_pairs"].items())
    lines = [f"{pairs}; images of {' x '.join(map(str, results['image']))} pixels", "", *table, ""]
    lines += [f"({mark}) {reason}" for reason, mark in footnotes.items()]
    refused = list(refusals(results))
    if refused:
        lines += ["", "Rows that were refused, because a mean over the rest would be of other frames:", ""]
        lines += [f"- {name}, {mode}: {line}" for name, mode, lines_ in refused for line in lines_]
    return "\n".join(lines).rstrip() + "\n"


def markdown(results: Mapping[str, Any]) -> str:
    """`results.md`."""
    footnotes: dict[str, str] = {}
    every = {mode: (*MAIN[mode], *MORE[mode]) for mode in MAIN}
    parts = ["# Reenactment bench", "## Measured", measured_block(results).rstrip()]
    parts += ["### With 95 % intervals over subjects"]
    for mode in results["modes"]:
        own = columns(results, {mode: every[mode]})
        parts += ["\n".join(_methods_table(results, own, footnotes, with_intervals=True))]
    parts += ["\n".join(f"({mark}) {reason}" for reason, mark in footnotes.items())]
    parts += ["### Faces that no detector found", "\n".join(faces_lines(results))]
    parts += ["### Rows", "\n".join(f"- {name}: {row['about']}" for name, row in results["methods"].items())]
    parts += ["## Protocol", "\n".join(f"- {key}: {text}" for key, text in results["protocol"].items())]
    networks = [f"- {name}: {network_line(found)}" for name, found in results["networks"].items()]
    parts += ["## Networks", "\n".join(networks)]
    parts += ["## Speed", "\n".join(f"- {key}: {text}" for key, text in speed_lines(results["speed"]))]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts += ["## Versions", versions]
    parts += ["## Published numbers (not measured here)", f"> {PUBLISHED_WARNING}"]
    for table in TABLES:
        parts += [f"### {table.title}", "\n".join(_aligned(published_rows(table)))]
    return "\n\n".join(part for part in parts if part) + "\n"


def refusals(results: Mapping[str, Any]) -> Iterable[tuple[str, str, list[str]]]:
    """(method, mode, problems) of compared folders that are not as they must be."""
    for name, row in results["methods"].items():
        for mode in results["modes"]:
            if row["compared"] and "absent" in row[mode]:
                yield name, mode, row[mode]["absent"]


def faces_lines(results: Mapping[str, Any]) -> list[str]:
    """How many faces were not found, of each method."""
    lines = []
    for name, row in results["methods"].items():
        for mode in results["modes"]:
            lost = row[mode].get("faces_not_found")
            if lost:
                share = 100 * lost["frames"] / lost["of"]
                lines.append(
                    f"- {name}, {mode}: {lost['frames']} of {lost['of']} frames ({share:.1f} %), "
                    f"{lost['driver']} of the driver's"
                )
    return lines or ["No detector was there, see networks."]


def network_line(found: Mapping[str, Any]) -> str:
    """A network of `results["networks"]` in one line."""
    if "missing" in found:
        return f"missing ({found['missing']}); {found['remedy']}"
    return ", ".join(f"{key} {value}" for key, value in found.items() if value is not None)


def speed_lines(speed: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The speed page as (what, figure)."""
    machine = speed["machine"]
    cores = f", {machine['cores']} cores" if machine["cores"] else ""
    lines = [
        ("machine", f"{machine['gpu'] or machine['cpu']}{cores}, {machine['torch_threads']} thread(s) of torch"),
        (
            "an avatar",
            f"{speed['seconds_per_avatar']:.2f} s (made {speed['batch']} at a time, mean of {speed['avatars']})",
        ),
        (
            "tokens",
            f"{speed['tokens_per_second']:.0f} a second, {speed['tokens_per_avatar']:.0f} an avatar, other candidates not counted",
        ),
        (
            "moving and drawing",
            f"{speed['frames_per_second']:.1f} frames a second of {speed['image'][0]} x {speed['image'][1]} pixels, "
            f"{speed['points_of_drawn_avatar']:,} points, one frame at a time, without files",
        ),
        ("peak memory", f"{speed['peak_memory_gib']:.2f} GiB"),
    ]
    if speed["peak_gpu_memory_gib"] is not None:
        lines.append(("peak GPU memory", f"{speed['peak_gpu_memory_gib']:.2f} GiB"))
    return lines


def published_rows(table: PublishedTable) -> list[list[str]]:
    """Heading and rows of a published table."""
    rows = [["method (published)", *table.columns]]
    for name, values in table.rows.items():
        rows.append([name, *("" if value is None else f"{value:.2f}" for value in values)])
    return rows


def _best(results: Mapping[str, Any], mode: str, metric: Metric) -> str | None:
    """The best method besides the truth; None where there is nothing to be better than."""
    found = {}
    for name, row in results["methods"].items():
        entry = row[mode].get("metrics", {}).get(metric.key, {})
        if name != "truth" and "value" in entry:
            found[name] = float(entry["value"])
    if len(found) < 2:
        return None
    return (max if metric.higher_is_better else min)(found, key=found.__getitem__)


def _methods_table(
    results: Mapping[str, Any], shown: Sequence[tuple[str, Metric]], footnotes: dict[str, str], with_intervals: bool
) -> list[str]:
    """Lines of Markdown; `footnotes` (reason -> mark) gains the reasons that are new."""
    rows = [["method", *(heading(mode, metric) for mode, metric in shown)]]
    for name in results["methods"]:
        row = [name]
        for mode, metric in shown:
            found = cell(results, name, mode, metric)
            text = f"**{found.text}**" if found.best else found.text
            if found.reason:
                text += f" ({footnotes.setdefault(found.reason, _mark(len(footnotes)))})"
            row.append(f"{text} {found.interval}".rstrip() if with_intervals else text)
        rows.append(row)
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table that also reads well as plain text."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(row, widths)) + " |" for row in rows]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def _mark(index: int) -> str:
    return "abcdefghijklmnopqrstuvwxyz"[index] if index < 26 else str(index)


def _summary(reasons: Sequence[str]) -> str:
    return reasons[0] if len(reasons) == 1 else f"refused, {len(reasons)} problems, the first: {reasons[0]}"
