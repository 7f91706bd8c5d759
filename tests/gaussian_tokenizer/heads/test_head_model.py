import dataclasses
import json

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.heads.loading import built_in_head, load_head
from gaussian_tokenizer.heads.procedural_head import build_procedural_head


def random_head(vertices=40, shapes=7, expressions=5, seed=0) -> HeadModel:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    weights = torch.rand(vertices, 5, generator=generator)
    regressor = torch.rand(5, vertices, generator=generator)
    return HeadModel(
        name="random",
        template=0.1 * normal(vertices, 3),
        faces=torch.stack([torch.randperm(vertices, generator=generator)[:3] for _ in range(60)]),
        shape_dirs=0.01 * normal(vertices, 3, shapes),
        expression_dirs=0.01 * normal(vertices, 3, expressions),
        pose_dirs=0.01 * normal(vertices, 3, 36),
        joint_regressor=regressor / regressor.sum(1, keepdim=True),
        skinning_weights=weights / weights.sum(1, keepdim=True),
        parents=(-1, 0, 1, 1, 1),
        expression_names=tuple(f"e{i}" for i in range(expressions)),
        landmark_faces=torch.tensor([3, 8]),
        landmark_barycentrics=torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]]),
        regions={"eyes": torch.arange(vertices) < 4},
    )


def random_params(head: HeadModel, frames=3, seed=1) -> HeadParameters:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return HeadParameters(
        shape=normal(head.n_shape),
        expr=normal(frames, head.n_expression),
        rotation=normal(frames, 3),
        neck_pose=normal(frames, 3),
        jaw_pose=normal(frames, 3),
        eyes_pose=normal(frames, 6),
        translation=normal(frames, 3),
        static_offset=0.01 * normal(head.n_vertices, 3),
        dynamic_offset=0.01 * normal(frames, head.n_vertices, 3),
    )


def pose_by_the_published_formulas(
    head: HeadModel, params: HeadParameters, frame: int
) -> tuple[np.ndarray, np.ndarray]:
    """SMPL / FLAME in float64, vertex by vertex, with 4x4 matrices: the vertices and the joint transforms."""
    h = {
        f.name: np.asarray(v, np.float64)
        for f in dataclasses.fields(head)
        if isinstance(v := getattr(head, f.name), torch.Tensor)
    }
    p = {name: np.asarray(value, np.float64) for name, value in params.tensors().items()}
    full_pose = np.concatenate([p[k][frame] for k in ("rotation", "neck_pose", "jaw_pose", "eyes_pose")]).reshape(5, 3)
    rotations = [Rotation.from_rotvec(vector).as_matrix() for vector in full_pose]
    betas = np.concatenate((p["shape"], p["expr"][frame]))
    shaped = []
    for v in range(head.n_vertices):
        dirs = np.concatenate((h["shape_dirs"][v], h["expression_dirs"][v]), axis=1)
        offset = p["static_offset"][v] + p["dynamic_offset"][frame, v]
        shaped.append(h["template"][v] + sum(dirs[:, k] * betas[k] for k in range(len(betas))) + offset)
    joints = [sum(h["joint_regressor"][j, v] * shaped[v] for v in range(head.n_vertices)) for j in range(5)]
    feature = np.concatenate([(rotation - np.eye(3)).ravel() for rotation in rotations[1:]])

    chain, transforms = [], []
    for j, parent in enumerate(head.parents):
        local = np.eye(4)
        local[:3, :3] = rotations[j]
        local[:3, 3] = joints[j] - (joints[parent] if j else 0)
        chain.append(chain[parent] @ local if j else local)
        rest = np.eye(4)
        rest[:3, 3] = -joints[j]
        shift = np.eye(4)
        shift[:3, 3] = p["translation"][frame]
        transforms.append(shift @ chain[j] @ rest)
    vertices = []
    for v in range(head.n_vertices):
        posed = shaped[v] + h["pose_dirs"][v] @ feature
        blend = sum(h["skinning_weights"][v, j] * transforms[j] for j in range(5))
        vertices.append((blend @ np.append(posed, 1))[:3])
    return np.array(vertices), np.array(transforms)


@pytest.mark.parametrize("make", [random_head, lambda: build_procedural_head(600)], ids=["random", "procedural"])
def test_pose_agrees_with_the_published_formulas(make):
    head = make()
    params = random_params(head)
    posed = head.pose(params)
    for frame in range(params.num_frames):
        vertices, transforms = pose_by_the_published_formulas(head, params, frame)
        np.testing.assert_allclose(posed.vertices[frame].numpy(), vertices, atol=1e-5)
        np.testing.assert_allclose(posed.joint_transforms[frame].numpy(), transforms, atol=1e-5)


