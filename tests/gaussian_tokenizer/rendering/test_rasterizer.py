import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rasterizer_reference import rasterize_reference, sh_basis

from gaussian_tokenizer.geometry.rotations import quaternion_to_matrix
from gaussian_tokenizer.rendering import projection, rasterizer
from gaussian_tokenizer.rendering.rasterizer import project, rasterize

NAMES = ("means", "quats", "scales", "opacities", "sh", "viewmats")


def scene(seed=0, n=300, degree=1, n_cameras=2, spread=0.15, size=0.02, opaque=0.0, dtype=torch.float32):
    """Gaussians around the origin of sizes that differ a hundredfold by axis, cameras a meter away with cx, cy anywhere."""
    random = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)  # noqa: E731
    viewmats = torch.eye(4, dtype=torch.float64).repeat(n_cameras, 1, 1)
    viewmats[:, :3, :3] = quaternion_to_matrix(normal(n_cameras, 4))
    viewmats[:, :3, 3] = torch.tensor([0, 0, 1.0]) + 0.05 * normal(n_cameras, 3)
    Ks = torch.tensor([[60.0, 0, 16], [0, 70.0, 12], [0, 0, 1]], dtype=torch.float64).repeat(n_cameras, 1, 1)
    Ks[:, :2, 2] += 6 * normal(n_cameras, 2)
    values = {
        "means": spread * normal(n, 3),
        "quats": normal(n, 4),
        "scales": size * torch.exp(normal(n, 3)),
        "opacities": opaque + (1 - opaque) * torch.rand(n, generator=random, dtype=torch.float64),
        "sh": 0.4 * normal(n, (degree + 1) ** 2, 3),
        "viewmats": viewmats,
        "Ks": Ks,
    }
    return {name: value.to(dtype) for name, value in values.items()}


def drawn(function, values, width=35, height=27, **options):
    """Results and gradients of a random weighting of them."""
    inputs = {name: value.clone().requires_grad_(name in NAMES) for name, value in values.items()}
    outputs = function(**inputs, width=width, height=height, **options)
    random = torch.Generator().manual_seed(7)
    loss = sum((x * torch.randn(x.shape, generator=random, dtype=torch.float64).to(x)).sum() for x in outputs)
    return outputs, torch.autograd.grad(loss, [inputs[name] for name in NAMES])


def assert_same_as_the_twin(values, image=1e-4, gradient=1e-3, **options):
    outputs, gradients = drawn(rasterize, values, **options)
    expected, expected_gradients = drawn(rasterize_reference, values, **options)
    for ours, twin in zip(outputs, expected):
        assert ours.shape == twin.shape and ours.dtype == values["means"].dtype
        assert (ours - twin).abs().max() <= image
    for name, ours, twin in zip(NAMES, gradients, expected_gradients):
        # Where nearly all that matters is cut off at 0.999 a gradient is next to zero; there it counts in absolute terms.
        assert (ours - twin).norm() <= gradient * (twin.norm() + 1e-6), name
    return outputs


SCENES = {
    "several_cameras_with_off_center_principal_points": {},
    "third_degree_of_sh": {"degree": 3, "n": 100},
    "nearly_opaque": {"opaque": 0.97},
    "quite_opaque_and_wide": {"opaque": 1.0, "size": 0.3, "n": 30},
    "stacks_that_end_the_pixels": {"n": 800, "spread": 0.03, "opaque": 0.5},
    "needles": {"size": 0.004, "n": 500},
    "around_and_behind_the_camera": {"spread": 1.0, "n": 400, "size": 0.05},
    "larger_than_the_image": {"size": 0.3, "n": 40},
    "dust": {"size": 1e-5, "n": 500},
}


@pytest.mark.parametrize("name", SCENES)
def test_float32_agrees_with_the_twin(name):
    outputs = assert_same_as_the_twin(scene(**SCENES[name]))
    assert outputs[1].max() > 0.02  # there is something to see


@pytest.mark.parametrize("name", SCENES)
def test_float64_agrees_with_the_twin_to_rounding(name):
    assert_same_as_the_twin(scene(**SCENES[name], dtype=torch.float64), image=1e-9, gradient=1e-8)


