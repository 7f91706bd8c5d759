import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import ROOT

from gaussian_tokenizer.heads.head_model import JOINTS, HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.heads.ict import read_ict, read_obj
from gaussian_tokenizer.heads.loading import load_head
from gaussian_tokenizer.heads.procedural_head import build_procedural_head

ARCHIVE = ROOT.parent / "shared/data/ict_facekit/ict_facekit_subset.tar.xz"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    if not ARCHIVE.is_file():
        pytest.skip(f"the ICT-FaceKit subset is not at {ARCHIVE}")
    target = tmp_path_factory.mktemp("ict")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(target, filter="data")
    yield target
    shutil.rmtree(target)


@pytest.fixture(scope="module")
def head(folder) -> HeadModel:
    return read_ict(folder)


def test_obj_files_are_read_without_their_texture_coordinates(tmp_path):
    path = tmp_path / "small.obj"
    path.write_text(
        "# a square and a triangle\nv 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 -2.5e-1\nvt 0 0\nf 1/1 2/1 3/1 4/1\nf 1 2 3\n"
    )
    vertices, faces = read_obj(path)
    np.testing.assert_array_equal(vertices, [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, -0.25]])
    assert faces == [[0, 1, 2, 3], [0, 1, 2]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("v 0 0\n", "cannot reshape"),
        ("v 0 0 x\n", "could not convert"),
        ("v 0 0 nan\n", "vertex 0 is not finite"),
        ("v 0 0 0\nf 1 2 3\n", "face 0 is"),
        ("v 0 0 0\nf 1 1\n", "expected 3 or 4"),
    ],
)
def test_broken_obj_files_are_named(tmp_path, content, message):
    path = tmp_path / "broken.obj"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_obj(path)
    assert str(path) in str(caught.value)


