"""Arguments of the Gaussian decoder's training: the decoder, the corpus, the losses and the training itself."""

from dataclasses import dataclass

from gaussian_tokenizer.avatars.skinning import ANIMATIONS
from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer
from modeling import GaussianDecoderConfig, PointillistConfig
from training.common.models import shared_fields
from training.common.parser import option
from training.common.training_arguments import PretrainArguments


@dataclass
class DecoderArguments:
    """The decoder; defaults are the paper's."""

    point_model: str = option("trained point model: folder or Hub id; it is not trained here")
    decoder: str | None = option("decoder to start from: folder or Hub id; its sizes override those given here", None)
    mode: str = option("full (position, hidden states), or an ablation: position, ar_feature, flame_position", "full")
    hidden_size: int = option("width of the decoder", 1024)
    num_hidden_layers: int = option("joint-attention blocks", 12)
    num_attention_heads: int = option("heads of each attention", 16)
    read_anchors: bool = option("also read where a point's face is on the subject's own head (not in the paper)", False)
    read_portrait: bool = option("also read the portrait where the points are in it (not in the paper)", False)
    portrait_channels: int = option("channels of each feature map of the portrait that is read", 32)
    attention: str = option(
        "joint (points and portrait, the paper) or portrait (points read it, linear in points)", "joint"
    )
    gaussians_per_point: int = option("Gaussians that each point becomes (the paper: 1)", 1)
    sh_degree: int = option("degree of the colors' spherical harmonics", 0)
    init_scale: float = option("initial size of Gaussians in meters", 0.0067379)
    max_scale: float = option("largest size of a Gaussian in meters", 0.01)
    max_offset: float = option("largest distance of a Gaussian from its point in meters", 0.1)
    init_opacity: float = option("initial opacity of Gaussians", 0.1)
    initializer_range: float = option("standard deviation of new weights", 0.02)
    freeze_vision_encoder: bool | None = option("do not train the portrait encoder; default: as the point model", None)
    attn_implementation: str = option("eager, sdpa, flash_attention_2", "sdpa")

    def config(self, point_config: PointillistConfig, tokenizer: GaussianTokenizer) -> GaussianDecoderConfig:
        """The configuration of a new decoder behind this point model."""
        frozen = self.freeze_vision_encoder
        if frozen is None:
            frozen = point_config.use_vision_encoder and point_config.freeze_vision_encoder
        return GaussianDecoderConfig(
            **shared_fields(self, GaussianDecoderConfig, tokenizer) | {"freeze_vision_encoder": frozen},
            point_feature_size=point_config.hidden_size,
            vision_config=point_config.vision_config,
        )


@dataclass
class FrameArguments:
    """The corpus and its frames."""

    corpus: str = option("folder made by `python -m gaussian_tokenizer.build_corpus`, with frames")
    head: str = option("head model of the corpus: procedural:600, a .safetensors, a FLAME .pkl, an ICT folder")
    num_targets: int = option("frames of a subject that are rendered in a step", 4)
    random_source: bool = option("use a random image of a subject as its portrait instead of the first one", False)
    num_references: int = option(
        "with read_portrait: 1 to this many images of a subject, the source among them, are read in a step, and this many in "
        "evaluation, which leaves them out (not in the paper)",
        1,
    )
    self_generated_ratio: float = option("share of items whose points the point model generated (the paper: 0)", 0.0)
    animation: str = option("how Gaussians follow the head: lbs or face_frames", "lbs")
    feature_cache: str | None = option("folder to cache the point model's hidden states between steps and runs", None)
    eval_split: str = option("held-out split", "validation")
    max_eval_avatars: int | None = option("held-out subjects to evaluate; by default all", None)
    max_eval_frames: int = option("frames of a held-out subject to evaluate, evenly spaced", 16)

    def __post_init__(self) -> None:
        for name in ("num_targets", "num_references"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, found {getattr(self, name)}")
        if not 0 <= self.self_generated_ratio <= 1:
            raise ValueError(f"--self_generated_ratio is a share, 0 to 1, found {self.self_generated_ratio}")
        if self.animation not in ANIMATIONS:
            raise ValueError(f"--animation {self.animation}: expected {' or '.join(ANIMATIONS)}")


@dataclass
class LossArguments:
    """Weights of the losses; defaults are the paper's."""

    l1_weight: float = option("mean absolute difference", 1.0)
    ssim_weight: float = option("1 - structural similarity", 0.5)
    lpips_weight: float = option("LPIPS (VGG); 0 leaves it out", 0.1)
    lpips_weights: str | None = option("file of torchvision's VGG16, needed unless --lpips_weight is 0", None)
    offset_weight: float = option("mean squared offset, in units of its limit", 0.1)


@dataclass
class DecoderTrainingArguments(PretrainArguments):
    """Training: transformers' TrainingArguments with the paper's defaults (12,500 steps)."""

    output_dir: str = option("folder for the checkpoints and the trained decoder", "outputs/decoder")
    max_steps: int = 12_500
    warmup_steps: float = 500
    weight_decay: float = 0.05
    per_device_train_batch_size: int = 1
    per_device_eval_batch_size: int = 1
