"""The demo: its measures against independent ones, and a miniature of the whole road."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.spatial import cKDTree

from gaussian_tokenizer.processing_gaussian_tokenizer import GaussianTokenizer
from training.demo_report import chamfer, judge

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("sizes", [(1, 1), (1, 40), (300, 120), (50, 50)])
def test_chamfer_is_the_mean_of_nearest_neighbours_both_ways(sizes):
    random = np.random.default_rng(0)
    a, b = (random.normal(0, 0.1, (n, 3)).astype(np.float32) for n in sizes)
    expected = (cKDTree(b).query(a)[0].mean() + cKDTree(a).query(b)[0].mean()) / 2
    assert chamfer(a, b) == pytest.approx(expected, rel=1e-6)
    assert chamfer(b, a) == pytest.approx(expected, rel=1e-6)


def test_chamfer_is_nothing_to_itself_and_infinite_to_no_cloud():
    a = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    assert chamfer(a, a) == pytest.approx(0, abs=1e-7)
    assert chamfer(a, a[:0]) == chamfer(a[:0], a) == float("inf")


TOKENIZER = GaussianTokenizer(n_bins=8, n_faces=7, bounds=[[-1, -1, -1], [1, 1, 1]])


def sentence():
    """22 ids of five points: bos, (x, y, z, face) five times, eos."""
    random = np.random.default_rng(0)
    cloud = {"positions": random.uniform(-1, 1, (5, 3)).astype(np.float32), "faces": random.integers(0, 7, 5)}
    ids = TOKENIZER(cloud)["input_ids"].astype(np.int64)
    assert len(ids) == 22
    return ids


def changed(position, value):
    ids = sentence()
    ids[position] = value
    return ids


def swapped():
    ids = sentence()
    assert (ids[1:9] != np.roll(ids[1:9], 4)).all()
    ids[1:5], ids[5:9] = ids[5:9].copy(), ids[1:5].copy()
    return ids


@pytest.mark.parametrize(
    ("ids", "points", "invalid"),
    [
        (sentence(), 5, 0),
        (np.append(sentence(), [TOKENIZER.pad_token_id] * 3), 5, 0),
        (sentence()[:-1], 5, 0),  # stopped by the limit of points
        (sentence()[:-3], 4, 2),  # stopped in mid-point: x and y of no point
        (changed(6, 8), 1, 16),  # a face where a y should be: the rest is lost
        (changed(4, 3), 0, 20),
        (changed(20, 99), 4, 4),
        (swapped(), 5, 8),  # two points that are not in order
        (np.insert(sentence(), 9, TOKENIZER.eos_token_id), 2, 13),  # what comes after the end
        (np.array([TOKENIZER.bos_token_id, TOKENIZER.eos_token_id]), 0, 0),
    ],
)
@pytest.mark.filterwarnings("ignore:.*kept the")
def test_every_token_that_the_tokenizer_would_not_have_written_counts(ids, points, invalid):
    kept, found = judge(TOKENIZER, ids)
    assert (len(kept["faces"]), found) == (points, invalid)
    assert set(kept) == {"positions", "faces"}


@pytest.mark.slow
def test_a_miniature_of_the_demo_leaves_its_report_and_pictures(tmp_path, datasets_cache):
    output = tmp_path / "demo"
    command = [sys.executable, "-m", "training.demo", "--output_dir", output, "--config", "training/configs/debug.yaml"]
    command += ["--num_subjects", 6, "--num_heldout", 2, "--num_generated", 2, "--image_size", 28, "--n_bins", 16]
    command += ["--max_steps", 2, "--save_steps", 2, "--num_threads", 1]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(datasets_cache), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    done = subprocess.run(
        [str(word) for word in command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert all(f"=== {step}/4" in done.stdout for step in (1, 2, 3, 4))
    report = json.loads((output / "report.json").read_text())
    numbers = ("num_tokens", "train_loss_first", "train_loss_last", "heldout_nll", "unigram_nll", "uniform_nll")
    assert report["num_subjects"] == 6 and all(report[name] > 0 for name in numbers)
    assert len(report["generated"]) == 2
    for cloud in report["generated"]:
        assert set(cloud) >= {"avatar_id", "num_points", "invalid_tokens", "chamfer_own", "chamfer_others"}
        assert cloud["invalid_tokens"] == 0 and cloud["num_points"] > 0
        assert 0 < cloud["chamfer_own"] < 1 and 0 < cloud["chamfer_others"] < 1
        assert (output / "pictures" / f"{cloud['avatar_id']}.png").is_file()
    assert min(Image.open(output / "pictures" / "generated.png").size) > 100
    assert (output / "corpus" / "corpus.json").is_file()
    assert (output / "model" / "model.safetensors").is_file() and (output / "model" / "processor_config.json").is_file()