def test_a_folder_that_is_not_ict_facekit_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no generic_neutral_mesh\.obj here or in FaceXModel"):
        read_ict(tmp_path)
    (tmp_path / "generic_neutral_mesh.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    with pytest.raises(ValueError, match="3 vertices and 1 faces, expected the 26719 and 26384"):
        read_ict(tmp_path)


def test_shapes_without_a_file_are_skipped_and_the_rest_is_whole(folder, head):
    assert (head.n_faces, head.n_shape, head.n_expression) == (34_332, 12, 27)
    names = json.loads((folder / "FaceXModel/vertex_indices.json").read_text())["expressions"]
    assert [name for name in names if name in head.expression_names] == list(head.expression_names)
    assert read_ict(folder / "FaceXModel").hash == head.hash
    assert load_head(str(folder)).hash == head.hash


def test_shapes_are_the_differences_of_the_files_in_meters(folder, head):
    def positions(name):
        return np.loadtxt(
            [line[2:] for line in (folder / f"FaceXModel/{name}.obj").read_text().split("\n") if line.startswith("v ")]
        )

    neutral, smile, identity = positions("generic_neutral_mesh"), positions("mouthSmile_L"), positions("identity003")
    nose_tip = int(neutral[:9409, 2].argmax())
    ours = int(head.template[:, 2].argmax())
    index = head.expression_names.index("mouthSmile_L")
    np.testing.assert_allclose(head.shape_dirs[ours, :, 3], (identity - neutral)[nose_tip] / 100, atol=1e-6)
    moved = np.linalg.norm(smile - neutral, axis=1)[:11_248].argmax()
    expected = (smile - neutral)[moved] / 100
    found = head.expression_dirs[:, :, index]
    np.testing.assert_allclose(found[found.norm(dim=1).argmax()], expected, atol=1e-6)
    assert head.template[found.norm(dim=1).argmax(), 0] > 0  # the left corner of the mouth


def test_the_head_is_of_real_size_with_joints_where_they_turn(head):
    joints = dict(zip(JOINTS, (head.joint_regressor @ head.template).tolist(), strict=True))
    np.testing.assert_allclose(joints["left_eye"], (0.0311, 0.022, 0.070), atol=5e-4)
    np.testing.assert_allclose(joints["right_eye"], (-0.0311, 0.022, 0.070), atol=5e-4)
    assert joints["root"][1] < joints["neck"][1] < joints["jaw"][1] < 0
    torch.testing.assert_close(head.skinning_weights.sum(1), torch.ones(head.n_vertices), atol=1e-5, rtol=0)
    assert head.skinning_weights.min() >= 0
    a, b, c = (head.template[head.faces[:, corner]].double() for corner in range(3))
    assert (torch.linalg.cross(b - a, c - a).norm(dim=-1) > 0).all()
    assert head.faces.unique().numel() == head.n_vertices


def test_the_jaw_joint_opens_the_mouth_as_the_jaw_open_shape_does(head):
    turned = HeadParameters.zeros(head.n_shape, head.n_expression)
    turned.jaw_pose[0, 0] = float(np.deg2rad(25.3))
    rest = head.landmarks(head.template)
    by_joint = head.landmarks(head.pose(turned).vertices[0]) - rest
    by_shape = head.landmarks(head.template + head.expression_dirs[:, :, head.expression_names.index("jawOpen")]) - rest
    assert by_joint[8, 1] < -0.02 and by_joint[66, 1] < -0.02
    assert by_joint[[27, 28, 29, 30, 62]].norm(dim=1).max() < 4e-3
    assert (by_joint - by_shape).norm(dim=1).max() < 0.012


def test_eyeballs_turn_in_place(head):
    params = HeadParameters.zeros(head.n_shape, head.n_expression)
    params.eyes_pose[0, 1] = 0.3
    moved = head.pose(params).vertices[0] - head.template
    assert moved[head.template[:, 0] < 0].abs().max() < 1e-6
    assert moved[~head.regions["eyes"]].abs().max() < 1e-6
    assert moved[head.regions["iris"] & (head.template[:, 0] > 0), 0].mean() > 2e-3


def test_landmarks_and_regions_lie_where_they_should(head):
    points = head.landmarks(head.template)
    assert points.shape == (68, 3) and points[0, 0] < 0 < points[16, 0]
    assert points[27, 1] > points[30, 1] > points[51, 1] > points[57, 1] > points[8, 1]
    means = {name: head.template[mask].mean(0) for name, mask in head.regions.items()}
    assert set(build_procedural_head(600).regions) - {"teeth", "tongue"} == set(means)
    heights = [float(means[name][1]) for name in ("scalp", "brows", "eyes", "lips", "neck")]
    assert heights == sorted(heights, reverse=True)
    for name, mask in head.regions.items():
        assert mask.any() and abs(means[name][0]) < 2e-3, name
    assert head.template[head.regions["ears"], 0].abs().min() > 0.065


def test_teeth_are_kept_on_request_and_follow_their_jaws(folder, head):
    with_teeth = read_ict(folder, teeth=True)
    assert with_teeth.n_faces > head.n_faces + 10_000
    assert with_teeth.regions["mouth_interior"].sum() > head.regions["mouth_interior"].sum() + 4000


def test_shape_files_of_another_topology_or_cut_ones_are_named(folder, tmp_path):
    copy = tmp_path / "FaceXModel"
    copy.mkdir()
    for name in ("generic_neutral_mesh.obj", "vertex_indices.json", "identity000.obj"):
        shutil.copy(folder / "FaceXModel" / name, copy / name)
    with pytest.raises(FileNotFoundError, match=r"lacks jawOpen\.obj"):
        read_ict(tmp_path)
    shutil.copy(folder / "FaceXModel/jawOpen.obj", copy / "jawOpen.obj")
    content = (copy / "identity000.obj").read_bytes()
    (copy / "identity000.obj").write_bytes(content[: len(content) // 8])
    with pytest.raises(ValueError, match=r"identity000\.obj"):
        read_ict(tmp_path)
    (copy / "vertex_indices.json").write_text("{}")
    with pytest.raises(ValueError, match=r"vertex_indices\.json: not the index file"):
        read_ict(tmp_path)
