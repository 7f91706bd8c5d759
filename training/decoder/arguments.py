"""Arguments of the Gaussian decoder's training; read like those of pre-training (`arguments.parse_arguments`)."""

from dataclasses import dataclass, field, fields

from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer
from modeling import GaussianDecoderConfig, PointillistConfig
from training.common.arguments import PretrainArguments


@dataclass
class DecoderArguments:
    """The decoder; defaults are the paper's."""

    point_model: str = field(metadata={"help": "trained point model: folder or Hub id; it stays as it is"})
    decoder: str | None = field(
        default=None, metadata={"help": "decoder to go on from: folder or Hub id; its sizes hold"}
    )
    mode: str = field(
        default="full",
        metadata={
            "help": "what a point tells: full (position and hidden states), position, ar_feature, or flame_position "
            "(head vertices in the place of generated points): the paper's ablations"
        },
    )
    hidden_size: int = field(default=1024, metadata={"help": "width of the decoder"})
    num_hidden_layers: int = field(default=12, metadata={"help": "joint-attention blocks"})
    num_attention_heads: int = field(default=16, metadata={"help": "heads of each attention"})
    read_anchors: bool = field(
        default=False,
        metadata={
            "help": "tell each point where its face is on the subject's own head, and learn to pull it there (not in the paper)"
        },
    )
    sh_degree: int = field(default=0, metadata={"help": "degree of the colors' spherical harmonics"})
    init_scale: float = field(default=0.0067379, metadata={"help": "meters, size of a new decoder's Gaussians"})
    max_scale: float = field(default=0.01, metadata={"help": "meters, size a Gaussian cannot exceed"})
    max_offset: float = field(default=0.1, metadata={"help": "meters, how far a Gaussian may leave its point"})
    init_opacity: float = field(default=0.1, metadata={"help": "opacity of a new decoder's Gaussians"})
    initializer_range: float = field(default=0.02, metadata={"help": "standard deviation of new weights"})
    freeze_vision_encoder: bool | None = field(
        default=None,
        metadata={"help": "keep the portrait encoder, a copy of the point model's; left out, as the point model did"},
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "eager, sdpa, flash_attention_2"})

    def config(self, point_config: PointillistConfig, tokenizer: GaussianTokenizer) -> GaussianDecoderConfig:
        """The configuration of a new decoder behind this point model."""
        lower, upper = tokenizer.bounds
        own = {f.name for f in fields(self)} & {f.name for f in fields(GaussianDecoderConfig)}
        frozen = self.freeze_vision_encoder
        if frozen is None:
            frozen = point_config.freeze_vision_encoder if point_config.use_vision_encoder else False
        return GaussianDecoderConfig(
            point_feature_size=point_config.hidden_size,
            point_center=[(a + b) / 2 for a, b in zip(lower, upper)],
            point_extent=max(b - a for a, b in zip(lower, upper)) / 2,
            vision_config=point_config.vision_config,
            **({name: getattr(self, name) for name in own} | {"freeze_vision_encoder": frozen}),
        )


@dataclass
class FrameArguments:
    """The corpus and what is drawn of it."""

    corpus: str = field(metadata={"help": "folder made by `python -m gaussian_tokenizer.build_corpus`, with frames"})
    head: str = field(
        metadata={"help": "head model of the corpus: procedural:600, a .safetensors, a FLAME .pkl, an ICT folder"}
    )
    num_targets: int = field(default=4, metadata={"help": "frames of a subject drawn in a step"})
    random_source: bool = field(
        default=False, metadata={"help": "read any of a subject's images instead of its first one"}
    )
    self_generated_ratio: float = field(
        default=0.0,
        metadata={
            "help": "share of the sequences that the point model writes itself, once for each subject and before training, in "
            "the place of the true one: the decoder then meets what it will meet at use (the paper: 0)"
        },
    )
    animation: str = field(default="lbs", metadata={"help": "how Gaussians follow the head: lbs or face_frames"})
    feature_cache: str | None = field(
        default=None, metadata={"help": "folder that keeps the point model's hidden states between steps and runs"}
    )
    eval_split: str = field(default="validation", metadata={"help": "held-out split"})
    max_eval_avatars: int | None = field(default=None, metadata={"help": "look at so many held-out subjects at most"})
    max_eval_frames: int = field(default=16, metadata={"help": "frames of a held-out subject looked at, evenly spread"})


@dataclass
class LossArguments:
    """Weights of the losses; defaults are the paper's."""

    l1_weight: float = field(default=1.0, metadata={"help": "mean absolute difference"})
    ssim_weight: float = field(default=0.5, metadata={"help": "1 - structural similarity"})
    lpips_weight: float = field(default=0.1, metadata={"help": "LPIPS (VGG); 0 leaves it out"})
    lpips_weights: str | None = field(
        default=None, metadata={"help": "file of torchvision's VGG16, needed unless --lpips_weight is 0"}
    )
    offset_weight: float = field(default=0.1, metadata={"help": "mean squared offset, in units of its limit"})


@dataclass
class DecoderTrainingArguments(PretrainArguments):
    """Training: transformers' TrainingArguments with the paper's defaults (12,500 steps)."""

    output_dir: str = field(
        default="outputs/decoder", metadata={"help": "where checkpoints and the decoder are written"}
    )
    max_steps: int = 12_500
    warmup_steps: float = 500
    weight_decay: float = 0.05
    per_device_train_batch_size: int = 1
    per_device_eval_batch_size: int = 1
    max_grad_norm: float = 1.0
