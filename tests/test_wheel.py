"""The wheel, installed where no checkout is: it holds everything, and its commands run there."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from paths import ROOT

PACKAGES = ("gaussian_tokenizer", "modeling", "training", "eval")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built as `make wheel` builds it, from a copy, so that the checkout stays clean and nothing stale is packed."""
    sources, folder = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("dist")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, sources / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(sources)]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Call it with a command: it runs in a new environment with this wheel and the libraries that the tests run with."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    install = ["--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    (own,) = folder.glob("lib/python*/site-packages")
    # A path in a .pth file comes last, and the .pth files there, such as that of an editable install, are not read.
    (own / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    work = tmp_path_factory.mktemp("work")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}

    def run(command: str, *arguments: str) -> str:
        done = subprocess.run(
            [folder / "bin" / command, *arguments], cwd=work, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run.folder, run.work = folder, work
    return run


def test_the_wheel_holds_every_file_of_the_packages(wheel):
    with zipfile.ZipFile(wheel) as file:
        packed = {name for name in file.namelist() if name.split("/")[0] in PACKAGES}
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()]
    assert packed == {path.relative_to(ROOT).as_posix() for path in paths if "__pycache__" not in path.parts}
    assert {"training/configs/accelerate/fsdp.yaml", "gaussian_tokenizer/__init__.pyi", "eval/py.typed"} <= packed


def test_the_packages_come_from_the_wheel(installed):
    code = f"import {', '.join(PACKAGES)}; print(*({', '.join(f'{name}.__file__' for name in PACKAGES)}))"
    assert all(Path(path).is_relative_to(installed.folder) for path in installed("python", "-c", code).split())


def test_commands_run_and_find_configs_by_name(installed):
    assert "build-corpus" in installed("pointillist")
    assert "a recipe of the toolkit: debug, demo" in installed("pointillist", "train", "--help")
    subjects = ("--num_subjects", "2", "--num_points", "60", "--image_size", "56", "--views", "1", "--timesteps", "1")
    installed("pointillist", "synthesize", *subjects, "--output_dir", "subjects")
    corpus = ("--head", "procedural:600", "--n_bins", "64", "--image_size", "56", "--num_validation", "1")
    installed("pointillist", "build-corpus", "--avatars", "subjects", *corpus, "--output_dir", "corpus")
    training = ("--corpus", "corpus", "--output_dir", "model", "--max_steps", "2", "--use_cpu", "true")
    installed("pointillist", "pretrain", "debug", *training)
    assert json.loads((installed.work / "model" / "training_report.json").read_text())["steps"] == 2