def test_zero_parameters_give_the_template_and_the_identity():
    head = random_head()
    posed = head.pose(HeadParameters.zeros(head.n_shape, head.n_expression, 2))
    torch.testing.assert_close(posed.vertices, head.template.expand(2, -1, -1), atol=1e-6, rtol=0)
    torch.testing.assert_close(posed.joint_transforms, torch.eye(4).expand(2, 5, 4, 4), atol=1e-6, rtol=0)


def test_pose_correctives_can_be_left_out():
    head = random_head()
    params = random_params(head)
    without = head.pose(params, pose_correctives=False).vertices
    flat = dataclasses.replace(head, pose_dirs=torch.zeros_like(head.pose_dirs))
    torch.testing.assert_close(without, flat.pose(params).vertices)
    assert (without - head.pose(params).vertices).abs().max() > 1e-3


def test_pose_is_differentiable_in_every_parameter_at_rest():
    head = random_head()
    params = HeadParameters.zeros(head.n_shape, head.n_expression)
    leaves = {name: value.requires_grad_() for name, value in params.tensors().items()}
    (head.pose(params).vertices ** 2).sum().backward()
    for name, leaf in leaves.items():
        assert torch.isfinite(leaf.grad).all() and leaf.grad.abs().sum() > 0, name


def test_canonical_vertices_keep_shape_and_static_offset_only():
    head = random_head()
    params = random_params(head)
    expected = head.template + head.shape_dirs @ params.shape + params.static_offset
    torch.testing.assert_close(head.canonical_vertices(params), expected)


def test_normals_are_the_area_weighted_mean_of_the_faces():
    head = random_head()
    vertices = head.template.double().numpy()
    sums = np.zeros_like(vertices)
    for a, b, c in head.faces.tolist():
        for corner in (a, b, c):
            sums[corner] += np.cross(vertices[b] - vertices[a], vertices[c] - vertices[a])
    used = np.linalg.norm(sums, axis=1) > 0
    expected = sums[used] / np.linalg.norm(sums[used], axis=1, keepdims=True)
    np.testing.assert_allclose(head.normals(head.template)[used].numpy(), expected, atol=1e-5)
    assert head.normals(head.template.expand(2, 3, -1, -1)).shape == (2, 3, head.n_vertices, 3)


def test_landmarks_are_points_of_faces():
    head = random_head()
    corners = head.template[head.faces[3]]
    expected = 0.2 * corners[0] + 0.3 * corners[1] + 0.5 * corners[2]
    torch.testing.assert_close(head.landmarks(head.template)[0], expected)
    assert head.landmarks(head.template.expand(4, -1, -1)).shape == (4, 2, 3)


def test_parameters_of_another_head_are_refused_with_both_sizes():
    head = random_head()
    with pytest.raises(ValueError, match=r"shape of size 300.*has 7"):
        head.pose(HeadParameters.zeros(300, 5))
    with pytest.raises(ValueError, match=r"expr of size 100.*has 5"):
        head.pose(HeadParameters.zeros(7, 100))
    params = dataclasses.replace(HeadParameters.zeros(7, 5), static_offset=torch.zeros(9, 3))
    with pytest.raises(ValueError, match=r"static_offset of size 9.*has 40"):
        head.check(params)


def test_tensors_that_disagree_are_refused():
    with pytest.raises(ValueError, match=r"skinning_weights is \(40, 4\), expected \(40, 5\)"):
        dataclasses.replace(random_head(), skinning_weights=torch.zeros(40, 4))
    with pytest.raises(ValueError, match="region eyes"):
        dataclasses.replace(random_head(), regions={"eyes": torch.zeros(3, dtype=torch.bool)})
    with pytest.raises(ValueError, match="parents"):
        dataclasses.replace(random_head(), parents=(-1, 0, 3, 1, 1))


def test_a_saved_head_comes_back_whole_and_saving_is_deterministic(tmp_path):
    head = random_head()
    head.save(tmp_path / "head.safetensors")
    loaded = HeadModel.load(tmp_path / "head.safetensors")
    for field in dataclasses.fields(head):
        ours, theirs = getattr(head, field.name), getattr(loaded, field.name)
        if isinstance(ours, torch.Tensor):
            assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype, field.name
        elif field.name == "regions":
            assert all(torch.equal(ours[name], theirs[name]) for name in ours) and set(ours) == set(theirs)
        else:
            assert ours == theirs
    assert loaded.hash == head.hash
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "head.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.safetensors", "head.safetensors"]


