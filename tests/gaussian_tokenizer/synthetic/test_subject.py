"""Synthetic subjects: the same for a seed, different subjects for different seeds, Gaussians where they belong."""

import dataclasses

import numpy as np
import pytest
import torch

from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.avatars.gaussians import SH_DC
from gaussian_tokenizer.geometry.rotations import quaternion_to_matrix
from gaussian_tokenizer.geometry.triangles import closest_point_barycentrics
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.heads.procedural_head import build_procedural_head
from gaussian_tokenizer.rendering.cameras import Cameras, portrait_cameras
from gaussian_tokenizer.rendering.splatting import Rendering, render
from gaussian_tokenizer.synthetic.subject import (
    SHAPE_LIMIT,
    SyntheticSubject,
    draw_timesteps,
    portrait_avatar,
    synthesize_subject,
)


@pytest.fixture(scope="module")
def head() -> HeadModel:
    return build_procedural_head(600)


@pytest.fixture(scope="module")
def crowd(head) -> list[SyntheticSubject]:
    return [synthesize_subject(head, (7, index)) for index in range(60)]


def with_hair(crowd: list[SyntheticSubject], style: str) -> SyntheticSubject:
    return next(subject for subject in crowd if subject.appearance.hair_style == style)


def lifts(subject: SyntheticSubject, region: str) -> np.ndarray:
    """Distance of the points bound to faces of a region from those faces, meters."""
    head = subject.head
    points = subject.avatar.canonical_points()
    chosen = head.regions[region][head.faces].all(1)[points["faces"]]
    positions, faces = points["positions"][chosen].double(), points["faces"][chosen]
    triangles = head.canonical_vertices(subject.params).double()[head.faces[faces]]
    feet = torch.einsum("nc,nci->ni", closest_point_barycentrics(positions, triangles), triangles)
    return (positions - feet).norm(dim=1).numpy()


def rendering(subject: SyntheticSubject, size: int = 48) -> Rendering:
    cameras = portrait_cameras(subject.head, size)
    gaussians = portrait_avatar(subject, 2 / float(cameras.Ks[0, 0, 0])).canonical_gaussians()
    return render(gaussians, cameras, background=1.0)


def portrait(subject: SyntheticSubject) -> np.ndarray:
    return rendering(subject).image[0].numpy()


def test_a_seed_gives_the_same_subject_again_and_another_seed_another(head):
    first, again, other = (synthesize_subject(head, seed).avatar for seed in (3, 3, 4))
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name
    assert torch.equal(first.params.shape, again.params.shape)
    assert not torch.equal(first.params.shape, other.params.shape)


def test_a_seed_looks_alike_on_any_head_model(head):
    small, large = (synthesize_subject(model, 5).appearance for model in (head, build_procedural_head(1200)))
    for field in dataclasses.fields(small):
        np.testing.assert_array_equal(getattr(small, field.name), getattr(large, field.name))


def test_shapes_are_standard_normal_within_limits(crowd):
    shapes = torch.stack([subject.params.shape for subject in crowd])
    assert shapes.abs().max() <= SHAPE_LIMIT
    assert abs(shapes.mean()) < 0.1
    assert 0.85 < shapes.std() < 1.1


def test_a_subject_is_a_complete_avatar_that_survives_its_file(head, crowd, tmp_path):
    avatar = crowd[0].avatar
    assert set(avatar.tensors()) == {"positions", "faces", "sh", "opacities", "scales", "quats"}
    assert avatar.sh_degree == 0
    assert avatar.head_hash == head.hash
    avatar.save(tmp_path / "subject")
    loaded = GaussianAvatar.load(tmp_path / "subject", head)
    for name, tensor in avatar.tensors().items():
        assert torch.equal(tensor, loaded.tensors()[name]), name
    colors = loaded.posed().colors
    assert 0 <= colors.min() < colors.max() <= 1.0001


def test_hair_stands_off_the_scalp_and_skin_does_not(crowd):
    bald, short, curly = (lifts(with_hair(crowd, style), "scalp") for style in ("bald", "short", "curly"))
    # A rounded surface bulges over the flat triangles of a head of 600 faces, and there is noise.
    assert bald.max() < 0.016
    assert short.mean() > bald.mean() + 0.002
    assert curly.mean() > short.mean() + 0.005
    assert curly.max() < 0.09


