import io
import zipfile

import numpy as np
import plyfile
import pytest
import torch

from eval.viewer.exports import folder_bytes, splat_bytes
from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.avatars.motions import expression_frames
from gaussian_tokenizer.heads.procedural_head import build_procedural_head
from gaussian_tokenizer.synthetic.subject import synthesize_subject


@pytest.fixture(scope="module")
def avatar() -> GaussianAvatar:
    return synthesize_subject(build_procedural_head(600), 1, num_points=80).avatar


def test_the_ply_has_the_pose_that_was_asked_for(avatar):
    turned = expression_frames(avatar.head)["turn"]
    rows = plyfile.PlyData.read(io.BytesIO(splat_bytes(avatar, turned, ".ply")))["vertex"]
    found = np.stack([rows[axis] for axis in "xyz"], -1)
    np.testing.assert_allclose(found, avatar.posed(turned).positions[0].numpy(), atol=1e-6)


def test_a_splat_file_has_32_bytes_a_gaussian(avatar):
    pytest.importorskip("gsplat")
    content = splat_bytes(avatar, expression_frames(avatar.head)["neutral"], ".splat")
    assert len(content) == 32 * len(avatar)
    found = np.frombuffer(content, np.float32).reshape(-1, 8)[:, :3]
    expected = avatar.canonical_gaussians().positions[0].numpy()
    np.testing.assert_allclose(np.sort(found, 0), np.sort(expected, 0), atol=1e-5)


def test_the_zip_is_a_folder_that_opens_as_the_same_avatar(avatar, tmp_path):
    zipfile.ZipFile(io.BytesIO(folder_bytes(avatar, "ada"))).extractall(tmp_path)
    again = GaussianAvatar.load(tmp_path / "ada", head=avatar.head)
    for name, tensor in avatar.tensors().items():
        assert torch.equal(again.tensors()[name], tensor), name
    assert torch.equal(again.params.shape, avatar.params.shape) and again.head_hash == avatar.head.hash


def test_the_zip_of_one_avatar_is_always_the_same(avatar):
    assert folder_bytes(avatar, "ada") == folder_bytes(avatar, "ada")