def test_the_hash_names_the_geometry_and_not_the_name():
    head = random_head()
    assert dataclasses.replace(head, name="other", regions={}).hash == head.hash
    moved = head.template.clone()
    moved[0, 0] += 1e-6
    assert dataclasses.replace(head, template=moved).hash != head.hash
    assert len(head.hash) == 16 and int(head.hash, 16) >= 0


def test_a_cut_file_is_named(tmp_path):
    path = tmp_path / "head.safetensors"
    random_head().save(path)
    content = path.read_bytes()
    for length in (0, 5, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"head\.safetensors"):
            HeadModel.load(path)


WRONG_METADATA: list[dict] = [
    {"name": ["random"]},
    {"expression_names": "e0"},
    {"expression_names": [0, 1, 2, 3, 4]},
    {"parents": [-1, 0, 1, 1, 1e400]},
    {"parents": [-1, 0, 1, 1, 1.5]},
    {"parents": None},
]


def said(metadata, **change):
    """The metadata of a file that says something else."""
    return {"head_model": json.dumps(json.loads(metadata["head_model"]) | change)}


def test_files_that_are_no_head_model_are_refused_in_one_line(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = tmp_path / "head.safetensors"
    save_file({"x": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="not a head model file"):
        HeadModel.load(path)

    random_head().save(path)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    doubled, negative = tensors["skinning_weights"].clone(), tensors["skinning_weights"].clone()
    doubled[7] *= 2
    negative[3] = torch.tensor([1.5, -0.5, 0, 0, 0])
    deep = {"head_model": "[" * 100_000 + "]" * 100_000}
    for wrong in (deep, {"head_model": "[]"}, *(said(metadata, **change) for change in WRONG_METADATA)):
        save_file(tensors, path, wrong)
        with pytest.raises(ValueError, match="not a head model file"):
            HeadModel.load(path)
    broken = {
        "missing tensors \\['template'\\]": {key: value for key, value in tensors.items() if key != "template"},
        "faces has an index outside 0..39": tensors | {"faces": tensors["faces"] + 30},
        "template has NaN": tensors | {"template": tensors["template"] * torch.nan},
        "template is torch.float64": tensors | {"template": tensors["template"].double()},
        "shape_dirs is": tensors | {"shape_dirs": tensors["shape_dirs"][:5].clone()},
        "vertex 7 sum to 2": tensors | {"skinning_weights": doubled},
        "the least weight is -0.5": tensors | {"skinning_weights": negative},
        "region eyes is torch.float32, expected torch.bool": tensors | {"region.eyes": torch.ones(40)},
        r"landmark_faces is \(2, 1\), expected \(2,\)": tensors
        | {"landmark_faces": tensors["landmark_faces"][:, None]},
        "template, shape_dirs is one number": tensors | {"template": torch.ones(()), "shape_dirs": torch.ones(())},
        "landmark_faces is one number": tensors | {"landmark_faces": torch.tensor(1)},
        "40 vertices and 0 faces, expected a mesh": tensors | {"faces": torch.zeros(0, 3, dtype=torch.int64)},
    }
    for message, content in broken.items():
        save_file(content, path, metadata)
        with pytest.raises(ValueError, match=message) as caught:
            HeadModel.load(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_load_head_understands_every_kind_of_name(tmp_path):
    assert load_head("procedural:700").n_faces == 700
    random_head().save(tmp_path / "head.safetensors")
    assert load_head(str(tmp_path / "head.safetensors")).name == "random"
    for spec, error, message in (
        ("procedural:many", ValueError, "number of faces"),
        ("procedural:12", ValueError, "expected 600 to"),
        (str(tmp_path / "no.safetensors"), FileNotFoundError, "no such head model"),
        (str(tmp_path / "no.pkl"), FileNotFoundError, "no such FLAME file"),
        (str(tmp_path), FileNotFoundError, "generic_neutral_mesh.obj"),
        ("flame", ValueError, "expected 'procedural'"),
    ):
        with pytest.raises(error, match=message):
            load_head(spec)


def test_only_the_name_of_a_built_in_head_brings_one(tmp_path):
    assert built_in_head("procedural:700").n_faces == 700
    for name in (None, "", "flame2023", "procedurally", "procedural/../head.safetensors", str(tmp_path)):
        assert built_in_head(name) is None


def test_to_moves_every_tensor():
    head = random_head().to("meta")
    assert head.device.type == "meta" and head.regions["eyes"].device.type == "meta"
