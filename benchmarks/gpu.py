"""Everything that needs a GPU, measured in parts, each in a process of its own and in under ten minutes on an H200.

    make gpu                                            # all parts that are not finished yet, about an hour
    python benchmarks/gpu.py --parts decoding training  # some
    python benchmarks/gpu.py --size toy --device cpu    # every part at toy size on a CPU, in outputs/gpu_toy: a minute

Parts (benchmarks/gpu_parts.py says what each measures): the tests marked `gpu`; gsplat beside the rasterizer for CPUs; attention
functions beside each other; generation at the token level, the point level and with mesh-aware faces; training; the Gaussian
decoder; animation; a fit; memory under ZeRO-2. The first use of gsplat compiles it, which takes minutes more.

Every part writes `<part>.json` into --output_dir after each row: machine, versions, commit, rows. A finished part is not repeated
unless --overwrite; a part that failed keeps its rows and its error, and is tried again. The table of all results is printed, and
written into docs/performance.md with --write_docs. The exit status is 1 if a part failed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from report import environment

from gaussian_tokenizer.utils.atomic import atomic_file
from gaussian_tokenizer.utils.versions import installed_versions

ROOT = Path(__file__).resolve().parents[1]
DOCS, MARKERS = ROOT / "docs" / "performance.md", ("<!-- gpu -->", "<!-- /gpu -->")
OUTPUT = {"full": ROOT / "benchmarks" / "results" / "gpu", "toy": ROOT / "outputs" / "gpu_toy"}
OPTIONAL = ("flash-attn", "deepspeed", "triton")
NOT_MEASURED, BANDWIDTH = "not measured yet", "limit at 4.8 TB/s"
# What to expect on an H200, by part and row; these rows are in the table before anything is measured.
EXPECTED = {
    ("tests", "pytest -m gpu"): "all pass",
    ("splatting", "difference, degree 0, one camera"): "images 2e-3, gradients 1e-2, as in the tests",
    ("splatting", "difference, degree 1, large Gaussians, three cameras"): "the same",
    ("splatting", "difference, degree 2, size of an avatar"): "the same",
    ("splatting", "difference, degree 3, two cameras"): "the same",
    ("splatting", "speed, degree 0, forward"): "",
    ("splatting", "speed, degree 0, forward + backward"): "",
    ("attention", "token level, sdpa, float32"): "below 1e-4",
    ("attention", "token level, sdpa, bfloat16"): "as eager in bfloat16",
    ("attention", "token level, flash_attention_2, bfloat16"): "as eager in bfloat16",
    ("attention", "token level, flex_attention, bfloat16"): "as eager in bfloat16",
    ("attention", "point level, sdpa, float32"): "below 1e-4",
    ("attention", "point level, sdpa, bfloat16"): "as eager in bfloat16",
    ("attention", "point level, flash_attention_2, bfloat16"): "as eager in bfloat16",
    ("attention", "point level, flex_attention, bfloat16"): "as eager in bfloat16",
    ("decoding", "batch 1, eager"): "",
    ("decoding", "batch 1, compiled"): f"{BANDWIDTH} 43 s a cloud; 51 to 56 s with what else a step takes",
    ("decoding", "batch 8, compiled"): f"{BANDWIDTH} 29 s a cloud",
    ("decoding_points", "batch 1, eager"): "",
    ("decoding_points", "batch 1, compiled"): f"{BANDWIDTH} 6.0 s a cloud",
    ("decoding_points", "batch 8, compiled"): f"{BANDWIDTH} 2.3 s a cloud",
    ("decoding_points", "batch 1, compiled, a whole cloud"): "no more than by the rate",
    ("decoding_mesh", "batch 1, eager"): "",
    ("decoding_mesh", "batch 1, compiled"): f"{BANDWIDTH} 6.0 s a cloud",
    ("decoding_mesh", "batch 8, compiled"): f"{BANDWIDTH} 2.3 s a cloud",
    ("decoding_mesh", "batch 1, compiled, a whole cloud"): "no more than by the rate",
    ("training", "x-transformers"): "an MFU of 1 is 228,000 tokens/s",
    ("training", "ours"): "the speed of x-transformers",
    ("training", "ours, point level"): "",
    ("training", "ours, point level, mesh-aware"): "",
    ("decoder", "forward"): "48 TFLOP: limit at 989 TFLOP/s 49 ms",
    ("decoder", "forward + backward"): "limit 146 ms; about 16 GiB (docs/decoder.md)",
    ("decoder", "forward + backward, gradient checkpointing"): "limit 194 ms; about 4 GiB",
    ("animate", "lbs: pose, render, fetch"): "",
    ("animate", "face_frames: pose, render, fetch"): "",
    ("fit", "fit_paper"): "",
    ("zero2", "ZeRO-2, one process"): "7.8 GB of weights and optimizer, and four windows",
}
PARTS = tuple(dict.fromkeys(part for part, _ in EXPECTED))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    add("--size", choices=OUTPUT, default="full", help="full: the paper's sizes")
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--output_dir", type=Path, help="default: benchmarks/results/gpu, for toys outputs/gpu_toy")
    add("--overwrite", action="store_true", help="also repeat parts that are finished")
    add("--limit", type=float, default=1200, help="seconds after which a part is killed")
    add("--write_docs", action="store_true", help="write the table into docs/performance.md")
    add("--inside", action="store_true", help=argparse.SUPPRESS)  # measure here, not in a process for each part
    arguments = parser.parse_args()
    output = arguments.output_dir or OUTPUT[arguments.size]
    if arguments.device == "cpu" and arguments.size == "full":
        parser.error("the paper's sizes take days on a CPU: give --size toy, or --device cuda")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "error: this PyTorch sees no GPU; to try the parts without one: --size toy --device cpu\n")
    output.mkdir(parents=True, exist_ok=True)
    failed = False
    for part in arguments.parts:
        if arguments.inside:
            measure(part, arguments.device, arguments.size, output)
        elif read(output, part).get("finished") and not arguments.overwrite:
            print(f"{part}: finished before; --overwrite repeats it", flush=True)
        else:
            print(f"{part} ...", flush=True)
            failed |= not measure_apart(part, arguments.device, arguments.size, output, arguments.limit)
    if arguments.inside:
        return
    table = results_table(output)
    print(table)
    if arguments.write_docs:
        write_docs(table)
    sys.exit(int(failed))


def measure(part: str, device: str, size: str, output: Path) -> None:
    """Run a part in this process and write its results after each row; an exception is written too."""
    from gpu_parts import PARTS as functions
    from gpu_parts import Setup

    report = {"part": part, "size": size, "device": device, **environment()}
    report["versions"] |= installed_versions(OPTIONAL) | {"CUDA": torch.version.cuda}
    report |= {"finished": False, "error": None, "seconds": 0.0, "rows": []}
    begin = time.perf_counter()
    write(output, report)
    try:
        for row in functions[part](Setup(torch.device(device), size == "toy")):
            print(f"  {row['what']}: {measured(row)}", flush=True)
            report["rows"].append(row)
            report["seconds"] = time.perf_counter() - begin
            write(output, report)
        report["finished"] = True
    except Exception as error:
        traceback.print_exc()
        report["error"] = f"{type(error).__name__}: {error}"
    write(output, report | {"seconds": time.perf_counter() - begin})


def measure_apart(part: str, device: str, size: str, output: Path, limit: float) -> bool:
    """Run a part in a process of its own, killed with its children after `limit` seconds; whether it finished."""
    (output / f"{part}.json").unlink(missing_ok=True)
    options = ["--inside", "--parts", part, "--device", device, "--size", size, "--output_dir", str(output)]
    # gsplat and DeepSpeed compile with ninja, which lies beside this Python and is found by PATH alone.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    command, environ = [sys.executable, __file__, *options], os.environ | {"PATH": path}
    process = subprocess.Popen(command, cwd=ROOT, env=environ, start_new_session=True)
    error = None
    try:
        status = process.wait(limit)
        error = f"the process ended with status {status}" if status else None
    except subprocess.TimeoutExpired:
        error = f"killed after {limit:g} seconds"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    report = {"part": part, "size": size, "finished": False, "error": None, "rows": []} | read(output, part)
    if error and not report["finished"]:
        write(output, report | {"error": report["error"] or error})
    return report["finished"]


def read(output: Path, part: str) -> dict[str, Any]:
    """The results of a part; empty if there are none."""
    path = output / f"{part}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def write(output: Path, report: dict[str, Any]) -> None:
    with atomic_file(output / f"{report['part']}.json") as file:
        file.write((json.dumps(report, indent=2) + "\n").encode())


def measured(row: dict[str, Any]) -> str:
    """The numbers of a row with their units, then its note."""
    numbers = {name: value for name, value in row.items() if name not in ("what", "note", "detail")}
    texts = [f"{short(value)} {name}" for name, value in numbers.items()]
    return "; ".join([*texts, *([row["note"]] if "note" in row else [])])


def short(value: float | None) -> str:
    """Three significant digits; a larger number in full."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def results_table(output: Path) -> str:
    """Markdown: machine and versions, then each row with what was measured and what is expected."""
    reports = {part: read(output, part) for part in PARTS}
    lines, machines = [], {}
    for part, report in reports.items():
        rows = {row["what"]: measured(row) for row in report.get("rows", [])}
        if report.get("error"):
            rows["error"] = report["error"]
        rows |= {what: NOT_MEASURED for of, what in EXPECTED if of == part and what not in rows}
        for what, text in rows.items():
            cells = (part, what, text, EXPECTED.get((part, what), ""))
            lines.append("| " + " | ".join(" ".join(cell.split()).replace("|", "/")[:300] for cell in cells) + " |")
        if "machine" in report:
            versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
            machine = report["machine"]["gpu"] if report["device"] == "cuda" else report["machine"]["cpu"]
            machines.setdefault(f"{machine}; {versions}; commit {(report['commit'] or 'unknown')[:16]}", []).append(
                part
            )
    about = [f"{', '.join(parts)}: {machine}." for machine, parts in machines.items()] or ["Not measured yet."]
    return "\n".join([*about, "", "| part | what | measured | expected on an H200 |", "|---|---|---|---|", *lines])


def write_docs(table: str) -> None:
    """Put the table between the markers of docs/performance.md."""
    text = DOCS.read_text()
    before, _, rest = text.partition(MARKERS[0])
    _, found, after = rest.partition(MARKERS[1])
    if not found:
        raise ValueError(f"{DOCS}: expected the lines {' and '.join(MARKERS)}")
    with atomic_file(DOCS) as file:
        file.write(f"{before}{MARKERS[0]}\n\n{table}\n\n{MARKERS[1]}{after}".encode())


if __name__ == "__main__":
    main()
