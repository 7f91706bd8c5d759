"""Points in a portrait: their places against the pinhole formula, what hides them against rays, their mirror images."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.heads.procedural_head import build_procedural_head
from gaussian_tokenizer.rendering.cameras import Cameras, portrait_cameras
from gaussian_tokenizer.rendering.portrait_points import (
    COLUMNS,
    LIMIT,
    PLACES,
    TOLERANCE,
    Portrait,
    Reference,
    face_pixels,
    mesh_depths,
    mirror_images,
    mirrored_faces,
    portrait_points,
)
from modeling.gaussian_decoder import modeling_portrait
from modeling.pointillist.configuration_pointillist import FACE_PIXELS


@pytest.fixture(scope="module")
def head() -> HeadModel:
    return build_procedural_head(600)


@pytest.fixture(scope="module")
def params(head) -> HeadParameters:
    """Another shape, an expression, and turned neck and jaw."""
    generator = torch.Generator().manual_seed(0)
    params = HeadParameters.zeros(head.n_shape, head.n_expression)
    params.shape.copy_(torch.randn(head.n_shape, generator=generator))
    params.expr[0, :3] = 0.5
    params.neck_pose.copy_(torch.tensor([[0.1, 0.3, 0.05]]))
    params.jaw_pose[0, 0] = 0.2
    return params


@pytest.fixture
def camera() -> Cameras:
    """Not square, the principal point not in the middle, with skew."""
    camera = Cameras.look_at([0.35, 0.1, 0.9], (0.0, 0.0, 0.0), 300.0, 160, 120)
    camera.Ks.copy_(torch.tensor([[[300.0, 5.0, 70.0], [0.0, 280.0, 65.0], [0.0, 0.0, 1.0]]]))
    return camera


def scattered(head: HeadModel, params: HeadParameters, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Canonical points up to 2 cm off the faces they are bound to."""
    generator = torch.Generator().manual_seed(1)
    faces = torch.randint(head.n_faces, (count,), generator=generator)
    corners = torch.rand(count, 3, generator=generator)
    at = torch.einsum(
        "nc,nci->ni", corners / corners.sum(1, keepdim=True), head.canonical_vertices(params)[head.faces[faces]]
    )
    return at + 0.02 * (torch.rand(count, 3, generator=generator) - 0.5), faces


def column(points: torch.Tensor, name: str) -> np.ndarray:
    return points[:, COLUMNS.index(name)].double().numpy()


def test_the_decoder_reads_the_columns_that_are_written():
    assert modeling_portrait.COLUMNS == COLUMNS and len(modeling_portrait.UNITS) == len(COLUMNS)
    assert modeling_portrait.UNITS[COLUMNS.index("behind_head")] == LIMIT


def test_a_point_on_a_vertex_is_where_the_pinhole_formula_puts_the_posed_vertex(head, params, camera):
    faces = torch.arange(head.n_faces)
    points, _ = portrait_points(head.canonical_vertices(params)[head.faces[:, 0]], faces, params, head, camera)
    posed = head.pose(params).vertices[0].double().numpy()
    view, K = camera.viewmats[0].double().numpy(), camera.Ks[0].double().numpy()
    for face, corners in enumerate(head.faces.numpy()):
        a, b, c = ([sum(view[i, j] * posed[v, j] for j in range(3)) + view[i, 3] for i in range(3)] for v in corners)
        x = (K[0, 0] * a[0] + K[0, 1] * a[1]) / a[2] + K[0, 2]
        y = K[1, 1] * a[1] / a[2] + K[1, 2]
        normal = np.cross(np.subtract(b, a), np.subtract(c, a))
        cosine = -np.dot(normal, a) / (math.sqrt(np.dot(normal, normal)) * math.sqrt(np.dot(a, a)))
        expected = [x / 80 - 1, y / 60 - 1, a[2], cosine]
        np.testing.assert_allclose(points[face, :4], expected, atol=2e-5)


def test_what_hides_a_point_is_what_the_ray_to_it_meets(head, params, camera):
    """Moeller and Trumbore's intersection of each ray from the camera with every triangle, in float64."""
    positions, faces = scattered(head, params, 300)
    points, mirror = portrait_points(positions, faces, params, head, camera)
    triangles = head.pose(params.to(torch.float64)).vertices[0].numpy()[head.faces.numpy()]
    view, K = camera.viewmats[0].double().numpy(), camera.Ks[0].double().numpy()
    eye = -view[:3, :3].T @ view[:3, 3]
    seen = []
    for u, v, depth, facing, behind, _, on_head, visible in torch.cat((points, mirror)).double().numpy():
        ray = view[:3, :3].T @ np.linalg.solve(K, [(u + 1) * 80, (v + 1) * 60, 1])  # its depth is 1
        first, second = triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]
        across = np.cross(ray, second)
        det = (first * across).sum(1)
        away = eye - triangles[:, 0]
        a = (away * across).sum(1) / det
        turned = np.cross(away, first)
        b = (turned @ ray) / det
        met = ((second * turned).sum(1) / det)[(a >= 0) & (b >= 0) & (a + b <= 1)]
        assert on_head == (len(met) > 0)
        expected = np.clip(depth - (met.min() if len(met) else np.inf), -LIMIT, LIMIT)
        assert behind == pytest.approx(expected, abs=2e-5)
        inside = max(abs(u), abs(v)) < 1
        if abs(expected - TOLERANCE) > 1e-4 and abs(expected + TOLERANCE) > 1e-4 and abs(facing) > 1e-4:
            assert visible == (inside and expected < TOLERANCE and (facing > 0 or expected < -TOLERANCE))
        seen.append(visible)
    assert 100 < sum(seen) < 500, "both are met"


