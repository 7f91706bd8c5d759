"""Configuration of the Gaussian decoder: the paper's network by default.

Sizes: AvatarPointillist supplementary, section D; ranges and initial values of the Gaussians: LAM's released configuration.
"""

import math
from collections.abc import Mapping

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import Dinov2Config, PreTrainedConfig

SIZE, LAYERS = (1, 2**31 - 1), (1, 10_000)  # the most that an index of a tensor holds, and that a list of names may
POSITIVE, OCTAVES = (1e-12, 1e12), (0, 64)
LIMITS = {
    **dict.fromkeys(
        ("hidden_size", "intermediate_size", "num_attention_heads", "point_feature_size", "portrait_channels"), SIZE
    ),
    **dict.fromkeys(("point_extent", "init_scale", "max_scale", "max_offset"), POSITIVE),
    "num_hidden_layers": LAYERS,
    "gaussians_per_point": (1, 1000),
    "point_frequencies": OCTAVES,
    "initializer_range": (0, 1e3),
    "init_opacity": (0, 1),
}
MODES = ("full", "ar_feature", "position", "flame_position")
ATTENTIONS = ("joint", "portrait")


# These two are also in configuration_pointillist.py: a checkpoint of one model travels without the files of the other.
def check_fields(config: PreTrainedConfig, limits: Mapping[str, tuple[float, float]]) -> None:
    """Raise `ValueError` for an unknown dtype, a field outside its limits (NaN is outside of all), or a center that is no point."""
    if isinstance(config.dtype, str) and not isinstance(getattr(torch, config.dtype, None), torch.dtype):
        raise ValueError(f"dtype is {config.dtype!r}, expected one of torch's, such as float32; correct config.json")
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{name} is {value}, expected {low} to {high}; correct config.json")
    center = config.point_center
    if center is not None and (len(center) != 3 or not all(map(math.isfinite, center))):
        raise ValueError(f"point_center is {center}, expected x, y and z in meters")


def dinov2_config(settings: dict | Dinov2Config | None) -> Dinov2Config:
    """The configuration of the portrait encoder; default ViT-L/14. Raises `ValueError` for a dict that describes none."""
    if settings is None:
        return Dinov2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518)
    if not isinstance(settings, dict):
        return settings
    depth = settings.get("num_hidden_layers", 1)
    if isinstance(depth, int) and not LAYERS[0] <= depth <= LAYERS[1]:
        raise ValueError(f"vision_config has num_hidden_layers {depth}, expected {LAYERS[0]} to {LAYERS[1]}")
    try:
        return Dinov2Config(**settings)
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"vision_config is no configuration of DINOv2 ({error!r})") from None


