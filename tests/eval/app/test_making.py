"""An avatar in steps: the same one as the pipeline makes, its points as they come, its files, and an end when it is stopped."""

import threading
import zipfile
from threading import Event

import numpy as np
import pytest
import torch
from PIL import Image

from eval.app.making import FPS, NUM_FRAMES, VIDEO_SIZE, Clouds, Stopped, make
from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.avatars.ply import read_gaussian_ply
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.rendering.cameras import default_camera

SETTINGS = dict(candidates=2, seed=3, temperature=0.9, refine_steps=0, max_points=12)


@pytest.fixture
def portrait(bench_head):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    params = HeadParameters.zeros(bench_head.n_shape, bench_head.n_expression)
    return Image.fromarray(pixels), params, default_camera(bench_head, 32, 32)


def test_the_last_step_has_the_files_of_the_avatar_that_the_pipeline_makes(
    bench_pipeline, bench_head, portrait, tmp_path
):
    *steps, last = make(bench_pipeline, portrait, tmp_path, Event(), **SETTINGS)
    assert all(step.files == () for step in steps) and last.share == 1
    assert [path.name for path in last.files] == ["talking.gif", "talking.html", "avatar.zip", "avatar.ply"]
    image, params, camera = portrait
    expected = bench_pipeline(image, params, camera=camera, **SETTINGS)
    zipfile.ZipFile(tmp_path / "avatar.zip").extractall(tmp_path)
    found = GaussianAvatar.load(tmp_path / "avatar", head=bench_head)
    assert torch.equal(found.positions, expected.positions) and torch.equal(found.faces, expected.faces)
    assert len(read_gaussian_ply(tmp_path / "avatar.ply", with_faces=False).positions) == len(expected)
    with Image.open(tmp_path / "talking.gif") as gif:
        assert (gif.n_frames, gif.size) == (NUM_FRAMES, (VIDEO_SIZE, VIDEO_SIZE))
        assert gif.info["duration"] == pytest.approx(1000 / FPS, abs=5)


def test_the_points_on_the_way_are_those_of_the_sequences(bench_pipeline, portrait):
    clouds = Clouds(bench_pipeline.tokenizer, 3, Event())
    inputs = bench_pipeline.inputs([portrait[0]], [portrait[1]])
    torch.manual_seed(0)
    prompts = torch.full((3, 1), bench_pipeline.tokenizer.bos_token_id)
    condition = bench_pipeline.point_model.select_inputs(inputs)
    ids = bench_pipeline.point_model.generate(prompts, **condition, streamer=clouds, max_points=9)
    for sequence, positions in zip(ids, clouds.positions):
        decoded = bench_pipeline.tokenizer.decode(sequence, errors="truncate")
        np.testing.assert_array_equal(np.array(positions), decoded["positions"])
    heights = np.array([-0.3, -0.1, 0.0, 0.1])
    clouds.positions, clouds.ended = [[], [np.array((0, -0.05, 0))], [np.array((0, -0.2, 0))]], [False, False, True]
    assert clouds.shares(heights) == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("how", ["stop", "close"])
def test_generation_ends_when_it_is_stopped_or_nobody_listens(how, bench_pipeline, portrait, tmp_path, monkeypatch):
    """Under a limit of points that takes minutes; without a pause between two pictures."""
    monkeypatch.setattr("eval.app.making.INTERVAL", 0.0)
    monkeypatch.setattr("eval.app.making.BUSY", 0)
    before, stop = threading.active_count(), Event()
    steps = make(bench_pipeline, portrait, tmp_path, stop, **SETTINGS | {"max_points": 20_000, "min_points": 20_000})
    next(steps)
    if how == "close":
        steps.close()
    else:
        stop.set()
        with pytest.raises(Stopped):
            list(steps)
    assert threading.active_count() == before and not any(tmp_path.iterdir())


def test_what_the_pipeline_refuses_reaches_the_page(bench_pipeline, portrait, tmp_path):
    with pytest.raises(ValueError, match="temperature"):
        list(make(bench_pipeline, portrait, tmp_path, Event(), **SETTINGS | {"temperature": -1.0}))
