#!/usr/bin/env python3
"""The tests marked `newest` on the newest releases of what the toolkit stands on, in an environment of its own: `make newest`.

Who installs the toolkit gets the newest releases that pyproject.toml allows, whatever constraints.txt pins. Here the newest of
`[tool.newest]`'s packages are installed, beyond the bounds of pyproject.toml too. The exit status says:

    0  the tests pass; or they fail, but with a package newer than any that was tested, according to `[tool.newest]`; or the
       releases cannot be installed (no network, no space). The last two are said loudly
    1  the tests fail with releases that were tested: users meet it today

The first argument is a file to which the line that sums it up is written, for CI to end with.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv-newest"
PYTHON = VENV / "bin" / "python"
PACKAGES = (".[demo]", "hypothesis", "plyfile", "pytest", "pytest-timeout", "pytest-xdist")
SPACE = 12  # GB for an environment with CUDA's libraries while it is unpacked


def tested_versions() -> dict[str, str]:
    """{package: major.minor} of the newest releases on which the tests passed, from pyproject.toml."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        return tomllib.load(file)["tool"]["newest"]


def install(packages: list[str]) -> str | None:
    """Make the environment; returns what was in the way, or None."""
    free = shutil.disk_usage(ROOT).free / 1e9
    if not PYTHON.exists() and free < SPACE:
        return f"{free:.1f} GB free at {ROOT}, {SPACE} needed"
    options = ("--quiet", "--no-compile", "--disable-pip-version-check", "--retries", "1", "--upgrade")
    pip = [str(PYTHON), "-m", "pip", "install", *options]
    for command in (
        [sys.executable, "-m", "venv", str(VENV)],
        # torch first, alone: with it in place nothing else pulls another build of it
        [*pip, "torch"],
        [*pip, "--editable", *PACKAGES],
        # once more, past the upper bounds of pyproject.toml, of which pip then complains
        [*pip, *packages],
    ):
        done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            shutil.rmtree(VENV, ignore_errors=True)  # half an environment would be taken for a whole one next time
            return f"{' '.join(command)}: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"
    return None


def installed_versions(packages: list[str]) -> dict[str, str]:
    program = "import importlib.metadata, json, sys; print(json.dumps({p: importlib.metadata.version(p) for p in sys.argv[1:]}))"
    return json.loads(
        subprocess.run([PYTHON, "-c", program, *packages], check=True, capture_output=True, text=True).stdout
    )


def run_tests() -> tuple[bool, str]:
    """Run them; returns whether they passed, and pytest's last line."""
    files = [
        str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.newest" in path.read_text("utf-8")
    ]
    command = [
        str(PYTHON),
        "-m",
        "pytest",
        "-q",
        "-m",
        "newest and not slow",
        "--numprocesses",
        "2",
        "--dist",
        "loadfile",
    ]
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | os.environ
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*command, *files], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    last = "pytest printed nothing"
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip().strip("= ") or last
    return process.wait() == 0, last


def untested(installed: dict[str, str], tested: dict[str, str]) -> list[str]:
    """The packages of a newer minor release than was tested, as "name version (tested: version)"."""

    def release(version: str) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", version)[:2])

    return [
        f"{name} {version} (tested: {tested[name]})"
        for name, version in installed.items()
        if release(version) > release(tested[name])
    ]


def verdict(passed: bool, counts: str, newer: list[str], versions: str) -> tuple[int, str, list[str]]:
    """Exit status, the line that sums it up, and what must not be overlooked."""
    if passed:
        advice = (
            [f"Raise [tool.newest] and the bounds of pyproject.toml: the tests pass with {', '.join(newer)}."]
            if newer
            else []
        )
        return 0, f"newest releases pass ({counts}; {versions})", advice
    if newer:
        return (
            0,
            f"WARNING: BROKEN ON THE NEWEST RELEASES ({counts}; {versions})",
            [
                f"The tests fail on releases newer than any that was tested: {', '.join(newer)}.",
                "CI does not fail for it. Mend it, or bound the package in pyproject.toml, before users meet it.",
            ],
        )
    return (
        1,
        f"FAILED on the newest releases ({counts}; {versions})",
        [
            f"The tests fail on releases that pyproject.toml lets users install: {versions}.",
            "Mend it, or lower the bound in pyproject.toml and the entry of [tool.newest].",
        ],
    )


def shout(lines: list[str]) -> None:
    print("\n" + "!" * 100, *(f"!!! {line}" for line in lines), "!" * 100, "", sep="\n", flush=True)


def main(summary: Path | None = None) -> int:
    tested = tested_versions()
    trouble = install(list(tested))
    if trouble:
        status, line, warnings = 0, "WARNING: NOT TESTED ON THE NEWEST RELEASES, they could not be installed", [trouble]
    else:
        installed = installed_versions(list(tested))
        versions = ", ".join(f"{name} {version}" for name, version in installed.items())
        print(f"newest releases: {versions}", flush=True)
        status, line, warnings = verdict(*run_tests(), untested(installed, tested), versions)
    if warnings:
        shout([line, *warnings])
    else:
        print(line)
    if summary:
        summary.write_text(f"{line}\n")
    return status


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:2])))
