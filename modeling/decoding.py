"""From what the Gaussian decoder returns to what a splatter draws.

`GaussianDecoder` travels with its checkpoint and therefore knows nothing of this toolkit; here its batched, padded output becomes
the `Gaussians` of one avatar. Canonical space: still unposed, one frame.
"""

from gaussian_tokenizer.gaussians import Gaussians

from .modeling_gaussian_decoder import GaussianDecoderOutput


def to_gaussians(output: GaussianDecoderOutput, row: int = 0, num_points: int | None = None) -> Gaussians:
    """The Gaussians of one row of a batch, without its padding; gradients pass.

    Args:
        output: of `GaussianDecoder`, (B, N, ..).
        row: which avatar, 0 to B - 1.
        num_points: how many leading points are real; default all N.

    Returns:
        `Gaussians` of one frame (T = 1), float32, canonical space in metres.

    Raises:
        ValueError: there is no such row, or it has fewer points.
    """
    batch, longest, _ = output.positions.shape
    count = longest if num_points is None else num_points
    if not 0 <= row < batch or not 0 <= count <= longest:
        raise ValueError(f"row {row} with {count} points of an output of {batch} rows with {longest} points")
    return Gaussians(
        positions=output.positions[row, None, :count],
        scales=output.scales[row, None, :count],
        quats=output.quats[row, None, :count],
        opacities=output.opacities[row, :count],
        sh=output.sh[row, :count],
    )
