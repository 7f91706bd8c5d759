"""A decoded avatar against its portrait: nearer at the portrait's view and at others, in bounds, what is unseen untouched."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from gaussian_tokenizer.avatars.anchoring import face_frames
from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.avatars.gaussians import SH_DC
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.procedural_head import build_procedural_head
from gaussian_tokenizer.rendering.cameras import Cameras, portrait_cameras
from gaussian_tokenizer.rendering.image_metrics import psnr
from gaussian_tokenizer.rendering.portrait_points import Portrait
from gaussian_tokenizer.rendering.splatting import render
from gaussian_tokenizer.synthetic.subject import synthesize_subject
from modeling.refinement import MAX_OFFSET, refine

SIZE = 56


@pytest.fixture(scope="module")
def head() -> HeadModel:
    return build_procedural_head(600)


@pytest.fixture(scope="module")
def truth(head) -> GaussianAvatar:
    """A subject in a pose of its own: the portrait is not of the head at rest."""
    avatar = synthesize_subject(head, 1, num_points=900).avatar
    avatar.params.neck_pose[0, 1] = 0.2
    return avatar


@pytest.fixture(scope="module")
def cameras(head) -> Cameras:
    """From the front, from 30 degrees to the left and to the right."""
    return portrait_cameras(head, SIZE, (0.0, 30.0, -30.0))


@pytest.fixture(scope="module")
def gray(truth) -> GaussianAvatar:
    """The subject without its colors."""
    return replace(truth, sh=torch.zeros_like(truth.sh))


def portrait_of(avatar: GaussianAvatar, camera: Cameras, scene: tuple | None = None) -> Portrait:
    """With alpha on white; with a `scene` color behind it and alpha unknown."""
    drawn = render(avatar.posed(), camera, 1.0 if scene is None else scene)
    alpha = drawn.alpha if scene is None else torch.ones_like(drawn.alpha)
    image = torch.cat((drawn.image.clamp(0, 1), alpha), -1)[0].movedim(-1, 0)
    return Portrait(image, camera, avatar.params)


def likeness(avatar: GaussianAvatar, truth: GaussianAvatar, cameras: Cameras) -> torch.Tensor:
    """(C,) dB"""
    return psnr(render(avatar.posed(truth.params), cameras).image, render(truth.posed(), cameras).image)


@pytest.mark.parametrize("scene", [None, (0.1, 0.5, 0.2)])
def test_colors_come_back_at_the_portrait_and_at_other_views(gray, truth, cameras, scene):
    before = likeness(gray, truth, cameras)
    refined = refine(gray, portrait_of(truth, cameras[0], scene), 30)
    gain = likeness(refined, truth, cameras) - before
    assert gain[0] > 5 and gain[1:].min() > 2


def test_what_was_right_stays(truth, cameras):
    refined = refine(truth, portrait_of(truth, cameras[0]), 20)
    assert likeness(refined, truth, cameras).min() > 35


def test_the_camera_may_be_of_another_size_than_the_portrait(gray, truth, cameras):
    portrait = portrait_of(truth, cameras[0])
    own = cameras[0]
    larger = Cameras(own.viewmats, own.Ks * torch.tensor([[2.0], [2.0], [1.0]]), 2 * SIZE, 2 * SIZE)
    first, second = (refine(gray, each, 3) for each in (portrait, replace(portrait, camera=larger)))
    torch.testing.assert_close(first.sh, second.sh, rtol=0, atol=1e-4)


def test_only_what_the_portrait_shows_moves_and_by_millimeters(truth, head, cameras):
    """The portrait is of another subject, so that everything pulls, and shows 5 cm."""
    other = synthesize_subject(head, 5, num_points=900).avatar
    camera = Cameras.orbit((0.0, 0.0, 0.0), 1.0, [0.0], 0.0, SIZE / 0.05, SIZE, SIZE)
    refined = refine(truth, replace(portrait_of(other, cameras[0]), camera=camera), 40)
    meters = face_frames(head.canonical_vertices(truth.params), head.faces).scales[truth.faces, None]
    offsets = ((refined.positions - truth.positions) * meters).abs()
    assert 1e-4 < offsets.max() <= MAX_OFFSET + 1e-6
    posed = truth.posed()
    far = posed.positions[0, :, :2].norm(dim=1) > 0.05 + MAX_OFFSET + 5 * posed.scales[0].amax(1)
    assert far.sum() > 100
    for name, value in refined.tensors().items():
        assert torch.equal(value[far], truth.tensors()[name][far]), name
    assert torch.equal(refined.quats, truth.quats) and not torch.equal(refined.opacities, truth.opacities)


def test_only_the_constant_color_changes(gray, truth, cameras):
    rest = torch.randn(len(gray), 3, 3, generator=torch.Generator().manual_seed(0)) * 0.01
    banded = replace(gray, sh=torch.cat((gray.sh, rest), 1))
    refined = refine(banded, portrait_of(truth, cameras[0]), 2)
    assert torch.equal(refined.sh[:, 1:], rest) and not torch.equal(refined.sh[:, :1], gray.sh)


def test_the_same_again_also_where_gradients_are_off_and_no_steps_change_nothing(gray, truth, cameras):
    portrait = portrait_of(truth, cameras[0])
    state = torch.get_rng_state()
    first = refine(gray, portrait, 3)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        again = refine(gray, portrait, 3)
    for name, value in first.tensors().items():
        assert torch.equal(again.tensors()[name], value) and not value.requires_grad, name
    assert refine(gray, portrait, 0) is gray


def test_the_first_step_follows_the_sign_of_the_error(gray, cameras):
    """A portrait of the same subject, lighter in red and darker in blue: so its colors become, and green stays behind."""
    wanted = replace(gray, sh=gray.sh + torch.tensor([0.2, 0.0, -0.2]) / SH_DC)
    shift = (refine(gray, portrait_of(wanted, cameras[0]), 5).sh - gray.sh)[:, 0]
    seen = shift.abs().amax(1) > 0.05 / SH_DC
    assert seen.sum() > 50
    assert (shift[seen, 0] > 0).all() and (shift[seen, 2] < 0).all()
    assert shift[seen, 1].abs().mean() < 0.3 * shift[seen, 0].mean()


@pytest.mark.parametrize("steps", [-1, 1.5, True, "3", np.nan])
def test_a_number_of_steps_that_is_none_is_refused(gray, truth, cameras, steps):
    with pytest.raises(ValueError, match=r"refine_steps is .*, expected a whole number"):
        refine(gray, portrait_of(truth, cameras[0]), steps)


def test_what_cannot_be_refined_is_refused(gray, truth, cameras):
    portrait = portrait_of(truth, cameras[0])
    with pytest.raises(ValueError, match="refinement needs sh, opacities"):
        refine(replace(gray, sh=None, opacities=None), portrait, 1)
    with pytest.raises(ValueError, match="SSIM needs at least"):
        refine(gray, replace(portrait, image=portrait.image[:, :8, :8]), 1)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"use torch\.no_grad"):
        refine(gray, portrait, 1)
