"""The likeliest of several clouds written for one person.

A point drawn too high skips all that belonged before it, and the sorted order never goes back: such a cloud falls apart, and the
model itself finds it unlikely. The hidden states that come with a generation say how likely, at the price of one matrix product.

Axes: B persons, C candidates of each, N points, D width.
"""

from dataclasses import fields

import torch
from torch import Tensor

from .pointillist.generation_pointillist import PointillistGenerateOutput
from .pointillist.modeling_pointillist import PointillistForCausalLM


@torch.no_grad()
def mean_log_likelihood(model: PointillistForCausalLM, written: PointillistGenerateOutput) -> Tensor:
    """(B * C,) nats a token of the points, each token among those of its slot; -inf for a sequence without points.

    `written` comes from `generate(..., output_point_features=True, return_dict_in_generate=True)` without a prompt.
    """
    assert written.point_features is not None and written.num_points is not None
    count, n_bins = written.point_features.shape[1], model.config.n_bins
    tokens = written.sequences[:, 1 : 1 + 4 * count].unflatten(1, (count, 4))
    real = torch.arange(count, device=tokens.device) < written.num_points[:, None]
    slots = ((slice(0, n_bins), tokens[..., :3]), (slice(n_bins, model.config.bos_token_id), tokens[..., 3:] - n_bins))
    total = torch.zeros(len(tokens), device=tokens.device)
    for (rows, labels), features in zip(slots, written.point_features.split((3, 1), dim=2)):
        scores = model.lm_head(features, (rows,)).float().log_softmax(-1)
        own = scores.gather(-1, labels.clamp(0, rows.stop - rows.start - 1)[..., None])[..., 0].sum(-1)
        total += own.masked_fill(~real, 0).sum(1)
    return (total / (4 * written.num_points)).nan_to_num(nan=-torch.inf)


def likeliest(
    model: PointillistForCausalLM, written: PointillistGenerateOutput, candidates: int
) -> PointillistGenerateOutput:
    """Of each C rows in turn the one with the highest `mean_log_likelihood`: B rows of what the points need."""
    score = mean_log_likelihood(model, written).unflatten(0, (-1, candidates))
    rows = torch.arange(len(score), device=score.device) * candidates + score.argmax(1)
    kept = {"sequences", "point_features", "num_points"}
    return PointillistGenerateOutput(
        **{f.name: getattr(written, f.name)[rows] for f in fields(written) if f.name in kept}
    )
