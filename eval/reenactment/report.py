"""The results (the content of `results.json`) as text: the cells of the tables, and `results.md`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.reenactment.published import TABLES, PublishedTable
from eval.reenactment.scores import METRICS, Metric

# Table S1: self LPIPS, FID, AKD, APD; cross FID, CLIP, AKD, APD. PSNR, SSIM and coverage are added in front.
MAIN = {"self": ("psnr", "ssim", "coverage", "lpips", "fid", "akd", "apd"), "cross": ("fid", "clip", "akd", "apd")}
MORE = {"self": ("clip", "csim", "apd_geodesic", "aed"), "cross": ("csim", "apd_geodesic", "aed")}
ALL = {mode: (*MAIN[mode], *MORE[mode]) for mode in MAIN}
PUBLISHED_WARNING = (
    "Published numbers, not measured here: other data, other code, unpublished definitions of AKD, APD, CLIP and FID. "
    "Do not compare them directly with the measured ones."
)


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    interval: str = ""  # "[low, high]"
    reason: str = ""  # why there is no number
    best: bool = False


def columns(results: Mapping[str, Any], which: Mapping[str, Sequence[str]]) -> list[tuple[str, Metric]]:
    """(mode, metric) of the columns, for the modes that were run."""
    return [(mode, METRICS[key]) for mode in which if mode in results["modes"] for key in which[mode]]


def entry(results: Mapping[str, Any], name: str, mode: str, metric: Metric) -> Mapping[str, Any]:
    """A method's result for a metric; empty if the method has no row in this mode."""
    return results["methods"][name][mode].get("metrics", {}).get(metric.key, {})


def cell(results: Mapping[str, Any], name: str, mode: str, metric: Metric) -> Cell:
    """The number of a method, or why there is none."""
    absent = results["methods"][name][mode].get("absent")
    if absent:
        more = f"refused, {len(absent)} problems, the first: " if len(absent) > 1 else ""
        return Cell("—", reason=more + absent[0])
    found = entry(results, name, mode, metric)
    if "na" in found:
        return Cell("n/a", reason=found["na"])
    ends = [number(found[end], metric.digits) for end in ("low", "high") if found[end] is not None]
    interval = f"[{', '.join(ends)}]" if ends else ""
    return Cell(number(found["value"], metric.digits), interval, best=name == _best(results, mode, metric))


def number(value: float | str, digits: int) -> str:
    """A value of the results, where infinity is the word "inf"."""
    return "∞" if value == "inf" else f"{value:.{digits}f}"


def measured_block(results: Mapping[str, Any]) -> str:
    """The table, its footnotes and the refused rows in Markdown, as printed at the end of a run."""
    footnotes: dict[str, int] = {}
    table = _methods_table(results, columns(results, MAIN), footnotes, with_intervals=False)
    pairs = ", ".join(f"{mode} {count} pairs" for mode, count in results["num_pairs"].items())
    lines = [f"{pairs}; images of {' x '.join(map(str, results['image']))} pixels", "", table, ""]
    lines += [f"({mark}) {reason}" for reason, mark in footnotes.items()]
    refused = [f"{name}, {mode}: {line}" for name, mode, problems in refusals(results) for line in problems]
    if refused:
        lines += [
            "",
            "Refused rows, because a mean over the remaining frames would not be comparable:",
            "",
            _list(refused),
        ]
    return "\n".join(lines).rstrip() + "\n"


def markdown(results: Mapping[str, Any]) -> str:
    """`results.md`."""
    footnotes: dict[str, int] = {}
    parts = ["# Reenactment bench", "## Measured", measured_block(results).rstrip()]
    parts += ["### With 95 % intervals over subjects"]
    for mode in results["modes"]:
        parts += [_methods_table(results, columns(results, {mode: ALL[mode]}), footnotes, with_intervals=True)]
    parts += ["\n".join(f"({mark}) {reason}" for reason, mark in footnotes.items())]
    parts += ["## Frames without a detected face", _list(faces_not_found(results))]
    for heading, lines in facts(results).items():
        parts += [f"## {heading}", _list(f"{key}: {text}" for key, text in lines.items())]
    parts += ["## Published numbers (not measured here)", f"> {PUBLISHED_WARNING}"]
    for table in TABLES:
        parts += [f"### {table.title}", _aligned(published_rows(table))]
    return "\n\n".join(part for part in parts if part) + "\n"


