"""The optimization of one subject: how it begins, what each step looks at, and what it refuses."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from gaussian_tokenizer.captures.frame import Frame
from gaussian_tokenizer.captures.loading import read_tracking
from gaussian_tokenizer.captures.tracking import Tracking
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.loading import load_head
from gaussian_tokenizer.synthesize import synthesize
from gaussian_tokenizer.synthetic.source import PLAIN
from training.fitting.arguments import FitSettings
from training.fitting.images import Images, evenly_spread
from training.fitting.optimization import (
    Fit,
    _images_of_step,
    _resets_opacities,
    densify_config,
    learning_rates,
    optimize,
    scene_extent,
)
from training.fitting.report import face_stats, image_metrics, tokenized

CPU = torch.device("cpu")
QUICK = FitSettings(
    iterations=20, start_downscale=2, full_resolution_from=10, sh_degree=1, sh_degree_interval=8, init_opacity=0.3,
    position_lr=0.02, position_lr_final=0.002, color_lr=0.1, opacity_lr=0.1, scale_lr=0.03, rotation_lr=0.02,
    densify_from=2, densify_until=18, densify_interval=5, prune_large_from=0, opacity_reset_interval=0, visibility_images=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def head() -> HeadModel:
    return load_head("procedural:600")


@pytest.fixture(scope="module")
def tracking(tmp_path_factory, head) -> Tracking:
    """A synthetic subject of 36 pixels, three cameras and four moments."""
    settings = {"image_size": 36, "num_points": 60, "views": 3, "timesteps": 4}
    (folder,) = synthesize(tmp_path_factory.mktemp("fit"), 1, **settings, **PLAIN)
    return read_tracking(folder, head)


@pytest.fixture(scope="module")
def fitted(tracking, head):
    fit = Fit(tracking, head, QUICK, CPU)
    state, counts, losses = fit.begin(), [], []

    def note(state, loss):
        losses.append(loss)
        counts.append(state.gaussians.faces.bincount(minlength=600))

    optimize(fit, state, note)
    return fit, state, losses, counts


def test_it_begins_with_one_gray_gaussian_on_every_face(tracking, head):
    state = Fit(tracking, head, FitSettings(), CPU).begin()
    gaussians = state.gaussians
    assert (
        torch.equal(gaussians.faces, torch.arange(600))
        and not gaussians.positions.any()
        and not gaussians.log_scales.any()
    )
    assert gaussians.opacities.sigmoid().tolist() == pytest.approx([0.1] * 600)
    assert gaussians.sh_dc.min() >= 0 and gaussians.sh_dc.max() < 1 / 255 and gaussians.sh_rest.shape == (600, 15, 3)
    assert set(state.head) == {"expr", "rotation", "neck_pose", "jaw_pose", "eyes_pose", "translation"}


def test_a_short_fit_draws_unseen_images_far_better_than_its_beginning(fitted, tracking):
    fit, state, losses, _ = fitted
    unseen = tracking.splits["val"] + tracking.splits["test"]
    before, _ = image_metrics(fit, fit.avatar(fit.begin()), unseen)
    after, _ = image_metrics(fit, fit.avatar(state), unseen)
    assert after > before + 3 and np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


def test_after_every_density_control_faces_hold_4_to_15_or_nothing(fitted):
    _, _, _, counts = fitted
    assert all(count.max() == 1 for count in counts[:4])
    for count in counts[4:]:
        assert set(count.tolist()) <= {0, *range(4, 16)}
    assert counts[-1].sum() > counts[4].sum()


def test_without_the_constraint_no_face_is_emptied_and_none_is_limited(tracking, head):
    often = replace(QUICK, iterations=12, densify_from=0, densify_interval=3, densify_grad_threshold=0.0)
    fit = Fit(tracking, head, replace(often, density_constraint=False), CPU)
    state = fit.begin()
    optimize(fit, state, lambda state, loss: None)
    count = state.gaussians.faces.bincount(minlength=600)
    assert count.min() >= 1 and count.max() == 16  # four times twice as many


def test_head_parameters_of_seen_moments_are_optimized_and_those_of_others_stay(fitted, tracking):
    fit, state, _, _ = fitted
    rows = {split: {fit.images.row(index) for index in tracking.splits[split]} for split in ("train", "test")}
    for name, value in state.head.items():
        moved = (value != tracking.params.tensors()[name]).any(1)
        assert all(bool(moved[row]) for row in rows["train"]) and not any(bool(moved[row]) for row in rows["test"])
    assert torch.equal(fit.avatar(state).params.expr, state.head["expr"])


def test_what_the_tokenizer_rounds_is_hardly_seen(fitted, tracking):
    fit, state, _, _ = fitted
    avatar = fit.avatar(state)
    rounded = tokenized(avatar)
    assert torch.equal(rounded.faces.sort().values, avatar.faces.sort().values)
    exact, _ = image_metrics(fit, avatar, tracking.splits["val"])
    assert abs(exact - image_metrics(fit, rounded, tracking.splits["val"])[0]) < 0.3


def test_face_stats_are_over_occupied_faces():
    counts = face_stats(torch.tensor([0, 0, 0, 2, 2, 2, 2, 3]), 5)
    assert counts == {
        "min": 1,
        "median": 3.0,
        "max": 4,
        "share_empty": pytest.approx(0.4),
        "histogram": [2, 1, 0, 1, 1],
    }


# ---- schedules


def test_every_image_is_seen_once_before_any_is_seen_again(tracking, head):
    fit = Fit(tracking, head, replace(QUICK, images_per_step=2), CPU)
    count = len(fit.train)
    seen = [index for step in range(count) for index in _images_of_step(fit, step)]
    assert sorted(seen[:count]) == sorted(seen[count:]) == sorted(fit.train) and seen[:count] != seen[count:]
    assert not {*seen} & {*tracking.splits["val"], *tracking.splits["test"]}


def test_images_grow_in_equal_parts_of_the_time(tracking, head):
    fit = Fit(tracking, head, replace(QUICK, start_downscale=2, full_resolution_from=10), CPU)
    assert [fit.downscale(step) for step in (0, 4, 5, 9, 10, 19)] == [2, 2, 2, 2, 1, 1]


def test_a_smaller_image_shows_the_same_through_the_same_camera(tracking):
    images = Images(tracking, 1.0, CPU)
    large, small = images.truth(0)[0].numpy(), images.truth(0, 3)[0].numpy()
    expected = large.reshape(12, 3, 12, 3, 3).mean((1, 3))
    np.testing.assert_allclose(small, expected, atol=1e-6)
    camera, smaller = images.camera(0), images.camera(0, 3)
    torch.testing.assert_close(smaller.Ks[:, :2] * 3, camera.Ks[:, :2])
    assert (smaller.width, smaller.height) == (12, 12)


def test_positions_slow_down_exponentially(tracking, head):
    fit = Fit(tracking, head, replace(QUICK, scene_extent=2.0), CPU)
    rates = [learning_rates(fit, step)["positions"] for step in (0, 10, 20)]
    assert rates == pytest.approx([0.04, 0.04 / 10**0.5, 0.004])


def test_shortening_divides_the_whole_schedule():
    short = FitSettings(shorten=20).shortened()
    assert (short.iterations, short.densify_from, short.densify_interval) == (30_000, 500, 100)
    assert (short.sh_degree_interval, short.opacity_reset_interval, short.prune_large_from) == (50, 3000, 3000)
    assert FitSettings(shorten=1e9).shortened().densify_interval == 1
    assert replace(QUICK, shorten=2).shortened().opacity_reset_interval == 0


def test_opacities_are_lowered_at_intervals_and_on_white_when_density_control_begins():
    settings = FitSettings(shorten=1000).shortened()
    assert (settings.densify_from, settings.opacity_reset_interval, settings.densify_until) == (10, 60, 600)
    steps = range(1, 601)
    assert [step for step in steps if _resets_opacities(settings, step)] == [10, *range(60, 600, 60)]
    dark = replace(settings, background=0.0)
    assert [step for step in steps if _resets_opacities(dark, step)] == [*range(60, 600, 60)]
    never = replace(settings, opacity_reset_interval=0)
    assert not any(_resets_opacities(never, step) for step in steps)


def test_large_gaussians_go_from_their_iteration_on(tracking, head):
    fit = Fit(tracking, head, replace(QUICK, prune_large_from=10, scene_extent=2.0), CPU)
    assert (densify_config(fit, 10).max_scale, densify_config(fit, 10).max_radius) == (None, None)
    assert (densify_config(fit, 11).max_scale, densify_config(fit, 11).max_radius) == (0.2, 20.0)
    assert densify_config(fit, 11).percent_dense == pytest.approx(0.02)


def test_one_camera_that_stands_still_has_an_extent_too(tracking):
    alone = replace(tracking, splits={"train": tracking.splits["train"][:1], "val": (), "test": ()})
    assert scene_extent(alone, QUICK) == 0.5
    assert scene_extent(tracking, replace(QUICK, scene_extent=0.1)) == 0.1
    places = np.stack([np.linalg.inv(tracking.frames[i].viewmat)[:3, 3] for i in tracking.splits["train"]])
    middle = sum(places) / len(places)
    expected = 1.1 * max(np.linalg.norm(place - middle) for place in places)
    assert scene_extent(tracking, replace(QUICK, min_extent=0.01)) == pytest.approx(expected)


def test_chosen_images_are_spread_over_cameras_and_moments(tracking):
    everything = range(len(tracking.frames))  # 4 moments of 3 cameras
    moments = [
        [
            (tracking.frames[index].timestep, tracking.frames[index].camera)
            for index in evenly_spread(tracking, everything, n)
        ]
        for n in (1, 2, 4, 6)
    ]
    assert moments == [
        [(0, 0)],
        [(0, 0), (2, 1)],
        [(0, 0), (1, 1), (2, 2), (3, 0)],
        [(0, 0), (0, 1), (1, 2), (2, 0), (2, 1), (3, 2)],
    ]
    assert evenly_spread(tracking, (3, 4), 5) == evenly_spread(tracking, (3, 4), None) == [3, 4]
    assert evenly_spread(tracking, (3, 4), 0) == []


# ---- what cannot be fitted


def with_images(tracking: Tracking, change) -> Tracking:
    return replace(tracking, frames=tuple(change(frame) for frame in tracking.frames))


def test_nothing_but_black_images_is_refused(tracking, head):
    def black(frame: Frame) -> Frame:
        return replace(frame, image=np.zeros((36, 36, 4), np.uint8))

    with pytest.raises(ValueError, match="every training image is black or transparent"):
        Fit(with_images(tracking, black), head, QUICK, CPU)


def test_cameras_that_look_away_are_refused(tracking, head):
    def turned(frame: Frame) -> Frame:
        return replace(frame, viewmat=np.diag([1.0, -1.0, -1.0, 1.0]) @ frame.viewmat)

    with pytest.raises(ValueError, match="no camera sees the head"):
        Fit(with_images(tracking, turned), head, QUICK, CPU).begin()


def test_no_images_to_learn_from_and_too_small_ones_are_refused(tracking, head):
    with pytest.raises(ValueError, match="training split is empty"):
        Fit(replace(tracking, splits={"train": (), "val": (), "test": (0,)}), head, QUICK, CPU)
    with pytest.raises(ValueError, match="at least 88"):
        Fit(tracking, head, replace(QUICK, start_downscale=8), CPU)


def test_images_that_show_nothing_of_the_head_end_the_fit(tracking, head):
    settings = replace(QUICK, min_face_pixels=1e6)
    fit = Fit(tracking, head, settings, CPU)
    with pytest.raises(ValueError, match="no Gaussian is in any image after 5 steps"):
        optimize(fit, fit.begin(), lambda state, loss: None)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("iterations", 0, "--iterations is 0, expected at least 1"),
        ("init_opacity", 1.0, "--init_opacity is 1.0"),
        ("background", 2.0, "--background is 2.0, expected 0 to 1"),
        ("sh_degree", 4, "--sh_degree is 4"),
        ("max_points_per_face", 3, "between 4 and 3 points"),
        ("min_extent", 3.0, "--min_extent 3.0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        FitSettings(**{field: value})
