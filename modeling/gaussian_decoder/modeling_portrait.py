"""Reading the portrait where the points are in it: colors and shallow features, at each point and at its mirror image.

Of several images of a person, the portrait first, each is read alike, and a point takes from each its share of `view_shares`.

Axes: B batch, K images of a person, N points, D width, C channels of a feature map, H W pixels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_gaussian_decoder import GaussianDecoderConfig

# Of `portrait_points` and `mirror_points`: u, v in -1..1 of the image as grid_sample has it (align_corners=False), depth in
# meters, cosine between normal and view, meters behind the head mesh and behind other points, and whether the pixel shows the
# head, and the point.
COLUMNS = ("u", "v", "depth", "facing", "behind_head", "behind_points", "on_head", "visible")
FACING, VISIBLE = COLUMNS.index("facing"), COLUMNS.index("visible")
UNITS = (1.0, 1.0, 1.0, 1.0, 0.05, 0.05, 1.0, 1.0)  # what the network takes for 1
DARKEST = 0.01  # a color read is kept this far from 0 and 1, where the inverse of the sigmoid is infinite
SHARPNESS = 8.0  # how much an image that shows a point from the front counts more than one from the side
HIDDEN = 1e-9  # weight of the portrait where it does not show the point: all that is left where no other image does


class Reading(NamedTuple):
    """What is read at the points and, second, at their mirror images."""

    features: Tensor  # (B, N, 2 * features)
    colors: Tensor  # (B, N, 2, 3) in 0..1
    alphas: Tensor  # (B, N, 2) how much of the subject is there: 0 on background, outside, and at a hidden mirror image
    visible: Tensor  # (B, N, 2)


class PortraitReader(nn.Module):
    """Convolutions over the images at full, half and quarter resolution, sampled bilinearly. Linear in points and images."""

    def __init__(self, config: GaussianDecoderConfig):
        super().__init__()
        channels = config.portrait_channels
        # An even kernel with an even stride: the pixels of the smaller map lie in the middle of those it was made of.
        self.convolutions = nn.ModuleList(
            [
                nn.Conv2d(4, channels, 3, padding=1),
                nn.Conv2d(channels, channels, 4, stride=2, padding=1),
                nn.Conv2d(channels, channels, 4, stride=2, padding=1),
            ]
        )

    @staticmethod
    def size(config: GaussianDecoderConfig) -> int:
        """Of `Reading.features`."""
        return 2 * (len(COLUMNS) + 4 + 3 * config.portrait_channels)

    def forward(self, portrait: Tensor, portrait_points: Tensor, mirror_points: Tensor) -> Reading:
        """`portrait` (B, K, 4, H, W), points (B, N, K, 8) twice, see `COLUMNS`."""
        seen = torch.cat((portrait_points, mirror_points), dim=1).float().transpose(1, 2)
        images, places = portrait.float().flatten(0, 1), seen.flatten(0, 1)
        color, alpha = images.split((3, 1), dim=1)
        # Weighted by alpha, so that the background does not bleed into the color of an edge.
        maps = [sample(torch.cat((color * alpha, images), dim=1), places)]
        inner = images.to(next(self.parameters()).dtype)
        for convolution in self.convolutions:
            inner = F.gelu(convolution(inner), approximate="tanh")
            maps.append(sample(inner, places))
        each = torch.cat((*maps, places / places.new_tensor(UNITS)), dim=-1).unflatten(0, seen.shape[:2])
        read = (view_shares(seen)[..., None] * each).sum(1)
        features, alphas, visible = read[..., 3:], read[..., 6], read[..., VISIBLE - len(COLUMNS)]
        colors = read[..., :3] / alphas[..., None].clamp(min=1e-6)
        halves = [torch.stack(x.chunk(2, dim=1), dim=2) for x in (features, colors, alphas, visible)]
        features, colors, alphas, visible = halves
        real = torch.stack((torch.ones_like(visible[..., 0]), visible[..., 1]), dim=-1)
        return Reading((features * real[..., None]).flatten(2), colors, alphas * real, visible)


def view_shares(seen: Tensor) -> Tensor:
    """(B, K, M) the share of each image in what is read at a point seen as (B, K, M, 8); their sum is 1.

    In proportion to e^(SHARPNESS facing) of those that show the point, exactly 0 of others; where none shows it, the first has all.
    """
    weights = seen[..., VISIBLE] * (SHARPNESS * seen[..., FACING]).exp()
    weights = torch.cat((weights[:, :1].clamp(min=HIDDEN), weights[:, 1:]), dim=1)
    return weights / weights.sum(1, keepdim=True)


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """(B, C, H, W) at u, v of points (B, M, 8) -> (B, M, C) float32, bilinear, zero outside."""
    read = F.grid_sample(
        maps.float(), points[:, :, None, :2], mode="bilinear", padding_mode="zeros", align_corners=False
    )
    return read[..., 0].mT


def color_logits(reading: Reading, trust: Tensor) -> Tensor:
    """(B, N, 3) the inverse sigmoid of the colors read, each with its share.

    The share of a reading is alpha e^t / (1 + sum of both), where t is its `trust` (B, N, 2), less for a hidden point: on
    background nothing is read, and the logit is 0.
    """
    trust = trust + torch.stack((6 * reading.visible[..., 0] - 3, torch.zeros_like(trust[..., 1])), dim=-1)
    weights = reading.alphas * trust.clamp(max=10).exp()
    shares = weights / (1 + weights.sum(-1, keepdim=True))
    return (shares[..., None] * reading.colors.clamp(DARKEST, 1 - DARKEST).logit()).sum(2)
