"""The landmarks of the procedural head at every resolution, and FLAME's embedding files, of which no code is run."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from faces_2d import MIRRORED

from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.landmarks import with_landmarks
from gaussian_tokenizer.heads.procedural_head import build_procedural_head


@pytest.fixture(scope="module")
def head() -> HeadModel:
    return build_procedural_head(2000)


@pytest.mark.parametrize("n_faces", [600, 1313, 2000, 4000, 10144])
def test_landmarks_are_at_the_same_places_of_the_procedural_head_at_every_resolution(n_faces):
    head, finest = build_procedural_head(n_faces), build_procedural_head(20_000)
    points, expected = (1000 * each.landmarks(each.template).numpy() for each in (head, finest))
    distance = np.linalg.norm(points - expected, axis=1)
    corners = [36, 39, 42, 45, 48, 54]  # of eyes and mouth, which are vertices of every mesh
    assert distance[corners].max() < 0.1
    assert np.median(distance) < 3 and distance.max() < 13  # the tip of the nose of 600 faces is cut off
    np.testing.assert_allclose(points[MIRRORED] * (-1, 1, 1), points, atol=1.1)  # faces beside the middle differ


def test_landmarks_of_the_eyes_are_lids_around_the_eyeballs(head):
    marks, eyeballs = head.landmarks(head.template), head.joint_regressor[3:] @ head.template
    for eyeball, lids in zip(eyeballs, (marks[42:48], marks[36:42])):
        assert (lids[:, :2].mean(0) - eyeball[:2]).norm() < 2e-3
        radius = (lids - eyeball).norm(dim=1)
        assert radius.min() > 0.0122 and radius[[1, 2, 4, 5]].max() < 0.0155 and radius.max() < 0.018


def test_inner_lips_part_when_the_jaw_opens(head):
    upper, lower = [61, 62, 63], [67, 66, 65]
    rest = head.landmarks(head.template)
    torch.testing.assert_close(rest[upper], rest[lower], atol=1e-3, rtol=0)
    opened = head.landmarks(head.template + head.expression_dirs[:, :, head.expression_names.index("lips_part")])
    assert ((opened[upper] - opened[lower])[:, 1] > 5e-3).all()


def points(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 2000, count), rng.dirichlet((1, 1, 1), count)


def write_npy(folder: Path, content: object) -> Path:
    """As `np.save` writes an object: a pickle in an array."""
    path = folder / "landmark_embedding.npy"
    np.save(path, content, allow_pickle=True)
    return path


def deca(full: tuple | None, static: tuple) -> dict:
    """The keys of DECA's file, with the contour of many angles as tensors."""
    content = {
        "static_lmk_faces_idx": static[0],
        "static_lmk_bary_coords": static[1],
        "dynamic_lmk_faces_idx": torch.zeros(79, 17, dtype=torch.int64),
        "dynamic_lmk_bary_coords": torch.zeros(79, 17, 3),
    }
    if full is not None:
        content |= {"full_lmk_faces_idx": full[0][None], "full_lmk_bary_coords": full[1][None]}
    return content


def test_an_embedding_of_deca_gives_all_68(head, tmp_path):
    faces, weights = points(68)
    found = with_landmarks(head, write_npy(tmp_path, deca((faces, weights), points(51))))
    expected = np.einsum("kc,kci->ki", weights, head.template.numpy()[head.faces.numpy()[faces]])
    np.testing.assert_allclose(found.landmarks(found.template).numpy(), expected, atol=1e-6)
    assert found.hash == head.hash
    found.save(tmp_path / "head.safetensors")
    assert torch.equal(HeadModel.load(tmp_path / "head.safetensors").landmark_faces, torch.from_numpy(faces))


def test_the_eyes_that_vhap_adds_are_left_out(head, tmp_path):
    faces, weights = points(70)
    found = with_landmarks(head, write_npy(tmp_path, deca((faces, weights), points(51))))
    assert found.landmark_faces.tolist() == faces[:68].tolist()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_the_51_without_the_jaw_are_read_from_flames_own_file(head, tmp_path, protocol):
    faces, weights = points(51)
    path = tmp_path / "flame_static_embedding.pkl"
    content = {"lmk_face_idx": faces.astype(np.uint32), "lmk_b_coords": weights}
    path.write_bytes(pickle.dumps(content, protocol))
    assert with_landmarks(head, path).landmark_faces.tolist() == faces.tolist()
    np.savez(tmp_path / "embedding.npz", **content)
    assert with_landmarks(head, tmp_path / "embedding.npz").landmark_faces.tolist() == faces.tolist()
    without = with_landmarks(head, write_npy(tmp_path, deca(None, (faces, weights))))
    assert len(without.landmark_faces) == 51


class Runs:
    def __reduce__(self):
        return print, ("this code was run",)


def test_nothing_in_an_embedding_is_run(head, tmp_path, capsys):
    content = deca(points(68), points(51)) | {"extra": Runs()}
    other = tmp_path / "embedding.pkl"
    other.write_bytes(pickle.dumps(content))
    for path in (write_npy(tmp_path, content), other):
        with pytest.raises(ValueError, match=rf"{path.name}: .*names .*print, which no such file needs"):
            with_landmarks(head, path)
    assert "run" not in capsys.readouterr().out


def test_other_files_are_refused_by_name(head, tmp_path):
    faces, weights = points(68)
    static, tensors = points(51), (torch.zeros(68, dtype=torch.int64), torch.zeros(68, 3))
    for message, content in (
        ("names faces 5000 to 5000, .* has 2000", deca((np.full(68, 5000), weights), static)),
        ("67 faces and barycentrics", deca((faces[:67], weights[:67]), static)),
        ("do not sum to 1", deca((faces, 2 * weights), static)),
        ("has a; expected full_lmk_faces_idx", {"a": 1}),
        ("it is an array of numbers", [1, 2]),
        ("holds no dictionary", {1, 2}),
        ("full_lmk_faces_idx or full_lmk_bary_coords is not a readable array", deca(tensors, static)),
    ):
        with pytest.raises(ValueError, match=rf"landmark_embedding\.npy: .*{message}"):
            with_landmarks(head, write_npy(tmp_path, content))
    (tmp_path / "cut.npy").write_bytes(write_npy(tmp_path, {"a": 1}).read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"cut\.npy: not a landmark embedding that is safe to read"):
        with_landmarks(head, tmp_path / "cut.npy")
    with pytest.raises(FileNotFoundError, match="no such landmark embedding"):
        with_landmarks(head, tmp_path / "missing.npy")
