"""Training curves pinned in files: the loss of each step, and the kind of CPU that it was recorded on."""

import json
import os
import platform
from pathlib import Path

import pytest
import torch

REFERENCES = Path(__file__).parents[1] / "training" / "references"
SAME_CPU, OTHER_CPU = 1e-4, 2e-2  # relative tolerances: other vector instructions sum in another order


def kind_of_cpu() -> str:
    """Machine, model name and vector instructions that torch uses, such as `x86_64, Intel(R) Xeon(R) ..., AVX512`."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return f"{platform.machine()}, {model}, {torch.backends.cpu.get_cpu_capability()}"


def assert_pinned(name: str, losses: list[float]) -> None:
    """Compare losses with `references/<name>.json`, or write that file where POINTILLIST_PIN is set."""
    path = REFERENCES / f"{name}.json"
    if os.environ.get("POINTILLIST_PIN"):
        path.write_text(
            json.dumps({"cpu": kind_of_cpu(), "torch": torch.__version__, "losses": losses}, indent=1) + "\n"
        )
    reference = json.loads(path.read_text())
    tolerance = SAME_CPU if reference["cpu"] == kind_of_cpu() else OTHER_CPU
    assert losses == pytest.approx(reference["losses"], rel=tolerance)
