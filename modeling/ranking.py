"""The likeliest of several clouds generated for one subject: a cloud that falls apart has a low likelihood.

Axes: B subjects, C candidates of each, N points, D width.
"""

import torch
from torch import Tensor

from .pointillist.generation_pointillist import PointillistGenerateOutput
from .pointillist.modeling_pointillist import PointillistForCausalLM


@torch.no_grad()
def mean_log_likelihood(
    model: PointillistForCausalLM, generated: PointillistGenerateOutput, **faces: Tensor | None
) -> Tensor:
    """(B * C,) nats per token of the points, each token among those of its slot; -inf for a sequence without points.

    `generated` comes from `generate(..., output_point_features=True)` without a prompt; `faces` are `face_centers`,
    `face_normals` and `face_pixels`, for a model with mesh-aware faces.
    """
    assert generated.point_features is not None and generated.num_points is not None
    count = generated.point_features.shape[1]
    points = generated.sequences[:, 1 : 1 + 4 * count].unflatten(1, (count, 4))[..., model.config.slot_columns]
    real = torch.arange(count, device=points.device) < generated.num_points[:, None]
    nll = model.point_nll(generated.point_features, torch.where(real[..., None], points, -100), **faces)
    return (-nll.sum((1, 2)) / (4 * generated.num_points)).nan_to_num(nan=-torch.inf)


def likeliest(
    model: PointillistForCausalLM, generated: PointillistGenerateOutput, candidates: int, **faces: Tensor | None
) -> PointillistGenerateOutput:
    """The row of each C in turn with the highest `mean_log_likelihood`: B rows, without the caches."""
    score = mean_log_likelihood(model, generated, **faces).unflatten(0, (-1, candidates))
    rows = torch.arange(len(score), device=score.device) * candidates + score.argmax(1)
    kept = ("sequences", "point_features", "num_points")
    return PointillistGenerateOutput(**{name: generated[name][rows] for name in kept})
