"""Losses on pictures: against scikit-image and scipy, and what is said when LPIPS cannot be had."""

import sys

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from training.losses import PerceptualLoss, offset_regulariser, psnr, ssim


def pictures(seed: int, size: tuple[int, int] = (40, 32)) -> tuple[torch.Tensor, torch.Tensor]:
    """Two pairs of smooth pictures (2, H, W, 3) with noise of different strength."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]] / 10
    truth = np.stack([0.5 + 0.4 * np.sin(x[..., None] + y[..., None] * np.arange(1, 4) + phase) for phase in (0, 1)])
    noise = np.array([0.02, 0.2])[:, None, None, None] * random.standard_normal(truth.shape)
    return torch.from_numpy(np.clip(truth + noise, 0, 1)).float(), torch.from_numpy(truth).float()


def test_psnr_is_that_of_scikit_image_picture_by_picture():
    images, truth = pictures(0)
    expected = [peak_signal_noise_ratio(t.numpy(), i.numpy(), data_range=1) for i, t in zip(images, truth)]
    np.testing.assert_allclose(psnr(images, truth).numpy(), expected, rtol=1e-5)
    assert psnr(truth, truth).isfinite().all()


def test_ssim_is_the_published_formula_with_a_gaussian_window_of_11_pixels():
    """Wang et al. 2004 in float64 with scipy's filter, borders mirrored; inside the borders also scikit-image's."""
    images, truth = (x.double().numpy() for x in pictures(1, (60, 50)))

    def blur(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, (1.5, 1.5, 0), mode="mirror", truncate=3.5)

    for image, true, found in zip(images, truth, ssim(*(torch.from_numpy(x).float() for x in (images, truth)))):
        mean_a, mean_b = blur(image), blur(true)
        var_a, var_b = blur(image**2) - mean_a**2, blur(true**2) - mean_b**2
        covariance = blur(image * true) - mean_a * mean_b
        c1, c2 = 0.01**2, 0.03**2
        values = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
        values /= (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
        assert float(found) == pytest.approx(values.mean(), abs=1e-4)
        inside = structural_similarity(
            true, image, data_range=1, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert values[5:-5, 5:-5].mean() == pytest.approx(inside, abs=1e-4)
    assert ssim(*(torch.from_numpy(truth).float(),) * 2).tolist() == pytest.approx([1.0, 1.0])


def test_ssim_of_one_picture_has_one_value_and_a_gradient():
    images, truth = pictures(2)
    image = images[1:].clone().requires_grad_()
    value = ssim(image, truth[1:])
    assert value.shape == (1,)
    value.sum().backward()
    assert image.grad.abs().sum() > 0


def test_pictures_smaller_than_the_window_are_refused():
    with pytest.raises(ValueError, match="11 pixels, found pictures of 8x20"):
        ssim(torch.zeros(1, 20, 8, 3), torch.zeros(1, 20, 8, 3))


def test_the_offset_regulariser_counts_real_points_in_units_of_the_limit():
    offsets = torch.tensor([[[0.02, 0.0, 0.0], [0.0, 0.01, 0.0]], [[0.02, 0.02, 0.02], [5.0, 5.0, 5.0]]])
    mask = torch.tensor([[True, True], [True, False]])
    expected = (1.0 + 0.25 + 3.0) / 3
    assert float(offset_regulariser(offsets, mask, 0.02)) == pytest.approx(expected)


def test_missing_lpips_weights_name_the_file_and_the_way_without(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"vgg16\.pth: no such file.*--lpips_weight 0"):
        PerceptualLoss(tmp_path / "vgg16.pth")


def test_a_missing_lpips_package_is_named_with_its_install_line(tmp_path, monkeypatch):
    (tmp_path / "vgg16.pth").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match=r"pip install .*\[lpips\].*--lpips_weight 0"):
        PerceptualLoss(tmp_path / "vgg16.pth")


def test_lpips_tells_equal_pictures_from_others(tmp_path):
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
    images, truth = pictures(3, (64, 64))
    assert loss(truth, truth).abs().max() < 1e-6
    assert (loss(images, truth) > 0).all()
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="VGG16"):
        PerceptualLoss(tmp_path / "other.pth")
