"""The Gaussian decoder: from the points of an avatar and a portrait to the color, scale, rotation and opacity of its Gaussians.

Axes: B batch, N points, M portrait tokens, S = N + M, H heads, D width, G Gaussians per point (row n G + g is the g-th of
point n), K SH coefficients.
"""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .configuration_gaussian_decoder import GaussianDecoderConfig
from .modeling_blocks import JointBlock, PortraitBlock, feed_forward
from .modeling_portrait import COLUMNS, PortraitReader, Reading, color_logits

SH_DC = 0.28209479177387814  # the constant basis function, 1 / (2 sqrt(pi))
EXPONENT_LIMIT = 15.0  # above it the gradient of exp is held, so that an overflow to infinity does not become NaN


@dataclass
class GaussianDecoderOutput(ModelOutput):
    """Gaussians in canonical space, activated, float32 whatever the precision of the blocks.

    positions: (B, N G, 3) meters, the points (with `read_anchors`: pulled to their anchors) moved by `offsets` (B, N G, 3), each
        within +-max_offset. `config.per_gaussian(faces)` are the faces of these Gaussians.
    scales: (B, N G, 3) meters, one standard deviation along each axis, 0 to max_scale. At max_scale the gradient is zero.
    quats: (B, N G, 4) wxyz, unit length. opacities: (B, N G) in 0..1.
    sh: (B, N G, K, 3) coefficients, K = (sh_degree + 1)^2; rgb = sum of basis * sh + 0.5.
    Where `point_mask` is False, offsets and opacities are zero.
    """

    positions: Tensor | None = None
    offsets: Tensor | None = None
    scales: Tensor | None = None
    quats: Tensor | None = None
    opacities: Tensor | None = None
    sh: Tensor | None = None