def test_long_thin_diagonal_gaussians_are_as_exact_as_round_ones():
    values = scene(n=20, n_cameras=1, degree=0)
    values["scales"] = torch.tensor([0.5, 1e-5, 1e-5]).expand(20, 3).contiguous()
    assert_same_as_the_twin(values)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 60),
    spread=st.floats(0.01, 1.5),
    size=st.floats(1e-4, 0.3),
    opaque=st.floats(0, 0.999),
    width=st.integers(1, 20),
    height=st.integers(1, 20),
)
def test_any_scene_and_any_image_size_agree_with_the_twin(seed, n, spread, size, opaque, width, height):
    values = scene(seed, n, 1, 1, spread, size, opaque, torch.float64)
    assert_same_as_the_twin(values, image=1e-9, gradient=1e-7, width=width, height=height)


def test_gradients_are_those_of_finite_differences():
    values = scene(seed=3, n=4, n_cameras=1, degree=1, size=0.05, spread=0.05, dtype=torch.float64)
    values["opacities"] = values["opacities"] * 0.5 + 0.1
    inputs = [values[name].requires_grad_() for name in NAMES]
    # Finite differences that step over a threshold would be wrong: the step is small, the scene far from any.
    assert torch.autograd.gradcheck(
        lambda *inputs: rasterize(*inputs, values["Ks"], 6, 4), inputs, eps=1e-7, atol=1e-4, rtol=1e-4, nondet_tol=0
    )


def test_the_order_of_the_gaussians_does_not_matter():
    values = scene(n=200)
    shuffle = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    shuffled = {n: v if n in ("viewmats", "Ks") else v[shuffle] for n, v in values.items()}
    (first, gradients), (second, moved) = drawn(rasterize, values), drawn(rasterize, shuffled)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert torch.allclose(gradients[0][shuffle], moved[0], rtol=1e-5, atol=1e-6)


def test_two_runs_give_the_same_bits():
    (first, gradients), (second, again) = drawn(rasterize, scene()), drawn(rasterize, scene())
    assert all(torch.equal(a, b) for a, b in zip((*first, *gradients), (*second, *again)))


def test_neither_the_number_of_threads_nor_the_size_of_the_parts_changes_a_bit(monkeypatch, restored_threads):
    values = scene(n=300)
    torch.set_num_threads(1)
    expected = [x for group in drawn(rasterize, values, 70, 50) for x in group]
    monkeypatch.setattr(rasterizer, "TILES_AT_ONCE", 1)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        results = [x for group in drawn(rasterize, values, 70, 50) for x in group]
        assert all(torch.equal(a, b) for a, b in zip(results, expected))
    monkeypatch.setattr(rasterizer, "PART", 17)  # the gradient of the cameras is then added in another order
    by_parts = [drawn(rasterize, values, 70, 50) for _ in range(2)]
    flat = [[x for group in results for x in group] for results in by_parts]
    assert all(torch.equal(a, b) for a, b in zip(*flat))
    assert all(torch.equal(a, b) for a, b in zip(flat[0][:-1], expected[:-1]))
    assert torch.allclose(flat[0][-1], expected[-1], rtol=1e-5)


@pytest.fixture
def restored_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def one_pixel(opacities, depths=None, colors=None):
    """Wide Gaussians one behind the other over a single pixel: image (3,), alpha, depth sum."""
    n = len(opacities)
    depths = torch.tensor(depths if depths is not None else [1.0 + i for i in range(n)])
    sh = torch.zeros(n, 1, 3)
    if colors is not None:
        sh[:, 0] = (torch.tensor(colors) - 0.5) / sh_basis(torch.tensor([[0.0, 0, 1]]), 0)
    means = torch.stack((torch.zeros(n), torch.zeros(n), depths), 1)
    K = torch.tensor([[[1.0, 0, 0.5], [0, 1, 0.5], [0, 0, 1]]])
    quats = torch.tensor([[1.0, 0, 0, 0]]).repeat(n, 1)
    image, alpha, depth = rasterize(
        means, quats, torch.full((n, 3), 9.0), torch.tensor(opacities), sh, torch.eye(4)[None], K, 1, 1
    )
    return image[0, 0, 0], alpha.item(), depth.item()


def test_two_layers_mix_as_the_formula_says():
    image, alpha, depth = one_pixel([0.5, 0.25], colors=[[1.0, 0, 0], [0.0, 1, 0]])
    assert torch.allclose(image, torch.tensor([0.5, 0.125, 0]), atol=1e-6)
    assert alpha == pytest.approx(0.625) and depth == pytest.approx(0.5 * 1 + 0.125 * 2)