def test_points_behind_others_know_it(head, params, camera):
    """A wall of points before the face, and one point at the face."""
    wall = torch.cartesian_prod(torch.linspace(-0.05, 0.05, 20), torch.linspace(-0.05, 0.05, 20))
    wall = torch.cat((wall, torch.full((400, 1), 0.16)), 1)
    at = torch.cat((wall, torch.tensor([[0.0, 0.0, 0.13]])))
    still = HeadParameters.zeros(head.n_shape, head.n_expression)
    front = portrait_cameras(head, 100)
    points, _ = portrait_points(at, torch.zeros(401, dtype=torch.int64), still, head, front)
    behind = column(points, "behind_points")
    assert behind[400] == pytest.approx(0.03, abs=2e-3) and abs(behind[:400]).max() < 2e-3


def test_a_point_behind_the_camera_or_beside_the_image_is_not_seen(head, params, camera):
    at = torch.tensor([[0.7, 0.2, 1.8], [0.0, 0.9, 0.0], [0.0, 0.0, 0.0]])
    points, _ = portrait_points(at, torch.zeros(3, dtype=torch.int64), HeadParameters.zeros(head.n_shape, head.n_expression),
                                head, camera)  # fmt: skip
    assert column(points, "depth")[0] < 0 and points[0, 0] == -2 and column(points, "v")[1] < -1
    assert not column(points, "visible").any() and points.isfinite().all()


def test_mirror_images_lie_on_the_other_side_of_the_own_head(head, params):
    faces = torch.arange(head.n_faces)
    vertices = head.canonical_vertices(params)
    centers = vertices[head.faces].mean(1)
    normals = torch.nn.functional.normalize(head.normals(vertices)[head.faces].mean(1), dim=-1)
    mirror, other = mirror_images(centers + 0.01 * normals, faces, params, head)
    assert torch.equal(other, mirrored_faces(head))
    flip = torch.tensor([-1.0, 1.0, 1.0])
    distances = (mirror - (centers + 0.01 * normals) * flip).norm(dim=1)
    assert distances.median() < 1e-5 and distances.max() < 0.01  # nearly all faces have a mirrored one
    again, back = mirror_images(mirror, other, params, head)
    assert (back == faces).float().mean() > 0.95 and (again - centers - 0.01 * normals).norm(dim=1).median() < 1e-5


def test_on_a_lopsided_head_the_mirror_image_lies_on_its_surface(head):
    offset = torch.zeros(head.n_vertices, 3)
    offset[head.template[:, 0] > 0.01, 0] = 0.02  # the left half is 2 cm wider
    params = HeadParameters.zeros(head.n_shape, head.n_expression)
    params = HeadParameters(**params.tensors() | {"static_offset": offset})
    vertices, faces = head.canonical_vertices(params), torch.arange(head.n_faces)
    right = vertices[head.faces][..., 0].amax(1) < -0.04
    centers = vertices[head.faces].mean(1)[right]
    mirror, other = mirror_images(centers, faces[right], params, head)
    assert (mirror[:, 0] > -centers[:, 0] + 0.005).float().mean() > 0.4
    triangles = vertices[head.faces[other]]
    normals = torch.nn.functional.normalize(
        torch.linalg.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]), dim=-1
    )
    assert (((mirror - triangles[:, 0]) * normals).sum(1)).abs().max() < 1e-5


def test_in_profile_no_visible_point_has_a_visible_mirror_image(head):
    params = HeadParameters.zeros(head.n_shape, head.n_expression)
    positions, faces = scattered(head, params, 2000)
    wide = positions[:, 0].abs() > 0.03
    points, mirror = portrait_points(positions, faces, params, head, portrait_cameras(head, 126, [90.0]))
    both = column(points[wide], "visible") * column(mirror[wide], "visible")
    assert column(points[wide], "visible").sum() > 200 and both.mean() < 0.01
    points, mirror = portrait_points(positions, faces, params, head, portrait_cameras(head, 126, [0.0]))
    frontal = column(points[wide], "visible") > 0
    assert column(mirror[wide], "visible")[frontal].mean() > 0.9


def test_the_order_of_the_points_does_not_matter(head, params, camera):
    positions, faces = scattered(head, params, 200)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(2))
    for own, moved in zip(
        portrait_points(positions, faces, params, head, camera),
        portrait_points(positions[order], faces[order], params, head, camera),
    ):
        torch.testing.assert_close(own[order], moved)


