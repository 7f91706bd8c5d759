"""Tables, page and images of a real run, and of results with every kind of cell."""

import copy
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from eval.reenactment.methods import copy_source, truth
from eval.reenactment.protocol import make_pairs
from eval.reenactment.published import TABLES
from eval.reenactment.report import PUBLISHED_WARNING, markdown, measured_block
from eval.reenactment.report_html import page
from eval.reenactment.report_images import draw_grid, save_pair_video


@pytest.fixture
def results(finished):
    return json.loads((finished / "results.json").read_text())


def with_numbers(results: dict) -> dict:
    """As if every network had been there."""
    results = copy.deepcopy(results)
    for number, (name, row) in enumerate(results["methods"].items()):
        for mode in results["modes"]:
            for key, entry in row[mode].get("metrics", {}).items():
                if "na" in entry:
                    value = 0.0 if name == "truth" else 1.0 + number
                    row[mode]["metrics"][key] = {
                        "value": value,
                        "low": value - 0.5,
                        "high": value + 0.5,
                        "frames": 9,
                        "subjects": 3,
                    }
    return results


def header(text: str) -> list[str]:
    return [
        cell.strip()
        for cell in next(line for line in text.splitlines() if line.startswith("| method")).split("|")[1:-1]
    ]


def test_the_table_has_the_layout_of_table_s1_with_psnr_ssim_and_coverage_in_front(results):
    names = [" ".join(cell.split(" ")[:2]) for cell in header(measured_block(results))[1:]]
    assert names[:3] == ["self PSNR", "self SSIM", "self Coverage"]
    assert names[3:] == list(TABLES[0].columns)


def test_a_missing_metric_has_its_reason_in_a_footnote(results):
    text = measured_block(results)
    row = next(line for line in text.splitlines() if line.startswith("| ours"))
    mark = re.search(r"n/a \((\w)\)", row)[1]
    assert f"\n({mark}) " in text and "lpips_weights" in text


def test_the_truth_is_infinite_in_psnr_and_absent_in_cross_reenactment(results):
    row = next(line for line in measured_block(results).splitlines() if line.startswith("| truth"))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[1:4] == ["∞", "1.000", "1.000"] and all(cell.startswith("—") for cell in cells[-4:])


def test_the_best_method_is_marked_and_the_truth_is_not_a_method(results):
    rows = [line for line in measured_block(with_numbers(results)).splitlines() if "**" in line]
    assert rows and not any(line.startswith("| truth") for line in rows)
    best = [line.count("**") // 2 for line in rows]
    assert sum(best) == 11  # one a column


def test_a_refused_row_lists_all_that_is_wrong(results, finished):
    results["methods"]["peer"] = {"about": "frames", "compared": True} | {
        mode: {"absent": [f"missing: {mode}/a/00001.png", f"extra: {mode}/b/00009.png"]} for mode in results["modes"]
    }
    text = measured_block(results)
    assert "refused, 2 problems" in text and "- peer, self: extra: self/b/00009.png" in text
    assert "extra: cross/b/00009.png" in page_of(results, finished)


def page_of(results: dict, folder: Path) -> str:
    """The page with the images and videos of a finished run."""
    return page(results, folder, sorted(folder.glob("videos/*/*")))


def test_published_numbers_are_separate_under_a_warning(results):
    text = markdown(results)
    measured, published = text.split("## Published numbers (not measured here)")
    assert PUBLISHED_WARNING in published and "| GAGAvatar" in published and "50.24" in published
    assert "GAGAvatar" not in measured and "50.24" not in measured


def test_the_page_needs_no_other_file_and_runs_nothing(results, finished):
    text = (finished / "report.html").read_text()
    sources = re.findall(r"(?:src|href)='([^']*)'", text)
    assert sources and all(source.startswith("data:") for source in sources)
    assert "<script" not in text and "http://" not in text and "https://" not in text and "prefers-color-scheme" in text
    assert len([s for s in sources if s.startswith(("data:video/mp4", "data:image/gif"))]) == 6


def test_every_tag_of_the_page_is_closed(results, finished):
    open_tags: list[str] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "img", "circle", "line"):
                open_tags.append(tag)

        def handle_endtag(self, tag):
            if tag not in ("circle", "line"):
                assert open_tags.pop() == tag

    for made in (results, with_numbers(results)):
        Tags().feed(page_of(made, finished))
        assert open_tags == []


def test_names_from_outside_are_escaped_on_the_page(results, finished):
    results["methods"]["<b>peer"] = results["methods"]["ours"] | {"about": "<script>alert(1)</script>"}
    text = page_of(results, finished)
    assert "<script>" not in text and "&lt;b&gt;peer" in text


def test_a_phone_scrolls_the_page_downwards_only(results, finished, tmp_path, width_on_a_phone):
    name = "a-name-without-a-space-" * 6
    results["run"]["model_name"] = name
    results["methods"]["peer"] = {"about": name, "compared": True} | {
        mode: {"absent": [f"missing: {mode}/{name}.png"]} for mode in results["modes"]
    }
    path = tmp_path / "report.html"
    path.write_text(page_of(with_numbers(results), finished))
    assert width_on_a_phone(path) == 390


def test_intervals_are_drawn_where_there_are_any(results, finished):
    assert page(with_numbers(results), finished, []).count("<svg") > page(results, finished, []).count("<svg") > 0


def test_the_grid_has_a_panel_for_every_pair_and_method(finished):
    with Image.open(finished / "grid.png") as grid:
        width, height = grid.size
    assert width == (5 + 5) * (32 + 4) + 2 * 40 and height == 28 + 3 * (32 + 22)


def test_a_video_becomes_a_gif_where_ffmpeg_is_missing(clips, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    pair = make_pairs(clips, "self", 0)[0]
    path = save_pair_video(tmp_path / "videos" / "self" / pair.name, pair, [truth(), copy_source()])
    with Image.open(path) as video:
        assert path.suffix == ".gif" and video.n_frames == 3 and video.size == (3 * 36, 54)
    draw_grid(tmp_path / "grid.png", [pair], [truth()])
    assert (tmp_path / "grid.png").is_file()
