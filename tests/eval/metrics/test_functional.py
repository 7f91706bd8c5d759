"""The mathematics of the metrics against independent implementations and cases that were worked out by hand."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
from scipy.spatial.transform import Rotation

from eval.metrics.__main__ import main
from eval.metrics.functional import (
    cosine_similarity,
    coverage,
    expression_distance,
    frechet_distance,
    keypoint_distance,
    pose_distance_euler,
    pose_distance_geodesic,
    psnr,
    ssim,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def images(rng, count=3, height=40, width=52):
    return rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def test_psnr_is_that_of_the_definition_and_infinite_for_equal_images():
    black = np.zeros((2, 12, 16, 3), np.uint8)
    other = black.copy()
    other[1] += 51  # a fifth of the range: 10 log10(25)
    np.testing.assert_allclose(psnr(black, other), [math.inf, 10 * math.log10(25)])


def test_psnr_and_ssim_agree_with_scikit_image(rng):
    metrics = pytest.importorskip("skimage.metrics")
    a = images(rng)
    b = np.clip(a.astype(int) + rng.integers(-40, 40, a.shape), 0, 255).astype(np.uint8)
    window = {
        "gaussian_weights": True,
        "sigma": 1.5,
        "use_sample_covariance": False,
        "channel_axis": -1,
        "data_range": 255,
    }
    np.testing.assert_allclose(psnr(a, b), [metrics.peak_signal_noise_ratio(x, y) for x, y in zip(a, b)], rtol=1e-12)
    np.testing.assert_allclose(
        ssim(a, b), [metrics.structural_similarity(x, y, **window) for x, y in zip(a, b)], rtol=1e-6
    )


def test_coverage_is_counted_pixel_by_pixel_and_unknown_without_alpha(rng):
    a, truth = rng.integers(0, 256, (2, 3, 8, 9), dtype=np.uint8)
    truth[2] = 255
    expected = []
    for own, true in zip(a[:2], truth[:2]):
        subject = [(x, y) for x in range(8) for y in range(9) if true[x, y] >= 128]
        expected.append(sum(own[place] >= 128 for place in subject) / len(subject))
    found = coverage(a, truth)
    np.testing.assert_allclose(found[:2], expected, rtol=1e-6)
    assert np.isnan(found[2])
    with pytest.raises(ValueError, match=r"alphas \(N, H, W\) uint8, found uint8 \(3, 8, 9\) and uint8 \(2, 8, 9\)"):
        coverage(a, truth[:2])


def test_ssim_of_equal_images_is_one(rng):
    a = images(rng)
    np.testing.assert_array_equal(ssim(a, a), 1.0)


def test_images_smaller_than_the_window_of_ssim_are_refused(rng):
    small = images(rng, height=10)
    with pytest.raises(ValueError, match="window of 11 pixels, found images of 52x10"):
        ssim(small, small)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_images_of_other_sizes_or_types_are_named(metric, rng):
    a = images(rng)
    with pytest.raises(ValueError, match=r"\(3, 40, 52, 3\) uint8, \(3, 30, 52, 3\) uint8"):
        metric(a, a[:, :30])
    with pytest.raises(ValueError, match="float64"):
        metric(a / 255, a / 255)


def sqrtm_frechet(x, y):
    """The formula as it is written, with scipy's matrix root."""
    sigma_x, sigma_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = np.real(scipy.linalg.sqrtm(sigma_x @ sigma_y))
    return np.square(x.mean(0) - y.mean(0)).sum() + np.trace(sigma_x + sigma_y - 2 * root)


def features(rng, n, m, width):
    mix = rng.normal(size=(width, width)) / math.sqrt(width)
    return rng.normal(size=(n, width)) @ mix, (1.3 * rng.normal(size=(m, width)) + 0.1) @ mix