class GaussianDecoder(PreTrainedModel):
    """Points and a portrait -> Gaussians (see `forward`), by joint-attention blocks and one linear layer for each attribute.

    The blocks are SD3's MM-DiT without a timestep, as in LAM: each stream has its own weights, attention is over both; with
    `attention="portrait"` the points read the portrait's tokens by cross-attention instead.
    """

    config: GaussianDecoderConfig
    main_input_name = "positions"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["JointBlock", "PortraitBlock", "Dinov2Layer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: GaussianDecoderConfig):
        super().__init__(config)
        vision, layers = config.vision_config, range(config.num_hidden_layers)
        assert isinstance(vision, Dinov2Config) and config.vision_layers is not None
        self.vision_layers = config.vision_layers
        self.embed = PointEmbedding(config)
        self.layer_proj = nn.ModuleList(nn.Linear(vision.hidden_size, vision.hidden_size) for _ in self.vision_layers)
        self.image_proj = nn.Linear(config.image_embed_size, config.hidden_size)
        if config.attention == "joint":
            self.blocks = nn.ModuleList(JointBlock(config, i, context_pre_only=i == layers[-1]) for i in layers)
        else:
            self.blocks = nn.ModuleList(PortraitBlock(config, i) for i in layers)
        if config.read_portrait:
            self.reader = PortraitReader(config)
        self.norm = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.head = GaussianHead(config)
        self.use_vision(Dinov2Model(vision))
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        # On the layers, not on the head: in custom code, transformers skips modules without parameters of their own.
        if isinstance(module, AttributeLinear):
            module.init_weights()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)  # replaces the parameters by trainable ones
        (loaded[0] if isinstance(loaded, tuple) else loaded).freeze()
        return loaded

    def use_vision(self, vision: Dinov2Model) -> None:
        """Use this portrait encoder, frozen if so configured."""
        self.vision = vision.requires_grad_(True)
        self.freeze()

    def freeze(self) -> None:
        """Freeze the portrait encoder, if so configured, and the parameters that no loss reaches; the model does this itself.

        A trainable parameter without a gradient would stall distributed training: portraits are never masked, and the queries of
        the last block's context are not used.
        """
        if self.config.freeze_vision_encoder:
            self.vision.requires_grad_(False)
        cast(Any, self.vision).embeddings.mask_token.requires_grad_(False)
        if self.config.attention == "joint":
            attention = cast(Any, self.blocks[-1]).attn
            for unused in (attention.q_proj_context, attention.q_norm_context):
                unused.requires_grad_(False)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Portraits (B, 3, h, w), ImageNet-normalized -> `image_embeds` (B, M, layers read * D_vision), M patches.

        The patch tokens of each layer of `vision_layers`, normalized by the encoder's last norm, side by side (DINOv2's
        `get_intermediate_layers`). Compute it once to use a portrait many times.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(f"pixel_values must be (B, 3, h, w), found {tuple(pixel_values.shape)}")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_vision_encoder):
            pixel_values = pixel_values.to(self.image_proj.weight.dtype)
            states = self.vision(pixel_values, output_hidden_states=True).hidden_states
            layers = [self.vision.layernorm(states[i + 1])[:, 1:] for i in self.vision_layers]
            return torch.cat(layers, dim=-1)

    @can_return_tuple
    def forward(
        self,
        positions: Tensor,
        point_features: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_embeds: Tensor | None = None,
        point_mask: Tensor | None = None,
        anchors: Tensor | None = None,
        portrait: Tensor | None = None,
        portrait_points: Tensor | None = None,
        mirror_points: Tensor | None = None,
    ) -> GaussianDecoderOutput:
        """One pass. Raises `ValueError` if an input is missing or does not fit the configuration or the other inputs.

        Args:
            positions: (B, N, 3) meters, canonical space: dequantized tokens, or head vertices for "flame_position".
            point_features: (B, N, 4, D_ar) last hidden states of the point model that predicted x, y, z and face of each
                point; read by the modes "full" and "ar_feature" only.
            pixel_values: (B, 3, h, w) portrait, ImageNet-normalized, or `image_embeds` (B, M, E) from `encode_image`.
            point_mask: (B, N) bool, False on padding, which does not affect the other points.
            anchors: (B, N, 3) meters, canonical space: the nearest point on the face of each point, on the subject's own head;
                read with `read_anchors` only.
            portrait: (B, 4, H, W) the portrait as it is, red, green, blue and alpha (1 where it is not known) in 0..1; or
                (B, K, 4, H, W), the portrait and K - 1 further images of the same person, in any order. This and the next two are
                read with `read_portrait` only.
            portrait_points, mirror_points: (B, N, 8), or (B, N, K, 8), where the points and their mirror images are in it, see
                `modeling_portrait.COLUMNS`; `gaussian_tokenizer.rendering.portrait_points` computes them. A row of zeros says that
                an image does not show a point; it is then not read there.
        """
        self._check(positions, point_features, pixel_values, image_embeds, point_mask, anchors)
        self._check_portrait(positions, portrait, portrait_points, mirror_points)
        if pixel_values is not None:
            image_embeds = self.encode_image(pixel_values)
        assert image_embeds is not None
        layers = image_embeds.to(self.image_proj.weight.dtype).chunk(len(self.layer_proj), dim=-1)
        context = self.image_proj(torch.cat([project(x) for project, x in zip(self.layer_proj, layers)], dim=-1))

        # Without padding there is no mask, so that every attention kernel applies.
        point_mask = None if point_mask is None or point_mask.all() else point_mask.bool()
        if point_mask is not None:
            # Here, so that the content of the padding, even NaN, reaches neither values nor gradients.
            padding = ~point_mask[..., None]
            positions = positions.masked_fill(padding, 0)
            point_features = None if point_features is None else point_features.masked_fill(padding[..., None], 0)
            anchors = None if anchors is None else anchors.masked_fill(padding, 0)
        reading = self._read(portrait, portrait_points, mirror_points, point_mask)
        points = self.embed(positions, point_features, anchors, reading)

        mask = self._attention_mask(point_mask, context)
        for block in self.blocks:
            points, context = block(points, context, mask)
        return self.head(self.norm(points), positions.float(), anchors, reading, point_mask)

    def _read(self, portrait, portrait_points, mirror_points, point_mask: Tensor | None) -> Reading | None:
        if not self.config.read_portrait:
            return None
        if portrait.ndim == 4:  # K = 1
            portrait, portrait_points, mirror_points = (
                portrait[:, None],
                portrait_points[:, :, None],
                mirror_points[:, :, None],
            )
        if point_mask is not None:
            padding = ~point_mask[..., None, None]
            portrait_points, mirror_points = (x.masked_fill(padding, 0) for x in (portrait_points, mirror_points))
        return self.reader(portrait, portrait_points, mirror_points)

    def _attention_mask(self, point_mask: Tensor | None, context: Tensor) -> Tensor | None:
        if point_mask is None:
            return None
        visible = torch.cat((point_mask, point_mask.new_ones(context.shape[:2])), dim=1)
        if "flash" in self.config._attn_implementation:  # flash attention removes the padding itself
            return visible.long()
        # The same for every query, hence (B, 1, 1, S): an S x S mask of 31,000 tokens would be a gigabyte a row.
        visible, dtype = visible[:, None, None], context.dtype
        if self.config._attn_implementation != "eager":
            return visible
        return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)

    def _check(self, positions, point_features, pixel_values, image_embeds, point_mask, anchors) -> None:
        config = self.config
        if positions.ndim != 3 or positions.shape[-1] != 3:
            raise ValueError(f"positions must be (B, N, 3), found {tuple(positions.shape)}")
        batch, count, _ = positions.shape
        shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {}
        if config.reads_point_features:
            name = f'mode "{config.mode}" needs point_features (B, N, 4, point_feature_size)'
            shapes[name] = point_features, (batch, count, 4, config.point_feature_size)
        if config.read_anchors:
            shapes["read_anchors needs anchors (B, N, 3)"] = anchors, (batch, count, 3)
        if point_mask is not None:
            shapes["point_mask must be (B, N)"] = point_mask, (batch, count)
        for name, (value, expected) in shapes.items():
            found = None if value is None else tuple(value.shape)
            if found != expected:
                raise ValueError(f"{name} = {expected}, found {found}")
        if (pixel_values is None) == (image_embeds is None):
            raise ValueError("give exactly one of pixel_values and image_embeds")
        size = config.image_embed_size
        if image_embeds is not None and (image_embeds.ndim != 3 or image_embeds.shape[-1] != size):
            found = tuple(image_embeds.shape)
            raise ValueError(f"image_embeds must be (B, M, {size}) as encode_image makes them, found {found}")
        portraits = len(pixel_values if image_embeds is None else image_embeds)
        if portraits != batch:
            raise ValueError(f"{batch} point clouds, but {portraits} portraits")

    def _check_portrait(self, positions, portrait, portrait_points, mirror_points) -> None:
        if not self.config.read_portrait:
            return
        batch, count, _ = positions.shape
        given = None if portrait is None or portrait.ndim not in (4, 5) else tuple(portrait.shape)
        images = () if given is None else tuple(max(1, each) for each in given[1:-3])  # (K,) or ()
        size = (batch, *images, 4, *(("H", "W") if given is None else given[-2:]))
        points = (batch, count, *images, len(COLUMNS))
        for name, value, expected in (
            ("portrait", portrait, size),
            ("portrait_points", portrait_points, points),
            ("mirror_points", mirror_points, points),
        ):
            found = None if value is None else tuple(value.shape)
            if found != expected:
                raise ValueError(
                    f"this decoder reads the portrait (read_portrait) and needs {name} {expected}, found {found}; give the "
                    "portrait's camera and head parameters to the pipeline, or compute the inputs with portrait_points"
                )


