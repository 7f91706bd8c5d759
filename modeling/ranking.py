"""The likeliest of several clouds generated for one subject: a cloud that falls apart has a low likelihood.

Axes: B subjects, C candidates of each, N points, D width.
"""

import torch
from torch import Tensor

from .pointillist.generation_pointillist import PointillistGenerateOutput
from .pointillist.modeling_pointillist import PointillistForCausalLM


@torch.no_grad()
def mean_log_likelihood(model: PointillistForCausalLM, generated: PointillistGenerateOutput) -> Tensor:
    """(B * C,) nats a token of the points, each token among those of its slot; -inf for a sequence without points.

    `generated` comes from `generate(..., output_point_features=True)` without a prompt.
    """
    assert generated.point_features is not None and generated.num_points is not None
    count, config = generated.point_features.shape[1], model.config
    tokens = generated.sequences[:, 1 : 1 + 4 * count].unflatten(1, (count, 4))
    real = torch.arange(count, device=tokens.device) < generated.num_points[:, None]
    faces = slice(config.n_bins, config.first_special)
    slots = (slice(0, config.n_bins), tokens[..., :3]), (faces, tokens[..., 3:] - config.n_bins)
    total = torch.zeros(len(tokens), device=tokens.device)
    for (rows, labels), features in zip(slots, generated.point_features.split((3, 1), dim=2)):
        scores = model.lm_head(features, (rows,)).float().log_softmax(-1)
        found = scores.gather(-1, labels.clamp(0, rows.stop - rows.start - 1)[..., None])[..., 0].sum(-1)
        total += found.masked_fill(~real, 0).sum(1)
    return (total / (4 * generated.num_points)).nan_to_num(nan=-torch.inf)


def likeliest(
    model: PointillistForCausalLM, generated: PointillistGenerateOutput, candidates: int
) -> PointillistGenerateOutput:
    """The row of each C in turn with the highest `mean_log_likelihood`: B rows, without the caches."""
    score = mean_log_likelihood(model, generated).unflatten(0, (-1, candidates))
    rows = torch.arange(len(score), device=score.device) * candidates + score.argmax(1)
    kept = ("sequences", "point_features", "num_points")
    return PointillistGenerateOutput(**{name: generated[name][rows] for name in kept})
