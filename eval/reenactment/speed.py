"""Speed on this machine: seconds and tokens per avatar, rendered frames per second without file access, peak memory."""

import platform
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from eval.reenactment.methods import render_frames
from eval.reenactment.protocol import Pair
from gaussian_tokenizer.avatars.avatar import GaussianAvatar

FRAMES = 32  # rendered for the measurement, after one to warm up


def measure(avatar: GaussianAvatar, pair: Pair, generation: Sequence[dict[str, Any]], device: str) -> dict[str, Any]:
    """`results["speed"]`; `generation` are the stats of making the avatars, possibly from an earlier start of this run."""
    rows = pair.rows[:FRAMES]
    skinning = avatar.bind()
    render_frames(skinning, pair.driver, rows[:1])
    begin = time.perf_counter()
    for row in rows:
        render_frames(skinning, pair.driver, range(row, row + 1))
    seconds = time.perf_counter() - begin
    making, tokens = (sum(stats[key] for stats in generation) for key in ("seconds", "tokens"))
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB on Linux
    return {
        "avatars": len(generation),
        "batch": max(stats["batch"] for stats in generation),
        "seconds_per_avatar": making / len(generation),
        "tokens_per_avatar": tokens / len(generation),
        "tokens_per_second": tokens / making,
        "gaussians_of_drawn_avatar": len(avatar),
        "image": list(pair.driver.size),
        "frames_drawn": len(rows),
        "frames_per_second": len(rows) / seconds,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30,
        "peak_gpu_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device.startswith("cuda") else None,
        "machine": machine(device),
    }


def machine(device: str) -> dict[str, Any]:
    """CPU, threads and GPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(names) or None,
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else None,
        "system": platform.system(),
    }
