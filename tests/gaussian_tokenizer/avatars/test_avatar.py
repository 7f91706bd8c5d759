"""Avatars: files written back byte for byte, the head they belong to, canonical and posed Gaussians."""

import errno
import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import plyfile
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy.spatial.transform import Rotation

from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.avatars.ply import property_names, read_gaussian_ply
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.heads.procedural_head import build_procedural_head
from gaussian_tokenizer.utils import atomic


def tiny_head(seed=0, vertices=10, faces=16, name="tiny", shape_size=3, expression_size=2):
    """Ten random vertices and sixteen random triangles: small enough to check with loops."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return torch.tensor(rng.standard_normal(shape), dtype=torch.float32) * 0.05

    return HeadModel(
        name=name,
        template=normal(vertices, 3),
        faces=torch.tensor(np.stack([rng.permutation(vertices)[:3] for _ in range(faces)])),
        shape_dirs=normal(vertices, 3, shape_size) * 0.2,
        expression_dirs=normal(vertices, 3, expression_size) * 0.2,
        pose_dirs=normal(vertices, 3, 36) * 0.01,
        joint_regressor=torch.tensor(rng.dirichlet(np.ones(vertices), 5), dtype=torch.float32),
        skinning_weights=torch.tensor(rng.dirichlet(np.ones(5), vertices), dtype=torch.float32),
        parents=(-1, 0, 1, 1, 1),
        expression_names=tuple(f"expression {i}" for i in range(expression_size)),
        landmark_faces=torch.zeros(0, dtype=torch.int64),
        landmark_barycentrics=torch.zeros(0, 3),
        regions={},
    )


HEAD = tiny_head()


def random_params(num_frames=3, head=HEAD, seed=0, offsets=True):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator) * 0.3

    params = HeadParameters.zeros(head.n_shape, head.n_expression, num_frames)
    values = {name: normal(*value.shape) for name, value in params.tensors().items()}
    if offsets:
        values["static_offset"] = normal(head.n_vertices, 3) * 0.01
        values["dynamic_offset"] = normal(num_frames, head.n_vertices, 3) * 0.01
    return HeadParameters(**values)


def random_avatar(count=20, sh_degree=1, head=HEAD, seed=0, **fields):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    values = {
        "positions": normal(count, 3),
        "faces": torch.randint(head.n_faces, (count,), generator=generator),
        "sh": normal(count, (sh_degree + 1) ** 2, 3),
        "opacities": normal(count),
        "scales": normal(count, 3) - 1,
        "quats": normal(count, 4),
        "params": random_params(head=head, seed=seed),
    }
    return GaussianAvatar(**{**values, **fields})


def write_gaussian_avatars_folder(folder, count=20, sh_degree=3, num_frames=3, seed=0):
    """A folder as the reference implementation writes it: plyfile and np.savez."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    names = property_names(sh_degree, with_faces=True)
    table = np.empty(count, dtype=[(name, "f4") for name in names])
    for name in names:
        table[name] = 0 if name.startswith("n") else rng.standard_normal(count)
    table["binding_0"] = rng.integers(0, HEAD.n_faces, count)
    plyfile.PlyData([plyfile.PlyElement.describe(table, "vertex")]).write(folder / "point_cloud.ply")
    params = random_params(num_frames, seed=seed).tensors()
    arrays = {name: value.numpy() for name, value in params.items()}
    arrays["static_offset"] = arrays["static_offset"][None]
    np.savez(folder / "flame_param.npz", **arrays)
    return folder


def assert_same(first, second):
    assert first.tensors().keys() == second.tensors().keys()
    for name, value in first.tensors().items():
        assert torch.equal(value, second.tensors()[name]), name
    assert (first.params is None) == (second.params is None)
    if first.params is not None:
        for name, value in first.params.tensors().items():
            assert torch.equal(value, second.params.tensors()[name]), name
    assert (first.head_name, first.head_hash) == (second.head_name, second.head_hash)


def files(folder):
    return sorted(os.listdir(folder))