def test_alpha_is_cut_at_0_999_and_left_out_below_1_255():
    assert one_pixel([1.0])[1] == pytest.approx(0.999)
    assert one_pixel([1.01 / 255])[1] == pytest.approx(1.01 / 255, rel=1e-4)
    assert one_pixel([0.99 / 255])[1] == 0


def test_where_alpha_is_cut_the_opacity_has_no_gradient():
    values = scene(n=1, n_cameras=1, degree=0, size=50.0)
    values["means"], values["opacities"] = torch.zeros(1, 3), torch.ones(1)
    outputs, gradients = drawn(rasterize, values)
    assert outputs[1].min().item() == pytest.approx(0.999)
    assert gradients[NAMES.index("opacities")].item() == 0


def test_the_gaussian_that_would_end_the_pixel_is_left_out_with_all_behind_it():
    # Transmittance 1, 0.05, 0.0025, then 0.000125; the next, to 0.0000063, ends it, and so 0.1 does not count.
    assert one_pixel([0.95, 0.95, 0.95, 0.95, 0.1])[1] == pytest.approx(1 - 0.05**3, abs=1e-6)
    assert one_pixel([0.95, 0.95, 0.95, 0.1])[1] == pytest.approx(1 - 0.05**3 * 0.9, abs=1e-7)


def test_near_and_far_cut_by_depth():
    values = scene(n=200, n_cameras=1)
    assert_same_as_the_twin(values, near=0.9, far=1.1)
    assert drawn(rasterize, values, near=5.0)[0][1].max() == 0


def test_nothing_in_view_has_zero_gradients():
    values = scene(n=5)
    values["means"] = values["means"] + 1000
    outputs, gradients = drawn(rasterize, values)
    assert all((x == 0).all() for x in (*outputs, *gradients))
    empty = {n: v if n in ("viewmats", "Ks") else v[:0] for n, v in values.items()}
    assert all((x == 0).all() for x in drawn(rasterize, empty)[0])


def test_projection_and_colors_are_those_of_gsplat():
    torch_impl = pytest.importorskip("gsplat.cuda._torch_impl")
    values = scene(n=400, n_cameras=3, degree=3, spread=0.5, dtype=torch.float64)
    covariances, _ = torch_impl._quat_scale_to_covar_preci(values["quats"], values["scales"], True, False)
    radii, means2d, depths, conics, _ = torch_impl._fully_fused_projection(
        values["means"], covariances, values["viewmats"], values["Ks"], 35, 27
    )
    for i in range(3):
        seen = (radii[i] > 0).all(1)
        assert seen.sum() > 50
        camera = values["viewmats"][i], values["Ks"][i]
        ours, shape, depth = project(values["means"], values["quats"], values["scales"], *camera, 35, 27, 0.3)
        slope, over_rows, inside = shape.unbind(1)
        ours_conics = torch.stack((1 / inside, -slope / inside, 1 / over_rows + slope**2 / inside), 1)
        assert torch.allclose(ours[seen], means2d[i][seen])
        assert torch.allclose(depth[seen], depths[i][seen])
        assert torch.allclose(ours_conics[seen], conics[i][seen], rtol=1e-7, atol=1e-10)
        eye = torch.linalg.inv(camera[0])[:3, 3].contiguous()
        colors = (torch_impl._spherical_harmonics(3, values["means"] - eye, values["sh"]) + 0.5).clamp(min=0)
        assert torch.allclose(torch.from_numpy(seen_colors(values, *camera, eye))[seen], colors[seen])


def seen_colors(values, *camera):
    """(N, 3), as the compiled projection writes them; not of Gaussians outside 0.01 < depth."""
    gaussians = [values[name].numpy() for name in NAMES[:5]]
    n = len(gaussians[0])
    features = np.zeros((n, 4))
    projection.project(
        0, n, *gaussians, *(x.numpy() for x in camera), 35, 27, 0.3, 0.01, 1e10, 0.0,
        np.empty((n, 6)), features, np.empty(n, np.bool_),
    )  # fmt: skip
    return features[:, :3]


def test_the_harmonics_are_orthonormal():
    directions = torch.nn.functional.normalize(
        torch.randn(200_000, 3, generator=torch.Generator().manual_seed(0)), dim=1
    )
    basis = sh_basis(directions.double(), 3)
    assert torch.allclose(4 * math.pi * basis.T @ basis / len(basis), torch.eye(16, dtype=torch.float64), atol=0.03)
