"""Rotations as axis-angle vectors (radians), matrices and quaternions (w, x, y, z).

Batched over any leading axes, differentiable everywhere (a zero rotation included), in the dtype and on the device of their input.
"""

import torch
from torch import Tensor

SMALL_ANGLE_SQUARED = 1e-6  # below, sin(t)/t and (1 - cos t)/t^2 are taken from their series (error < 1e-14)


def axis_angle_to_matrix(axis_angle: Tensor) -> Tensor:
    """(..., 3) radians -> (..., 3, 3), by Rodrigues: R = I + sin(t)/t K + (1 - cos t)/t^2 K^2, K the cross-product matrix."""
    squared = (axis_angle * axis_angle).sum(-1)
    small = squared < SMALL_ANGLE_SQUARED
    # The discarded branch of torch.where still gets a gradient, so it must stay finite.
    safe_squared = torch.where(small, torch.ones_like(squared), squared)
    angle = safe_squared.sqrt()
    sine = torch.where(small, 1 - squared / 6, angle.sin() / angle)[..., None, None]
    cosine = torch.where(small, 0.5 - squared / 24, (1 - angle.cos()) / safe_squared)[..., None, None]
    x, y, z = axis_angle.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack((zero, -z, y, z, zero, -x, -y, x, zero), -1).unflatten(-1, (3, 3))
    return torch.eye(3, dtype=cross.dtype, device=cross.device) + sine * cross + cosine * (cross @ cross)


def matrix_to_quaternion(matrix: Tensor) -> Tensor:
    """(..., 3, 3) rotation matrices -> (..., 4) unit quaternions wxyz with w >= 0, by Shepperd's method."""
    m00, m01, m02, m10, m11, m12, m20, m21, m22 = matrix.flatten(-2).unbind(-1)
    # Row i is 4 * q_i * q, so the row with the largest diagonal entry 4 * q_i^2 is the safest to normalize.
    entries = (
        1 + m00 + m11 + m22, m21 - m12, m02 - m20, m10 - m01,
        m21 - m12, 1 + m00 - m11 - m22, m10 + m01, m02 + m20,
        m02 - m20, m10 + m01, 1 - m00 + m11 - m22, m21 + m12,
        m10 - m01, m02 + m20, m21 + m12, 1 - m00 - m11 + m22,
    )  # fmt: skip
    rows = torch.stack(entries, -1).unflatten(-1, (4, 4))
    best = rows.diagonal(dim1=-2, dim2=-1).argmax(-1)
    quaternion = torch.take_along_dim(rows, best[..., None, None], dim=-2).squeeze(-2)
    quaternion = torch.nn.functional.normalize(quaternion, dim=-1)
    return torch.where(quaternion[..., :1] < 0, -quaternion, quaternion)


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """(..., 4) quaternions wxyz, normalized here -> (..., 3, 3) rotation matrices."""
    w, x, y, z = torch.nn.functional.normalize(quaternion, dim=-1).unbind(-1)
    entries = (
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    )  # fmt: skip
    return torch.stack(entries, -1).unflatten(-1, (3, 3))


def quaternion_multiply(first: Tensor, second: Tensor) -> Tensor:
    """Hamilton product of (..., 4) quaternions wxyz: `second` acts first, then `first`."""
    aw, ax, ay, az = first.unbind(-1)
    bw, bx, by, bz = second.unbind(-1)
    entries = (
        aw * bw - ax * bx - ay * by - az * bz,
        aw * bx + ax * bw + ay * bz - az * by,
        aw * by - ax * bz + ay * bw + az * bx,
        aw * bz + ax * by - ay * bx + az * bw,
    )
    return torch.stack(entries, -1)
