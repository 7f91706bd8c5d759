"""`report.html`: everything a run found on one page that needs no other file, but for videos beyond VIDEO_BYTES."""

import base64
import mimetypes
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.reenactment import report
from eval.reenactment.scores import Metric
from gaussian_tokenizer.utils.templates import render_template

VIDEO_BYTES = 24 * 2**20  # embedded in total; the other videos are links to the files beside the page
CHART_LEFT, CHART_WIDTH = 104, 196  # of the intervals, in units of the SVG


def page(results: Mapping[str, Any], folder: Path, videos: Sequence[Path]) -> str:
    """The page as text; `folder` holds `grid.png`, `videos` are the files of all pairs, in their order."""
    return render_template(
        __package__,
        "report.html.j2",
        report=report,
        results=results,
        model=Path(results["run"]["model_name"]).name,
        dataset=Path(results["run"]["dataset_name"]).name,
        charts=[_chart(results, mode, metric) for mode, metric in report.columns(results, report.ALL)],
        grid=_data(folder / "grid.png"),
        videos=list(_videos(videos, folder)),
        per_subject=list(_per_subject(results)),
    )


def _chart(results: Mapping[str, Any], mode: str, metric: Metric) -> dict[str, Any]:
    """`dots`: (method, value, where its value, low and high end lie) of every method that has an interval."""
    found = {name: report.entry(results, name, mode, metric) for name in results["methods"]}
    found = {name: each for name, each in found.items() if each.get("low") is not None and each["value"] != "inf"}
    ends = [each[key] for each in found.values() for key in ("value", "low", "high")] or [0.0]
    scale = CHART_WIDTH / ((max(ends) - min(ends)) or 1.0)
    dots = []
    for name, each in found.items():
        x = {key: round(CHART_LEFT + (each[key] - min(ends)) * scale, 1) for key in ("value", "low", "high")}
        dots.append((name, report.number(each["value"], metric.digits), x))
    return {"mode": mode, "metric": metric, "dots": dots}


def _videos(videos: Sequence[Path], folder: Path) -> Iterator[tuple[str, str]]:
    """(name, content or link) of every video."""
    left = VIDEO_BYTES
    for path in videos:
        left -= path.stat().st_size
        name = f"{path.parent.name}: {path.stem.replace('__', ' ← ')}"
        yield name, _data(path) if left >= 0 else str(path.relative_to(folder))


def _per_subject(results: Mapping[str, Any]) -> Iterator[tuple[str, str, list[Metric], dict[str, dict[str, Any]]]]:
    """(method, mode, metrics, means of every pair) where there are metrics of single frames."""
    for mode in results["modes"]:
        for name, row in results["methods"].items():
            means = {pair: found["mean"] for pair, found in row[mode].get("pairs", {}).items()}
            keys = {key for found in means.values() for key in found}
            metrics = [metric for _, metric in report.columns(results, {mode: report.ALL[mode]}) if metric.key in keys]
            if metrics:
                yield name, mode, metrics, means


def _data(path: Path) -> str:
    content = base64.b64encode(path.read_bytes()).decode()
    return f"data:{mimetypes.guess_type(path.name)[0]};base64,{content}"