class PointEmbedding(nn.Module):
    """Positions (B, N, 3), point features (B, N, 4, D_ar), anchors (B, N, 3) and what is read in the portrait -> (B, N, D)."""

    def __init__(self, config: GaussianDecoderConfig):
        super().__init__()
        self.config = config
        width, encoded = config.hidden_size, 3 * 2 * config.point_frequencies + 3
        if config.reads_positions:
            self.position_mlp = branch(encoded, width)
        if config.reads_point_features:
            self.feature_mlp = branch(4 * config.point_feature_size, width)
        if config.read_anchors:
            self.anchor_mlp = branch(2 * encoded, width)
        if config.read_portrait:
            self.portrait_mlp = branch(PortraitReader.size(config), width)
        branches = config.reads_positions + config.reads_point_features + config.read_anchors + config.read_portrait
        self.proj = nn.Linear(branches * width, width)

    def forward(
        self, positions: Tensor, point_features: Tensor | None, anchors: Tensor | None, reading: Reading | None
    ) -> Tensor:
        dtype = self.proj.weight.dtype
        center = torch.tensor(self.config.point_center, device=positions.device)
        parts = []
        if self.config.reads_positions:
            parts.append(self.position_mlp(self.encode(positions - center).to(dtype)))
        if self.config.reads_point_features and point_features is not None:
            parts.append(self.feature_mlp(point_features.to(dtype).flatten(-2)))
        if self.config.read_anchors and anchors is not None:
            both = torch.cat((self.encode(anchors - center), self.encode(positions.float() - anchors.float())), dim=-1)
            parts.append(self.anchor_mlp(both.to(dtype)))
        if reading is not None:
            parts.append(self.portrait_mlp(reading.features.to(dtype)))
        return self.proj(torch.cat(parts, dim=-1))

    def encode(self, meters: Tensor) -> Tensor:
        return positional_encoding(meters.float() / self.config.point_extent, self.config.point_frequencies)


