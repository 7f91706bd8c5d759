"""Arguments of pre-training: the model and the corpus."""

from dataclasses import dataclass, field

from transformers import Dinov2Config

from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer
from modeling import PointillistConfig
from training.common.arguments import flag_named
from training.common.models import box, shared_fields


@dataclass
class ModelArguments:
    """The model; defaults are the paper's."""

    model: str | None = field(
        default=None,
        metadata={"help": "checkpoint folder or Hub id to start from; its sizes override those given here"},
    )
    hidden_size: int = field(default=1024, metadata={"help": "width of the decoder"})
    intermediate_size: int = field(default=4096, metadata={"help": "width of the feed-forward"})
    num_hidden_layers: int = field(default=24, metadata={"help": "blocks of the decoder"})
    num_attention_heads: int = field(default=16, metadata={"help": "heads of each attention"})
    num_key_value_heads: int | None = field(
        default=None, metadata={"help": "key/value heads; by default as many as heads"}
    )
    head_dim: int = field(default=64, metadata={"help": "channels of a head"})
    partial_rotary_factor: float = field(
        default=0.5, metadata={"help": "fraction of a head's channels that RoPE rotates"}
    )
    rope_theta: float = field(default=10000.0, metadata={"help": "base wavelength of RoPE"})
    initializer_range: float = field(
        default=0.02, metadata={"help": "standard deviation of new weights; larger for a narrow model"}
    )
    sliding_window: int = field(
        default=12000, metadata={"help": "tokens a token attends to, and tokens in a training window"}
    )
    loss_within_slot: bool = field(
        default=False,
        metadata={"help": "normalize a face over faces and a coordinate over coordinates only: cheaper, learns faster"},
    )
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "eager, sdpa, flash_attention_2, flex_attention"}
    )
    use_vision_encoder: bool = field(default=True, metadata={"help": "condition on a portrait"})
    vision_model: str | None = field(
        default=None, metadata={"help": "pre-trained DINOv2: folder or Hub id such as facebook/dinov2-large"}
    )
    freeze_vision_encoder: bool | None = field(
        default=None, metadata={"help": "do not train the portrait encoder; by default true if --vision_model is given"}
    )
    vision_hidden_size: int = field(
        default=1024, metadata={"help": "width of the portrait encoder, without --vision_model"}
    )
    vision_num_layers: int = field(
        default=24, metadata={"help": "blocks of the portrait encoder, without --vision_model"}
    )
    vision_num_heads: int = field(
        default=16, metadata={"help": "heads of the portrait encoder, without --vision_model"}
    )
    vision_patch_size: int = field(default=14, metadata={"help": "pixels of a patch, without --vision_model"})
    use_point_encoder: bool = field(default=True, metadata={"help": "condition on the head mesh"})
    point_latents: int = field(default=256, metadata={"help": "tokens that describe the head mesh"})
    point_samples: int | None = field(
        default=None, metadata={"help": "vertices that are read of a finer mesh, evenly spaced; by default all"}
    )
    point_frequencies: int = field(
        default=8, metadata={"help": "octaves of the Fourier embedding of a vertex; fewer for few heads"}
    )
    point_hidden_size: int = field(default=768, metadata={"help": "width of the mesh encoder"})
    point_layers: int = field(default=8, metadata={"help": "blocks of the mesh encoder"})
    point_attention_heads: int = field(default=12, metadata={"help": "heads of the mesh encoder"})

    def config(self, tokenizer: GaussianTokenizer) -> PointillistConfig:
        """The configuration of a new model for this tokenizer's vocabulary."""
        vision = None
        if self.use_vision_encoder and self.vision_model:
            with flag_named("--vision_model", self.vision_model):
                vision = Dinov2Config.from_pretrained(self.vision_model)
        elif self.use_vision_encoder:
            vision = Dinov2Config(
                hidden_size=self.vision_hidden_size,
                num_hidden_layers=self.vision_num_layers,
                num_attention_heads=self.vision_num_heads,
                patch_size=self.vision_patch_size,
                image_size=tokenizer.image_size,
            )
        frozen = bool(self.vision_model) if self.freeze_vision_encoder is None else self.freeze_vision_encoder
        vocabulary = {"n_bins": tokenizer.n_bins, "n_faces": tokenizer.n_faces}
        return PointillistConfig(
            **shared_fields(self, PointillistConfig) | {"freeze_vision_encoder": frozen} | vocabulary | box(tokenizer),
            vision_config=vision,
        )


@dataclass
class DataArguments:
    """The corpus."""

    corpus: str = field(metadata={"help": "folder made by `python -m gaussian_tokenizer.build_corpus`"})
    condition_dropout: float = field(
        default=0.1, metadata={"help": "share of windows without condition, for classifier-free guidance"}
    )
    eval_split: str = field(default="validation", metadata={"help": "held-out split"})
    max_eval_avatars: int | None = field(
        default=None, metadata={"help": "held-out avatars to evaluate; by default all"}
    )
