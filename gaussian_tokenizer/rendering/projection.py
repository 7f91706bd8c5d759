"""Gaussians in the world to ellipses with colors in an image, and the gradients back: compiled loops, in float64.

A Gaussian's covariance has the image axes a and b (3,): rows of the projection's Jacobian times rotation times scales, so that
it is [[a.a, a.b], [a.b, b.b]] + eps2d (Zwicker et al. 2001, section 5). It is written as (slope, over rows, inside) =
(xy / yy, yy, det / yy): the line of the rows' maxima, the variance over rows, and the variance inside a row, so that
sigma = dy^2 / (2 yy) + (dx - slope dy)^2 / (2 det / yy). Nothing is subtracted to get it: det = |a x b|^2 + eps2d (|a|^2 +
|b|^2) + eps2d^2. Long and thin Gaussians are as exact as round ones.

Axes: N Gaussians, M of them seen, K SH coefficients. A camera is viewmat (4, 4), K (3, 3) and position `eye` (3,), float64.
"""

import math

import numpy as np

from gaussian_tokenizer.rendering.compiling import compiled, inlined

MARGIN = (
    0.15  # of the image: farther out the Jacobian is that at this border, or Gaussians beside the camera would blow up
)
SMALLEST = 1e-12  # a shorter quaternion or direction is divided by this
N_SUMS = 10  # see `blending.blend_backward`
CAMERA_GRADIENTS = 15  # of the matrix's first three rows, then of the position
DEGREE_0 = math.sqrt(1 / (4 * math.pi))
DEGREE_1 = math.sqrt(3 / (4 * math.pi))
DEGREE_2, DEGREE_2_0 = math.sqrt(15 / (4 * math.pi)), math.sqrt(5 / (16 * math.pi))
DEGREE_3_0, DEGREE_3_1 = math.sqrt(7 / (16 * math.pi)), math.sqrt(21 / (32 * math.pi))
DEGREE_3_2, DEGREE_3_3 = math.sqrt(105 / (4 * math.pi)), math.sqrt(35 / (32 * math.pi))


@inlined
def _unit(quats, i):
    """(w, x, y, z) of length 1, and the length it had."""
    w, x, y, z = float(quats[i, 0]), float(quats[i, 1]), float(quats[i, 2]), float(quats[i, 3])
    length = max(math.sqrt(w * w + x * x + y * y + z * z), SMALLEST)
    return w / length, x / length, y / length, z / length, length


@inlined
def _set_rotation(unit, rotation):
    w, x, y, z, _ = unit
    rotation[0, 0], rotation[0, 1], rotation[0, 2] = 1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)
    rotation[1, 0], rotation[1, 1], rotation[1, 2] = 2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)
    rotation[2, 0], rotation[2, 1], rotation[2, 2] = 2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)


@inlined
def _in_camera(viewmat, means, i):
    x, y, z = float(means[i, 0]), float(means[i, 1]), float(means[i, 2])
    return (
        viewmat[0, 0] * x + viewmat[0, 1] * y + viewmat[0, 2] * z + viewmat[0, 3],
        viewmat[1, 0] * x + viewmat[1, 1] * y + viewmat[1, 2] * z + viewmat[1, 3],
        viewmat[2, 0] * x + viewmat[2, 1] * y + viewmat[2, 2] * z + viewmat[2, 3],
    )


@inlined
def _clamped(tangent, focal, principal, size):
    """A tangent x / z or y / z inside of the image and its margin."""
    margin = MARGIN * size / focal
    return min(max(tangent, -principal / focal - margin), (size - principal) / focal + margin)


@inlined
def _set_image_axes(viewmat, rotation, scales, index, zoom_x, zoom_y, tan_x, tan_y, turned, a, b):
    """The standard deviations in camera axes (3, 3), as columns, and the rows a and b of their image; zoom is f / z."""
    for k in range(3):
        for i in range(3):
            turned[i, k] = float(scales[index, k]) * (
                viewmat[i, 0] * rotation[0, k] + viewmat[i, 1] * rotation[1, k] + viewmat[i, 2] * rotation[2, k]
            )
        a[k] = zoom_x * (turned[0, k] - tan_x * turned[2, k])
        b[k] = zoom_y * (turned[1, k] - tan_y * turned[2, k])