def refusals(results: Mapping[str, Any]) -> Iterator[tuple[str, str, list[str]]]:
    """(method, mode, problems) of compared folders with missing or wrong frames."""
    for name, row in results["methods"].items():
        for mode in results["modes"]:
            if row["compared"] and "absent" in row[mode]:
                yield name, mode, row[mode]["absent"]


def faces_not_found(results: Mapping[str, Any]) -> list[str]:
    """How many frames of each method have no detected face."""
    lines = []
    for name, row in results["methods"].items():
        for mode in results["modes"]:
            if lost := row[mode].get("faces_not_found"):
                count = f"{lost['frames']} of {lost['of']} frames ({100 * lost['frames'] / lost['of']:.1f} %)"
                lines.append(f"{name}, {mode}: {count}, {lost['driver']} of the driver's")
    return lines or ["No face detector was available, see networks."]


def facts(results: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """What is listed below the numbers: heading -> key -> text."""
    return {
        "Rows": {name: row["about"] for name, row in results["methods"].items()},
        "Protocol": results["protocol"],
        "Networks": {name: _network(found) for name, found in results["networks"].items()},
        "Speed": _speed(results["speed"]),
        "Versions": results["versions"],
    }


def published_rows(table: PublishedTable) -> list[list[str]]:
    """Heading and rows of a published table."""
    rows = [[name, *("" if v is None else f"{v:.2f}" for v in values)] for name, values in table.rows.items()]
    return [["method (published)", *table.columns], *rows]


def _network(found: Mapping[str, Any]) -> str:
    if "missing" in found:
        return f"missing ({found['missing']}); {found['remedy']}"
    return ", ".join(f"{key} {value}" for key, value in found.items())


def _speed(speed: Mapping[str, Any]) -> dict[str, str]:
    machine, size = speed["machine"], " x ".join(map(str, speed["image"]))
    cores = f", {machine['cores']} cores" if machine["cores"] else ""
    lines = {
        "machine": f"{machine['gpu'] or machine['cpu']}{cores}, {machine['torch_threads']} torch thread(s)",
        "an avatar": f"{speed['seconds_per_avatar']:.2f} s (generated {speed['batch']} at a time, mean of {speed['avatars']})",
        "tokens": f"{speed['tokens_per_second']:.0f} per second, {speed['tokens_per_avatar']:.0f} per avatar, of one candidate",
        "posing and rendering": f"{speed['frames_per_second']:.1f} frames per second of {size} pixels, "
        f"{speed['gaussians_of_drawn_avatar']:,} Gaussians, one frame at a time, without file access",
        "peak memory": f"{speed['peak_memory_gib']:.2f} GiB",
    }
    if speed["peak_gpu_memory_gib"] is not None:
        lines["peak GPU memory"] = f"{speed['peak_gpu_memory_gib']:.2f} GiB"
    return lines


def _best(results: Mapping[str, Any], mode: str, metric: Metric) -> str | None:
    """The best method besides the truth; None if there is only one."""
    entries = {name: entry(results, name, mode, metric) for name in results["methods"] if name != "truth"}
    found = {name: float(each["value"]) for name, each in entries.items() if "value" in each}
    if len(found) < 2:
        return None
    return (max if metric.higher_is_better else min)(found, key=found.__getitem__)


def _methods_table(
    results: Mapping[str, Any], shown: Sequence[tuple[str, Metric]], footnotes: dict[str, int], with_intervals: bool
) -> str:
    """In Markdown; new reasons are added to `footnotes` (reason -> mark)."""
    units = [f" ({metric.unit})" if metric.unit else "" for _, metric in shown]
    rows = [["method", *(f"{mode} {metric.title}{unit} {metric.arrow}" for (mode, metric), unit in zip(shown, units))]]
    for name in results["methods"]:
        row = [name]
        for mode, metric in shown:
            found = cell(results, name, mode, metric)
            text = f"**{found.text}**" if found.best else found.text
            if found.reason:
                text += f" ({footnotes.setdefault(found.reason, len(footnotes) + 1)})"
            row.append(f"{text} {found.interval}".rstrip() if with_intervals else text)
        rows.append(row)
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that is also readable as plain text."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _list(lines) -> str:
    return "\n".join(f"- {line}" for line in lines)
