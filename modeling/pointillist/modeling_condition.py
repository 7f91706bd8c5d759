"""The condition of the point model: the tokens of a portrait and a head mesh that cross-attention reads.

Axes: B batch, S conditions (of B / S successive sequences each), V vertices, L tokens, M condition tokens, H heads, D width.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model
from transformers import initialization as init

from .configuration_pointillist import PointillistConfig


def evenly_spaced(count: int, total: int, device: torch.device) -> Tensor:
    """Ascending indices (count,) below `total`."""
    return torch.arange(count, device=device) * total // count


class PointEncoder(nn.Module):
    """Vertices and normals (B, V, 3) -> latents (B, point_latents, point_hidden_size).

    As in a Perceiver, learned queries attend to the Fourier-embedded vertices and normals, then to each other.
    """

    def __init__(self, config: PointillistConfig):
        super().__init__()
        self.config = config
        width, heads = config.point_hidden_size, config.point_attention_heads
        self.latents = nn.Parameter(torch.empty(config.point_latents, width))
        self.embed = nn.Linear(3 * 2 * config.point_frequencies + 6, width)
        self.point_norm = nn.LayerNorm(width)
        self.read = nn.MultiheadAttention(width, heads, batch_first=True)
        options: dict[str, Any] = dict(dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, **options) for _ in range(config.point_layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, vertices: Tensor, normals: Tensor) -> Tensor:
        shape, other = tuple(vertices.shape), tuple(normals.shape)
        if shape != other or len(shape) != 3 or shape[-1] != 3:
            raise ValueError(f"head_vertices and head_normals must both be (B, V, 3), found {shape} and {other}")
        samples = self.config.point_samples
        if samples is not None and samples < vertices.shape[1]:
            read = evenly_spaced(samples, vertices.shape[1], vertices.device)
            vertices, normals = vertices[:, read], normals[:, read]
        centered = vertices.float() - torch.tensor(self.config.point_center, device=vertices.device)
        unit = centered / self.config.point_extent
        octaves = math.pi * 2.0 ** torch.arange(self.config.point_frequencies, device=vertices.device)
        angles = rearrange(unit[..., None] * octaves, "b v xyz octave -> b v (xyz octave)")
        points = torch.cat((angles.sin(), angles.cos(), unit, normals.float()), dim=-1)
        points = self.point_norm(self.embed(points.to(self.latents.dtype)))
        # Each query starts from its own vertex, evenly spaced: a mean over all vertices hardly differs between heads.
        spread = evenly_spaced(len(self.latents), points.shape[1], vertices.device)
        latents = self.latents + points[:, spread]
        latents = latents + self.read(latents, points, points, need_weights=False)[0]
        for block in self.blocks:
            latents = block(latents)
        return self.norm(latents)


class ConditionEncoder(nn.Module):
    """Portrait, through DINOv2, and head mesh -> condition tokens (B, M, D), side by side (method figure of AvatarPointillist)."""

    def __init__(self, config: PointillistConfig):
        super().__init__()
        self.config = config
        self.empty = nn.Parameter(torch.empty(1, config.hidden_size))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if config.use_vision_encoder:
            assert isinstance(config.vision_config, Dinov2Config)
            self.use_vision(Dinov2Model(config.vision_config))
            self.vision_proj = nn.Linear(config.vision_config.hidden_size, config.hidden_size)
        if config.use_point_encoder:
            self.points = PointEncoder(config)
            self.point_proj = nn.Linear(config.point_hidden_size, config.hidden_size)

    def use_vision(self, vision: Dinov2Model) -> None:
        """Use this portrait encoder, frozen if so configured."""
        self.vision = vision.requires_grad_(True)
        self.freeze()

    def freeze(self) -> None:
        """Freeze the portrait encoder, if so configured, and its mask token: portraits are never masked.

        A trainable parameter that no loss reaches would stall distributed training. The models do this themselves.
        """
        if self.config.use_vision_encoder:
            vision: Any = self.vision
            unused = vision if self.config.freeze_vision_encoder else vision.embeddings.mask_token
            unused.requires_grad_(False)

    def init_weights(self, std: float) -> None:
        """Fill the parameters that belong to no standard layer."""
        init.normal_(self.empty, std=std)
        if self.config.use_point_encoder:
            init.normal_(self.points.latents)  # as large as the embeddings of the vertices that are added

    def forward(
        self, pixel_values: Tensor | None, head_vertices: Tensor | None, head_normals: Tensor | None
    ) -> Tensor | None:
        tokens = []
        if pixel_values is not None:
            if not self.config.use_vision_encoder:
                raise ValueError("this model has no portrait encoder (use_vision_encoder): leave pixel_values out")
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_vision_encoder):
                features = self.vision(pixel_values.to(self.empty.dtype)).last_hidden_state
            tokens.append(self.vision_proj(features))
        if head_vertices is not None:
            if not self.config.use_point_encoder:
                raise ValueError("this model has no mesh encoder (use_point_encoder): leave head_vertices out")
            if head_normals is None:
                raise ValueError("head_vertices need head_normals of the same shape; the tokenizer makes both")
            tokens.append(self.point_proj(self.points(head_vertices, head_normals)))
        return self.norm(torch.cat(tokens, dim=1)) if tokens else None

    def or_empty(self, condition: Tensor | None, batch: int, drop: Tensor | None) -> Tensor:
        """The condition, or the learned empty token where there is none or `drop` (B,) is True, for B sequences.

        A condition (S, M, D) of fewer rows stays as it is, unless rows are dropped: B / S successive sequences share each.
        """
        empty = self.empty[None].expand(batch, -1, -1)
        if condition is None:
            return empty
        if batch % len(condition):
            raise ValueError(
                f"condition for {len(condition)} sequences, but {batch} sequences of tokens: give one for each, or one for "
                "every so many successive sequences"
            )
        if drop is None:
            return condition
        condition = condition.repeat_interleave(batch // len(condition), 0)
        return torch.where(drop[:, None, None].bool(), empty, condition)


def attend_sharing(
    attend: Callable, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """`attend`, one of transformers' attention functions, where B / S successive sequences read the same keys and values.

    Queries (B, H, L, d) of sequences that share keys (S, H, M, d) lie side by side, as of one sequence of B / S * L tokens: no
    order among them matters and nothing is copied. mask: (B, 1, L, M), None where all is seen. Returns (B, L, H, d), weights.
    """
    sharing = len(query) // len(key)
    if sharing == 1:
        return attend(module, query, key, value, mask, **options)
    together = "(s n) h l c -> s h (n l) c"
    query = rearrange(query, together, n=sharing)
    mask = None if mask is None else rearrange(mask, together, n=sharing)
    output, weights = attend(module, query, key, value, mask, **options)
    output = rearrange(output, "s (n l) h d -> (s n) l h d", n=sharing)
    return output, None if weights is None else rearrange(weights, "s h (n l) ... -> (s n) h l ...", n=sharing)