@pytest.mark.parametrize(
    ("n", "m", "width"), [(200, 150, 32), (500, 300, 64), (64, 64, 64), (20, 30, 64), (10, 300, 64), (128, 120, 256)]
)
def test_frechet_distance_agrees_with_scipy_and_torchmetrics_also_with_fewer_rows_than_features(n, m, width, rng):
    torch, fid = pytest.importorskip("torch"), pytest.importorskip("torchmetrics.image.fid")
    x, y = features(rng, n, m, width)
    found = frechet_distance(x, y)
    assert found == pytest.approx(sqrtm_frechet(x, y), rel=1e-6)
    tensors = [torch.from_numpy(value) for value in (x, y)]
    moments = [moment for value in tensors for moment in (value.mean(0), value.T.cov())]
    assert found == pytest.approx(float(fid._compute_fid(*moments)), rel=1e-6)


def test_frechet_distance_of_one_dimensional_features_is_that_of_two_normals():
    x, y = np.array([[0.0], [2.0]]), np.array([[3.0], [7.0]])  # means 1 and 5, standard deviations √2 and 2√2
    assert frechet_distance(x, y) == pytest.approx(4**2 + (2 * math.sqrt(2) - math.sqrt(2)) ** 2)


@pytest.mark.parametrize("rows", [5, 400])
def test_frechet_distance_of_a_set_to_itself_and_to_its_permutation_is_zero(rows, rng):
    x = 100 * np.abs(rng.normal(size=(rows, 128)))
    assert frechet_distance(x, x) < 1e-7
    assert frechet_distance(x, rng.permutation(x)) < 1e-7


