"""Heads found from 2D landmarks: made-up people are found again, one photograph, and what cannot be a face."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from faces_2d import MIRRORED, angle_degrees, median_distance_mm, noisy_landmarks, random_face, vertices_of
from paths import ROOT

from gaussian_tokenizer.captures.portrait import fit_portrait
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.procedural_head import build_procedural_head

ASTRONAUT = np.array(json.loads((ROOT / "training/recipe/astronaut.json").read_text())["landmarks"])


@pytest.fixture(scope="module")
def head() -> HeadModel:
    return build_procedural_head(2000)


@pytest.mark.parametrize("identity_scale", [1.0, 2.5])
@pytest.mark.parametrize("yaw", [0, 15, -35])
def test_a_person_is_found_again(head, identity_scale, yaw):
    skin = head.regions["face"].numpy()
    faces, wholes, turns = [], [], []
    for seed in range(3):
        face = random_face(head, seed, identity_scale, yaw, distance=(0.7, 1.0, 1.5)[seed])
        found = fit_portrait(noisy_landmarks(head, face, seed), head, (512, 512))
        assert found.warnings == () and found.rms < 3.0, seed
        own, expected = (head.canonical_vertices(each).double().numpy() for each in (found.params, face.params))
        faces.append(median_distance_mm(own[skin], expected[skin]))
        wholes.append(median_distance_mm(own, expected))
        turns.append(angle_degrees(found.camera.viewmats[0, :3, :3].double().numpy(), face.rotation))
        ratio = float(found.camera.Ks[0, 0, 0]) / face.focal
        assert 0.5 < ratio < 1.6, seed
    assert np.median(faces) < (1.5 if identity_scale == 1 else 3.0)
    assert np.median(wholes) < (2.5 if identity_scale == 1 else 6.0)
    assert max(turns) < (2.0 if identity_scale == 1 else 4.0)


def test_without_noise_a_likely_person_fits_to_a_fraction_of_a_pixel(head):
    face = random_face(head, 5, 0.5, 10)
    assert fit_portrait(noisy_landmarks(head, face, 0, noise=0), head, (512, 512)).rms < 0.5


def test_camera_and_parameters_give_the_landmarks_of_the_result(head):
    """The whole head, posed and projected here, as against the few vertices that the fit works with."""
    face = random_face(head, 1, 1.0, 20)
    for marks in (noisy_landmarks(head, face, 1), noisy_landmarks(head, face, 1)[17:]):
        found = fit_portrait(marks, head, (400, 600))
        points = head.landmarks(torch.from_numpy(vertices_of(head, found.params))).numpy()[-51:]
        viewmat, K = found.camera.viewmats[0].double().numpy(), found.camera.Ks[0].double().numpy()
        assert K[:2, 2].tolist() == [300, 200] and (found.camera.width, found.camera.height) == (600, 400)
        seen = (points @ viewmat[:3, :3].T + viewmat[:3, 3]) @ K.T
        pixels = seen[:, :2] / seen[:, 2:]
        np.testing.assert_allclose(found.landmarks[-51:].numpy(), pixels, atol=2e-3)
        distance = np.linalg.norm(pixels - marks[-51:], axis=1)
        np.testing.assert_allclose(found.residuals[-51:].numpy(), distance, atol=2e-3)
        assert len(found.residuals) == len(marks)
        assert found.rms == pytest.approx(float(found.residuals.square().mean().sqrt()), abs=1e-5)


def test_the_pose_is_in_the_camera_and_what_landmarks_do_not_show_is_at_rest(head):
    params = fit_portrait(noisy_landmarks(head, random_face(head, 2, 1.0, 15), 2), head, (512, 512)).params
    for name in ("rotation", "translation", "neck_pose", "eyes_pose"):
        assert not getattr(params, name).any(), name
    assert params.num_frames == 1 and params.shape.dtype == torch.float32
    head.check(params)


def test_a_given_focal_length_is_kept_and_puts_the_camera_at_its_distance(head):
    face = random_face(head, 3, 1.0, 10, distance=1.4)
    found = fit_portrait(noisy_landmarks(head, face, 3), head, (512, 512), focal=face.focal)
    assert float(found.camera.Ks[0, 0, 0]) == pytest.approx(face.focal)
    assert float(found.camera.positions.norm()) == pytest.approx(1.4, rel=0.1)


def outline_of_the_far_side(head: HeadModel, face, marks: np.ndarray, yaw: float) -> np.ndarray:
    """Landmarks whose jaw, on the side that is turned away, lies on the outline of the skin at the same height."""
    corners = face.project(vertices_of(head, face.params))[head.faces[head.regions["face"][head.faces].all(1)].numpy()]
    moved = marks.copy()
    for mark in range(8) if yaw < 0 else range(9, 17):
        y = marks[mark, 1]
        a, b = corners, np.roll(corners, -1, axis=1)
        crossed = (a[..., 1] > y) != (b[..., 1] > y)
        a, b = a[crossed], b[crossed]
        x = a[:, 0] + (y - a[:, 1]) / (b[:, 1] - a[:, 1]) * (b[:, 0] - a[:, 0])
        moved[mark, 0] = x.min() if yaw < 0 else x.max()
    return moved


@pytest.mark.parametrize("yaw", [-35, 35])
def test_the_jaw_of_a_turned_head_may_be_drawn_along_its_outline(head, yaw):
    face = random_face(head, 4, 1.0, yaw)
    marks = outline_of_the_far_side(head, face, noisy_landmarks(head, face, 4, noise=0.5), yaw)
    far = list(range(3)) if yaw < 0 else [14, 15, 16]
    hidden = noisy_landmarks(head, face, 4, noise=0)
    assert np.abs(marks - hidden)[far, 0].min() > 25
    found = fit_portrait(marks, head, (512, 512))
    assert found.warnings == () and np.abs(found.landmarks.numpy() - marks)[far, 0].max() < 4
    assert angle_degrees(found.camera.viewmats[0, :3, :3].double().numpy(), face.rotation) < 4


def test_one_wrong_landmark_does_not_move_the_others(head):
    face = random_face(head, 6, 1.0, 5)
    marks = noisy_landmarks(head, face, 6)
    right = fit_portrait(marks, head, (512, 512))
    marks[30] += (60, -40)
    wrong = fit_portrait(marks, head, (512, 512))
    others = np.arange(68) != 30
    assert wrong.residuals[others].square().mean().sqrt() < 1.6 * right.residuals[others].square().mean().sqrt()
    confidences = others.astype(float)
    without = fit_portrait(marks, head, (512, 512), confidences=confidences)
    assert without.residuals[30] > 50 and without.rms < 1.2 * right.rms


CLICKED = [36, 39, 42, 45, 30, 48, 54, 8]  # corners of eyes and mouth, tip of the nose, chin


@pytest.mark.parametrize("yaw", [0, 20])
def test_eight_landmarks_give_pose_and_face_better_than_the_mean_head(head, yaw):
    skin = head.regions["face"].numpy()
    confidences = np.isin(np.arange(68), CLICKED).astype(float)
    turns, found_mm, mean_mm = [], [], []
    for seed in range(4):
        face = random_face(head, seed, 1.0, yaw)
        marks = noisy_landmarks(head, face, seed, noise=2.0)
        found = fit_portrait(marks, head, (512, 512), confidences=confidences)
        assert found.warnings == () and found.residuals[CLICKED].max() < 10
        turns.append(angle_degrees(found.camera.viewmats[0, :3, :3].double().numpy(), face.rotation))
        own, true, mean = (
            vertices.double().numpy()[skin]
            for vertices in (*map(head.canonical_vertices, (found.params, face.params)), head.template)
        )
        found_mm.append(median_distance_mm(own, true))
        mean_mm.append(median_distance_mm(mean, true))
    assert max(turns) < 10 and np.mean(found_mm) < 0.9 * np.mean(mean_mm)


def test_where_landmarks_without_confidence_are_does_not_matter(head):
    """Nor to the landmarks of the jaw, which slide away from the others."""
    face = random_face(head, 4, 1.0, 35)
    marks = outline_of_the_far_side(head, face, noisy_landmarks(head, face, 4), 35)
    confidences = ((np.arange(68) < 17) | np.isin(np.arange(68), CLICKED)).astype(float)
    elsewhere = np.where(confidences[:, None] > 0, marks, (3000.0, 7.0))
    one, other = (fit_portrait(each, head, (512, 512), confidences=confidences) for each in (marks, elsewhere))
    assert torch.equal(one.params.shape, other.params.shape) and torch.equal(one.camera.viewmats, other.camera.viewmats)


@pytest.mark.parametrize("yaw", [-30, 0, 30])
def test_mirrored_landmarks_are_noticed(head, yaw):
    marks = noisy_landmarks(head, random_face(head, 7, 2.5, yaw), 7)
    assert fit_portrait(marks, head, (512, 512)).warnings == ()
    assert "mirrored" in fit_portrait(marks[MIRRORED], head, (512, 512)).warnings[0]


def test_a_small_face_and_no_face_are_returned_with_a_warning(head):
    small = (ASTRONAUT - ASTRONAUT.mean(0)) * 20 / 92 + 256
    (text,) = fit_portrait(small, head, (512, 512)).warnings
    assert "the face is 20 pixels large" in text
    muzzle = ASTRONAUT.copy()
    muzzle[27:36, 1] += np.linspace(-10, 60, 9)
    muzzle[48:] += (0, 50)
    assert "human face" in fit_portrait(muzzle, head, (512, 512)).warnings[-1]
    shuffled = np.random.default_rng(0).permutation(ASTRONAUT)
    assert "human face" in fit_portrait(shuffled, head, (512, 512)).warnings[-1]


@pytest.mark.parametrize(
    ("landmarks", "message"),
    [
        (ASTRONAUT[:67], r"\(67, 2\), expected \(68, 2\) in iBUG's order or the \(51, 2\)"),
        (np.full((68, 2), 100.0), "x 100, y 100 to x 100, y 100 are on a point or a line"),
        (ASTRONAUT / 512, "expected pixels, not fractions of the image"),
        (np.where(np.arange(136).reshape(68, 2) == 7, np.nan, ASTRONAUT), r"landmark 3 is \[182.9, nan\]"),
        (ASTRONAUT * 8, "outside the image of 512x512; are they of another size"),
        (ASTRONAUT - 1000, "outside the image of 512x512"),
    ],
)
def test_what_cannot_be_a_face_in_the_image_is_refused(head, landmarks, message):
    with pytest.raises(ValueError, match=message):
        fit_portrait(landmarks, head, (512, 512))


def test_heads_with_51_landmarks_are_fitted_to_those_and_heads_with_none_refused(head):
    inner = {name: getattr(head, name)[17:] for name in ("landmark_faces", "landmark_barycentrics")}
    face = random_face(head, 8, 1.0, 10)
    marks = noisy_landmarks(head, face, 8)
    found = fit_portrait(marks, dataclasses.replace(head, **inner), (512, 512))
    assert len(found.residuals) == 51 and found.rms < 2
    torch.testing.assert_close(found.params.shape, fit_portrait(marks[17:], head, (512, 512)).params.shape)
    none = {name: getattr(head, name)[:0] for name in inner}
    with pytest.raises(ValueError, match="has 0 landmarks, expected 68 or 51; FLAME gets them from its embedding file"):
        fit_portrait(marks, dataclasses.replace(head, **none), (512, 512))


def test_a_mesh_with_a_hole_between_nose_and_jaw_is_fitted_too(head):
    """As FLAME's, whose lips may stand apart; here a part of the chin is missing."""
    middle = head.template[head.faces].mean(1)
    gone = (middle[:, 0].abs() < 0.02) & (middle[:, 1] < -0.058) & (middle[:, 1] > -0.08) & (middle[:, 2] > 0.0)
    kept = ~gone
    kept[head.landmark_faces] = True
    new_index = kept.cumsum(0) - 1
    open_head = dataclasses.replace(head, faces=head.faces[kept], landmark_faces=new_index[head.landmark_faces])
    assert gone.sum() > 10
    marks = noisy_landmarks(head, random_face(head, 9, 1.0, 20), 9)
    assert fit_portrait(marks, open_head, (512, 512)).rms == pytest.approx(
        fit_portrait(marks, head, (512, 512)).rms, abs=0.1
    )


