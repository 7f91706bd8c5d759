"""Losses on images, and what is said when LPIPS cannot be had."""

import sys

import pytest
import torch

from training.decoder.losses import PerceptualLoss, offset_regularizer


def test_the_offset_regularizer_counts_real_points_in_units_of_the_limit():
    offsets = torch.tensor([[[0.02, 0.0, 0.0], [0.0, 0.01, 0.0]], [[0.02, 0.02, 0.02], [5.0, 5.0, 5.0]]])
    mask = torch.tensor([[True, True], [True, False]])
    expected = (1.0 + 0.25 + 3.0) / 3
    assert float(offset_regularizer(offsets, mask, 0.02)) == pytest.approx(expected)


def test_missing_lpips_weights_name_the_file_and_the_way_without(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"vgg16\.pth: no such file.*--lpips_weight 0"):
        PerceptualLoss(tmp_path / "vgg16.pth")


def test_a_missing_lpips_package_is_named_with_its_install_line(tmp_path, monkeypatch):
    (tmp_path / "vgg16.pth").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match=r"pip install .*\[lpips\].*--lpips_weight 0"):
        PerceptualLoss(tmp_path / "vgg16.pth")


def test_lpips_tells_equal_images_from_others(tmp_path, image_pairs):
    try:
        from torchvision.models import vgg16
    except (ImportError, RuntimeError):
        pytest.skip("no torchvision for this torch")
    pytest.importorskip("lpips")
    torch.manual_seed(0)
    network = vgg16(weights=None)
    torch.save(network.state_dict(), tmp_path / "vgg16.pth")
    loss = PerceptualLoss(tmp_path / "vgg16.pth")
    torch.testing.assert_close(loss.network.net.slice1[0].weight, network.features[0].weight)
    images, truth = image_pairs(3, (64, 64))
    assert loss(truth, truth).abs().max() < 1e-6
    assert (loss(images, truth) > 0).all()
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="VGG16"):
        PerceptualLoss(tmp_path / "other.pth")