@inlined
def _dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@inlined
def _cross(a, b):
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


@inlined
def _direction(means, i, eye):
    """From the camera: unit vector and length."""
    x, y, z = means[i, 0] - eye[0], means[i, 1] - eye[1], means[i, 2] - eye[2]
    length = max(math.sqrt(x * x + y * y + z * z), SMALLEST)
    return x / length, y / length, z / length, length


@inlined
def _set_harmonics(x, y, z, count, basis):
    """Real spherical harmonics of a unit vector, `count` of (degree + 1)^2, degree 0 to 3.

    With the Condon-Shortley phase, order m = -l..l inside a degree, as 3D Gaussian Splatting has them (Sloan 2013).
    """
    xx, yy, zz = x * x, y * y, z * z
    basis[0] = DEGREE_0
    if count > 1:
        basis[1], basis[2], basis[3] = -DEGREE_1 * y, DEGREE_1 * z, -DEGREE_1 * x
    if count > 4:
        basis[4], basis[5], basis[7] = DEGREE_2 * x * y, -DEGREE_2 * y * z, -DEGREE_2 * x * z
        basis[6], basis[8] = DEGREE_2_0 * (2 * zz - xx - yy), DEGREE_2 / 2 * (xx - yy)
    if count > 9:
        basis[9], basis[15] = -DEGREE_3_3 * y * (3 * xx - yy), -DEGREE_3_3 * x * (xx - 3 * yy)
        basis[10], basis[14] = DEGREE_3_2 * x * y * z, DEGREE_3_2 / 2 * z * (xx - yy)
        basis[11], basis[13] = -DEGREE_3_1 * y * (4 * zz - xx - yy), -DEGREE_3_1 * x * (4 * zz - xx - yy)
        basis[12] = DEGREE_3_0 * z * (2 * zz - 3 * xx - 3 * yy)


@inlined
def _harmonics_gradient(x, y, z, count, by):
    """Gradient with respect to (x, y, z), given that with respect to the harmonics, `by` (count,)."""
    grad_x = grad_y = grad_z = 0.0
    xx, yy, zz = x * x, y * y, z * z
    if count > 1:
        grad_x, grad_y, grad_z = -DEGREE_1 * by[3], -DEGREE_1 * by[1], DEGREE_1 * by[2]
    if count > 4:
        grad_x += DEGREE_2 * (y * by[4] - z * by[7] + x * by[8]) - 2 * DEGREE_2_0 * x * by[6]
        grad_y += DEGREE_2 * (x * by[4] - z * by[5] - y * by[8]) - 2 * DEGREE_2_0 * y * by[6]
        grad_z += 4 * DEGREE_2_0 * z * by[6] - DEGREE_2 * (y * by[5] + x * by[7])
    if count > 9:
        grad_x += DEGREE_3_2 * (y * z * by[10] + x * z * by[14])
        grad_y += DEGREE_3_2 * (x * z * by[10] - y * z * by[14])
        grad_z += DEGREE_3_2 * (x * y * by[10] + (xx - yy) / 2 * by[14])
        grad_x -= DEGREE_3_3 * (6 * x * y * by[9] + 3 * (xx - yy) * by[15])
        grad_y -= DEGREE_3_3 * (3 * (xx - yy) * by[9] - 6 * x * y * by[15])
        grad_x -= DEGREE_3_1 * ((4 * zz - 3 * xx - yy) * by[13] - 2 * x * y * by[11])
        grad_y -= DEGREE_3_1 * ((4 * zz - xx - 3 * yy) * by[11] - 2 * x * y * by[13])
        grad_z -= DEGREE_3_1 * 8 * z * (y * by[11] + x * by[13])
        grad_x -= DEGREE_3_0 * 6 * x * z * by[12]
        grad_y -= DEGREE_3_0 * 6 * y * z * by[12]
        grad_z += DEGREE_3_0 * (6 * zz - 3 * xx - 3 * yy) * by[12]
    return grad_x, grad_y, grad_z


