"""Speed, memory and accuracy of the rasterizers: ours on one core and on two, the slow reference, a limit; gsplat on CUDA.

    python benchmarks/render.py                         # about three minutes, most of it the reference
    python benchmarks/render.py --points 1000 5000 --pixels 64 128 --rounds 2

Scenes are square images of Gaussians on a head-sized ellipsoid, with scales that follow the spacing of the points as in an avatar.
Rows: forward, forward + backward (gradients of all inputs), and as the limit one `exp` for each pixel of each Gaussian's
ellipse by torch, which no exact rasterizer avoids. Times are CPU time of the single thread, best of all rounds; memory is the
growth of the process. Rows that name threads are wall time, taken in turns, so they say something only on an idle machine. Growth
is time ~ points ** exponent (and pixels, counted as width * height) from the smallest to the largest size; work proportional to
points + pixels stays under 1 in both.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import ctypes
import math
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from report import markdown_table, write_report

from gaussian_tokenizer.avatars.gaussians import Gaussians
from gaussian_tokenizer.rendering.cameras import Cameras
from gaussian_tokenizer.rendering.rasterizer import MIN_ALPHA, project, rasterize
from gaussian_tokenizer.rendering.splatting import render

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "support"))
from rasterizer_reference import rasterize_reference

REFERENCE_POINTS, REFERENCE_PIXELS = 5_000, 128
AVATAR_POINTS, AVATAR_PIXELS = 27_000, 512
SEMI_AXES = (0.09, 0.14, 0.11)  # meters
SURFACE = 0.155  # square meters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, nargs="+", default=[1_000, REFERENCE_POINTS, 20_000, 100_000])
    parser.add_argument(
        "--pixels", type=int, nargs="+", default=[64, REFERENCE_PIXELS, 256, 512], help="width and height"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no_reference", action="store_true", help="leave out the reference, which takes a minute")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for n_points in sorted(arguments.points):
        for pixels in sorted(arguments.pixels):
            rows += measure(n_points, pixels, arguments.rounds)
            print(f"{n_points:>9,} points, {pixels} x {pixels} pixels measured", flush=True)
    targets = evaluate(rows)
    for size in ((REFERENCE_POINTS, REFERENCE_PIXELS), (AVATAR_POINTS, AVATAR_PIXELS)):
        rows += measure_threads(*size, arguments.rounds)
    if not arguments.no_reference:
        reference_rows, reference_targets = measure_reference()
        rows, targets = rows + reference_rows, targets + reference_targets
    if torch.cuda.is_available():
        rows += measure_cuda(arguments.rounds)
    print(markdown_table(rows), markdown_table(targets), sep="\n\n")
    print(f"\nwritten: {write_report('render', rows, targets=targets, threads=1)}")


def measure(n_points: int, pixels: int, rounds: int) -> list[dict]:
    gaussians, cameras = head(n_points), front(pixels)
    n_pairs = ellipse_pixels(gaussians, cameras)
    vector = torch.full((65_536,), -1.0)
    calls: dict[str, Callable[[], object]] = {
        "ours forward": lambda: draw(rasterize, gaussians, cameras, backward=False),
        "ours forward + backward": lambda: draw(rasterize, gaussians, cameras, backward=True),
        "limit: one exp a pair": lambda: exponentials(vector, n_pairs),
    }
    seconds = {name: best_of(call, rounds) for name, call in calls.items()}
    rows = []
    for name, call in calls.items():
        limit = seconds["limit: one exp a pair"]
        rows.append(row(n_points, pixels, name, seconds[name], n_pairs, seconds[name] / limit, grown_by(call)))
    return rows


def measure_threads(n_points: int, pixels: int, rounds: int) -> list[dict]:
    """Wall time with one thread and with two, best of three times as many rounds as others get, in turns."""
    gaussians, cameras = head(n_points), front(pixels)
    rows = []
    for backward in (False, True):
        call = partial(draw, rasterize, gaussians, cameras, backward)
        seconds = {1: math.inf, 2: math.inf}
        for _ in range(3 * rounds):
            for threads in seconds:
                torch.set_num_threads(threads)
                seconds[threads] = min(seconds[threads], best_of(call, 2, time.perf_counter))
        torch.set_num_threads(1)
        what = "forward + backward" if backward else "forward"
        for threads, best in seconds.items():
            rows.append(row(n_points, pixels, f"ours {what}, threads: {threads}", best, 0, None, None))
            print(f"{n_points:,} points, {pixels} pixels, {what}, threads {threads}: {1e3 * best:.1f} ms", flush=True)
    return rows


def measure_reference() -> tuple[list[dict], list[dict]]:
    """A single call of the reference, which is too slow for rounds; its result measures the accuracy of ours."""
    gaussians, cameras = head(REFERENCE_POINTS), front(REFERENCE_PIXELS)
    rows, targets = [], []
    results: dict[str, tuple] = {}
    for backward in (False, True):
        what = "forward + backward" if backward else "forward"
        seconds = {}
        for name, function, rounds in (("ours", rasterize, 5), ("reference", rasterize_reference, 1)):
            call = partial(keep, results, name, function, gaussians, cameras, backward)
            seconds[name] = best_of(call, rounds)
        size, n_pairs = (REFERENCE_POINTS, REFERENCE_PIXELS), REFERENCE_POINTS * REFERENCE_PIXELS**2
        rows.append(row(*size, f"reference {what}", seconds["reference"], n_pairs, None, None))
        name = f"reference / ours, {what}, {size[0]:,} points, {size[1]} pixels"
        targets.append(target(name, seconds["reference"] / seconds["ours"], least=10.0))
        print(f"reference {what} measured", flush=True)
    (images, gradients), (reference_images, reference_gradients) = results["ours"], results["reference"]
    error = max((a - b).abs().max().item() for a, b in zip(images, reference_images))
    relative = max(((a - b).norm() / b.norm()).item() for a, b in zip(gradients, reference_gradients))
    targets += [target("largest error of a pixel", error, most=1e-4)]
    targets += [target("largest relative error of a gradient", relative, most=1e-3)]
    return rows, targets


def measure_cuda(rounds: int) -> list[dict]:
    gaussians, cameras = head(AVATAR_POINTS).to("cuda"), front(AVATAR_PIXELS).to("cuda")
    leaves = [x.requires_grad_() for x in (gaussians.positions, gaussians.quats, gaussians.scales)]

    def forward() -> None:
        with torch.no_grad():
            render(gaussians, cameras)
        torch.cuda.synchronize()

    def backward() -> None:
        torch.autograd.grad(render(gaussians, cameras).image.square().sum(), leaves)
        torch.cuda.synchronize()

    rows = []
    for name, call in (("gsplat forward", forward), ("gsplat forward + backward", backward)):
        torch.cuda.reset_peak_memory_stats()
        seconds = best_of(call, 10 * rounds, time.perf_counter)
        memory = torch.cuda.max_memory_allocated() / 2**20
        rows.append(row(AVATAR_POINTS, AVATAR_PIXELS, name, seconds, 0, None, memory))
        print(f"{name}: {1 / seconds:.0f} frames/s", flush=True)
    return rows


def evaluate(rows: list[dict]) -> list[dict]:
    """The targets that can be evaluated at the measured sizes."""
    both = "ours forward + backward"
    of = {(row["points"], row["pixels"], row["what"]): row for row in rows}
    points, pixels = (sorted({row[key] for row in rows}) for key in ("points", "pixels"))
    ratios = [of[n, p, both]["milliseconds"] / of[n, p, "ours forward"]["milliseconds"] for n in points for p in pixels]
    targets = [target("forward + backward / forward, at most", max(ratios), most=4.0)]
    if (20_000, 256, both) in of:
        seconds = of[20_000, 256, both]["milliseconds"] / 1e3
        targets.append(target("seconds, forward + backward, 20,000 points, 256 pixels", seconds, most=1.0))
    if len(points) > 1 and len(pixels) > 1:
        for unit, key in (("time", "milliseconds"), ("memory", "MiB")):
            if rows[0][key] is None:
                continue
            small, large = of[points[0], pixels[-1], both][key], of[points[-1], pixels[-1], both][key]
            by_points = math.log(max(large, 1) / max(small, 1)) / math.log(points[-1] / points[0])
            small = of[points[-1], pixels[0], both][key]
            by_pixels = math.log(max(large, 1) / max(small, 1)) / math.log((pixels[-1] / pixels[0]) ** 2)
            together = large / (small + of[points[0], pixels[-1], both][key])
            targets.append(target(f"{unit}: exponent of the growth with points", by_points, most=1.0))
            targets.append(target(f"{unit}: exponent of the growth with pixels", by_pixels, most=1.0))
            targets.append(target(f"{unit}: both large / (many points + many pixels)", together, most=2.0))
    return targets


def row(
    points: int, pixels: int, what: str, seconds: float, pairs: int, x_limit: float | None, memory: float | None
) -> dict:
    return {
        "points": points,
        "pixels": pixels,
        "what": what,
        "milliseconds": 1e3 * seconds,
        "frames/s": 1 / seconds,
        "pairs": pairs,
        "x limit": x_limit,
        "MiB": memory,
    }


def target(name: str, measured: float, most: float = math.inf, least: float = -math.inf) -> dict:
    wanted = f"<= {most:g}" if most < math.inf else f">= {least:g}"
    return {"target": name, "measured": measured, "wanted": wanted, "reached": least <= measured <= most}


def draw(function: Callable, gaussians: Gaussians, cameras: Cameras, backward: bool) -> tuple:
    names = ("positions", "quats", "scales", "opacities", "sh")
    inputs = [*(getattr(gaussians, name) for name in names), cameras.viewmats]
    inputs = [value.detach().requires_grad_(backward) for value in inputs]
    results = function(*inputs, cameras.Ks, cameras.width, cameras.height)
    if not backward:
        return results, ()
    loss = sum((result * torch.linspace(0, 1, result.numel()).view_as(result)).sum() for result in results)
    return tuple(result.detach() for result in results), torch.autograd.grad(loss, inputs)


def keep(results: dict[str, tuple], name: str, *arguments) -> None:
    results[name] = draw(*arguments)


def head(n_points: int) -> Gaussians:
    random = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(1, n_points, 3, generator=random), dim=-1)
    spread = torch.exp(0.3 * torch.randn(1, n_points, 3, generator=random))
    return Gaussians(
        positions=directions * torch.tensor(SEMI_AXES),
        scales=0.7 * math.sqrt(SURFACE / n_points) * spread,
        quats=torch.randn(1, n_points, 4, generator=random),
        opacities=0.1 + 0.9 * torch.rand(n_points, generator=random),
        sh=0.5 * torch.randn(n_points, 1, 3, generator=random),
    )


def front(pixels: int) -> Cameras:
    """A camera whose image the head fills to four fifths of its height."""
    return Cameras.look_at((0.0, 0.0, 1.0), (0, 0, 0), focal=pixels / 0.36, width=pixels, height=pixels)


def ellipse_pixels(gaussians: Gaussians, cameras: Cameras) -> int:
    """Number of (Gaussian, pixel) pairs of at least MIN_ALPHA: the areas of the ellipses, 2 pi log(255 o) sqrt(det)."""
    one = gaussians.positions[0], gaussians.quats[0], gaussians.scales[0]
    _, shape, _ = project(*one, cameras.viewmats[0], cameras.Ks[0], cameras.width, cameras.height, 0.3)
    areas = 2 * math.pi * (gaussians.opacities / MIN_ALPHA).log() * (shape[:, 1] * shape[:, 2]).sqrt()
    return int(areas.sum())


def exponentials(vector: torch.Tensor, count: int) -> None:
    for _ in range(-(-count // len(vector))):
        vector.exp()


def best_of(call: Callable[[], object], rounds: int, clock: Callable[[], float] = time.thread_time) -> float:
    if rounds > 1:
        call()  # not timed: the first call allocates memory
    seconds = []
    for _ in range(rounds):
        start = clock()
        call()
        seconds.append(clock() - start)
    return min(seconds)


def grown_by(call: Callable[[], object]) -> float | None:
    """Peak resident memory during the call above that before it, in MiB; None where the system does not report it."""
    if platform.system() != "Linux":
        return None
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # otherwise the call reuses memory freed by earlier calls
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _resident("VmRSS")
    call()
    return (_resident("VmHWM") - before) / 1024


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


if __name__ == "__main__":
    main()
