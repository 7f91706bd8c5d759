"""Benchmark results as JSON with their provenance, and as a Markdown table.

`write_report("tokenizer", rows)` writes `benchmarks/results/tokenizer.json`: the rows, the machine, the versions and the commit.
There is no timestamp, so equal measurements write equal files.
"""

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from gaussian_tokenizer.utils.atomic import atomic_file
from gaussian_tokenizer.utils.versions import installed_versions

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "torchao", "transformers", "numpy", "accelerate", "x-transformers", "gsplat")


def write_report(name: str, rows: list[dict[str, Any]], **extra: Any) -> Path:
    """Write `results/<name>.json` with the rows, the environment, and everything in `extra`."""
    report = {"benchmark": name, **environment(), **extra, "rows": rows}
    path = RESULTS / f"{name}.json"
    RESULTS.mkdir(exist_ok=True)
    with atomic_file(path) as file:
        file.write((json.dumps(report, indent=2) + "\n").encode())
    return path


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """Rows of the same keys -> a Markdown table; floats with three significant digits, numbers right-aligned."""
    names = list(rows[0])
    cells = [[f"{row[name]:.3g}" if isinstance(row[name], float) else str(row[name]) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in [names, *cells]) for i in range(len(names))]
    right = [isinstance(rows[0][name], (int, float)) for name in names]
    lines = [names, ["-" * (w - 1) + (":" if r else "-") for w, r in zip(widths, right)], *cells]
    aligned = [
        [cell.rjust(width) if r else cell.ljust(width) for cell, width, r in zip(line, widths, right)] for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in aligned)


def environment() -> dict[str, Any]:
    """Machine, versions and commit; "-dirty" marks a tree with changes other than in the results."""
    cuda = torch.cuda.is_available()
    machine = {
        "cpu": _cpu_name(),
        "cpu_count": len(os.sched_getaffinity(0)) if platform.system() == "Linux" else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "system": f"{platform.system()} {platform.machine()}",
    }
    commit = _git("rev-parse", "HEAD")
    if commit and _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results"):
        commit += "-dirty"
    return {"machine": machine, "versions": installed_versions(PACKAGES), "commit": commit or None}


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    try:
        run = subprocess.run(["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return run.stdout.strip()
