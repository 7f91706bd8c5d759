"""The bench as a user runs it: everything it writes, killed and started again, peers beside it, and what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bench import run_bench
from paths import ROOT

from eval import reenactment_bench
from gaussian_tokenizer.avatars.avatar import GaussianAvatar

SCRIPT = ROOT / "eval" / "reenactment_bench.py"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def but_for_times(results: dict) -> str:
    return json.dumps({key: value for key, value in results.items() if key not in ("speed", "seconds")})


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def refused(words: list[str], output: Path, *more: str, capsys) -> str:
    """What a run that ends with an error says."""
    with pytest.raises(SystemExit) as stopped:
        run_bench(words, output, *more)
    assert stopped.value.code == 1
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.newest
def test_a_run_writes_numbers_table_grid_videos_and_page(finished):
    names = {path.name for path in finished.iterdir()}
    assert {"results.json", "results.md", "grid.png", "report.html", "videos", "avatars", "frames"} <= names
    assert len(list((finished / "videos").rglob("*.mp4"))) == 6
    results = results_of(finished)
    assert list(results["methods"]) == ["truth", "ours", "copy-source", "mean-image"]
    assert results["num_pairs"] == {"self": 3, "cross": 3} and results["image"] == [32, 32]
    truth, ours = (results["methods"][name]["self"] for name in ("truth", "ours"))
    assert truth["metrics"]["psnr"]["value"] == "inf" and truth["metrics"]["ssim"]["value"] == pytest.approx(
        1, abs=1e-9
    )
    assert 0 < ours["metrics"]["psnr"]["low"] <= ours["metrics"]["psnr"]["value"] <= ours["metrics"]["psnr"]["high"]
    frames = [value for pair in ours["pairs"].values() for value in pair["frames"]["psnr"]]
    assert len(frames) == 9 and sum(frames) / 9 == pytest.approx(ours["metrics"]["psnr"]["value"])
    speed = results["speed"]
    assert speed["seconds_per_avatar"] > 0 and speed["frames_per_second"] > 0 and speed["peak_memory_gib"] > 0.05
    assert GaussianAvatar.load(finished / "avatars" / "ours" / results["subjects"][0]).params is not None


def test_the_same_seed_gives_the_same_results_to_the_last_digit(bench_words, finished, tmp_path):
    again = run_bench(bench_words, tmp_path / "again")
    assert but_for_times(again) == but_for_times(results_of(finished))
    for path in sorted((finished / "frames").rglob("*.png")):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(finished)).read_bytes()


def test_a_killed_run_goes_on_and_ends_with_the_same_results(bench_words, finished, tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, str(SCRIPT), *bench_words, "--output_dir", str(output)]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 120
        while not list(output.glob("frames/ours/self/*/00001.png")) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        errors = process.communicate()[1].decode()
    assert process.returncode == -signal.SIGKILL, errors
    assert not (output / "results.json").exists()
    made = {path: path.stat().st_mtime_ns for path in output.glob("avatars/ours/*/point_cloud.ply")}
    assert made
    assert but_for_times(run_bench(bench_words, output)) == but_for_times(results_of(finished))
    assert {path: path.stat().st_mtime_ns for path in made} == made


def test_frames_of_a_peer_become_a_row_and_nothing_is_drawn_again(bench_words, finished, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    peer, broken = finished / "frames" / "ours", tmp_path / "broken"  # the layout is that of the run's own frames
    shutil.copytree(peer, broken)
    next(broken.glob("self/*/00002.png")).unlink()
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*/ours/**/*.png")}
    results = run_bench(bench_words, output, "--compare", f"twin={peer}", "--compare", f"broken={broken}")
    twin, ours = (results["methods"][name]["self"]["metrics"] for name in ("twin", "ours"))
    assert twin == ours | {"coverage": {"na": "the frames have no alpha"}} and 0 <= ours["coverage"]["value"] < 1
    assert (
        len(results["methods"]["broken"]["self"]["absent"]) == 1 and "metrics" in results["methods"]["broken"]["cross"]
    )
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "missing: self/" in (output / "results.md").read_text()


def test_the_ablation_without_points_gets_a_row(bench_words, flame_position, tmp_path):
    flame_position.save_pretrained(tmp_path / "decoder")
    words = [*bench_words, "--mode", "self", "--num_subjects", "2", "--num_frames", "2"]
    results = run_bench(words, tmp_path / "out", "--flame_position", str(tmp_path / "decoder"))
    assert list(results["methods"]) == ["truth", "ours", "flame_position", "copy-source", "mean-image"]
    row = results["methods"]["flame_position"]["self"]["metrics"]["psnr"]
    assert row["frames"] == 2 and row["value"] != results["methods"]["ours"]["self"]["metrics"]["psnr"]["value"]


def test_a_folder_of_another_run_is_refused_with_what_differs(bench_words, finished, capsys):
    before = (finished / "results.json").read_bytes()
    said = refused([*bench_words, "--seed", "4"], finished, capsys=capsys)
    assert "holds another run (seed was 3, is 4)" in said and (finished / "results.json").read_bytes() == before


def test_a_folder_of_something_else_is_left_alone(bench_words, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("almost done")
    assert "neither empty nor an output folder of this bench" in refused(bench_words, tmp_path, capsys=capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_one_subject_in_cross_mode_is_refused_before_anything_is_written(bench_words, tmp_path, capsys):
    said = refused([*bench_words, "--num_subjects", "1"], tmp_path / "out", capsys=capsys)
    assert "needs two subjects" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--compare", "peer"], "expected NAME=DIR"),
        (["--compare", "ours=."], "the name is taken"),
        (["--compare", "peer=nowhere"], "no such folder"),
        (["--num_frames", "0"], "expected at least 1"),
        (["--num_references", "2"], "does not read the portrait (read_portrait is False)"),
        (["--flame_position", "nowhere"], "--flame_position nowhere"),
        (["--camera", "5"], "has no camera 5"),
        (["--dataset", "nowhere"], "nowhere"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(bench_words, tmp_path, capsys, words, said):
    assert said in refused([*bench_words, *words], tmp_path / "out", capsys=capsys)
    assert not (tmp_path / "out").exists()


def test_a_decoder_of_another_mode_is_not_the_ablation(bench_words, pipeline_folder, tmp_path, capsys):
    said = refused(
        [*bench_words, "--flame_position", str(pipeline_folder / "gaussian_decoder")], tmp_path / "o", capsys=capsys
    )
    assert "its mode is 'full', expected 'flame_position'" in said


def test_the_protocol_is_exported_and_nothing_else_is_done(bench_words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", *bench_words, "--export_protocol", str(tmp_path / "protocol")])
    reenactment_bench.main()
    pairs = json.loads((tmp_path / "protocol" / "protocol.json").read_text())["pairs"]
    assert len(pairs) == 6 and "6 pairs of 3 subjects" in capsys.readouterr().out


def test_help_answers_and_names_the_flags(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["reenactment_bench.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        reenactment_bench.main()
    printed = capsys.readouterr().out
    assert stopped.value.code == 0
    for flag in (
        "--model",
        "--dataset",
        "--mode",
        "--output_dir",
        "--compare",
        "--export_protocol",
        "--seed",
        "--device",
    ):
        assert flag in printed