@compiled
def project(
    start, end, means, quats, scales, opacities, sh, viewmat, K, eye, width, height, eps2d, near, far, least,
    ellipses, features, seen,
):  # fmt: skip
    """The Gaussians `start` to `end`: means, scales (N, 3), quats (N, 4), opacities (N,), sh (N, K, 3), of any dtype.

    Written: `seen` (N,), whether the depth is between `near` and `far` and the opacity at least `least`, and of those that
    are seen `ellipses` (N, 6), see `blending`, and `features` (N, 4), red, green, blue and depth.
    """
    rotation, turned, basis = np.empty((3, 3)), np.empty((3, 3)), np.empty(16)
    a, b = np.empty(3), np.empty(3)
    for i in range(start, end):
        x, y, z = _in_camera(viewmat, means, i)
        seen[i] = (z > near) & (z < far) & (opacities[i] >= least)
        if not seen[i]:
            continue
        tan_x, tan_y = x / z, y / z
        _set_rotation(_unit(quats, i), rotation)
        _set_image_axes(
            viewmat, rotation, scales, i, K[0, 0] / z, K[1, 1] / z, _clamped(tan_x, K[0, 0], K[0, 2], width),
            _clamped(tan_y, K[1, 1], K[1, 2], height), turned, a, b,
        )  # fmt: skip
        xx, yy, cross = _dot(a, a), _dot(b, b), _cross(a, b)
        ellipses[i, 0] = K[0, 0] * tan_x + K[0, 1] * tan_y + K[0, 2]
        ellipses[i, 1] = K[1, 1] * tan_y + K[1, 2]
        ellipses[i, 2] = _dot(a, b) / (yy + eps2d)
        ellipses[i, 3] = yy + eps2d
        ellipses[i, 4] = (_dot(cross, cross) + eps2d * (xx + yy + eps2d)) / (yy + eps2d)
        ellipses[i, 5] = math.log(float(opacities[i]))
        x, y, z_, _ = _direction(means, i, eye)
        _set_harmonics(x, y, z_, sh.shape[1], basis)
        for channel in range(3):
            color = 0.5
            for k in range(sh.shape[1]):
                color += basis[k] * sh[i, k, channel]
            features[i, channel] = max(color, 0.0)
        features[i, 3] = z


@inlined
def _covariance_gradient(a, b, eps2d, by_slope, by_over_rows, by_inside, by_a, by_b):
    """Set the gradients (3,) with respect to a and b."""
    xx, yy, xy, cross = _dot(a, a), _dot(b, b) + eps2d, _dot(a, b), _cross(a, b)
    det = _dot(cross, cross) + eps2d * (xx + yy)
    by_xy, by_det = by_slope / yy, by_inside / yy
    by_yy = by_over_rows - (by_slope * xy + by_inside * det) / (yy * yy) + by_det * eps2d
    by_xx = by_det * eps2d
    # c = a x b, so dL/da = b x dL/dc and dL/db = dL/dc x a.
    for_a, for_b = _cross(b, cross), _cross(cross, a)
    for k in range(3):
        by_a[k] = 2 * by_det * for_a[k] + 2 * by_xx * a[k] + by_xy * b[k]
        by_b[k] = 2 * by_det * for_b[k] + 2 * by_yy * b[k] + by_xy * a[k]


@inlined
def _add_quaternion_gradient(unit, by_rotation, grads, i):
    """Add to row i of `grads` (N, 4) the gradient of a quaternion, given that of its rotation matrix (3, 3)."""
    w, x, y, z, length = unit
    g = by_rotation
    by_w = 2 * (x * (g[2, 1] - g[1, 2]) + y * (g[0, 2] - g[2, 0]) + z * (g[1, 0] - g[0, 1]))
    by_x = 2 * (w * (g[2, 1] - g[1, 2]) + y * (g[0, 1] + g[1, 0]) + z * (g[0, 2] + g[2, 0])) - 4 * x * (
        g[1, 1] + g[2, 2]
    )
    by_y = 2 * (w * (g[0, 2] - g[2, 0]) + x * (g[0, 1] + g[1, 0]) + z * (g[1, 2] + g[2, 1])) - 4 * y * (
        g[0, 0] + g[2, 2]
    )
    by_z = 2 * (w * (g[1, 0] - g[0, 1]) + x * (g[0, 2] + g[2, 0]) + y * (g[1, 2] + g[2, 1])) - 4 * z * (
        g[0, 0] + g[1, 1]
    )
    along = w * by_w + x * by_x + y * by_y + z * by_z if length > SMALLEST else 0.0
    grads[i, 0] += (by_w - w * along) / length
    grads[i, 1] += (by_x - x * along) / length
    grads[i, 2] += (by_y - y * along) / length
    grads[i, 3] += (by_z - z * along) / length


