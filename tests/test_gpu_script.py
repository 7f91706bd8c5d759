"""`benchmarks/gpu.py` at toy size on the CPU, so that it does not break unseen between two machines with a GPU."""

import json
import math
import subprocess
import sys

import pytest
from paths import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        import gpu

        yield gpu


def parts() -> list[str]:
    names = (
        "tests",
        "splatting",
        "attention",
        "decoding",
        "decoding_points",
        "decoding_mesh",
        "training",
        "decoder",
        "animate",
    )
    return [*names, "fit", "zero2"]


@pytest.mark.slow
@pytest.mark.parametrize("part", parts())
def test_every_part_measures_all_rows_of_the_table(gpu, part, tmp_path):
    gpu.measure(part, "cpu", "toy", tmp_path)
    report = json.loads((tmp_path / f"{part}.json").read_text())
    assert report["finished"] and report["error"] is None
    assert {"machine", "versions", "commit"} <= report.keys()
    rows = {row["what"]: row for row in report["rows"]}
    assert {what for of, what in gpu.EXPECTED if of == part} <= rows.keys()
    allowed = ("needs CUDA", "compiled on CUDA only", "skipped")
    for row in report["rows"]:
        assert "note" not in row or any(note in row["note"] for note in allowed), row
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float)), row
    if part == "splatting":
        assert all(row["color"] < 1e-5 for row in report["rows"] if "color" in row)
    if part.startswith("decoding_"):
        assert rows["batch 1, compiled, a whole cloud"]["points"] == 100
    assert "| not measured yet |" in gpu.results_table(tmp_path)  # the other parts


def test_parts_are_those_of_the_table(gpu):
    assert tuple(parts()) == gpu.PARTS


def run(output, *more: str) -> subprocess.CompletedProcess:
    words = ["--size", "toy", "--device", "cpu", "--parts", "decoder", "--output_dir", str(output), *more]
    return subprocess.run([sys.executable, str(SCRIPT), *words], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_a_part_that_is_killed_is_named_and_tried_again_and_a_finished_one_is_kept(tmp_path):
    killed = run(tmp_path, "--limit", "0.1")
    assert killed.returncode == 1 and "| decoder | error | killed after 0.1 seconds |" in killed.stdout
    finished = run(tmp_path)
    assert finished.returncode == 0 and "decoder | error" not in finished.stdout
    written = (tmp_path / "decoder.json").read_bytes()
    assert "finished before" in run(tmp_path).stdout
    assert (tmp_path / "decoder.json").read_bytes() == written


def test_the_table_in_the_docs_is_replaced_and_the_rest_kept(gpu, tmp_path, monkeypatch):
    page = tmp_path / "performance.md"
    page.write_text("before\n<!-- gpu -->\nold\n<!-- /gpu -->\nafter\n")
    monkeypatch.setattr(gpu, "DOCS", page)
    gpu.write_docs(gpu.results_table(tmp_path))
    text = page.read_text()
    assert text.startswith("before\n<!-- gpu -->\n\nNot measured yet.") and text.endswith("|\n\n<!-- /gpu -->\nafter\n")
    assert "old" not in text and text.count("not measured yet") == len(gpu.EXPECTED)
    page.write_text("no markers")
    with pytest.raises(ValueError, match="<!-- gpu -->"):
        gpu.write_docs("")
