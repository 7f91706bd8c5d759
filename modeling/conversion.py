"""Between the Gaussian decoder, which knows nothing of this toolkit, and its heads and `Gaussians`, in canonical space."""

import torch
from torch import Tensor

from gaussian_tokenizer.avatars.gaussians import Gaussians
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters

from .gaussian_decoder.modeling_gaussian_decoder import GaussianDecoderOutput


def to_gaussians(output: GaussianDecoderOutput, row: int = 0, num_gaussians: int | None = None) -> Gaussians:
    """The Gaussians of one `row` of a decoder's output (B, N, ..), its first `num_gaussians` (default: all); gradients pass.

    Returns `Gaussians` of one frame (T = 1), float32, canonical space in meters. Raises `ValueError` if there is no such row, or
    it has fewer.
    """
    positions, _, scales, quats, opacities, sh = output.values()
    batch, longest, _ = positions.shape
    count = longest if num_gaussians is None else num_gaussians
    if not 0 <= row < batch or not 0 <= count <= longest:
        raise ValueError(f"row {row} with {count} Gaussians of an output of {batch} rows with {longest} Gaussians")
    return Gaussians(
        positions=positions[row, None, :count],
        scales=scales[row, None, :count],
        quats=quats[row, None, :count],
        opacities=opacities[row, :count],
        sh=sh[row, :count],
    )


def vertex_points(head: HeadModel, params: HeadParameters) -> tuple[Tensor, Tensor]:
    """Points of a "flame_position" decoder: vertices (V, 3) of a subject's head, meters, and one face (V,) of each vertex."""
    faces = torch.zeros(head.n_vertices, dtype=torch.int64, device=head.device)
    faces[head.faces.flatten()] = torch.arange(head.n_faces, device=head.device).repeat_interleave(3)
    return head.canonical_vertices(params), faces