def test_long_hair_falls_below_the_scalp(head, crowd):
    subject = with_hair(crowd, "long")
    scalp = head.regions["scalp"]
    lowest = head.canonical_vertices(subject.params)[scalp][:, 1].min()
    points = subject.avatar.canonical_points()
    hair = points["positions"][scalp[head.faces].all(1)[points["faces"]]]
    assert hair[:, 1].min() < lowest - 0.02


def test_a_full_beard_stands_off_the_chin_with_more_points_than_none(crowd):
    full, none = (next(s for s in crowd if s.appearance.beard_style == style) for style in ("full", "none"))
    assert lifts(full, "beard").mean() > lifts(none, "beard").mean() + 0.004
    assert len(lifts(full, "beard")) > len(lifts(none, "beard"))


def test_gaussians_on_the_skin_lie_flat_on_it(head, crowd):
    bald = with_hair(crowd, "bald").avatar
    normals = head.normals(head.canonical_vertices(bald.params))[head.faces].mean(1)[bald.faces]
    gaussians = bald.canonical_gaussians()
    scales = gaussians.scales[0]
    thin = scales.argmin(1)
    axes = quaternion_to_matrix(gaussians.quats[0])[torch.arange(len(thin)), :, thin]
    scalp = head.regions["scalp"][head.faces].all(1)[bald.faces]
    assert (axes[scalp] * torch.nn.functional.normalize(normals[scalp], dim=1)).sum(1).abs().min() > 0.85
    assert (scales.amin(1) < 0.5 * scales.amax(1))[scalp].all()


def test_gaussians_are_about_as_wide_as_they_are_apart(head, crowd):
    bald = with_hair(crowd, "bald").avatar
    scalp = head.regions["scalp"][head.faces].all(1)
    triangles = head.template[head.faces[scalp]]
    area = (
        torch.linalg.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]).norm(dim=1).sum() / 2
    )
    on_scalp = scalp[bald.faces]
    spacing = (area / on_scalp.sum()).sqrt()
    widths = bald.canonical_gaussians().scales[0].amax(1)[on_scalp]
    assert (widths > 0.6 * spacing).all()
    assert (widths < 1.2 * spacing).all()


def test_num_points_is_obeyed_and_nonsense_refused(head):
    assert 1700 < len(synthesize_subject(head, 0, num_points=2000).avatar) < 2300
    with pytest.raises(ValueError, match="0 points"):
        synthesize_subject(head, 0, num_points=0)


def test_a_head_without_regions_gives_a_bald_subject(head):
    subject = synthesize_subject(dataclasses.replace(head, regions={}), 3)
    assert 300 <= len(subject.avatar) <= 500
    assert np.isfinite(portrait(subject)).all()


def test_the_portrait_is_a_closed_head_on_white(head, crowd):
    for subject in crowd[:6]:
        alpha = rendering(subject).alpha[0, :, :, 0]
        assert alpha[16:34, 19:29].min() > 0.97
        assert max(alpha[-6:, 0].max(), alpha[-6:, -1].max()) < 0.9
    np.testing.assert_allclose(portrait(crowd[0])[-1, 0], 1, atol=0.2)


def test_the_portrait_shows_skin_and_hair_in_their_colors(crowd):
    subject = with_hair(crowd, "bald")
    forehead = portrait(subject)[11:14, 22:26].mean((0, 1))
    tint = forehead / forehead.sum() - subject.appearance.skin / subject.appearance.skin.sum()
    assert np.abs(tint).max() < 0.05
    subject = with_hair(crowd, "curly")
    top = portrait(subject)[8:11, 22:26].mean((0, 1))
    assert np.linalg.norm(top - subject.appearance.hair) < np.linalg.norm(top - subject.appearance.skin)


def showing(
    subject: SyntheticSubject, avatar: GaussianAvatar, chosen: torch.Tensor, cameras: Cameras, **pose
) -> np.ndarray:
    """(C, H, W) how much of every pixel comes from the faces `chosen` (F,) bool; `pose`: jaw, neck in radians."""
    params = HeadParameters.zeros(subject.head.n_shape, subject.head.n_expression)
    params.shape.copy_(subject.params.shape)
    params.jaw_pose[0, 0], params.neck_pose[0, 1] = pose.get("jaw", 0.0), pose.get("neck", 0.0)
    gaussians = avatar.posed(params)
    white = (chosen[avatar.faces].float() - 0.5) / SH_DC
    return (
        render(dataclasses.replace(gaussians, sh=white[:, None, None].expand(-1, 1, 3)), cameras).image[..., 0].numpy()
    )