def branch(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(*feed_forward(inputs, width, width), nn.LayerNorm(width))


def positional_encoding(unit: Tensor, octaves: int) -> Tensor:
    """(.., 3) in [-1, 1] -> (.., 6 * octaves + 3): sines, cosines (x of all octaves, then y, then z), then the input."""
    frequencies = math.pi * 2.0 ** torch.arange(octaves, device=unit.device)
    angles = rearrange(unit[..., None] * frequencies, "... xyz octave -> ... (xyz octave)")
    return torch.cat((angles.sin(), angles.cos(), unit), dim=-1)


class GaussianHead(nn.Module):
    """Normalized points (B, N, D) and their positions (B, N, 3) -> Gaussians.

    A new one gives all points the same attributes but the color: small, faint, unrotated Gaussians on their points, or around
    them if there are several.
    """

    def __init__(self, config: GaussianDecoderConfig):
        super().__init__()
        self.config = config
        width, half, each = config.hidden_size, config.hidden_size // 2, config.gaussians_per_point
        layers = nn.Linear(width, half), nn.SiLU(), nn.Linear(half, half), nn.SiLU(), nn.Linear(half, width)
        self.mlp = nn.Sequential(*layers)
        faint = math.log(config.init_opacity / (1 - config.init_opacity))
        self.color = AttributeLinear(width, 3 * each, initial=[0.0] * 3 * each if config.read_portrait else None)
        self.scale = AttributeLinear(width, 3 * each, initial=[math.log(config.init_scale)] * 3 * each)
        self.offset = AttributeLinear(width, 3 * each, initial=spread_offsets(config))
        self.opacity = AttributeLinear(width, each, initial=[faint] * each)
        self.quat = AttributeLinear(width, 4 * each, initial=[1.0, 0.0, 0.0, 0.0] * each)
        if config.read_anchors:
            self.pull = AttributeLinear(width, 1, initial=[0.0])
        if config.read_portrait:  # the point itself before its mirror image
            self.trust = AttributeLinear(width, 2, initial=[0.0, 1.0])
        if config.sh_degree:
            rest = 3 * ((config.sh_degree + 1) ** 2 - 1) * each
            self.sh_rest = AttributeLinear(width, rest, initial=[0.0] * rest)

    def forward(
        self,
        points: Tensor,
        positions: Tensor,
        anchors: Tensor | None,
        reading: Reading | None,
        point_mask: Tensor | None,
    ) -> GaussianDecoderOutput:
        config = self.config
        x = self.mlp(points)
        # No autocast here: half precision would round a position of 0.2 m to 0.1-1 mm.
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            offsets = (self.split(self.offset(x)).sigmoid() - 0.5) * (2 * config.max_offset)
            opacities = self.split(self.opacity(x)).sigmoid()[..., 0]
            if config.read_anchors and anchors is not None:  # initially half way
                positions = positions + self.pull(x).sigmoid() * (anchors.float() - positions)
            if point_mask is not None:
                point_mask = config.per_gaussian(point_mask, 1)
                offsets = offsets * point_mask[..., None]
                opacities = opacities * point_mask
            color = self.split(self.color(x))
            if reading is not None:
                color = color + config.per_gaussian(color_logits(reading, self.trust(x)), 1)
            sh = ((color.sigmoid() - 0.5) / SH_DC)[:, :, None]
            if config.sh_degree:
                sh = torch.cat((sh, self.split(self.sh_rest(x)).unflatten(-1, (-1, 3))), dim=2)
            return GaussianDecoderOutput(
                positions=config.per_gaussian(positions, 1) + offsets,
                offsets=offsets,
                scales=HeldExp.apply(self.split(self.scale(x))).clamp(max=config.max_scale),
                quats=F.normalize(self.split(self.quat(x)), dim=-1),
                opacities=opacities,
                sh=sh,
            )

    def split(self, values: Tensor) -> Tensor:
        """(B, N, G C) of a layer -> (B, N G, C)"""
        return values.unflatten(-1, (self.config.gaussians_per_point, -1)).flatten(1, 2)


def spread_offsets(config: GaussianDecoderConfig) -> list[float]:
    """What `GaussianHead.offset` returns at first: the Gaussians of a point on a golden spiral around it, a single one on it.

    The radius is half of `init_scale`: they overlap, but are no copies, which would get the same gradients forever.
    """
    count = config.gaussians_per_point
    heights = [1 - (2 * i + 1) / count for i in range(count)]
    angles = [math.pi * (3 - math.sqrt(5)) * i for i in range(count)]
    sphere = [
        (math.sqrt(1 - z * z) * math.cos(a), math.sqrt(1 - z * z) * math.sin(a), z) for z, a in zip(heights, angles)
    ]
    center = [sum(axis) / count for axis in zip(*sphere)]
    unit = min(config.init_scale, config.max_offset) / 2 / (2 * config.max_offset)
    shares = [0.5 + unit * (value - middle) for point in sphere for value, middle in zip(point, center)]
    return [math.log(share / (1 - share)) for share in shares]


class AttributeLinear(nn.Linear):
    """A linear layer that computes in float32, whatever the precision of its weights.

    A new one returns `initial` (LAM's values) for every point, or is initialized like torch's linear layers without it.
    """

    def __init__(self, inputs: int, outputs: int, initial: list[float] | None):
        super().__init__(inputs, outputs)
        self.initial = initial

    def init_weights(self) -> None:
        if self.initial is None:
            bound = self.in_features**-0.5
            init.uniform_(self.weight, -bound, bound)
            init.uniform_(self.bias, -bound, bound)
        else:
            init.zeros_(self.weight)
            init.copy_(self.bias, torch.tensor(self.initial))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.float(), self.bias.float())


class HeldExp(torch.autograd.Function):
    """exp(x) with the gradient of exp(min(x, EXPONENT_LIMIT)): the clamp that follows returns 0, and 0 * inf is NaN."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * x.clamp(max=EXPONENT_LIMIT).exp()
