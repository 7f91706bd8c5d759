import math

import pytest
import torch

from gaussian_tokenizer.heads.procedural_head import build_procedural_head
from gaussian_tokenizer.rendering.cameras import Cameras, default_camera, portrait_cameras


def project(cameras, point):
    in_camera = cameras.viewmats[:, :3, :3] @ torch.tensor(point).to(cameras.viewmats) + cameras.viewmats[:, :3, 3]
    pixels = (cameras.Ks @ in_camera[:, :, None])[:, :, 0]
    return pixels[:, :2] / pixels[:, 2:], in_camera[:, 2]


def test_a_camera_in_front_has_the_subjects_left_on_the_right_and_up_on_top():
    cameras = Cameras.look_at((0.0, 0.0, 1.0), (0, 0, 0), focal=100, width=64, height=48)
    pixels, depth = project(cameras, (0.1, 0.05, 0.0))
    assert torch.allclose(pixels, torch.tensor([[32 + 10.0, 24 - 5.0]]))
    assert depth.item() == pytest.approx(1)


def test_look_at_puts_the_target_in_the_middle_and_the_eye_at_the_origin_of_every_camera():
    eyes = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = (0.1, -0.2, 0.3)
    cameras = Cameras.look_at(eyes, target, focal=50, width=30, height=20)
    pixels, depth = project(cameras, target)
    assert torch.allclose(pixels, torch.tensor([15.0, 10.0], dtype=torch.float64).expand(5, 2))
    assert torch.allclose(depth, (eyes - torch.tensor(target, dtype=torch.float64)).norm(dim=1))
    assert torch.allclose(cameras.positions, eyes)
    rotation = cameras.viewmats[:, :3, :3]
    assert torch.allclose(rotation @ rotation.mT, torch.eye(3, dtype=torch.float64).expand(5, 3, 3))
    assert torch.allclose(torch.linalg.det(rotation), torch.ones(5, dtype=torch.float64))


def test_orbit_goes_to_the_subjects_left_and_up():
    cameras = Cameras.orbit((0, 1, 0), 2.0, [0, 90, -90, 180], 0, focal=50, width=8, height=8)
    expected = torch.tensor([[0, 1, 2], [2, 1, 0], [-2, 1, 0], [0, 1, -2]], dtype=torch.float32)
    assert torch.allclose(cameras.positions, expected, atol=1e-6)
    above = Cameras.orbit((0, 0, 0), 2.0, [0], 30, focal=50, width=8, height=8)
    assert torch.allclose(above.positions, torch.tensor([[0, 1.0, math.sqrt(3)]]), atol=1e-6)
    assert cameras.viewmats.dtype == torch.float32


def test_one_camera_a_slice_and_a_list_are_cameras():
    cameras = Cameras.orbit((0, 0, 0), 1.0, [0, 10, 20], 5, focal=50, width=8, height=6)
    assert len(cameras[1]) == 1 and len(cameras[-1]) == 1 and len(cameras[:2]) == 2
    assert torch.equal(cameras[[2, 0]].viewmats, cameras.viewmats[[2, 0]])
    with pytest.raises(IndexError, match="camera 3 of 3"):
        cameras[3]


def test_to_changes_the_dtype_of_both_matrices():
    cameras = Cameras.look_at((0.0, 0.0, 1.0), (0, 0, 0), 50, 8, 8).to(torch.float64)
    assert cameras.viewmats.dtype == cameras.Ks.dtype == torch.float64


def broken(**changes):
    good = {
        "viewmats": torch.eye(4)[None],
        "Ks": torch.tensor([[[9.0, 0, 4], [0, 9, 4], [0, 0, 1]]]),
        "width": 8,
        "height": 8,
    }
    return lambda: Cameras(**{**good, **changes})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (broken(viewmats=torch.eye(4)), r"viewmats is \(4, 4\), expected \(C, 4, 4\)"),
        (broken(Ks=torch.eye(3)[None].repeat(2, 1, 1)), "1 viewmats and 2 Ks"),
        (broken(Ks=torch.eye(3).long()[None]), "Ks is a tensor of torch.int64"),
        (broken(viewmats=torch.eye(4).tolist()), "viewmats is a list"),
        (broken(viewmats=torch.full((1, 4, 4), math.nan)), "viewmats of camera 0 has nan"),
        (broken(viewmats=torch.eye(4)[None] + torch.eye(4)[3]), "is the matrix transposed"),
        (broken(Ks=torch.diag(torch.tensor([5.0, -5.0, 1.0]))[None]), r"\[5.0, -5.0\] pixels, expected more than 0"),
        (broken(width=0), "width is 0"),
        (broken(height=8.0), "height is 8.0"),
        (lambda: Cameras.look_at((0, 0, 0), (0, 0, 0), 9, 8, 8), "leaves no side for up"),
        (lambda: Cameras.look_at((0, 1.0, 0), (0, 0, 0), 9, 8, 8), "leaves no side for up"),
        (lambda: Cameras.look_at((0, 1.0), (0, 0, 0), 9, 8, 8), r"eyes are \(2,\)"),
        (lambda: Cameras.look_at((0, 0, 1.0), (0, 0, 0), 0, 8, 8), "expected more than 0"),
        (lambda: Cameras.orbit((0, 0, 0), 0, [0], 0, 9, 8, 8), "distance is 0"),
        (lambda: Cameras.orbit((0, 0, 0), 1, [0], 90, 9, 8, 8), "elevation is 90"),
    ],
)
def test_what_cannot_be_a_camera_is_refused_with_the_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_default_camera_is_that_of_synthetic_portraits_in_the_square_around_the_image():
    head = build_procedural_head(600)
    assert torch.equal(default_camera(head, 80, 80).Ks, portrait_cameras(head, 80).Ks)
    wide = default_camera(head, 80, 60)
    square = portrait_cameras(head, 80)
    assert (wide.width, wide.height) == (80, 60) and torch.equal(wide.viewmats, square.viewmats)
    shift = (square.Ks - wide.Ks)[0]
    assert shift[1, 2] == 10 and shift.count_nonzero() == 1  # rows above and below the image are left out