@inlined
def _add_color_gradient(i, means, eye, sh, sums, basis, by_basis, grad_means, grad_sh, camera, part):
    """Add the gradients of SH coefficients, means and camera position, given that of Gaussian i's color, `sums[6:9]`."""
    count = sh.shape[1]
    x, y, z, length = _direction(means, i, eye)
    _set_harmonics(x, y, z, count, basis)
    for k in range(count):
        by_basis[k] = 0.0
    for channel in range(3):
        color = 0.5
        for k in range(count):
            color += basis[k] * sh[i, k, channel]
        if color >= 0:
            for k in range(count):
                grad_sh[i, k, channel] += sums[6 + channel] * basis[k]
                by_basis[k] += sums[6 + channel] * sh[i, k, channel]
    by_x, by_y, by_z = _harmonics_gradient(x, y, z, count, by_basis)
    along = x * by_x + y * by_y + z * by_z if length > SMALLEST else 0.0
    by_x, by_y, by_z = (by_x - x * along) / length, (by_y - y * along) / length, (by_z - z * along) / length
    grad_means[i, 0] += by_x
    grad_means[i, 1] += by_y
    grad_means[i, 2] += by_z
    camera[part, 12] -= by_x
    camera[part, 13] -= by_y
    camera[part, 14] -= by_z


@inlined
def _add_axes_gradient(i, viewmat, rotation, scales, by_turned, by_rotation, grad_scales, camera, part):
    """Gradients of rotation, scales and the camera's rotation, given that of the standard deviations in camera axes (3, 3)."""
    for k in range(3):
        by_scale = 0.0
        for j in range(3):
            # dL/d(rotation scales) = R^T dL/dturned
            by_axis = (
                by_turned[0, k] * viewmat[0, j] + by_turned[1, k] * viewmat[1, j] + by_turned[2, k] * viewmat[2, j]
            )
            by_scale += by_axis * rotation[j, k]
            by_rotation[j, k] = by_axis * scales[i, k]
        grad_scales[i, k] += by_scale
    for j in range(3):
        x, y, z = rotation[j, 0] * scales[i, 0], rotation[j, 1] * scales[i, 1], rotation[j, 2] * scales[i, 2]
        for row in range(3):
            camera[part, 4 * row + j] += by_turned[row, 0] * x + by_turned[row, 1] * y + by_turned[row, 2] * z


