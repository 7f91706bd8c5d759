"""Configuration of the autoregressive point model: the paper's decoder by default.

Sizes: AvatarPointillist supplementary, section D; 1,024 levels, 10,144 faces and the window of 12,000 tokens: paper.
"""

import math
from collections.abc import Mapping

import torch
from huggingface_hub.dataclasses import strict
from transformers import Dinov2Config, PreTrainedConfig

SIZE, LAYERS = (1, 2**31 - 1), (1, 10_000)  # the most that an index of a tensor holds, and that a list of names may
POSITIVE, OCTAVES = (1e-12, 1e12), (0, 64)
LIMITS = {
    **dict.fromkeys(("n_bins", "n_faces", "hidden_size", "intermediate_size", "head_dim"), SIZE),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "point_attention_heads"), SIZE),
    **dict.fromkeys(("point_latents", "point_hidden_size", "point_samples"), SIZE),
    **dict.fromkeys(("num_hidden_layers", "point_layers"), LAYERS),
    **dict.fromkeys(("rope_theta", "point_extent"), POSITIVE),
    **dict.fromkeys(("partial_rotary_factor", "rms_norm_eps", "attention_dropout"), (0, 1)),
    "initializer_range": (0, 1e3),
    "point_frequencies": OCTAVES,
}


