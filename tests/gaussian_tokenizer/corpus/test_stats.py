"""Stats of a corpus against counts by hand, and the plot and the page that show them."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image
from scipy.stats import entropy

from gaussian_tokenizer.build_corpus import main
from gaussian_tokenizer.captures.subject import find_subjects
from gaussian_tokenizer.corpus.corpus import load_corpus
from gaussian_tokenizer.corpus.html_page import first_images
from gaussian_tokenizer.corpus.stats import compute_stats, stats_table
from gaussian_tokenizer.heads.procedural_head import build_procedural_head

HEAD = build_procedural_head(600)


@pytest.fixture(scope="module")
def corpus(tiny_corpus):
    return load_corpus(tiny_corpus)


@pytest.fixture(scope="module")
def stats(corpus):
    return compute_stats(corpus)


@pytest.fixture(scope="module")
def clouds(tiny_corpus):
    """positions (N, 3) and faces (N,) of every avatar, read from the folders."""
    found = [subject.load_avatar(HEAD).canonical_points() for subject in find_subjects(tiny_corpus.parent / "avatars")]
    return [(points["positions"].numpy(), points["faces"].numpy()) for points in found]


def test_counts_are_those_of_the_avatars(stats, clouds):
    sizes = sorted(len(faces) for _, faces in clouds)
    assert stats.subjects == {"train": 8, "validation": 4} and stats.frames == {"train": 32, "validation": 16}
    assert sorted(stats.num_points) == sizes and stats.num_tokens == sum(4 * size + 2 for size in sizes)
    counts = np.concatenate([np.bincount(faces, minlength=HEAD.n_faces) for _, faces in clouds])
    assert stats.points_per_face.tolist() == np.bincount(counts).tolist()
    assert stats.empty_faces == pytest.approx((counts == 0).mean())
    assert stats.licenses == {"CC0-1.0": 12} and stats.consents == {"synthetic, no person": 12}
    table = stats_table(stats)
    assert f"min {sizes[0]}, median {np.median(sizes):.0f}, max {sizes[-1]}" in table
    assert "12 (train 8, validation 4)" in table


def test_entropies_and_extent_are_those_of_the_binned_points(stats, clouds, corpus):
    positions, faces = (np.concatenate(parts) for parts in zip(*clouds))
    lo, hi = np.array(corpus.tokenizer.bounds)
    bins = np.floor((positions - lo) / (hi - lo) * 64).astype(int)
    expected = [entropy(np.unique(slot, return_counts=True)[1], base=2) for slot in (*bins.T, faces)]
    assert stats.slot_entropies == pytest.approx(expected)
    width = (hi - lo) / 64
    assert ((stats.extent[0] <= positions.min(0)) & (positions.min(0) - width < stats.extent[0])).all()
    assert ((stats.extent[1] >= positions.max(0)) & (positions.max(0) + width > stats.extent[1])).all()


def test_the_first_image_of_every_avatar_is_its_first_frame(corpus):
    found = dict(first_images(corpus, 100))
    for split in corpus.splits:
        frames = corpus.frames(split)
        for avatar_id, rows in corpus.frame_rows(split).items():
            np.testing.assert_array_equal(np.asarray(found.pop(avatar_id)), np.asarray(frames[rows[0]]["image"]))
    assert found == {}
    assert len(list(first_images(corpus, 3))) == 3


def test_the_command_writes_a_plot_and_a_page_that_stands_alone(corpus, tmp_path, capsys):
    options = ["--plot", str(tmp_path / "plot.png"), "--page", str(tmp_path / "page")]
    assert main(["stats", str(corpus.path), *options]) == 0
    assert "entropy of a slot" in capsys.readouterr().out
    assert Image.open(tmp_path / "plot.png").format == "PNG"
    page = (tmp_path / "page" / "index.html").read_text()
    assert not re.search(r"(src|href)='(?!data:)", page)
    images = [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"base64,([^']+)'", page)]
    assert [image.size for image in images][1] == (12 * 96, 96)  # the portraits, beside the plot
    assert np.asarray(images[1].convert("L")).std() > 10
    assert "CC0-1.0" in page and "synthetic, no person" in page and "synthetic-0-000003" in page


def test_names_on_the_page_are_text_and_not_html(corpus, stats, tmp_path):
    from dataclasses import replace

    from gaussian_tokenizer.corpus.html_page import write_page

    page = write_page(corpus, replace(stats, licenses={"<script>alert(1)</script>": 12}), tmp_path / "page.html")
    assert "<script>" not in page.read_text() and "&lt;script&gt;" in page.read_text()


def test_a_phone_scrolls_the_page_downwards_only(corpus, stats, tmp_path, width_on_a_phone):
    from dataclasses import replace

    from gaussian_tokenizer.corpus.html_page import write_page

    page = write_page(corpus, replace(stats, licenses={"a-name-without-a-space-" * 6: 12}), tmp_path / "page.html")
    assert width_on_a_phone(page) == 390