@strict
class GaussianDecoderConfig(PreTrainedConfig):
    r"""Configuration of `GaussianDecoder`.

    Args:
        mode: the paper's ablations. "full" reads positions and the point model's hidden states; "ar_feature" the hidden states
            only; "position" the positions only; "flame_position" the same, for head vertices instead of generated points.
        hidden_size, intermediate_size (default: four widths), num_hidden_layers, num_attention_heads: the joint-attention blocks.
        point_feature_size: width of the point model whose hidden states are read.
        point_frequencies, point_extent, point_center: of the positional encoding, as in `PointillistConfig`.
        read_anchors: also read the nearest point on each point's face, on the subject's own head, and learn how far to pull it
            there: corrects points that were generated beside the head (not in the paper).
        read_portrait, portrait_channels: also read the portrait, and feature maps of it, where the points and their mirror images
            are seen in it, for which its camera and head parameters must be known; colors start from what is read there. The
            channels are those of each of the three maps (not in the paper).
        attention: "joint", over points and portrait tokens, as in the paper; "portrait" lets points read the portrait tokens
            only, which takes time in proportion to the number of points, not to its square.
        gaussians_per_point: how many Gaussians each point becomes, all bound to its face, each with attributes and an offset of
            its own. The paper has 1; several are the anchors of Scaffold-GS (Lu et al. 2024).
        vision_config: a `Dinov2Config` (or dict) of the portrait encoder; default ViT-L/14, as in `PointillistConfig`.
        vision_layers: 0-based layers whose patch tokens are fused; default LAM's [4, 11, 17, 23] for 24 layers, else four
            evenly spread ones that end with the last.
        freeze_vision_encoder: whether the portrait encoder is kept as it is.
        sh_degree: degree of the spherical harmonics of the color, 0 to 3; 0 is the same from every view.
        init_scale, max_scale: meters, the standard deviation of a new decoder's Gaussians and its upper limit.
        max_offset: meters, how far a Gaussian may move from its point along each axis.
        init_opacity: opacity of a new decoder's Gaussians.
    """

    model_type = "avatar_gaussian_decoder"
    sub_configs = {"vision_config": Dinov2Config}

    mode: str = "full"
    hidden_size: int = 1024
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    initializer_range: float = 0.02

    point_feature_size: int = 1024
    point_frequencies: int = 8
    point_extent: float = 0.2
    point_center: list[float] | None = None
    read_anchors: bool = False
    read_portrait: bool = False
    portrait_channels: int = 32
    attention: str = "joint"
    gaussians_per_point: int = 1

    vision_config: dict | Dinov2Config | None = None
    vision_layers: list[int] | None = None
    freeze_vision_encoder: bool = True

    sh_degree: int = 0
    init_scale: float = 0.006737946999085467  # exp(-5)
    max_scale: float = 0.01
    max_offset: float = 0.1
    init_opacity: float = 0.1

    def __post_init__(self, **kwargs):
        check_fields(self, LIMITS)
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        self.point_center = self.point_center or [0.0, 0.0, 0.0]
        self.vision_config = dinov2_config(self.vision_config)
        if self.vision_layers is None:
            self.vision_layers = spread_layers(self.vision_config.num_hidden_layers)
        super().__post_init__(**kwargs)

    @property
    def image_embed_size(self) -> int:
        """Width of `image_embeds`: one portrait token of every layer read."""
        assert isinstance(self.vision_config, Dinov2Config) and self.vision_layers is not None
        return len(self.vision_layers) * self.vision_config.hidden_size

    @property
    def reads_positions(self) -> bool:
        return self.mode != "ar_feature"

    @property
    def reads_point_features(self) -> bool:
        return self.mode in ("full", "ar_feature")

    def per_gaussian(self, of_points: Tensor, dim: int = 0) -> Tensor:
        """What is known of the points (faces, say), repeated along `dim` for the Gaussians of each, in the order of the output."""
        return of_points.repeat_interleave(self.gaussians_per_point, dim)

    def validate_architecture(self):
        """Raise `ValueError` for fields that are out of range or contradict each other."""
        check_fields(self, LIMITS)
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}; found {self.mode!r}")
        if self.read_anchors and self.mode not in ("full", "position"):
            raise ValueError(f"read_anchors is for the modes full and position, which have faces; found {self.mode!r}")
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}; found {self.attention!r}")
        width, heads = self.hidden_size, self.num_attention_heads
        if width % heads or width % 2:
            raise ValueError(f"hidden_size {width} must be even and a multiple of num_attention_heads {heads}")
        depth, layers = self.vision_config.num_hidden_layers, self.vision_layers
        if not layers or layers != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < depth:
            raise ValueError(
                f"vision_layers must be ascending layers of the {depth} of the portrait encoder, found {layers}"
            )
        if not self.freeze_vision_encoder and layers[-1] != depth - 1:
            raise ValueError(
                f"a portrait encoder that is trained must be read to its last layer ({depth - 1}), or the layers after "
                f"{layers[-1]} get no gradient: change vision_layers {layers}"
            )
        if not 0 <= self.sh_degree <= 3:
            raise ValueError(f"sh_degree must be 0 to 3, found {self.sh_degree}")
        if not 0 < self.init_scale < self.max_scale:
            raise ValueError(
                "init_scale must lie between 0 and max_scale (at the limit its gradient is zero), "
                f"found {self.init_scale} and {self.max_scale}"
            )
        if not 0 < self.init_opacity < 1:
            raise ValueError(f"init_opacity must lie between 0 and 1, found {self.init_opacity}")


def spread_layers(depth: int) -> list[int]:
    """The layers of a portrait encoder that LAM reads: four, the last among them."""
    if depth == 24:
        return [4, 11, 17, 23]
    return sorted({max((i + 1) * depth // 4 - 1, 0) for i in range(4)})
