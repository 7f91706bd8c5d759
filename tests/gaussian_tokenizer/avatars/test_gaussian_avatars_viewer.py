"""GaussianAvatars' viewer opens the folders we write: its reading re-implemented from the format, key by key, in NumPy."""

from dataclasses import replace

import numpy as np
import plyfile
import pytest
import torch

from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.avatars.motions import synthetic_motion
from gaussian_tokenizer.geometry.rotations import quaternion_to_matrix
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.heads.procedural_head import build_procedural_head
from gaussian_tokenizer.synthetic.subject import synthesize_subject

STATIC = ("shape", "static_offset")  # these stay the avatar's, whatever motion is played
DYNAMIC = ("translation", "rotation", "neck_pose", "jaw_pose", "eyes_pose", "expr", "dynamic_offset")


@pytest.fixture(scope="module")
def head() -> HeadModel:
    """With FLAME's 300 shapes and 100 expressions: what is drivable in that viewer."""
    small = build_procedural_head(600)
    shapes = torch.zeros(small.n_vertices, 3, 300 - small.n_shape)
    expressions = torch.zeros(small.n_vertices, 3, 100 - small.n_expression)
    return replace(
        small,
        shape_dirs=torch.cat((small.shape_dirs, shapes), -1),
        expression_dirs=torch.cat((small.expression_dirs, expressions), -1),
        expression_names=tuple(f"expression {index}" for index in range(100)),
    )


@pytest.fixture(scope="module")
def avatar(head) -> GaussianAvatar:
    """Of three timesteps, colors of SH degree 0 and no offsets, as the decoder and a fit without them give."""
    made = synthesize_subject(build_procedural_head(600), 0, num_points=120).avatar
    params = synthetic_motion("talk", build_procedural_head(600), 3)
    generator = torch.Generator().manual_seed(0)
    shape = torch.cat((made.params.shape, torch.zeros(300 - len(made.params.shape))))
    expr = torch.cat((params.expr, torch.zeros(3, 100 - params.expr.shape[1])), 1)
    rotation = torch.randn(3, 3, generator=generator) * 0.2
    params = replace(params, shape=shape, expr=expr, rotation=rotation, layout=None)
    assert made.sh_degree == 0 and params.static_offset is None and params.dynamic_offset is None
    return replace(made, params=params, head=None, head_name=None, head_hash=None).with_head(head)


def viewer_reads(folder, sh_degree=3, motion=None) -> tuple[dict, dict]:
    """Columns of the Gaussians and the FLAME parameters; a missing key or another SH degree is an error, as there."""
    vertex = plyfile.PlyData.read(folder / "point_cloud.ply").elements[0]

    def columns(prefix):
        names = [each.name for each in vertex.properties if each.name.startswith(prefix)]
        return np.stack([vertex[name] for name in sorted(names, key=lambda name: int(name.split("_")[-1]))], 1)

    rest = [each.name for each in vertex.properties if each.name.startswith("f_rest_")]
    assert len(rest) == 3 * (sh_degree + 1) ** 2 - 3
    gaussians = {
        "xyz": np.stack([vertex[axis] for axis in "xyz"], 1),
        "dc": np.stack([vertex[f"f_dc_{channel}"] for channel in range(3)], 1),
        "rest": columns("f_rest_").reshape(len(vertex.data), 3, -1),
        "opacity": vertex["opacity"],
        "scale": columns("scale_"),
        "rot": columns("rot_"),
        "binding": columns("binding_")[:, 0].astype(np.int32),
    }
    with np.load(folder / "flame_param.npz") as file:
        flame = {key: file[key] for key in file.files}
    if motion is not None:
        with np.load(motion) as file:
            moving = {key: file[key] for key in file.files if file[key].dtype == np.float32}
        flame = {key: flame[key] for key in STATIC} | {key: moving[key] for key in DYNAMIC}
    return gaussians, flame


