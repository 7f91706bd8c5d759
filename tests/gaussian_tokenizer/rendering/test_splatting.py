import dataclasses
import logging
import math

import pytest
import torch
from rasterizer_reference import rasterize_reference

from gaussian_tokenizer.avatars.gaussians import Gaussians
from gaussian_tokenizer.rendering import splatting
from gaussian_tokenizer.rendering.cameras import Cameras
from gaussian_tokenizer.rendering.splatting import render


def some_gaussians(frames=1, n=60, degree=0, seed=0):
    random = torch.Generator().manual_seed(seed)
    return Gaussians(
        positions=0.08 * torch.randn(frames, n, 3, generator=random),
        scales=0.01 * torch.exp(0.5 * torch.randn(frames, n, 3, generator=random)),
        quats=torch.randn(frames, n, 4, generator=random),
        opacities=torch.rand(n, generator=random),
        sh=0.5 * torch.randn(n, (degree + 1) ** 2, 3, generator=random),
    )


def some_cameras(n=3, width=20, height=16):
    return Cameras.orbit((0, 0, 0), 1.0, [25.0 * i for i in range(n)], 10, focal=60, width=width, height=height)


def test_a_image_is_colors_over_the_background_with_expected_depth():
    gaussians, cameras = some_gaussians(degree=2), some_cameras()
    image, alpha, depth = render(gaussians, cameras, background=(0.1, 0.2, 0.3))
    assert image.shape == (3, 16, 20, 3) and alpha.shape == depth.shape == (3, 16, 20, 1)
    colors, alpha64, sums = rasterize_reference(
        gaussians.positions, gaussians.quats, gaussians.scales, gaussians.opacities, gaussians.sh,
        cameras.viewmats, cameras.Ks, 20, 16,
    )  # fmt: skip
    expected = colors + (1 - alpha64) * torch.tensor([0.1, 0.2, 0.3])
    assert (image - expected).abs().max() < 1e-4 and (alpha - alpha64).abs().max() < 1e-4
    filled = alpha > 1e-3
    assert 0.2 < filled.float().mean() < 0.9
    assert torch.allclose(depth[filled].double(), (sums / alpha64)[filled], atol=1e-4)
    assert (depth[alpha == 0] == 0).all()
    assert depth[filled].min() > 0.5 and depth.max() < 1.5


def test_each_image_shows_its_own_frame_with_its_own_camera():
    gaussians, cameras = some_gaussians(frames=3), some_cameras(3)
    both = render(gaussians, cameras).image
    for i in range(3):
        assert torch.equal(both[i], render(gaussians.frames(i), cameras[i]).image[0])


def test_a_single_frame_or_camera_is_repeated():
    gaussians, cameras = some_gaussians(frames=3), some_cameras(3)
    around, talking = render(gaussians.frames(1), cameras).image, render(gaussians, cameras[1]).image
    assert len(around) == len(talking) == 3
    assert torch.equal(around[1], talking[1])
    assert not torch.equal(around[0], around[1]) and not torch.equal(talking[0], talking[1])
    with pytest.raises(ValueError, match="3 frames and 2 cameras"):
        render(gaussians, cameras[:2])


def test_backgrounds_are_a_number_a_color_or_a_color_for_each_image():
    gaussians, cameras = some_gaussians(), some_cameras(2)
    black, alpha, _ = render(gaussians, cameras, background=0)
    colors = torch.tensor([[0.2, 0.4, 0.6], [1.0, 0.0, 0.5]])
    image = render(gaussians, cameras, background=colors).image
    assert torch.allclose(image, black + (1 - alpha) * colors[:, None, None], atol=1e-6)
    assert torch.equal(image[0], render(gaussians, cameras, background=colors[0]).image[0])
    assert torch.allclose(render(gaussians, cameras).image, black + 1 - alpha, atol=1e-6)
    with pytest.raises(ValueError, match=r"background is \(4,\)"):
        render(gaussians, cameras, background=torch.ones(4))


def test_gradients_reach_everything_that_can_be_fitted():
    gaussians, cameras, background = some_gaussians(degree=1), some_cameras(2), torch.rand(3).requires_grad_()
    names = [field.name for field in dataclasses.fields(gaussians)]
    leaves = [getattr(gaussians, name).requires_grad_() for name in names]
    viewmats = cameras.viewmats.clone().requires_grad_()
    image, alpha, depth = render(gaussians, dataclasses.replace(cameras, viewmats=viewmats), background)
    (image.square().sum() + alpha.sum() + depth.sum()).backward()
    for leaf in (*leaves, viewmats, background):
        assert leaf.grad is not None and torch.isfinite(leaf.grad).all() and leaf.grad.abs().sum() > 0


