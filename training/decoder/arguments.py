"""Arguments of the Gaussian decoder's training: the decoder, the corpus, the losses and the training itself."""

from dataclasses import dataclass, field

from gaussian_tokenizer.avatars.skinning import METHODS
from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer
from modeling import GaussianDecoderConfig, PointillistConfig
from training.common.models import box, shared_fields
from training.common.training_arguments import PretrainArguments


@dataclass
class DecoderArguments:
    """The decoder; defaults are the paper's."""

    point_model: str = field(metadata={"help": "trained point model: folder or Hub id; it is not trained here"})
    decoder: str | None = field(
        default=None, metadata={"help": "decoder to start from: folder or Hub id; its sizes override those given here"}
    )
    mode: str = field(
        default="full",
        metadata={
            "help": "what the decoder reads of a point: full (position and hidden states), position, ar_feature, or flame_position "
            "(head vertices in the place of generated points): the paper's ablations"
        },
    )
    hidden_size: int = field(default=1024, metadata={"help": "width of the decoder"})
    num_hidden_layers: int = field(default=12, metadata={"help": "joint-attention blocks"})
    num_attention_heads: int = field(default=16, metadata={"help": "heads of each attention"})
    read_anchors: bool = field(
        default=False,
        metadata={
            "help": "also read where each point's face is on the subject's head, and learn to move it there (not in the paper)"
        },
    )
    sh_degree: int = field(default=0, metadata={"help": "degree of the colors' spherical harmonics"})
    init_scale: float = field(default=0.0067379, metadata={"help": "initial size of Gaussians in meters"})
    max_scale: float = field(default=0.01, metadata={"help": "largest size of a Gaussian in meters"})
    max_offset: float = field(default=0.1, metadata={"help": "largest distance of a Gaussian from its point in meters"})
    init_opacity: float = field(default=0.1, metadata={"help": "initial opacity of Gaussians"})
    initializer_range: float = field(default=0.02, metadata={"help": "standard deviation of new weights"})
    freeze_vision_encoder: bool | None = field(
        default=None,
        metadata={
            "help": "do not train the portrait encoder, a copy of the point model's; by default as the point model was trained"
        },
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "eager, sdpa, flash_attention_2"})

    def config(self, point_config: PointillistConfig, tokenizer: GaussianTokenizer) -> GaussianDecoderConfig:
        """The configuration of a new decoder behind this point model."""
        frozen = self.freeze_vision_encoder
        if frozen is None:
            frozen = point_config.use_vision_encoder and point_config.freeze_vision_encoder
        return GaussianDecoderConfig(
            **shared_fields(self, GaussianDecoderConfig) | {"freeze_vision_encoder": frozen} | box(tokenizer),
            point_feature_size=point_config.hidden_size,
            vision_config=point_config.vision_config,
        )


@dataclass
class FrameArguments:
    """The corpus and its frames."""

    corpus: str = field(metadata={"help": "folder made by `python -m gaussian_tokenizer.build_corpus`, with frames"})
    head: str = field(
        metadata={"help": "head model of the corpus: procedural:600, a .safetensors, a FLAME .pkl, an ICT folder"}
    )
    num_targets: int = field(default=4, metadata={"help": "frames of a subject that are rendered in a step"})
    random_source: bool = field(
        default=False, metadata={"help": "use a random image of a subject as its portrait instead of the first one"}
    )
    self_generated_ratio: float = field(
        default=0.0,
        metadata={
            "help": "share of training items with a sequence that the point model generated, once for each subject before the "
            "training, instead of the true one: the input that the decoder gets at inference (the paper: 0)"
        },
    )
    animation: str = field(default="lbs", metadata={"help": "how Gaussians follow the head: lbs or face_frames"})
    feature_cache: str | None = field(
        default=None, metadata={"help": "folder that caches the point model's hidden states between steps and runs"}
    )
    eval_split: str = field(default="validation", metadata={"help": "held-out split"})
    max_eval_avatars: int | None = field(
        default=None, metadata={"help": "held-out subjects to evaluate; by default all"}
    )
    max_eval_frames: int = field(
        default=16, metadata={"help": "frames of a held-out subject to evaluate, evenly spaced"}
    )

    def __post_init__(self) -> None:
        if self.num_targets < 1:
            raise ValueError(f"--num_targets must be at least 1, found {self.num_targets}")
        if not 0 <= self.self_generated_ratio <= 1:
            raise ValueError(f"--self_generated_ratio is a share, 0 to 1, found {self.self_generated_ratio}")
        if self.animation not in METHODS:
            raise ValueError(f"--animation {self.animation}: expected {' or '.join(METHODS)}")


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
        default="outputs/decoder", metadata={"help": "folder for the checkpoints and the trained decoder"}
    )
    max_steps: int = 12_500
    warmup_steps: float = 500
    weight_decay: float = 0.05
    per_device_train_batch_size: int = 1
    per_device_eval_batch_size: int = 1
    max_grad_norm: float = 1.0