def test_other_arguments_that_are_wrong_are_refused(head):
    with pytest.raises(ValueError, match="focal is 0"):
        fit_portrait(ASTRONAUT, head, (512, 512), focal=0)
    with pytest.raises(ValueError, match=r"confidences are \(67,\), expected \(68,\)"):
        fit_portrait(ASTRONAUT, head, (512, 512), confidences=np.ones(67))
    with pytest.raises(ValueError, match="0 of the 51 landmarks without the jaw have a confidence"):
        fit_portrait(ASTRONAUT, head, (512, 512), confidences=np.arange(68) < 17)
    with pytest.raises(
        ValueError, match="5 of the 51 landmarks without the jaw have a confidence, expected at least 6"
    ):
        fit_portrait(ASTRONAUT, head, (512, 512), confidences=np.arange(68) < 22)


def test_a_photograph_is_fitted_to_a_few_pixels(head):
    """`skimage.data.astronaut()`, landmarks placed by hand: a smiling mouth, raised corners, the head tilted by 4 degrees."""
    found = fit_portrait(ASTRONAUT, head, (512, 512))
    assert found.warnings == () and found.rms < 3
    weights = dict(zip(head.expression_names, found.params.expr[0].tolist()))
    assert weights["smile_left"] > 0.5 and weights["smile_right"] > 0.5 and weights["lips_part"] > 0.3
    eyes = ASTRONAUT[[36, 45]]
    tilt = np.degrees(np.arctan2(*(eyes[1] - eyes[0])[::-1]))
    right, down, _ = found.camera.viewmats[0, :3, :3].double().numpy()
    assert np.degrees(np.arctan2(down[0], right[0])) == pytest.approx(tilt, abs=1.5)
