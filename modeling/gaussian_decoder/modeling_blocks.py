"""The blocks of the Gaussian decoder: joint attention of points and portrait, or attention of the points to the portrait.

Axes: B batch, N points, M portrait tokens, H heads, D width, d head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from .configuration_gaussian_decoder import GaussianDecoderConfig


class JointBlock(GradientCheckpointingLayer):
    """Attention over points and context together, then a feed-forward for each; every stream has its own weights.

    After the last block (`context_pre_only`) the context is not needed: it is attended to and returned as None.
    """

    def __init__(self, config: GaussianDecoderConfig, layer_idx: int, context_pre_only: bool):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size or 4 * config.hidden_size
        self.context_pre_only = context_pre_only
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.norm1_context = nn.LayerNorm(width, eps=1e-5)
        self.attn = JointAttention(config, layer_idx, context_pre_only)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.ff = feed_forward(width, inner, width)
        if not context_pre_only:
            self.norm2_context = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
            self.ff_context = feed_forward(width, inner, width)

    def forward(self, points: Tensor, context: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x, c = self.attn(self.norm1(points), self.norm1_context(context), mask)
        points = points + x
        points = points + self.ff(self.norm2(points))
        if self.context_pre_only:
            return points, None
        context = context + c
        return points, context + self.ff_context(self.norm2_context(context))


class PortraitBlock(GradientCheckpointingLayer):
    """The points read the context, which stays as it is, then a feed-forward: time and memory are linear in the points."""

    def __init__(self, config: GaussianDecoderConfig, layer_idx: int):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size or 4 * config.hidden_size
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.norm1_context = nn.LayerNorm(width, eps=1e-5)
        self.attn = PortraitAttention(config, layer_idx)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.ff = feed_forward(width, inner, width)

    def forward(self, points: Tensor, context: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        points = points + self.attn(self.norm1(points), self.norm1_context(context))
        return points + self.ff(self.norm2(points)), context


def feed_forward(inputs: int, inner: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, outputs))


class JointAttention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V over points followed by context; queries and keys normalized within each head."""

    is_causal = False
    num_key_value_groups = 1

    def __init__(self, config: GaussianDecoderConfig, layer_idx: int, context_pre_only: bool):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        width = config.hidden_size
        self.head_dim = width // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.q_proj_context, self.k_proj_context, self.v_proj_context = (nn.Linear(width, width) for _ in range(3))
        self.q_norm, self.k_norm = (HeadRMSNorm(self.head_dim, eps=1e-6) for _ in range(2))
        self.q_norm_context, self.k_norm_context = (HeadRMSNorm(self.head_dim, eps=1e-6) for _ in range(2))
        self.o_proj = nn.Linear(width, width)
        self.o_proj_context = None if context_pre_only else nn.Linear(width, width)

    def heads(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, H, L, d)"""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, points: Tensor, context: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Normalized points (B, N, D) and context (B, M, D) -> updates of both (None for the context of the last block)."""
        q, k, v = (self.heads(project(points)) for project in (self.q_proj, self.k_proj, self.v_proj))
        own = (self.q_proj_context, self.k_proj_context, self.v_proj_context)
        q_context, k_context, v_context = (self.heads(project(context)) for project in own)
        query = torch.cat((self.q_norm(q), self.q_norm_context(q_context)), dim=2)
        key = torch.cat((self.k_norm(k), self.k_norm_context(k_context)), dim=2)
        value = torch.cat((v, v_context), dim=2)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, _ = attend(self, query, key, value, mask, dropout=0.0, scaling=self.scaling)
        x, c = output.flatten(-2).split((points.shape[1], context.shape[1]), dim=1)
        return self.o_proj(x), None if self.o_proj_context is None else self.o_proj_context(c)


class PortraitAttention(nn.Module):
    """Cross-attention of points (B, N, D) to context (B, M, D); queries and keys normalized within each head."""

    is_causal = False
    num_key_value_groups = 1

    def __init__(self, config: GaussianDecoderConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        width = config.hidden_size
        self.head_dim = width // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))
        self.q_norm, self.k_norm = (HeadRMSNorm(self.head_dim, eps=1e-6) for _ in range(2))

    def forward(self, points: Tensor, context: Tensor) -> Tensor:
        inputs = (self.q_proj(points), self.k_proj(context), self.v_proj(context))
        query, key, value = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in inputs)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, _ = attend(self, self.q_norm(query), self.k_norm(key), value, None, dropout=0.0, scaling=self.scaling)
        return self.o_proj(output.flatten(-2))


class HeadRMSNorm(nn.RMSNorm):
    """RMSNorm in the precision of its input, also under autocast: with float32 gains torch has no fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