def test_nothing_in_view_is_background_with_zero_gradients():
    gaussians = some_gaussians()
    away = dataclasses.replace(gaussians, positions=(gaussians.positions + 100).requires_grad_())
    image, alpha, depth = render(away, some_cameras(), background=0.25)
    assert (image == 0.25).all() and (alpha == 0).all() and (depth == 0).all()
    (image.sum() + depth.sum()).backward()
    assert (away.positions.grad == 0).all()
    none = render(some_gaussians(n=0), some_cameras(), background=0.25)
    assert (none.image == 0.25).all() and none.image.shape == (3, 16, 20, 3)


def test_half_precision_and_double_come_back_as_they_came():
    for dtype in (torch.float64, torch.bfloat16):
        assert {x.dtype for x in render(some_gaussians().to(dtype), some_cameras())} == {dtype}


@pytest.mark.parametrize("name", ["positions", "scales", "quats", "opacities", "sh"])
def test_a_value_that_is_not_finite_is_named_with_its_gaussian(name):
    gaussians = some_gaussians()
    value = getattr(gaussians, name).clone()
    (value[7] if name in ("opacities", "sh") else value[0, 7]).view(-1)[0] = math.nan
    with pytest.raises(ValueError, match=f"{name} of Gaussian 7 is nan"):
        render(dataclasses.replace(gaussians, **{name: value}), some_cameras())


def test_planes_and_widening_that_make_no_sense_are_refused():
    for options in ({"eps2d": -1.0}, {"near": 0.0}, {"near": 2.0, "far": 1.0}):
        with pytest.raises(ValueError, match="expected eps2d >= 0 and 0 < near < far"):
            render(some_gaussians(), some_cameras(), **options)


def test_the_rasterizer_that_draws_is_logged_once(caplog, monkeypatch):
    splatting._log_once.cache_clear()
    drawn = []
    rasterize = splatting._with_ours
    monkeypatch.setattr(splatting, "_with_ours", lambda *words: drawn.append(words) or rasterize(*words))
    with caplog.at_level(logging.INFO, logger=splatting.__name__):
        for _ in range(2):
            render(some_gaussians(), some_cameras())
    (record,) = caplog.records
    assert len(drawn) == 2 and "the toolkit" in record.message and "gsplat" not in record.message


def test_out_of_memory_says_what_to_make_smaller(monkeypatch):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(splatting, "_with_ours", full)
    with pytest.raises(torch.cuda.OutOfMemoryError, match="3 images of 20 x 16 and 60 Gaussians; render fewer cameras"):
        render(some_gaussians(), some_cameras())


@pytest.mark.parametrize(("frames", "n_cameras"), [(1, 3), (3, 1), (3, 3)])
def test_gsplat_is_asked_for_the_same_images(frames, n_cameras):
    """What `gsplat.rasterization` is given, checked by a stand-in with its signature and meaning that runs anywhere."""

    def stand_in(*, means, quats, scales, opacities, colors, sh_degree, viewmats, Ks, width, height,
                 near_plane, far_plane, eps2d, packed, render_mode):  # fmt: skip
        assert render_mode == "RGB+ED" and sh_degree == 1 and means.ndim == 2 and not packed
        image, alpha, depth = rasterize_reference(
            means, quats, scales, opacities, colors, viewmats, Ks, width, height, eps2d, near_plane, far_plane
        )
        return torch.cat((image, depth / alpha.clamp(min=1e-10)), -1).float(), alpha.float(), {}

    gaussians, cameras = some_gaussians(frames=frames, degree=1), some_cameras(n_cameras)
    colors, alpha, depth = splatting._with_gsplat(stand_in, gaussians, cameras, 0.3, 0.01, 1e10)
    ours = render(gaussians, cameras, background=0)
    assert torch.allclose(colors, ours.image, atol=1e-4) and torch.allclose(alpha, ours.alpha, atol=1e-4)
    assert torch.allclose(depth, ours.depth, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("frames", "n_cameras"), [(1, 3), (3, 1), (3, 3)])
def test_gsplat_on_the_gpu_draws_the_same_images(frames, n_cameras):
    pytest.importorskip("gsplat")
    # At most 0.95: above, gsplat 1.5 and 1.6 cut alpha differently (0.999 and 0.99).
    gaussians = some_gaussians(frames=frames, n=300, degree=3)
    gaussians = dataclasses.replace(gaussians, opacities=gaussians.opacities * 0.95)
    cameras = some_cameras(n_cameras, 64, 48)
    images, gradients = [], []
    for device in ("cpu", "cuda"):
        moved = gaussians.to(device)
        leaves = [getattr(moved, field.name).requires_grad_() for field in dataclasses.fields(moved)]
        result = render(moved, cameras, background=0.5)
        assert result.image.device.type == device
        gradients.append(
            [x.cpu() for x in torch.autograd.grad(result.image.square().sum() + result.depth.sum(), leaves)]
        )
        images.append([x.detach().cpu() for x in result])
    for ours, theirs in zip(*images):
        assert (ours - theirs).abs().max() < 2e-3
    for ours, theirs in zip(*gradients):
        assert (ours - theirs).norm() < 1e-2 * ours.norm()
