"""Recipes: their measures against independent ones, the smallest one, and the documentation's examples on what it leaves."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from paths import ROOT
from PIL import Image
from scipy.spatial import cKDTree

from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.heads.head_parameters import FRAME_KEYS, HeadParameters
from gaussian_tokenizer.heads.procedural_head import build_procedural_head
from gaussian_tokenizer.rendering.cameras import Cameras
from gaussian_tokenizer.rendering.splatting import render
from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer
from modeling import AvatarPipeline, GaussianDecoder, GaussianDecoderConfig, PointillistForCausalLM
from training.common.arguments import read_yaml
from training.common.rows import HEAD_COLUMNS
from training.decoder.subjects import SubjectRows, mean_image_metrics
from training.recipe.__main__ import RECIPES, augmented, change, check, flags
from training.recipe.evaluation import generate
from training.recipe.report import chamfer, image_metrics, judge, true_frames


@pytest.mark.parametrize("sizes", [(1, 1), (1, 40), (300, 120), (50, 50)])
def test_chamfer_is_the_mean_of_nearest_neighbors_both_ways(sizes):
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


def sequence():
    """22 ids of five points: bos, (x, y, z, face) five times, eos."""
    random = np.random.default_rng(0)
    cloud = {"positions": random.uniform(-1, 1, (5, 3)).astype(np.float32), "faces": random.integers(0, 7, 5)}
    ids = TOKENIZER(cloud)["input_ids"].astype(np.int64)
    assert len(ids) == 22
    return ids


def changed(position, value):
    ids = sequence()
    ids[position] = value
    return ids


def swapped():
    ids = sequence()
    assert (ids[1:9] != np.roll(ids[1:9], 4)).all()
    ids[1:5], ids[5:9] = ids[5:9].copy(), ids[1:5].copy()
    return ids


@pytest.mark.parametrize(
    ("ids", "points", "invalid"),
    [
        (sequence(), 5, 0),
        (np.append(sequence(), [TOKENIZER.pad_token_id] * 3), 5, 0),
        (sequence()[:-1], 5, 0),  # stopped by the limit of points
        (sequence()[:-3], 4, 2),  # stopped in mid-point: x and y of no point
        (changed(6, 8), 1, 16),  # a face where a y should be: the rest is lost
        (changed(4, 3), 0, 20),
        (changed(20, 99), 4, 4),
        (swapped(), 5, 8),  # two points that are not in order
        (np.insert(sequence(), 9, TOKENIZER.eos_token_id), 2, 13),  # what comes after the end
        (np.array([TOKENIZER.bos_token_id, TOKENIZER.eos_token_id]), 0, 0),
    ],
)
@pytest.mark.filterwarnings("ignore:.*kept the")
def test_every_token_that_the_tokenizer_would_not_have_given_counts(ids, points, invalid):
    kept, found = judge(TOKENIZER, ids)
    assert (len(kept["faces"]), found) == (points, invalid)
    assert set(kept) == {"positions", "faces"}


@pytest.fixture(scope="module")
def miniature(tmp_path_factory, datasets_cache) -> tuple[Path, dict[str, str], str]:
    """A folder in which a tiny demo left `outputs/demo`, the environment that it ran in, and what it printed."""
    folder = tmp_path_factory.mktemp("miniature")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(datasets_cache), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    command = [sys.executable, "-m", "training.recipe", "debug", "--output_dir", str(folder / "outputs" / "demo")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, environment, done.stdout


@pytest.mark.slow
def test_a_miniature_of_the_demo_leaves_its_report_and_images(miniature):
    folder, _, printed = miniature
    output = folder / "outputs" / "demo"
    assert all(f"=== {step}/5" in printed for step in range(1, 6))
    report = json.loads((output / "report.json").read_text())
    numbers = ("num_tokens", "train_loss_first", "train_loss_last", "heldout_nll", "unigram_nll", "uniform_nll")
    assert report["num_subjects"] == 6 and all(report[name] > 0 for name in numbers)
    assert len(report["generated"]) == 2
    for cloud in report["generated"]:
        assert set(cloud) >= {"avatar_id", "num_points", "invalid_tokens", "chamfer_own", "chamfer_others"}
        assert cloud["invalid_tokens"] == 0 and cloud["num_points"] > 0
        assert 0 < cloud["chamfer_own"] < 1 and 0 < cloud["chamfer_others"] < 1
        for kind in ("heldout", "reencoded", "mean_image"):
            assert 0 < cloud[f"psnr_{kind}"] < 60 and -1 < cloud[f"ssim_{kind}"] < 1
        assert GaussianAvatar.load(output / "generated" / cloud["avatar_id"]).faces.max() < 600
    for kind in ("heldout", "reencoded", "mean_image"):
        assert report[f"psnr_{kind}"] == pytest.approx(
            np.mean([cloud[f"psnr_{kind}"] for cloud in report["generated"]])
        )
    for name in ("generated.png", "avatars.png"):
        assert min(Image.open(output / "images" / name).size) > 100
    assert Image.open(output / "images" / "motion.gif").n_frames > 20
    pipeline = AvatarPipeline.from_pretrained(output / "pipeline")
    assert len(pipeline(output / "portrait.png", seed=0, max_points=5)) >= 1
    assert (output / "corpus" / "corpus.json").is_file()
    bench = json.loads((output / "bench" / "results.json").read_text())
    assert len(bench["subjects"]) == 2 and bench["methods"]["ours"]["self"]["metrics"]["psnr"]["frames"] == 30
    assert "copy-source" in printed and (output / "bench" / "report.html").is_file()
    assert (output / "model" / "model.safetensors").is_file() and (output / "model" / "processor_config.json").is_file()


@pytest.mark.slow
def test_a_recipe_that_is_run_again_does_nothing_again_and_another_one_is_refused(miniature):
    folder, environment, _ = miniature
    output = folder / "outputs" / "demo"
    before = {
        path: path.stat().st_mtime_ns
        for part in ("corpus", "model", "decoder", "bench")
        for path in (output / part).rglob("*")
    }
    command = [sys.executable, "-m", "training.recipe", "debug", "--output_dir", str(output)]
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0 and again.stdout.count("done before") == 6
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    other = subprocess.run(
        [*command, "--seed", "1"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert other.returncode == 1 and "begun with another recipe" in other.stderr


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_options_of_every_recipe_exist(path):
    check(read_yaml(path), str(path))


def test_options_of_the_command_line_replace_those_of_the_recipe():
    recipe = {"head": "procedural:600", "pretrain": {"max_steps": 5, "level": "token"}, "bench": {"views": 2}}
    change(
        recipe,
        ["--pretrain.max_steps", "7", "--seed=3", "--bench", "null", "--synthesize.bounds", "[[0, 0, 0], [1, 1, 1]]"],
    )
    assert recipe == {
        "head": "procedural:600", "pretrain": {"max_steps": 7, "level": "token"}, "bench": None, "seed": 3,
        "synthesize": {"bounds": [[0, 0, 0], [1, 1, 1]]},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pretrian.max_steps", "7"], "did you mean 'pretrain'"),
        (["--pretrain.max_step", "7"], "pretrain has no option 'max_step'; did you mean 'max_steps'"),
        (["--train_decoder.modes", "7"], "train_decoder has no option 'modes'; did you mean 'mode'"),
        (["--sed", "1"], "no section or option 'sed'; did you mean 'seed'"),
        (["--pretrain.max_steps"], "has no value"),
        (["pretrain.max_steps", "1"], "expected --option"),
        (["--seed", "[1"], "not a value"),
        (["--synthesize", "3"], "synthesize is 3, expected options and their values"),
        (["--bench", "3"], "bench is 3, expected options and their values"),
        (["--synthesize.view", "3"], "synthesize has no option 'view'; did you mean 'views'"),
        (["--bench.timestep", "3"], "bench has no option 'timestep'; did you mean 'timesteps'"),
        (["--train_decoder.output_dir", "x"], "train_decoder has output_dir, which the recipe sets"),
        (["--bench.head", "procedural:2000"], "bench has head, which the recipe sets"),
        (["--bench", "{views: 2}"], "bench lacks num_subjects"),
        (["--seed", "77"], "seed 77 makes the subjects of synthesize and those of bench"),
        (["--num_generated", "0"], "num_generated is 0, expected a number from 1 on"),
    ],
)
def test_a_mistake_in_a_recipe_is_named_before_anything_runs(words, message):
    recipe = read_yaml(RECIPES / "debug.yaml")
    with pytest.raises(ValueError, match=re.escape(message)):
        change(recipe, words)
        check(recipe, "debug.yaml")


def test_options_become_words_of_each_kind_of_command():
    options = {"config": "demo", "plain": True, "overwrite": False, "num_test": None, "views": 2}
    assert flags(options) == ["--plain", "True", "--overwrite", "False", "--views", "2"]
    assert flags(options, switches=True) == ["--plain", "--views", "2"]


def test_a_config_that_augments_portraits_counts_unless_the_section_says_otherwise(tmp_path):
    (tmp_path / "mine.yaml").write_text("augment_portraits: true\n")
    section = {"config": str(tmp_path / "mine.yaml")}
    assert augmented(section) and augmented({"augment_portraits": True})
    assert not augmented(section | {"augment_portraits": False})
    assert not augmented({"config": "decoder_demo"}) and not augmented({})


EXAMPLES = [
    pytest.param(example[1], id=f"{page.name}:{text[: example.start()].count(chr(10)) + 2}")
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for text in [page.read_text()]
    for example in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
]


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES)
def test_every_python_example_of_the_documentation_runs_by_itself_after_the_demo(example, miniature):
    folder, environment, _ = miniature
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def subjects(corpus) -> SubjectRows:
    return SubjectRows(corpus, "validation", HEAD_COLUMNS)


def test_a_decoder_that_reads_the_portrait_is_given_it(corpus, point_model, tmp_path):
    head, points = build_procedural_head(600), PointillistForCausalLM.from_pretrained(point_model)
    config = GaussianDecoderConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, point_feature_size=32, init_scale=0.03, max_scale=0.06,
        init_opacity=0.9, vision_config=points.config.vision_config, read_portrait=True, portrait_channels=4,
    )  # fmt: skip
    report = generate(AvatarPipeline(corpus.tokenizer, points, GaussianDecoder(config), head), corpus, 2, 0, tmp_path)
    assert len(report["generated"]) == 2 and np.isfinite(report["psnr_heldout"] + report["psnr_reencoded"])


def test_image_metrics_are_those_of_the_drawn_frames(subjects, tiny_corpus):
    head = build_procedural_head(600)
    avatar = GaussianAvatar.load(tiny_corpus.parent / "avatars" / str(subjects.rows.avatars[0]["avatar_id"]), head=head)
    frames = true_frames(subjects, 0)
    found = image_metrics(avatar, frames)
    errors = []
    for i in range(4):
        params = HeadParameters(shape=frames["shape"][0], **{name: frames[name][0, i : i + 1] for name in FRAME_KEYS})
        camera = Cameras(frames["viewmats"][0, i : i + 1], frames["Ks"][0, i : i + 1], 56, 56)
        image = render(avatar.posed(params), camera, background=1.0).image[0].numpy()
        color, alpha = frames["images"][0, i, ..., :3].numpy(), frames["images"][0, i, ..., 3:].numpy()
        errors.append(10 * np.log10(1 / ((image - (color * alpha + 1 - alpha)) ** 2).mean()))
    assert found[0] == pytest.approx(np.mean(errors), rel=1e-4)


def test_a_mean_image_that_is_the_true_image_is_perfect_and_those_of_others_are_as_good_as_they_are(subjects):
    frames = true_frames(subjects, 0)["images"][0]
    color, alpha = frames.split((3, 1), -1)
    white = color * alpha + 1 - alpha
    rows = list(subjects.frame_rows(0))
    cameras = subjects.frames[rows]["camera"]
    first = {camera: cameras.index(camera) for camera in set(cameras)}  # one frame of each camera
    means = {camera: white[i] for camera, i in first.items()}
    found = mean_image_metrics(means, subjects, [rows[i] for i in first.values()])
    assert (found[0] > 100).all() and (found[1] > 1 - 1e-6).all()
    black = {camera: white[0] * 0 for camera in means}
    expected = [-10 * np.log10(float((image**2).mean())) for image in white]
    assert mean_image_metrics(black, subjects, rows)[0].tolist() == pytest.approx(expected, rel=1e-4)
    del means[cameras[0]]
    assert len(mean_image_metrics(means, subjects, rows)[0]) == sum(camera != cameras[0] for camera in cameras)