@pytest.mark.parametrize("n_faces", [600, 2000])
def test_an_open_mouth_shows_teeth_and_a_closed_cavity_and_a_closed_one_shows_nothing_of_it(n_faces):
    head = build_procedural_head(n_faces)
    subject = next(
        s for s in (synthesize_subject(head, (7, i)) for i in range(60)) if s.appearance.hair_style == "long"
    )
    middle = head.template[head.regions["lips"]].mean(0) - torch.tensor([0.0, 0.01, 0.0])
    cameras = Cameras.orbit(middle, 0.5, [0.0], 0.0, 0.5 * 40 / 0.09, 40, 40)
    avatar = portrait_avatar(subject, 2 * 0.09 / 40)
    teeth, mouth, back = (head.regions[name][head.faces].any(1) for name in ("teeth", "mouth_interior", "scalp"))
    assert showing(subject, avatar, mouth, cameras).mean() < 0.01
    close = Cameras.orbit(middle, 0.5, [0.0], 0.0, 0.5 * 40 / 0.05, 40, 40)
    detailed = portrait_avatar(subject, 2 * 0.05 / 40)
    assert showing(subject, detailed, teeth, close).max() < 0.1
    assert (showing(subject, detailed, teeth, close, jaw=0.3) > 0.5).mean() > 0.01
    opened = showing(subject, avatar, mouth, cameras, jaw=0.3)
    assert (opened > 0.5).mean() > 0.02
    # Nothing behind is seen between: every pixel of the open mouth is of the face or of the mouth.
    assert showing(subject, avatar, back, cameras, jaw=0.3)[0, 10:30, 10:30].max() < 0.4


@pytest.mark.parametrize("n_faces", [2000, 4000])
@pytest.mark.parametrize("placement", ["captured", "regular"])
def test_no_hair_shows_through_the_cheek_of_a_turned_head(n_faces, placement):
    head = build_procedural_head(n_faces)
    scalp = head.regions["scalp"][head.faces].sum(1) >= 2
    turns = [(40.0, {}), (-40.0, {}), (0.0, {"neck": 0.8}), (40.0, {"jaw": 0.3}), (-40.0, {"jaw": 0.3})]
    for seed in (1, 3, 4):
        subject = synthesize_subject(head, (0, seed), placement=placement)
        for azimuth, pose in turns:
            turn = np.deg2rad(azimuth) - pose.get("neck", 0.0)
            side = 1.0 if turn > 0 else -1.0
            cheek = torch.tensor([side * 0.044, -0.02, 0.06])
            if "neck" in pose:
                cosine, sine = np.cos(0.8), np.sin(0.8)
                cheek = torch.tensor(
                    [cosine * cheek[0] + sine * cheek[2], cheek[1], cosine * cheek[2] - sine * cheek[0]]
                )
            cameras = Cameras.orbit(cheek, 1.0, [azimuth], 0.0, 48 / 0.03, 48, 48)
            # On the seen cheek, 3 cm wide, away from the hair line.
            assert showing(subject, subject.avatar, scalp, cameras, **pose).max() < 0.2, (seed, azimuth, pose)


def test_portraits_of_different_subjects_differ(crowd):
    images = [portrait(subject) for subject in crowd[:8]]
    distances = [np.abs(a - b).mean() for i, a in enumerate(images) for b in images[:i]]
    assert min(distances) > 0.01


def test_the_camera_turns_to_the_subjects_left(head):
    center = portrait_cameras(head, 64, [30.0]).positions[0]
    assert center[0] > 0.4
    assert center[2] > 0.7


def test_timesteps_begin_at_rest_and_move_expression_neck_jaw_and_eyes_within_limits(head, crowd):
    motion = draw_timesteps(crowd[0], 40, seed=1)
    assert torch.equal(motion.shape, crowd[0].params.shape)
    for name, value in motion.tensors().items():
        if name != "shape":
            assert not value[0].any(), name
    assert (motion.expr[1:] > 0).sum(1).tolist() == [3] * 39 and motion.expr.max() <= 1
    assert motion.neck_pose.abs().amax(0).max() <= 0.3 and motion.neck_pose[1:].abs().min() > 0
    assert 0.1 < motion.jaw_pose[:, 0].max() <= 0.3 and motion.jaw_pose.min() >= 0
    assert torch.equal(motion.eyes_pose[:, :3], motion.eyes_pose[:, 3:])
    again, other = draw_timesteps(crowd[0], 40, seed=1), draw_timesteps(crowd[0], 40, seed=2)
    assert torch.equal(motion.expr, again.expr) and not torch.equal(motion.expr, other.expr)