@inlined
def _add_projection_gradient(
    i, sums, means, quats, scales, viewmat, K, width, height, eps2d, ellipses, rotation, turned, a, b,
    by_rotation, by_turned, by_a, by_b, grad_means, grad_quats, grad_scales, camera, part,
):  # fmt: skip
    """Add to the gradients of Gaussian i, all but those by its color, given the sums over its pixels (10,).

    The arrays from `rotation` to `by_b` are memory.
    """
    slope, over_rows, inside = ellipses[i, 2], ellipses[i, 3], ellipses[i, 4]
    dy, dy2, u, u_dy, u2 = sums[1], sums[2], sums[3], sums[4], sums[5]
    x, y, z = _in_camera(viewmat, means, i)
    tan_x, tan_y, zoom_x, zoom_y = x / z, y / z, K[0, 0] / z, K[1, 1] / z
    near_x, near_y = _clamped(tan_x, K[0, 0], K[0, 2], width), _clamped(tan_y, K[1, 1], K[1, 2], height)
    unit = _unit(quats, i)
    _set_rotation(unit, rotation)
    _set_image_axes(viewmat, rotation, scales, i, zoom_x, zoom_y, near_x, near_y, turned, a, b)
    # Of -sigma = -dy^2 / (2 over rows) - (dx - slope dy)^2 / (2 inside), summed over the pixels.
    by_mean_x, by_mean_y = u / inside, dy / over_rows - slope * u / inside
    _covariance_gradient(
        a, b, eps2d, u_dy / inside, dy2 / (2 * over_rows * over_rows), u2 / (2 * inside * inside), by_a, by_b
    )
    for k in range(3):
        by_turned[0, k] = zoom_x * by_a[k]
        by_turned[1, k] = zoom_y * by_b[k]
        by_turned[2, k] = -zoom_x * near_x * by_a[k] - zoom_y * near_y * by_b[k]
    by_tan_x, by_tan_y = K[0, 0] * by_mean_x, K[0, 1] * by_mean_x + K[1, 1] * by_mean_y
    if near_x == tan_x:
        by_tan_x -= zoom_x * (by_a[0] * turned[2, 0] + by_a[1] * turned[2, 1] + by_a[2] * turned[2, 2])
    if near_y == tan_y:
        by_tan_y -= zoom_y * (by_b[0] * turned[2, 0] + by_b[1] * turned[2, 1] + by_b[2] * turned[2, 2])
    by_x, by_y = by_tan_x / z, by_tan_y / z
    by_z = sums[9] - (by_tan_x * tan_x + by_tan_y * tan_y + _dot(by_a, a) + _dot(by_b, b)) / z
    _add_axes_gradient(i, viewmat, rotation, scales, by_turned, by_rotation, grad_scales, camera, part)
    _add_quaternion_gradient(unit, by_rotation, grad_quats, i)
    for j in range(3):
        grad_means[i, j] += by_x * viewmat[0, j] + by_y * viewmat[1, j] + by_z * viewmat[2, j]
        camera[part, j] += by_x * means[i, j]
        camera[part, 4 + j] += by_y * means[i, j]
        camera[part, 8 + j] += by_z * means[i, j]
    camera[part, 3] += by_x
    camera[part, 7] += by_y
    camera[part, 11] += by_z


@compiled
def project_backward(
    start, end, size, order, entries, entry_sums, means, quats, scales, opacities, sh, viewmat, K, eye, width, height, eps2d,
    ellipses, grad_means, grad_quats, grad_scales, grad_opacities, grad_sh, grad_cameras,
):  # fmt: skip
    """Add the gradients (float64, shapes of the inputs) of the parts `start` to `end`, part p being p * size.. of `order`.

    `entries` (M + 1,) are the first rows of `entry_sums` (E, 10) of the Gaussians `order` (M,). `grad_cameras` (P, 15): each part's
    sum of the gradients of the camera's matrix, rows 0 to 2, and position.
    """
    rotation, turned, by_rotation, by_turned = np.empty((3, 3)), np.empty((3, 3)), np.empty((3, 3)), np.empty((3, 3))
    a, b, by_a, by_b = np.empty(3), np.empty(3), np.empty(3), np.empty(3)
    basis, by_basis, sums = np.empty(16), np.empty(16), np.empty(N_SUMS)
    for part in range(start, end):
        for rank in range(part * size, min((part + 1) * size, len(order))):
            i = order[rank]
            for index in range(N_SUMS):
                sums[index] = 0.0
            for entry in range(entries[rank], entries[rank + 1]):
                for index in range(N_SUMS):
                    sums[index] += entry_sums[entry, index]
            _add_projection_gradient(
                i, sums, means, quats, scales, viewmat, K, width, height, eps2d, ellipses, rotation, turned, a, b,
                by_rotation, by_turned, by_a, by_b, grad_means, grad_quats, grad_scales, grad_cameras, part,
            )  # fmt: skip
            grad_opacities[i] += sums[0] / opacities[i]
            _add_color_gradient(i, means, eye, sh, sums, basis, by_basis, grad_means, grad_sh, grad_cameras, part)
