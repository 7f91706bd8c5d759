"""`training/fit_avatars.py` as a user runs it: what it leaves, going on, subjects that fail, several processes, and its errors."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import ROOT
from PIL import Image

import training.fitting.report
from gaussian_tokenizer.build_corpus import main as build_corpus
from gaussian_tokenizer.captures.subject import Subject
from gaussian_tokenizer.corpus.corpus import load_corpus
from gaussian_tokenizer.heads.loading import load_head
from gaussian_tokenizer.synthesize import synthesize
from gaussian_tokenizer.synthetic.source import PLAIN
from training import fit_avatars
from training.common.arguments import exit_on_user_error
from training.fitting.queue import Job, order_of
from training.fitting.state import FitState, saved_identity

SCRIPT = Path(fit_avatars.__file__)
DEBUG = SCRIPT.parent / "configs" / "fit_debug.yaml"
HEAD = "procedural:600"
STEPS = 16


def command(data: Path, output: Path, *more: str) -> list[str]:
    words = [DEBUG, "--data", data, "--head", HEAD, "--output_dir", output, "--device", "cpu", *more]
    return [str(word) for word in words]


def run(data: Path, output: Path, *more: str) -> str:
    """Run the script in this process; returns what it exits with, "" for success."""
    threads, before = torch.get_num_threads(), sys.argv
    sys.argv = ["fit_avatars.py", *command(data, output, "--disable_tqdm", "true", *more)]
    try:
        exit_on_user_error(fit_avatars.main)
        return ""
    except SystemExit as caught:
        return str(caught.code)
    finally:
        sys.argv = before
        torch.set_num_threads(threads)


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a result but the image, without the clocks of its report."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    found = {name: path.read_bytes() for name, path in files.items()}
    found.pop("fit.png")
    report = json.loads(found["fit_report.json"])
    report.pop("seconds")
    return found | {"fit_report.json": json.dumps(report).encode()}


@pytest.mark.parametrize("words", [["-c", "import training.fit_avatars"], [SCRIPT, "--help"]])
def test_the_script_and_its_help_load_no_transformers(words):
    done = subprocess.run([sys.executable, "-X", "importtime", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and " torch" in done.stderr
    assert not re.findall(r"\| +transformers$", done.stderr, re.MULTILINE)


def leftovers(output: Path) -> list[str]:
    return [str(path) for path in output.rglob("*") if ".tmp" in path.name or path.name == "result"]


@pytest.fixture(scope="module")
def subjects(tmp_path_factory) -> Path:
    """Two synthetic subjects of 32 pixels, three cameras and four moments."""
    folder = tmp_path_factory.mktemp("subjects") / "subjects"
    synthesize(folder, 2, image_size=32, num_points=60, views=3, timesteps=4, **PLAIN)
    return folder


@pytest.fixture
def no_image(monkeypatch):
    """Drawing fit.png is half of so short a fit."""
    monkeypatch.setattr(training.fitting.report, "draw_fit", lambda fit, avatar, report, path: path.write_bytes(b""))


@pytest.fixture(scope="module")
def one(subjects, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "subjects"
    shutil.copytree(subjects / "synthetic-0-000000", folder / "synthetic-0-000000")
    return folder


@pytest.fixture(scope="module")
def reference(subjects, tmp_path_factory) -> Path:
    """The output of one uninterrupted run."""
    output = tmp_path_factory.mktemp("reference") / "avatars"
    assert run(subjects, output) == ""
    return output


def test_each_subject_becomes_a_folder_with_avatar_images_and_report(reference, subjects):
    assert sorted(path.name for path in reference.iterdir() if path.name != ".fit") == [
        "synthetic-0-000000",
        "synthetic-0-000001",
    ]
    assert not list((reference / ".fit").iterdir()) and not leftovers(reference)
    head = load_head(HEAD)
    subject, source = (Subject.open(folder / "synthetic-0-000000") for folder in (reference, subjects))
    avatar = subject.load_avatar(head)
    assert avatar.params.num_frames == 4 and avatar.sh_degree == 1
    counts = avatar.faces.bincount(minlength=600)
    assert set(counts.tolist()) <= {0, *range(4, 16)}
    assert (subject.avatar_id, subject.about[:2]) == (source.avatar_id, source.about[:2])
    assert [frame.image.read_bytes() for frame in subject.frames()] == [f.image.read_bytes() for f in source.frames()]
    row = subject.frames()[0].load_params()
    assert torch.equal(row.expr[0], avatar.params.expr[0]) and torch.equal(row.shape, avatar.params.shape)


def test_the_report_says_how_good_it_is_and_how_it_was_made(reference):
    report = json.loads((reference / "synthetic-0-000000" / "fit_report.json").read_text())
    # The held-out camera sees a side that the two others do not.
    assert 10 < report["psnr"] < 60 and 0 < report["ssim"] <= 1 and 12 < report["psnr_timesteps"] < 60
    assert abs(report["psnr"] - report["psnr_tokenized"]) < 0.3 and report["n_bins"] == 1024
    faces = report["points_per_face"]
    assert 4 <= faces["min"] <= faces["median"] <= faces["max"] <= 15 and 0 <= faces["share_empty"] < 1
    assert sum(faces["histogram"]) == 600
    assert sum(n * count for n, count in enumerate(faces["histogram"])) == report["num_points"]
    assert report["iterations"] == STEPS and report["settings"]["density_constraint"] is True
    assert report["versions"]["torch"] == torch.__version__ and report["seconds"]["cpu"] > 0
    with Image.open(reference / "synthetic-0-000000" / "fit.png") as image:
        assert image.width > 400


def test_a_corpus_is_built_from_the_results_as_they_are(reference, tmp_path):
    words = ["--avatars", reference, "--head", HEAD, "--output_dir", tmp_path / "corpus", "--val_fraction", "0"]
    assert build_corpus([str(word) for word in words]) == 0
    corpus = load_corpus(tmp_path / "corpus")
    assert len(corpus.avatars("train")) == 2 and len(corpus.frames("train")) == 24
    assert set(corpus.avatars("train")["license"]) == {"CC0-1.0"}


def test_what_is_finished_is_kept_and_other_settings_are_refused(reference, subjects):
    before = {path: path.stat().st_mtime_ns for path in reference.rglob("*")}
    assert run(subjects, reference) == ""
    assert {path: path.stat().st_mtime_ns for path in reference.rglob("*") if path in before and path.is_file()} == {
        path: time for path, time in before.items() if path.is_file()
    }
    line = run(subjects, reference, "--iterations", "25")
    assert "fitted with other settings: iterations is 16, asked for 25" in line and "\n" not in line


def test_a_fit_that_is_told_to_stop_saves_and_goes_on_to_the_same_bytes(
    no_image, one, reference, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "avatars"

    def save(state: FitState, path: Path, identity: dict) -> None:
        kept_save(state, path, identity)
        os.kill(os.getpid(), signal.SIGTERM)

    kept_save = FitState.save
    with monkeypatch.context() as patch:
        patch.setattr(FitState, "save", save)
        assert run(one, output) == str(128 + signal.SIGTERM)
    said = capsys.readouterr().err
    assert "synthetic-0-000000 saved after 5 of 16 steps" in said
    assert "run the same command again" in said
    assert not (output / "synthetic-0-000000").exists()
    assert run(one, output) == ""
    assert content(output / "synthetic-0-000000") == content(reference / "synthetic-0-000000")
    assert not leftovers(output)


def test_a_fit_begun_with_other_settings_or_data_is_not_gone_on_with(one, tmp_path, monkeypatch):
    output = tmp_path / "avatars"
    monkeypatch.setattr(fit_avatars, "fit_report", lambda *_: exec("raise MemoryError('no memory')"))
    assert "MemoryError: no memory" in run(one, output)  # the fit itself is saved
    assert Job(one / "synthetic-0-000000", output).checkpoint.exists()
    assert "begun with other settings or data: seed is 0, asked for 1" in run(one, output, "--seed", "1")


def test_a_failed_subject_begins_anew_if_its_data_were_mended(one, tmp_path, monkeypatch, no_image):
    data, output = tmp_path / "subjects", tmp_path / "avatars"
    shutil.copytree(one, data)
    job = Job(data / "synthetic-0-000000", output)
    with monkeypatch.context() as patch:
        patch.setattr(fit_avatars, "fit_report", lambda *_: exec("raise MemoryError('no memory')"))
        run(data, output)
    before = saved_identity(job.checkpoint)
    path = data / "synthetic-0-000000" / "flame_param" / "00001.npz"
    arrays = dict(np.load(path))
    np.savez(path, **arrays | {"expr": arrays["expr"] * 0.5})
    seen = []
    monkeypatch.setattr(fit_avatars, "optimize", lambda fit, state, after: seen.append(state.iteration))
    run(data, output, "--retry_failed")
    assert seen == [0] and before["settings"]["iterations"] == STEPS


def test_one_bad_subject_is_recorded_and_the_others_are_fitted(no_image, subjects, tmp_path, reference):
    data, output = tmp_path / "subjects", tmp_path / "avatars"
    shutil.copytree(subjects, data)
    for path in (data / "synthetic-0-000000" / "images").iterdir():
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(path)
    said = run(data, output)
    assert "1 of 2 subjects failed" in said and "synthetic-0-000000" in said and "black" in said
    failed = json.loads((output / ".fit" / "synthetic-0-000000" / "failed.json").read_text())
    assert "black" in failed["reason"] and failed["attempts"] == 1 and failed["traceback"]
    assert content(output / "synthetic-0-000001") == content(reference / "synthetic-0-000001")
    # Not tried again unless asked for.
    shutil.rmtree(data / "synthetic-0-000000")
    shutil.copytree(subjects / "synthetic-0-000000", data / "synthetic-0-000000")
    assert "--retry_failed true" in run(data, output) and not (output / "synthetic-0-000000").exists()
    assert run(data, output, "--retry_failed", "true") == ""
    assert content(output / "synthetic-0-000000") == content(reference / "synthetic-0-000000")
    assert not list((output / ".fit").iterdir())


def test_nan_parameters_are_a_failure_with_a_reason(one, tmp_path):
    data = tmp_path / "subjects"
    shutil.copytree(one, data)
    path = data / "synthetic-0-000000" / "flame_param" / "00001.npz"
    arrays = dict(np.load(path))
    arrays["expr"][0, 0] = np.nan
    np.savez(path, **arrays)
    said = run(data, tmp_path / "avatars")
    assert "nan" in said and "00001.npz" in said


@pytest.mark.parametrize("where", ["checkpoint", "result"])
def test_a_disk_that_fills_leaves_nothing_half_written(no_image, one, reference, tmp_path, where, monkeypatch):
    resource = pytest.importorskip("resource")
    output, limits = tmp_path / "avatars", resource.getrlimit(resource.RLIMIT_FSIZE)

    def report(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if where == "result":
            patch.setattr(fit_avatars, "write_report", report)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        try:
            line = run(one, output)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert line.startswith("error: the disk is full") and "\n" not in line
    work = output / ".fit" / "synthetic-0-000000"
    assert not (output / "synthetic-0-000000").exists() and not (work / "failed.json").exists()
    assert [path.name for path in work.iterdir() if path.name.startswith(".")] == []
    if where == "checkpoint":
        return
    assert run(one, output) == ""
    assert content(output / "synthetic-0-000000") == content(reference / "synthetic-0-000000")


def test_a_process_waits_for_what_another_fits_and_takes_it_over_if_that_dies(
    no_image, subjects, reference, tmp_path, monkeypatch
):
    output = tmp_path / "avatars"
    job = Job(subjects / "synthetic-0-000001", output)
    job.work.mkdir(parents=True)
    # Dies a moment after this process has finished everything else.
    holding = (
        "import fcntl, os, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); print(flush=True)\n"
        "end = time.monotonic() + 60\n"
        "while not os.path.exists(sys.argv[2]) and time.monotonic() < end: time.sleep(0.01)\n"
        "time.sleep(0.5); print(os.path.exists(sys.argv[3]), flush=True)"
    )
    files = [job.work / "claim", output / "synthetic-0-000000", job.result]
    other = subprocess.Popen([sys.executable, "-c", holding, *map(str, files)], stdout=subprocess.PIPE, text=True)
    other.stdout.readline()
    monkeypatch.setattr(fit_avatars, "POLL_SECONDS", 0.05)
    monkeypatch.setenv("RANK", "1")  # begins with the second subject, which is taken
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(subjects, output) == ""
    said, _ = other.communicate(timeout=60)
    assert said.strip() == "False" and other.returncode == 0
    for name in ("synthetic-0-000000", "synthetic-0-000001"):
        assert content(output / name) == content(reference / name)


def test_a_subject_is_claimed_by_one_only(one, tmp_path):
    job = Job(one / "synthetic-0-000000", tmp_path)
    with job.claim() as first:
        with Job(job.source, tmp_path).claim() as second:
            assert first and not second
        job.clean()
    with job.claim() as again:
        assert again


def test_each_process_begins_with_its_share_and_knows_all():
    jobs = [Job(Path(f"/{name}"), Path("/output")) for name in "abcde"]
    orders = ["".join(job.source.name for job in order_of(jobs, process, 2)) for process in (0, 1)]
    assert orders == ["acebd", "bdace"]


def test_folders_that_hold_something_else_are_refused(one, tmp_path):
    (tmp_path / "avatars" / "synthetic-0-000000").mkdir(parents=True)
    assert "was not fitted" in run(one, tmp_path / "avatars")
    assert "no such folder" in run(tmp_path / "nowhere", tmp_path / "avatars")
    assert "did you mean" in run(one, tmp_path / "other", "--iteration_count", "3")
