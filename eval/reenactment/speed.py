"""How fast: seconds and tokens for an avatar, frames a second of moving and drawing it, peak memory, on which machine.

Times are those of this machine while the bench ran; files are not in them, and the transfer of a drawn frame to the CPU is.
"""

import platform
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from eval.reenactment.methods import draw
from eval.reenactment.protocol import Pair
from gaussian_tokenizer.avatars.avatar import GaussianAvatar

FRAMES = 32  # drawn for the measurement, after one to warm up


def measure(avatar: GaussianAvatar, pair: Pair, generation: Sequence[dict[str, Any]], device: str) -> dict[str, Any]:
    """The speed page; `generation` is what was noted when the avatars were made, maybe by an earlier start of this run."""
    rows = pair.rows[:FRAMES]
    bound = avatar.bind()
    draw(bound, pair.driver, rows[:1])
    begin = time.perf_counter()
    for row in rows:
        draw(bound, pair.driver, range(row, row + 1))
    seconds = time.perf_counter() - begin
    making, tokens = sum(noted["seconds"] for noted in generation), sum(noted["tokens"] for noted in generation)
    return {
        "avatars": len(generation),
        "batch": max(noted["batch"] for noted in generation),
        "seconds_per_avatar": making / len(generation),
        "tokens_per_avatar": tokens / len(generation),
        "tokens_per_second": tokens / making,
        "points_of_drawn_avatar": len(avatar),
        "image": list(pair.driver.size),
        "frames_drawn": len(rows),
        "frames_per_second": len(rows) / seconds,
        "peak_memory_gib": peak_memory(),
        "peak_gpu_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device.startswith("cuda") else None,
        "machine": machine(device),
    }


def peak_memory() -> float:
    """GiB that this process has held at most."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def machine(device: str) -> dict[str, Any]:
    """Processor, threads and GPU in words."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.is_file() else []  # fmt: skip
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(names) or None,
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else None,
        "system": platform.system(),
    }