# What a face reads of the portrait: red, green, blue and alpha at seven places on and above the face, how far the head mesh lies
# before each, and two numbers more; all of it twice, for the mirrored face too.
FACE_PIXELS = 2 * (7 * 5 + 2)
FACE_INPUTS = ("face_centers", "face_normals", "face_pixels")  # what describes the faces of a mesh


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
class PointillistConfig(PreTrainedConfig):
    r"""Configuration of `PointillistForCausalLM`.

    Args:
        n_bins: quantization levels per axis; coordinate ids are `[0, n_bins)`.
        n_faces: faces of the head model; face ids are `[n_bins, n_bins + n_faces)`. Then begin, end, padding.
        token_order: the order in which x, y, z and the face (f) of a point stand in the sequence: the tokenizer's.
        level: "token" (the paper), or "point": one position of the decoder a point, whose tokens small heads spell.
        mesh_aware_faces: at the point level, whether a face is described by its center and normal on the subject's mesh; what is
            spelled of a point after its face are offsets from that center.
        read_portrait: with mesh-aware faces, whether a face is also described by what the portrait shows at its place and above it
            on the posed head, for which the portrait's camera and head parameters must be known (not in the paper).
        slot_order: at the point level, the order in which x, y, z and the face (f) of a point are spelled (default "yfxz" with
            mesh-aware faces, else "yzxf").
        slot_head: at the point level, what spells a point: "mlp", one a slot, or "attention", one transformer block for all slots.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, head_dim: the decoder.
        num_key_value_heads: of self-attention; fewer than the query heads means grouped queries (default: all, as in the paper).
        partial_rotary_factor: share of each head that RoPE rotates (0.5 is x-transformers' default, hence the paper's).
        rope_theta: base wavelength of RoPE.
        rms_norm_eps: added to the mean square; tiny, because x-transformers' RMSNorm has none.
        sliding_window: how many tokens a token attends to, itself included; a multiple of 4 (default 12,000: paper). At the point
            level counted in points (default 3,000).
        attention_dropout: dropout on attention weights while training.
        loss_within_slot: normalize the loss over faces for a face, over the other tokens for all else, as generation under the
            grammar does; saves most logits of a large vocabulary (default: over the whole vocabulary).
        vision_config: a `Dinov2Config` (or dict) for the portrait encoder; default ViT-L/14 as in the paper.
        use_vision_encoder, freeze_vision_encoder: whether there is a portrait encoder, and whether it is kept as it is.
        use_point_encoder: whether there is a Perceiver-style encoder of the head mesh.
        point_latents, point_hidden_size, point_layers, point_attention_heads: its learned queries and size.
        point_samples: how many vertices of a finer mesh are read, evenly spaced in its order (default: all).
        point_frequencies: octaves of the Fourier embedding; point_extent: meters mapped to [-1, 1]; point_center: meters,
            subtracted from head vertices before it.
    """

    model_type = "avatar_pointillist"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # its name since transformers 5.24, and before
    sub_configs = {"vision_config": Dinov2Config}

    n_bins: int = 1024
    n_faces: int = 10144
    vocab_size: int | None = None
    token_order: str = "xyzf"
    level: str = "token"
    mesh_aware_faces: bool = False
    read_portrait: bool = False
    slot_order: str | None = None
    slot_head: str = "mlp"

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int = 64
    hidden_act: str = "gelu"
    partial_rotary_factor: float = 0.5
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    attention_dropout: float = 0.0
    loss_within_slot: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False

    use_vision_encoder: bool = True
    freeze_vision_encoder: bool = True
    vision_config: dict | Dinov2Config | None = None
    use_point_encoder: bool = True
    point_latents: int = 256
    point_hidden_size: int = 768
    point_layers: int = 8
    point_attention_heads: int = 12
    point_samples: int | None = None
    point_frequencies: int = 8
    point_extent: float = 0.2
    point_center: list[float] | None = None

    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        check_fields(self, LIMITS)
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        expected = self.first_special + 3
        if self.vocab_size not in (None, expected):
            raise ValueError(
                f"vocab_size {self.vocab_size} is not n_bins + n_faces + 3 = {expected} "
                f"(n_bins {self.n_bins}, n_faces {self.n_faces}); leave vocab_size out"
            )
        self.vocab_size = expected
        self.bos_token_id, self.eos_token_id, self.pad_token_id = expected - 3, expected - 2, expected - 1
        if self.level == "point" and self.slot_order is None:
            self.slot_order = "yfxz" if self.mesh_aware_faces else "yzxf"
        if self.sliding_window is None:
            self.sliding_window = 12000 // self.tokens_per_position
        self.layer_types = ["sliding_attention"] * self.num_hidden_layers
        self.point_center = self.point_center or [0.0, 0.0, 0.0]
        self.vision_config = dinov2_config(self.vision_config) if self.use_vision_encoder else None
        super().__post_init__(**kwargs)

    @property
    def first_special(self) -> int:
        """The id of bos, the first of the special tokens: all smaller ids are coordinates and faces."""
        return self.n_bins + self.n_faces

    @property
    def tokens_per_position(self) -> int:
        """How many tokens a position of the decoder stands for."""
        return 4 if self.level == "point" else 1

    @property
    def window_tokens(self) -> int:
        """The sliding window in tokens."""
        return (self.sliding_window or 0) * self.tokens_per_position

    @property
    def slots(self) -> tuple[int, ...]:
        """Slots (0 to 2: x, y, z; 3: face) in the order in which they are spelled."""
        return tuple("xyzf".index(letter) for letter in self.slot_order or self.token_order)

    @property
    def slot_columns(self) -> list[int]:
        """Where x, y, z and face stand among the four tokens of a point: `ids.unflatten(-1, (-1, 4))[..., slot_columns]`."""
        return [self.token_order.index(letter) for letter in "xyzf"]

    def slot_tokens(self) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Ids of the faces, and of everything else; special tokens are with the slot whose place the end takes, the first."""
        bos = self.first_special
        if self.token_order[0] == "f":
            return (slice(self.n_bins, bos + 3),), (slice(0, self.n_bins),)
        return (slice(self.n_bins, bos),), (slice(0, self.n_bins), slice(bos, bos + 3))

    def validate_architecture(self):
        """Raise `ValueError` for fields that are out of range or contradict each other."""
        check_fields(self, LIMITS)
        if self.level not in ("token", "point"):
            raise ValueError(f'level is {self.level!r}, expected "token" or "point"')
        if self.slot_head not in ("mlp", "attention"):
            raise ValueError(f'slot_head is {self.slot_head!r}, expected "mlp" or "attention"')
        if self.level == "token" and (self.mesh_aware_faces or self.slot_order is not None or self.slot_head != "mlp"):
            raise ValueError('mesh_aware_faces, slot_order and slot_head="attention" need level="point"')
        if self.read_portrait and not self.mesh_aware_faces:
            raise ValueError("read_portrait needs mesh_aware_faces=True: it is the faces that read")
        for name, order in (("slot_order", self.slot_order), ("token_order", self.token_order)):
            if order is not None and sorted(order) != sorted("xyzf"):
                raise ValueError(f'{name} is {order!r}, expected the letters x, y, z, f in some order, as "yfxz"')
        if self.level == "point" and self.token_order != "xyzf":
            raise ValueError(
                f'level="point" reads tokens in the order xyzf, found token_order {self.token_order!r}: its heads spell a point in '
                "slot_order, so use a tokenizer or corpus of the default token_order"
            )
        if self.window_tokens < 4 or self.window_tokens % 4:
            raise ValueError(
                f"sliding_window {self.sliding_window} is not a positive multiple of 4, the tokens of a point"
            )
        pairs = ("num_attention_heads", "num_key_value_heads"), ("point_hidden_size", "point_attention_heads")
        for name, divisor in pairs:
            if getattr(self, name) % getattr(self, divisor):
                found = f"{name} {getattr(self, name)} is not a multiple of {divisor} {getattr(self, divisor)}"
                raise ValueError(found)
        rotated = self.head_dim * self.partial_rotary_factor
        if rotated != int(rotated) or int(rotated) % 2:
            raise ValueError(
                f"head_dim {self.head_dim} * partial_rotary_factor {self.partial_rotary_factor} = {rotated} "
                "must be an even whole number of channels"
            )