def viewer_places(gaussians: dict, flame: dict, timestep: int, head: HeadModel) -> tuple[np.ndarray, ...]:
    """World-space positions, scales and rotation matrices at a timestep, float64."""
    assert flame["shape"].shape == (300,) and flame["expr"].shape[1] == 100
    frame = {key: flame[key][[timestep]] for key in DYNAMIC}
    static = np.broadcast_to(flame["static_offset"], (1, head.n_vertices, 3))[0]
    assert frame["dynamic_offset"].shape == (1, head.n_vertices, 3)
    values = {**frame, "shape": flame["shape"], "static_offset": static}
    params = HeadParameters(**{key: torch.from_numpy(value.copy()).double() for key, value in values.items()})
    vertices = head.pose(params).vertices[0].numpy()
    v0, v1, v2 = (vertices[head.faces[:, corner]][gaussians["binding"]] for corner in range(3))
    base = np.linalg.norm(v1 - v0, axis=1, keepdims=True)
    x = (v1 - v0) / base
    normal = np.cross(x, v2 - v0)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    z = np.cross(x, normal)
    size = (base + np.abs((z * (v2 - v0)).sum(1, keepdims=True))) / 2
    frames = np.stack((x, normal, z), -1)
    positions = size * np.einsum("nij,nj->ni", frames, gaussians["xyz"]) + (v0 + v1 + v2) / 3
    local = quaternion_to_matrix(torch.from_numpy(gaussians["rot"]).double()).numpy()
    return positions, size * np.exp(gaussians["scale"]), frames @ local


def test_the_viewer_reads_every_key_of_a_folder_and_places_the_gaussians_where_we_do(tmp_path, avatar, head):
    avatar.save(tmp_path / "avatar")
    gaussians, flame = viewer_reads(tmp_path / "avatar")
    np.testing.assert_array_equal(gaussians["dc"], avatar.sh[:, 0])
    assert not gaussians["rest"].any()
    np.testing.assert_array_equal(gaussians["opacity"], avatar.opacities)
    assert not flame["static_offset"].any() and not flame["dynamic_offset"].any()
    ours = avatar.posed(animation="face_frames")
    for timestep in range(3):
        positions, scales, rotations = viewer_places(gaussians, flame, timestep, head)
        np.testing.assert_allclose(positions, ours.positions[timestep], atol=3e-6)
        np.testing.assert_allclose(scales, ours.scales[timestep], rtol=2e-3, atol=1e-6)
        # of faces nearly without area a frame has few digits
        turned = np.abs(rotations - quaternion_to_matrix(ours.quats[timestep]).numpy()).max((1, 2))
        assert np.quantile(turned, 0.9) < 1e-4


def test_a_motion_saved_with_its_offsets_drives_an_avatar_there(tmp_path, avatar, head):
    avatar.save(tmp_path / "avatar")
    motion = avatar.params.frame(slice(1, 3))
    motion.save(tmp_path / "without.npz")
    with pytest.raises(KeyError, match="dynamic_offset"):
        viewer_reads(tmp_path / "avatar", motion=tmp_path / "without.npz")
    motion.with_offsets(head.n_vertices).save(tmp_path / "with.npz")
    gaussians, flame = viewer_reads(tmp_path / "avatar", motion=tmp_path / "with.npz")
    positions, _, _ = viewer_places(gaussians, flame, 0, head)
    np.testing.assert_allclose(positions, avatar.posed(animation="face_frames").positions[1], atol=3e-6)


def test_the_head_at_rest_keeps_the_key_of_its_dynamic_offset(tmp_path, avatar, head):
    avatar.save(tmp_path / "avatar")
    HeadParameters.load(tmp_path / "avatar" / "flame_param.npz").canonical().save(tmp_path / "rest.npz")
    gaussians, flame = viewer_reads(tmp_path / "avatar", motion=tmp_path / "rest.npz")
    positions, _, _ = viewer_places(gaussians, flame, 0, head)
    np.testing.assert_allclose(positions, avatar.canonical_gaussians().positions[0], atol=3e-6)


def test_a_degree_that_is_asked_for_is_what_the_viewer_started_with_it_opens(tmp_path, avatar):
    avatar.save(tmp_path / "avatar", sh_degree=1)
    gaussians, _ = viewer_reads(tmp_path / "avatar", sh_degree=1)
    assert gaussians["rest"].shape == (len(avatar), 3, 3)
    with pytest.raises(AssertionError):
        viewer_reads(tmp_path / "avatar")
