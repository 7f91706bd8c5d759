"""PSNR and SSIM against scikit-image and torchmetrics."""

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional.image import structural_similarity_index_measure

from gaussian_tokenizer.rendering.image_metrics import coverage, psnr, ssim


def test_psnr_is_that_of_scikit_image_image_by_image(image_pairs):
    images, truth = image_pairs(0)
    expected = [peak_signal_noise_ratio(t.numpy(), i.numpy(), data_range=1) for i, t in zip(images, truth)]
    np.testing.assert_allclose(psnr(images, truth).numpy(), expected, rtol=1e-5)
    assert psnr(truth, truth).isfinite().all()


def test_ssim_is_the_published_formula_with_a_gaussian_window_of_11_pixels(image_pairs):
    """As scikit-image and torchmetrics compute it, where the whole window lies in the image."""
    images, truth = image_pairs(1, (60, 50))
    settings = dict(data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    for image, true, found in zip(images, truth, ssim(images, truth)):
        expected = structural_similarity(true.numpy(), image.numpy(), channel_axis=-1, **settings)
        assert float(found) == pytest.approx(expected, abs=1e-5)
        _, full = structural_similarity_index_measure(
            image.permute(2, 0, 1)[None], true.permute(2, 0, 1)[None], data_range=1.0, return_full_image=True
        )
        assert float(found) == pytest.approx(float(full[..., 5:-5, 5:-5].mean()), abs=1e-5)
    assert ssim(truth, truth).tolist() == pytest.approx([1.0, 1.0])


def test_ssim_of_one_image_has_one_value_and_a_gradient(image_pairs):
    images, truth = image_pairs(2)
    image = images[1:].clone().requires_grad_()
    value = ssim(image, truth[1:])
    assert value.shape == (1,)
    value.sum().backward()
    assert image.grad.abs().sum() > 0


def test_images_smaller_than_the_window_are_refused():
    with pytest.raises(ValueError, match="11 pixels, found images of 8x20"):
        ssim(torch.zeros(1, 20, 8, 3), torch.zeros(1, 20, 8, 3))


def test_coverage_is_the_share_of_the_subject_that_is_opaque_and_unknown_without_alpha():
    truth = torch.zeros(3, 4, 4, 1)
    truth[0, :2], truth[1] = 1.0, 1.0
    alphas = torch.zeros(3, 4, 4, 1)
    alphas[0, 1:, :3] = 0.6  # three of the subject's eight pixels, and six beside it
    alphas[0, 0] = 0.4
    found = coverage(alphas, truth)
    assert found[0] == 3 / 8 and found[1:].isnan().all()