def test_depths_between_triangles_are_infinite_and_triangles_behind_the_camera_are_left_out():
    pixels = torch.tensor([[1.0, 1.0], [9.0, 9.0], [0.0, 0.0]])
    triangle = torch.tensor([[[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]]])
    depths = torch.tensor([[1.0, 2.0, 4.0]])
    expected = 1 / (0.5 * 1 + 0.25 / 2 + 0.25 / 4)  # inverse depth is linear in the image
    torch.testing.assert_close(mesh_depths(pixels, triangle, depths), torch.tensor([expected, math.inf, 1.0]))
    assert mesh_depths(pixels, triangle, depths - 1.5).isinf().all()
    assert len(mesh_depths(pixels[:0], triangle, depths)) == 0


def test_each_reference_is_read_as_if_it_were_the_portrait_on_the_portraits_shape(head, params, camera):
    still = HeadParameters.zeros(head.n_shape, head.n_expression)  # of another shape, which is not used
    wide = Cameras.look_at([-0.5, 0.0, 0.8], (0.0, 0.0, 0.0), 200.0, 320, 120)
    images = [np.full((120, 160, 3), 200, np.uint8), np.tile((np.arange(320) // 2).astype(np.uint8), (120, 1))]
    read = Portrait.of(images[0], params, camera, head, 80, [Reference(images[1], still, wide)])
    positions, faces = scattered(head, params, 50)
    inputs = read.inputs(positions, faces, head)
    assert inputs["portrait"].shape == (2, 4, 60, 80) and inputs["portrait_points"].shape == (50, 2, len(COLUMNS))
    on_shape = replace(still, shape=params.shape)
    for index, (moment, view) in enumerate(((params, camera), (on_shape, wide))):
        points, mirror = portrait_points(positions, faces, moment, head, view)
        assert torch.equal(inputs["portrait_points"][:, index], points)
        assert torch.equal(inputs["mirror_points"][:, index], mirror)
    ramp = inputs["portrait"][1, 0] * 255  # 320 columns of 0 to 159 have become 80: u is the same share of the width
    torch.testing.assert_close(ramp, (2 * torch.arange(80.0) + 0.75).expand(60, 80), atol=1.0, rtol=0)


def test_several_frames_are_no_portrait(head, camera):
    motion = HeadParameters.zeros(head.n_shape, head.n_expression, 2)
    with pytest.raises(ValueError, match="1 frame and 1 camera, found 2 and 1"):
        portrait_points(torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64), motion, head, camera)


def test_faces_read_the_portrait_where_points_above_them_are_seen(head, params, camera):
    """Against the places of points that are bound to the head, and bilinear sampling by scipy."""
    shape = params.shape  # with an expression, points bound to a face do not stay above it along its normal
    params = HeadParameters.zeros(head.n_shape, head.n_expression)
    params.shape.copy_(shape)
    params.rotation.copy_(torch.tensor([[0.1, -0.4, 0.05]]))
    image = torch.rand(4, camera.height, camera.width, generator=torch.Generator().manual_seed(2))
    found = face_pixels(Portrait(image, camera, params), head)
    assert found.shape == (head.n_faces, FACE_PIXELS) and found.dtype == torch.float32
    vertices = head.canonical_vertices(params).double()
    corners = vertices[head.faces]
    normals = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals /= normals.norm(dim=1, keepdim=True)
    faces = torch.arange(head.n_faces)
    premultiplied = np.concatenate((image[:3] * image[3:], image[3:]))
    for place, (height, below) in enumerate(PLACES):
        points = corners.mean(1) + height * normals - torch.tensor([0.0, below, 0.0])
        seen = portrait_points(points.float(), faces, params, head, camera)[0]
        pixels = (seen[:, :2].numpy() + 1) / 2 * (camera.width, camera.height) - 0.5
        near = (np.abs(seen[:, :2].numpy()) < 0.98).all(1)
        expected = [map_coordinates(channel, pixels[near, ::-1].T, order=1) for channel in premultiplied]
        own = found[near, 5 * place : 5 * place + 5].numpy()
        np.testing.assert_allclose(own[:, :4], np.stack(expected, 1), atol=2e-3)
        behind = (seen[:, COLUMNS.index("behind_head")].numpy() / LIMIT)[near]
        assert np.quantile(np.abs(own[:, 4] - behind), 0.99) < 0.01  # edges of triangles fall to either side
        if place == 0:
            for column, name in ((35, "facing"), (36, "visible")):
                assert (found[:, column] - seen[:, COLUMNS.index(name)]).abs().mean() < 0.01
    half = FACE_PIXELS // 2
    assert torch.equal(found[:, half:], found[mirrored_faces(head), :half])


def test_faces_outside_the_portrait_read_nothing(head, params):
    behind = Cameras.look_at([0.0, 0.0, 0.9], (0.0, 0.0, 2.0), 300.0, 160, 120)  # looks away from the head
    found = face_pixels(Portrait(torch.ones(4, 120, 160), behind, params), head)
    colors = found[:, :35].unflatten(1, (7, 5))[:, :, :4]
    assert (colors == 0).all() and (found[:, 36] == 0).all() and found.isfinite().all()