# Files


@pytest.mark.parametrize("sh_degree", [0, 1, 2, 3])
def test_a_gaussian_avatars_folder_is_written_back_byte_for_byte(tmp_path, sh_degree):
    source = write_gaussian_avatars_folder(tmp_path / "in", sh_degree=sh_degree)
    avatar = GaussianAvatar.load(source)
    assert (len(avatar), avatar.sh_degree, avatar.params.num_frames) == (20, sh_degree, 3)
    assert avatar.head_name is None and avatar.head_hash is None
    avatar.save(tmp_path / "out")
    assert files(tmp_path / "out") == ["flame_param.npz", "point_cloud.ply"]
    for name in files(tmp_path / "out"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("empty", [0.0, -0.0])
def test_empty_bands_of_a_folder_are_left_out_and_written_back_byte_for_byte(tmp_path, empty):
    source = write_gaussian_avatars_folder(tmp_path / "in", sh_degree=3)
    data = plyfile.PlyData.read(source / "point_cloud.ply", mmap=False)
    for number in range(45):  # channel by channel: of the 15 of each, those of bands 2 and 3
        if number % 15 >= 3:
            data["vertex"][f"f_rest_{number}"] = empty
    data.write(source / "point_cloud.ply")
    avatar = GaussianAvatar.load(source)
    assert avatar.sh_degree == (1 if np.signbit(empty) == 0 else 3)  # the sign of a zero has no other place
    avatar.save(tmp_path / "out")
    for name in files(source):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_a_new_folder_is_padded_for_gaussian_avatars_and_read_without_the_padding(tmp_path):
    avatar = random_avatar(sh_degree=0, params=random_params(offsets=False)).with_head(HEAD)
    avatar.save(tmp_path / "a")
    assert len(plyfile.PlyData.read(tmp_path / "a" / "point_cloud.ply")["vertex"].properties) == 63
    back = GaussianAvatar.load(tmp_path / "a", head=HEAD)
    assert torch.equal(back.sh, avatar.sh) and torch.equal(back.params.expr, avatar.params.expr)
    assert torch.equal(back.params.static_offset, torch.zeros(10, 3))
    assert torch.equal(back.params.dynamic_offset, torch.zeros(3, 10, 3))
    assert torch.equal(back.posed().positions, avatar.posed().positions)
    replace(back, params=avatar.params).save(tmp_path / "b")  # new parameters of an avatar that was read
    assert (tmp_path / "a" / "flame_param.npz").read_bytes() == (tmp_path / "b" / "flame_param.npz").read_bytes()


def test_a_folder_without_offsets_is_written_back_as_it_was(tmp_path):
    source = write_gaussian_avatars_folder(tmp_path / "in", sh_degree=0)
    np.savez(source / "flame_param.npz", **{k: v.numpy() for k, v in random_params(offsets=False).tensors().items()})
    GaussianAvatar.load(source, head=HEAD).save(tmp_path / "out")
    for name in files(source):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_what_a_folder_cannot_hold_is_said_in_one_line(tmp_path):
    random_avatar(params=random_params(offsets=False)).save(tmp_path / "a.safetensors")
    avatar = GaussianAvatar.load(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"do not say how many vertices .* attach the avatar's head model"):
        avatar.save(tmp_path / "a")
    avatar.with_head(HEAD).save(tmp_path / "a")
    with pytest.raises(ValueError, match=r"colors of SH degree 1, sh_degree=0; expected 1 to 3"):
        avatar.save(tmp_path / "b", sh_degree=0)
    with pytest.raises(ValueError, match=r"sh_degree=3 is for folders"):
        avatar.save(tmp_path / "b.safetensors", sh_degree=3)
    assert files(tmp_path) == ["a", "a.safetensors"]


def test_the_newest_iteration_of_a_training_folder_is_read(tmp_path):
    for iteration in (7000, 30000, 9):
        folder = tmp_path / "model" / "point_cloud" / f"iteration_{iteration}"
        write_gaussian_avatars_folder(folder, seed=iteration)
    newest = tmp_path / "model" / "point_cloud" / "iteration_30000"
    assert_same(GaussianAvatar.load(tmp_path / "model"), GaussianAvatar.load(newest))
    assert_same(GaussianAvatar.load(tmp_path / "model"), GaussianAvatar.load(newest / "point_cloud.ply"))


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(1, 5),
    sh_degree=st.integers(0, 3),
    absent=st.sets(st.sampled_from(["sh", "opacities", "scales", "quats", "params"])),
    named=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_our_own_file_gives_the_same_avatar_and_the_same_bytes(tmp_path, count, sh_degree, absent, named, seed):
    avatar = random_avatar(count, sh_degree, seed=seed, **dict.fromkeys(absent))
    if named:
        avatar = avatar.with_head(HEAD)
    avatar.save(tmp_path / "a.safetensors")
    back = GaussianAvatar.load(tmp_path / "a.safetensors")
    assert_same(avatar, back)
    assert back.head is None
    back.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_folder_remembers_its_head_model_and_keeps_its_other_files(tmp_path):
    folder = tmp_path / "subject"
    folder.mkdir()
    (folder / "metadata.json").write_text(json.dumps({"avatar_id": "é7", "consent": "yes"}), encoding="utf-8")
    (folder / "portrait.png").write_bytes(b"png")
    random_avatar().with_head(HEAD).save(folder)
    metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    assert metadata == {"avatar_id": "é7", "consent": "yes", "head_name": "tiny", "head_hash": HEAD.hash}
    assert (folder / "portrait.png").read_bytes() == b"png"
    avatar = GaussianAvatar.load(folder, head=HEAD)
    assert avatar.head is HEAD and avatar.head_hash == HEAD.hash


def test_replacing_a_folder_by_an_avatar_without_parameters_is_refused(tmp_path):
    random_avatar().save(tmp_path / "a")
    before = {name: (tmp_path / "a" / name).read_bytes() for name in files(tmp_path / "a")}
    with pytest.raises(ValueError, match="no head parameters to replace it with"):
        random_avatar(params=None).save(tmp_path / "a")
    assert before == {name: (tmp_path / "a" / name).read_bytes() for name in files(tmp_path / "a")}


@pytest.mark.parametrize("target", ["a", "a.safetensors"])
def test_a_disk_that_fills_while_saving_leaves_the_old_avatar_and_no_temporary(tmp_path, monkeypatch, target):
    def content():
        return {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    random_avatar(seed=1).save(tmp_path / target)
    before = content()

    calls = []

    def full_at_the_second_file(descriptor):
        calls.append(descriptor)
        if len(calls) == 2 or target.endswith(".safetensors"):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full_at_the_second_file)
    with pytest.raises(OSError, match="No space left"):
        random_avatar(seed=2).save(tmp_path / target)
    assert content() == before
    with pytest.raises(OSError, match="No space left"):
        calls.clear()
        random_avatar(seed=2).save(tmp_path / f"new_{target}")
    assert content() == before and files(tmp_path) == [target]


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_write_that_the_disk_cuts_off_leaves_the_old_avatar(tmp_path):
    random_avatar().save(tmp_path / "a")
    before = {name: (tmp_path / "a" / name).read_bytes() for name in files(tmp_path / "a")}
    script = f"""
        import resource, signal, torch
        from gaussian_tokenizer.avatars.avatar import GaussianAvatar
        avatar = GaussianAvatar.load({str(tmp_path / "a")!r})
        many = {{name: value.repeat(1000, *[1] * (value.ndim - 1)) for name, value in avatar.tensors().items()}}
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        GaussianAvatar(**many, params=avatar.params).save({str(tmp_path / "a")!r})
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert "File too large" in result.stderr
    assert before == {name: (tmp_path / "a" / name).read_bytes() for name in files(tmp_path / "a")}


def test_an_avatar_of_points_only_is_kept_as_safetensors_and_not_as_ply(tmp_path):
    points_only = random_avatar(sh=None, opacities=None, scales=None, quats=None).with_head(HEAD)
    with pytest.raises(ValueError, match="needs sh, opacities, scales, quats"):
        points_only.save(tmp_path / "a")
    with pytest.raises(ValueError, match="needs sh, opacities, scales, quats"):
        points_only.save_world_ply(tmp_path / "a.ply")
    assert files(tmp_path) == []
    points_only.save(tmp_path / "a.safetensors")
    assert_same(GaussianAvatar.load(tmp_path / "a.safetensors"), points_only)


def test_a_ply_is_not_a_name_for_an_avatar(tmp_path):
    with pytest.raises(ValueError, match="save_world_ply"):
        random_avatar().save(tmp_path / "a.ply")


def test_missing_files_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no such avatar"):
        GaussianAvatar.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"holds neither point_cloud\.ply nor point_cloud/iteration_"):
        GaussianAvatar.load(tmp_path / "empty")
    for name in ("a.safetensors", "a.ply"):
        with pytest.raises(FileNotFoundError, match=name):
            GaussianAvatar.load(tmp_path / name)


@pytest.mark.parametrize("content", ["{", "[1]", '{"head_hash": 5}', '{"head_name": ["a"]}', "[" * 100_000])
def test_a_broken_metadata_file_is_named(tmp_path, content):
    folder = write_gaussian_avatars_folder(tmp_path / "a")
    (folder / "metadata.json").write_text(content)
    with pytest.raises(ValueError, match=r"metadata\.json: "):
        GaussianAvatar.load(folder)


@pytest.mark.parametrize("about", ["[" * 100_000, "[]", "1", "{}"])
def test_safetensors_with_broken_metadata_are_no_avatar(tmp_path, about):
    path = tmp_path / "a.safetensors"
    save_file({"positions": torch.zeros(1, 3)}, path, {"gaussian_avatar": about})
    with pytest.raises(ValueError, match=r"a\.safetensors: not an avatar file"):
        GaussianAvatar.load(path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("scales", torch.full((4, 3), torch.nan), "scales of row 0 is nan"),
        ("faces", torch.tensor([0, 1, -2, 3]), "faces: row 2 is -2"),
        ("params.jaw_pose", torch.full((3, 3), torch.inf), "params.jaw_pose of row 0 is inf"),
        ("params.jaw_pose", torch.zeros(2, 3), r"jaw_pose is \(2, 3\), expected \(3, 3\)"),
        ("opacities", torch.zeros(5), r"opacities is \(5,\) torch.float32, expected \(4,\)"),
        ("positions", torch.zeros(4, 3).double(), "positions is torch.float64"),
        ("positions", torch.zeros(0, 3), "0 Gaussians"),
        ("positions", torch.tensor(1.0), "a.safetensors: "),
        ("sh", torch.zeros(4, 5, 3), r"sh is \(4, 5, 3\), expected"),
        ("colors", torch.zeros(4), "colors"),
        ("faces", None, "faces"),
    ],
)
def test_a_wrong_tensor_in_our_own_file_is_named(tmp_path, field, value, message):
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = tmp_path / "a.safetensors"
    random_avatar(4).save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()} | {field: value}  # noqa: SIM118
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, path, metadata)
    with pytest.raises(ValueError, match=message) as caught:
        GaussianAvatar.load(path)
    assert "a.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def test_a_safetensors_file_of_something_else_is_refused(tmp_path):
    HEAD.save(tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match=r"head\.safetensors: not an avatar file"):
        GaussianAvatar.load(tmp_path / "head.safetensors")


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_of_ours_gives_a_finite_avatar_or_one_line(tmp_path, data):
    if not (tmp_path / "good.safetensors").exists():
        random_avatar(2, 0).save(tmp_path / "good.safetensors")
    content = bytearray((tmp_path / "good.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    (tmp_path / "a.safetensors").write_bytes(content)
    try:
        avatar = GaussianAvatar.load(tmp_path / "a.safetensors")
    except ValueError as error:
        assert "a.safetensors" in str(error) and "\n" not in str(error)
    else:
        assert all(torch.isfinite(value).all() for value in avatar.tensors().values())


# The head it belongs to


def test_another_head_model_is_refused_by_its_hash(tmp_path):
    avatar = random_avatar().with_head(HEAD)
    other = tiny_head(seed=1, name="other")
    with pytest.raises(ValueError, match=rf"made on head model 'tiny' \(hash {HEAD.hash}\), not on 'other'"):
        avatar.with_head(other)
    for name in ("a", "a.safetensors"):
        avatar.save(tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name}.* was made on head model 'tiny'"):
            GaussianAvatar.load(tmp_path / name, head=other)


def test_a_head_model_of_other_sizes_is_refused_where_the_hash_is_unknown(tmp_path):
    source = write_gaussian_avatars_folder(tmp_path / "in")
    with pytest.raises(ValueError, match=r"binding_0 of row \d+ is \d+, expected a face index from 0 to 3"):
        GaussianAvatar.load(source, head=tiny_head(faces=4))
    avatar = GaussianAvatar.load(source)
    with pytest.raises(ValueError, match=r"Gaussian \d+ is bound to face \d+, head model 'tiny' has 4 faces"):
        avatar.with_head(tiny_head(faces=4))
    with pytest.raises(ValueError, match="expr of size 2"):
        GaussianAvatar.load(source, head=tiny_head(expression_size=5))
    with pytest.raises(ValueError, match="static_offset of size 10"):
        avatar.with_head(tiny_head(vertices=11))


def test_without_a_head_the_error_says_how_to_attach_one():
    with pytest.raises(ValueError, match="attach the one it was made on by with_head"):
        random_avatar().canonical_points()
    with pytest.raises(ValueError, match=r"made on \('tiny'\) by with_head"):
        replace(random_avatar(), head_name="tiny").posed()


def test_an_empty_avatar_is_refused():
    with pytest.raises(ValueError, match="0 Gaussians"):
        GaussianAvatar(positions=torch.zeros(0, 3), faces=torch.zeros(0, dtype=torch.int64))


def test_tensors_of_another_length_or_type_are_refused():
    with pytest.raises(ValueError, match=r"quats is \(19, 4\)"):
        random_avatar(quats=torch.zeros(19, 4))
    with pytest.raises(ValueError, match=r"faces is .* torch.int32, expected .* torch.int64"):
        random_avatar(faces=torch.zeros(20, dtype=torch.int32))


# Geometry


def frame_of_face(vertices, corners):
    v0, v1, v2 = (vertices[corner] for corner in corners)
    a0 = (v1 - v0) / np.linalg.norm(v1 - v0)
    a1 = np.cross(a0, v2 - v0)
    a1 /= np.linalg.norm(a1)
    a2 = np.cross(a0, a1)
    return (v0 + v1 + v2) / 3, np.stack([a0, a1, a2], 1), (np.linalg.norm(v1 - v0) + abs(a2 @ (v2 - v0))) / 2


def test_canonical_points_lie_on_the_subjects_own_head_at_rest():
    avatar = random_avatar().with_head(HEAD)
    points = avatar.canonical_points()
    assert points["positions"].dtype == torch.float32 and points["faces"].dtype == torch.int64
    params = avatar.params
    vertices = (HEAD.template + HEAD.shape_dirs @ params.shape + params.static_offset).double().numpy()
    for n in range(len(avatar)):
        center, rotation, scale = frame_of_face(vertices, HEAD.faces[avatar.faces[n]])
        expected = scale * rotation @ avatar.positions[n].double().numpy() + center
        np.testing.assert_allclose(points["positions"][n], expected, atol=1e-6)


@pytest.mark.parametrize("as_numpy", [True, False])
def test_from_points_undoes_canonical_points(as_numpy):
    avatar = random_avatar().with_head(HEAD)
    points = avatar.canonical_points()
    if as_numpy:
        points = {name: value.numpy() for name, value in points.items()}
    back = GaussianAvatar.from_points(points, avatar.params, HEAD)
    torch.testing.assert_close(back.positions, avatar.positions, atol=1e-4, rtol=1e-4)
    assert torch.equal(back.faces, avatar.faces)
    assert back.head is HEAD and back.head_hash == HEAD.hash and back.sh is None


def test_from_points_refuses_what_no_avatar_can_hold():
    good = {"positions": torch.zeros(2, 3), "faces": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match="Gaussian 1 is bound to face 16"):
        GaussianAvatar.from_points({**good, "faces": [0, 16]}, None, HEAD)
    with pytest.raises(ValueError, match="positions of row 1 is nan"):
        GaussianAvatar.from_points({**good, "positions": [[0, 0, 0], [0, float("nan"), 0]]}, None, HEAD)
    with pytest.raises(ValueError, match="0 Gaussians"):
        GaussianAvatar.from_points({"positions": torch.zeros(0, 3), "faces": []}, None, HEAD)
    flat = replace(HEAD, faces=torch.tensor([[0, 1, 2], [3, 3, 3]]))
    with pytest.raises(ValueError, match="point 1 is bound to face 1, whose three vertices are one point"):
        GaussianAvatar.from_points(good, None, flat)


@pytest.mark.parametrize("frame", [0, 2, -1])
def test_gaussians_that_ride_on_faces_follow_the_published_formulas(frame):
    avatar = random_avatar().with_head(HEAD)
    posed = avatar.posed(animation="face_frames").frames(frame)
    vertices = HEAD.pose(avatar.params).vertices[frame].double().numpy()
    for n in range(len(avatar)):
        center, rotation, scale = frame_of_face(vertices, HEAD.faces[avatar.faces[n]])
        expected = scale * rotation @ avatar.positions[n].double().numpy() + center
        np.testing.assert_allclose(posed.positions[0, n], expected, atol=2e-6)
        np.testing.assert_allclose(posed.scales[0, n], scale * np.exp(avatar.scales[n].numpy()), rtol=1e-4)
        turned = Rotation.from_matrix(rotation) * Rotation.from_quat(avatar.quats[n].numpy(), scalar_first=True)
        found = Rotation.from_quat(posed.quats[0, n].numpy(), scalar_first=True)
        assert (turned.inv() * found).magnitude() < 1e-3
    np.testing.assert_allclose(posed.opacities, 1 / (1 + np.exp(-avatar.opacities.numpy())), rtol=1e-5)
    assert torch.equal(posed.sh, avatar.sh)
    expected = np.maximum(0, 0.5 + 0.28209479177387814 * avatar.sh[:, 0].numpy())
    np.testing.assert_allclose(posed.colors, expected, rtol=1e-5, atol=1e-6)


def test_an_avatar_without_parameters_is_posed_as_the_mean_head():
    avatar = random_avatar(params=None).with_head(HEAD)
    for animation in ("lbs", "face_frames"):
        positions = avatar.posed(animation=animation).positions[0]
        torch.testing.assert_close(positions, avatar.canonical_points()["positions"], atol=1e-6, rtol=1e-5)


def test_an_unknown_animation_is_named():
    with pytest.raises(ValueError, match="animation is 'magic', expected lbs or face_frames"):
        random_avatar().with_head(HEAD).posed(animation="magic")


def test_a_frame_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="frame 3 asked of head parameters that hold 3 frames"):
        random_avatar().with_head(HEAD).save_world_ply(tmp_path / "a.ply", frame=3)
    assert files(tmp_path) == []


def test_from_gaussians_undoes_canonical_gaussians():
    avatar = random_avatar(sh_degree=2).with_head(HEAD)
    back = GaussianAvatar.from_gaussians(avatar.canonical_gaussians(), avatar.faces, avatar.params, HEAD)
    torch.testing.assert_close(back.positions, avatar.positions, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(back.scales, avatar.scales, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(back.opacities, avatar.opacities, atol=1e-5, rtol=1e-5)
    assert torch.equal(back.sh, avatar.sh) and torch.equal(back.faces, avatar.faces)
    unit = torch.nn.functional.normalize(avatar.quats, dim=1)
    torch.testing.assert_close((back.quats * unit).sum(1).abs(), torch.ones(len(avatar)))
    assert back.head is HEAD and back.params is avatar.params


def test_from_gaussians_keeps_what_a_network_predicts_finite_and_apart_from_it():
    canonical = random_avatar().with_head(HEAD).canonical_gaussians()
    predicted = replace(
        canonical,
        positions=canonical.positions.double().requires_grad_(),
        scales=torch.zeros_like(canonical.scales),
        opacities=torch.linspace(0, 1, 20).requires_grad_(),
        sh=canonical.sh.clone().requires_grad_(),
    )
    avatar = GaussianAvatar.from_gaussians(predicted, random_avatar().faces, random_params(), HEAD)
    for name, value in avatar.tensors().items():
        assert torch.isfinite(value).all() and not value.requires_grad, name
    assert avatar.opacities[0] < -13 and avatar.opacities[-1] > 13
    torch.testing.assert_close(avatar.posed().opacities, predicted.opacities.detach(), atol=2e-6, rtol=0)


def test_from_gaussians_refuses_a_motion_and_nan():
    avatar = random_avatar().with_head(HEAD)
    with pytest.raises(ValueError, match="1 frame of canonical Gaussians, found 3"):
        GaussianAvatar.from_gaussians(avatar.posed(), avatar.faces, avatar.params, HEAD)
    broken = avatar.canonical_gaussians()
    broken.scales[0, 7, 1] = torch.nan
    with pytest.raises(ValueError, match="scales of Gaussian 7 is nan"):
        GaussianAvatar.from_gaussians(broken, avatar.faces, avatar.params, HEAD)


@pytest.mark.parametrize(("frame", "animation"), [(1, "lbs"), (-1, "face_frames"), (None, "lbs")])
def test_a_world_ply_holds_what_a_viewer_draws(tmp_path, frame, animation):
    avatar = random_avatar(sh_degree=2).with_head(HEAD)
    avatar.save_world_ply(tmp_path / "world.ply", frame=frame, animation=animation)
    posed = avatar.canonical_gaussians() if frame is None else avatar.posed(animation=animation).frames(frame)
    table = plyfile.PlyData.read(tmp_path / "world.ply")["vertex"]
    assert [p.name for p in table.properties] == property_names(2, with_faces=False)
    np.testing.assert_allclose(table["z"], posed.positions[0, :, 2], atol=1e-6)
    np.testing.assert_allclose(np.exp(table["scale_1"]), posed.scales[0, :, 1], rtol=1e-5)
    np.testing.assert_allclose(table["rot_0"], posed.quats[0, :, 0], atol=1e-5)
    np.testing.assert_allclose(table["opacity"], avatar.opacities, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(table["f_rest_8"], avatar.sh[:, 1, 1])
    world = read_gaussian_ply(tmp_path / "world.ply", with_faces=False)
    np.testing.assert_array_equal(world.sh, avatar.sh.numpy())
    with pytest.raises(ValueError, match=r"world\.ply: lacks property binding_0"):
        GaussianAvatar.load(tmp_path / "world.ply")


def test_an_avatar_on_the_built_in_head_goes_to_files_and_back_through_its_points(tmp_path):
    head = build_procedural_head(600)
    params = random_params(num_frames=2, head=head)
    avatar = random_avatar(1000, 1, head=head, params=replace(params, static_offset=None, dynamic_offset=None))
    avatar.with_head(head).save(tmp_path / "a")
    back = GaussianAvatar.load(tmp_path / "a", head=head)
    assert torch.equal(back.positions, avatar.positions) and torch.equal(back.params.expr, avatar.params.expr)
    again = GaussianAvatar.from_points(back.canonical_points(), back.params, head)
    torch.testing.assert_close(again.positions, avatar.positions, atol=1e-3, rtol=1e-3)
    back.posed().check_finite()
