"""Numbers of frames, means over them with intervals, what is missing and what is not found."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from bench import noise, repainted

from eval.metrics.functional import frechet_distance
from eval.networks.faces import FaceReading
from eval.networks.weights import Missing
from eval.reenactment.protocol import make_pairs
from eval.reenactment.scores import (
    FeatureFiles,
    fid_with_interval,
    frame_values,
    mean_with_interval,
    missing_networks,
    resample,
    summarize,
)

ABSENT = Missing("a network", "not installed: it", "pip install it")


class Corners:
    """A stand-in for a network: three colors of every image, and the weights it says it has."""

    def __init__(self, weights: str = "first", blind: bool = False):
        self.weights, self.blind, self.seen = weights, blind, 0

    @property
    def about(self):
        return {"name": "corners", "package": "none", "version": "1", "weights": self.weights, "sha256": "0"}

    def __call__(self, images, others=None):
        self.seen += len(images)
        return images[:, ::16, ::16].reshape(len(images), -1).astype(float) + 1

    def read_face(self, images):
        self.seen += len(images)
        landmarks = images[:, :4, :2, :2].mean(2).astype(float)
        rotations = np.repeat(np.eye(3)[None], len(images), 0)
        reading = FaceReading(landmarks, rotations, images[:, 0, :5, 0].astype(float))
        if self.blind:
            for values in (reading.landmarks, reading.rotations, reading.expressions):
                values[0] = np.nan
        return reading


class Face(Corners):
    __call__ = Corners.read_face


def networks(**given):
    names = ("lpips", "inception", "face", "clip", "arcface")
    return SimpleNamespace(**{name: given.get(name, ABSENT) for name in names})


def everything(**changes):
    own = dict(inception=Corners(), face=Face(), clip=Corners(), arcface=Corners())
    return networks(**(own | changes))


def judge(pairs, clips, frames_of, nets, folder):
    files = FeatureFiles(folder, nets)
    true = {clip.subject_id: files.of_clip(clip) for clip in clips}
    frames = [files.of_frames("it", pair, frames_of(pair)) for pair in pairs]
    return summarize(pairs, frames, true, missing_networks(nets), 0)


def test_true_frames_score_perfectly(clips, tmp_path):
    pairs = make_pairs(clips, "self", 0)
    found = judge(pairs, clips, lambda pair: pair.driver.images(pair.rows), everything(), tmp_path)["metrics"]
    assert found["psnr"]["value"] == found["psnr"]["low"] == np.inf
    assert found["ssim"]["value"] == pytest.approx(1, abs=1e-9)
    assert [found[key]["value"] for key in ("akd", "apd", "apd_geodesic", "aed")] == [0, 0, 0, 0]
    assert found["fid"]["value"] < 1e-3
    assert found["clip"]["value"] == pytest.approx(1, abs=1e-9) and found["csim"]["value"] == pytest.approx(1, abs=1e-9)
    assert "na" in found["lpips"]


def test_a_metric_without_its_network_has_a_reason_and_no_number(clips, tmp_path):
    pairs = make_pairs(clips, "self", 0)
    found = judge(pairs, clips, lambda pair: noise(3), networks(), tmp_path)
    for key in ("lpips", "fid", "clip", "csim", "akd", "apd", "apd_geodesic", "aed"):
        assert (
            found["metrics"][key]["na"] == "not installed: it; pip install it" and "value" not in found["metrics"][key]
        )
    assert found["metrics"]["psnr"]["frames"] == 9 and "faces_not_found" not in found


def test_coverage_is_that_of_the_alphas_and_has_a_reason_where_there_are_none(clips, tmp_path):
    pairs = make_pairs(clips, "self", 0)
    files = FeatureFiles(tmp_path, networks())
    true = {clip.subject_id: files.of_clip(clip) for clip in clips}

    def found(alphas_of, name):
        frames = [files.of_frames(name, pair, noise(3), alphas_of(pair)) for pair in pairs]
        return summarize(pairs, frames, true, missing_networks(networks()), 0)["metrics"]["coverage"]

    assert found(lambda pair: pair.driver.alphas(pair.rows), "truth")["value"] == 1
    assert found(lambda pair: 0 * pair.driver.alphas(pair.rows), "nothing")["value"] == 0
    assert found(lambda pair: None, "compared") == {"na": "the frames have no alpha"}
    opaque = [replace(pair, driver=repainted(pair.driver, 90)) for pair in pairs]
    frames = [files.of_frames("opaque", pair, noise(3), pair.driver.alphas(pair.rows)) for pair in opaque]
    table = summarize(opaque, frames, true, missing_networks(networks()), 0)["metrics"]
    assert table["coverage"] == {"na": "the true images have no alpha"}


def test_motion_is_compared_with_the_driver_and_the_person_with_the_source(clips):
    pair = make_pairs(clips, "cross", 0)[0]
    random = np.random.default_rng(0)

    def features(count):
        turns = np.linalg.qr(random.normal(size=(count, 3, 3)))[0]
        turns *= np.linalg.det(turns)[:, None, None]
        return {
            "landmarks": random.uniform(0, 32, (count, 68, 2)), "rotations": turns,
            "expressions": random.uniform(size=(count, 7)), "clip": random.normal(size=(count, 6)),
            "arcface": random.normal(size=(count, 6)),
        }  # fmt: skip

    frames, source, driver = features(3), features(4), features(4)
    found = frame_values(pair, frames, source, driver)
    for index, row in enumerate(pair.rows):
        apart = np.linalg.norm(frames["landmarks"][index] - driver["landmarks"][row], axis=1).mean()
        assert found["akd"][index] == pytest.approx(apart * 16)  # 32 pixels seen as 512
        cosine = ((frames["rotations"][index].T @ driver["rotations"][row]).trace() - 1) / 2
        assert found["apd_geodesic"][index] == pytest.approx(np.degrees(np.arccos(cosine)))
        assert found["aed"][index] == pytest.approx(
            np.abs(frames["expressions"][index] - driver["expressions"][row]).mean()
        )
        for key, name in (("clip", "clip"), ("csim", "arcface")):
            a, b = frames[name][index], source[name][0]
            assert found[key][index] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert "psnr" not in found


def test_fid_of_cross_reenactment_is_taken_against_the_sources_own_frames(clips, tmp_path):
    pairs = make_pairs(clips, "cross", 0)
    found = judge(pairs, clips, lambda pair: pair.source.images(range(1, 4)), everything(), tmp_path)
    assert found["metrics"]["fid"]["value"] < 1e-3 and "psnr" not in found["metrics"]


def test_a_frame_without_a_face_is_counted_and_enters_no_mean(clips, tmp_path):
    pairs = make_pairs(clips, "self", 0)
    nets = everything(
        face=Face(blind=True)
    )  # it never sees the first of what it is given: of a clip that is the source
    found = judge(pairs, clips, lambda pair: noise(3), nets, tmp_path)
    assert found["faces_not_found"] == {"frames": 3, "driver": 0, "of": 9}
    assert found["metrics"]["akd"]["frames"] == 6 and found["metrics"]["clip"]["frames"] == 9
    values = [pair["frames"]["akd"] for pair in found["pairs"].values()]
    assert all(np.isnan(own[0]) for own in values)
    assert found["metrics"]["akd"]["value"] == pytest.approx(np.mean([own[1:] for own in values]))
    assert mean_with_interval([np.full(3, np.nan)] * 2, resample(2, 0)) == {"na": "no face was found in any frame"}


def test_the_interval_is_a_bootstrap_over_subjects_of_the_mean_over_frames():
    values = [np.array([1.0, 2, 3]), np.array([10.0]), np.array([4.0, np.nan, 6]), np.array([0.0, 1])]
    draws = resample(4, 7)
    means = []
    for draw in draws:
        drawn = np.concatenate([values[index] for index in draw])
        means.append(np.nanmean(drawn))
    found = mean_with_interval(values, draws)
    assert found["value"] == pytest.approx(np.nanmean(np.concatenate(values)))
    assert found["low"] == pytest.approx(np.sort(means)[24]) and found["high"] == pytest.approx(np.sort(means)[974])
    assert (found["frames"], found["subjects"]) == (8, 4)
    assert np.array_equal(draws, resample(4, 7)) and not np.array_equal(draws, resample(4, 8))
    single = mean_with_interval(values[:1], resample(1, 0))
    assert (single["low"], single["high"]) == (None, None)


def test_the_interval_of_fid_is_a_jackknife_over_subjects():
    random = np.random.default_rng(0)
    made, real = random.normal(size=(12, 9, 40)), random.normal(0.4, size=(12, 9, 40))
    found = fid_with_interval(list(made), list(real))
    without = [
        frechet_distance(np.delete(made, left, 0).reshape(-1, 40), np.delete(real, left, 0).reshape(-1, 40))
        for left in range(12)
    ]
    error = np.sqrt(11 / 12 * sum((value - np.mean(without)) ** 2 for value in without))
    assert found["low"] == pytest.approx(found["value"] - 1.96 * error, rel=1e-4)
    assert found["high"] == pytest.approx(found["value"] + 1.96 * error, rel=1e-4)
    assert (found["frames"], found["real_frames"], found["subjects"]) == (108, 108, 12)
    assert fid_with_interval([made[0]], [real[0]])["low"] is None


def test_features_are_read_once_for_the_same_frames_and_again_for_others(clips, tmp_path):
    pair, net = make_pairs(clips, "self", 0)[0], Corners()
    files = FeatureFiles(tmp_path, networks(inception=net))
    first = files.of_frames("it", pair, noise(3))
    again = files.of_frames("it", pair, noise(3))
    assert net.seen == 3 and all(np.array_equal(first[key], again[key]) for key in first)
    files.of_frames("it", pair, noise(3, seed=1))
    assert net.seen == 6
    other = Corners("second")
    FeatureFiles(tmp_path, networks(inception=other)).of_frames("it", pair, noise(3, seed=1))
    assert other.seen == 3  # other weights, other features


def test_a_damaged_file_of_features_is_made_again(clips, tmp_path):
    pair, net = make_pairs(clips, "self", 0)[0], Corners()
    files = FeatureFiles(tmp_path, networks(inception=net))
    first = files.of_frames("it", pair, noise(3))
    path = tmp_path / "it" / "self" / f"{pair.name}.npz"
    path.write_bytes(path.read_bytes()[:-80])
    again = files.of_frames("it", pair, noise(3))
    assert net.seen == 6 and np.array_equal(first["inception"], again["inception"])