def test_frechet_distance_says_what_it_cannot_compare(rng):
    with pytest.raises(ValueError, match=r"at least two rows, found \(1, 4\)"):
        frechet_distance(np.zeros((1, 4)), np.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(3, 5\)"):
        frechet_distance(np.zeros((3, 4)), np.zeros((3, 5)))
    with pytest.raises(ValueError, match="row 2 of the features is not finite"):
        frechet_distance(np.array([[0.0], [1.0], [math.nan]]), np.zeros((3, 1)))


def test_keypoint_distance_is_the_mean_length_in_pixels():
    a = np.zeros((2, 2, 2))
    b = np.array([[[3.0, 4.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    np.testing.assert_allclose(keypoint_distance(a, b), [3, 0])


def test_a_face_that_was_not_found_is_nan_in_its_frame_only():
    points, turned, shapes = np.zeros((3, 68, 2)), np.stack([np.eye(3)] * 3), np.ones((3, 52))
    lost = [value.copy() for value in (points, turned, shapes)]
    for value in lost:
        value[1] = np.nan
    for metric, a, b in [
        (keypoint_distance, points, lost[0]),
        (pose_distance_geodesic, turned, lost[1]),
        (pose_distance_euler, turned, lost[1]),
        (expression_distance, shapes, lost[2]),
    ]:
        np.testing.assert_array_equal(metric(a, b), [0, np.nan, 0])
        np.testing.assert_array_equal(metric(b, a), [0, np.nan, 0])
    np.testing.assert_allclose(cosine_similarity(shapes, lost[2]), [1, np.nan, 1])


def test_geodesic_distance_is_the_angle_of_the_turn_between(rng):
    start, axes = Rotation.random(50, rng=rng), rng.normal(size=(50, 3))
    angles = np.concatenate(([1e-9, 1e-5], rng.uniform(0, math.pi, 48)))
    turn = Rotation.from_rotvec(angles[:, None] * axes / np.linalg.norm(axes, axis=1, keepdims=True))
    np.testing.assert_allclose(pose_distance_geodesic(start.as_matrix(), (turn * start).as_matrix()), angles, rtol=1e-6)


def test_the_two_rotation_distances_of_hand_made_turns():
    quarter, tilt = Rotation.from_euler("z", 90, degrees=True), Rotation.from_euler("y", [[-30]], degrees=True)
    turned = np.stack([quarter.as_matrix(), Rotation.from_euler("x", 180, degrees=True).as_matrix()])
    upright = np.stack([np.eye(3)] * 2)
    np.testing.assert_allclose(pose_distance_geodesic(upright, turned), [math.pi / 2, math.pi])
    np.testing.assert_allclose(pose_distance_euler(upright, turned), [math.pi / 6, math.pi / 3])
    np.testing.assert_allclose(pose_distance_euler(upright[:1], tilt.as_matrix()), math.radians(30) / 3)


def test_euler_distance_is_that_of_scipys_angles_and_goes_the_short_way_round(rng):
    a, b = (rng.uniform(-1.2, 1.2, (40, 3)) for _ in range(2))
    matrices = [Rotation.from_euler("xyz", angles).as_matrix() for angles in (a, b)]  # fixed axes: Rz Ry Rx
    np.testing.assert_allclose(pose_distance_euler(*matrices), np.abs(a - b).mean(1), rtol=1e-9)
    nearly = [Rotation.from_euler("z", [[angle]], degrees=True).as_matrix() for angle in (179, -179)]
    np.testing.assert_allclose(pose_distance_euler(*nearly), math.radians(2) / 3)


def test_equal_rotations_in_single_precision_are_at_distance_zero(rng):
    turned = Rotation.random(20, rng=rng).as_matrix().astype(np.float32)
    assert (pose_distance_geodesic(turned, turned) == 0).all()
    assert (pose_distance_euler(turned, turned) == 0).all()


@pytest.mark.parametrize("wrong", [np.zeros((3, 3)), 2 * np.eye(3), np.diag([1.0, 1.0, -1.0])])
def test_a_matrix_that_is_no_rotation_is_refused_rather_than_measured(wrong):
    with pytest.raises(ValueError, match=r"matrix 1 is not a rotation.*give NaN"):
        pose_distance_geodesic(np.stack([np.eye(3), wrong]), np.stack([np.eye(3)] * 2))


def test_expression_distance_is_the_mean_of_absolute_differences():
    np.testing.assert_allclose(expression_distance([[0.0, 1.0], [1.0, 1.0]], [[0.5, 0.0], [1.0, 1.0]]), [0.75, 0])


def test_cosine_similarity_of_hand_made_features_and_nan_for_none():
    a = np.array([[1.0, 0.0], [3.0, 4.0], [1.0, 1.0], [0.0, 0.0]])
    b = np.array([[0.0, 2.0], [6.0, 8.0], [-1.0, -1.0], [1.0, 0.0]])
    np.testing.assert_allclose(cosine_similarity(a, b), [0, 1, -1, np.nan])


def test_rows_that_do_not_belong_together_are_named():
    with pytest.raises(ValueError, match=r"landmarks \(any, any, 2\).*\(2, 68, 2\) and \(3, 68, 2\)"):
        keypoint_distance(np.zeros((2, 68, 2)), np.zeros((3, 68, 2)))
    with pytest.raises(ValueError, match=r"rotations \(any, 3, 3\).*\(2, 3\)"):
        pose_distance_euler(np.zeros((2, 3)), np.zeros((2, 3)))


def test_the_doctor_lists_every_metric_and_the_way_to_the_missing_ones(tmp_path):
    environment = {**os.environ, "TORCH_HOME": str(tmp_path)}  # no weights that somebody has downloaded
    command = [sys.executable, "-m", "eval.metrics", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    status = {line.split("  ")[0]: line.split() for line in done.stdout.splitlines() if line and line[0].isupper()}
    for metric in ("PSNR", "SSIM", "Coverage"):
        assert "ready" in status[metric]
    for metric in ("LPIPS", "FID", "AKD, APD, AED", "CSIM", "CLIP"):
        assert "missing" in status[metric]
    for flag in ("--lpips_weights", "--inception_weights", "--landmark_weights", "--arcface_weights", "--clip_model"):
        assert flag in done.stdout


def test_the_doctor_says_which_file_is_wrong_and_goes_on(tmp_path, capsys):
    assert (
        main(["doctor", "--clip_model", str(tmp_path / "clip"), "--landmark_weights", str(tmp_path / "none.task")]) == 1
    )
    out = " ".join(capsys.readouterr().out.split())
    assert f"CLIP wrong clip --clip_model {tmp_path / 'clip'}: neither a folder" in out
    assert f"AKD, APD, AED wrong face --landmark_weights {tmp_path / 'none.task'}: no such file" in out
    assert "PSNR ready" in out
