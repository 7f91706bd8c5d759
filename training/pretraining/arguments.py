"""Arguments of pre-training: the model and the corpus."""

from dataclasses import dataclass

from transformers import Dinov2Config

from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer
from modeling import PointillistConfig
from training.common.arguments import flag_named
from training.common.models import shared_fields
from training.common.parser import option


@dataclass
class ModelArguments:
    """The model; defaults are the paper's."""

    model: str | None = option("checkpoint folder or Hub id to start from; its sizes override those given here", None)
    level: str = option('"token", or "point": one pass of the decoder a point', "token")
    mesh_aware_faces: bool = option("describe faces by their place on the subject's mesh (point level)", False)
    read_portrait: bool = option("describe faces by what the portrait shows there too (with --mesh_aware_faces)", False)
    slot_order: str | None = option("order in which x, y, z and f of a point are spelled (point level), as yfxz", None)
    slot_head: str = option('"mlp", or "attention": a transformer block spells a point (point level)', "mlp")
    hidden_size: int = option("width of the decoder", 1024)
    intermediate_size: int = option("width of the feed-forward", 4096)
    num_hidden_layers: int = option("blocks of the decoder", 24)
    num_attention_heads: int = option("heads of each attention", 16)
    num_key_value_heads: int | None = option("key/value heads; by default as many as heads", None)
    head_dim: int = option("channels of a head", 64)
    partial_rotary_factor: float = option("fraction of a head's channels that RoPE rotates", 0.5)
    rope_theta: float = option("base wavelength of RoPE", 10000.0)
    initializer_range: float = option("standard deviation of new weights; larger for a narrow model", 0.02)
    sliding_window: int = option("tokens a token attends to, and tokens in a training window, four a point", 12000)
    loss_within_slot: bool = option("normalize a token over those of its slot only: cheaper, learns faster", False)
    attn_implementation: str = option("eager, sdpa, flash_attention_2, flex_attention", "sdpa")
    use_vision_encoder: bool = option("condition on a portrait", True)
    vision_model: str | None = option("pre-trained DINOv2: folder or Hub id such as facebook/dinov2-large", None)
    freeze_vision_encoder: bool | None = option("do not train the portrait encoder; by default if --vision_model", None)
    vision_hidden_size: int = option("width of the portrait encoder, without --vision_model", 1024)
    vision_num_layers: int = option("blocks of the portrait encoder, without --vision_model", 24)
    vision_num_heads: int = option("heads of the portrait encoder, without --vision_model", 16)
    vision_patch_size: int = option("pixels of a patch, without --vision_model", 14)
    use_point_encoder: bool = option("condition on the head mesh", True)
    point_latents: int = option("tokens that describe the head mesh", 256)
    point_samples: int | None = option("vertices that are read of a finer mesh, evenly spaced; by default all", None)
    point_frequencies: int = option("octaves of the Fourier embedding of a vertex; fewer for few heads", 8)
    point_hidden_size: int = option("width of the mesh encoder", 768)
    point_layers: int = option("blocks of the mesh encoder", 8)
    point_attention_heads: int = option("heads of the mesh encoder", 12)

    def config(self, tokenizer: GaussianTokenizer) -> PointillistConfig:
        """The configuration of a new model for this tokenizer's vocabulary and order."""
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
        window = self.sliding_window // (4 if self.level == "point" else 1)  # positions of the decoder
        return PointillistConfig(
            **shared_fields(self, PointillistConfig, tokenizer)
            | {"freeze_vision_encoder": frozen, "sliding_window": window},
            n_bins=tokenizer.n_bins,
            n_faces=tokenizer.n_faces,
            token_order=tokenizer.token_order,
            vision_config=vision,
        )


@dataclass
class DataArguments:
    """The corpus."""

    corpus: str = option("folder made by `python -m gaussian_tokenizer.build_corpus`")
    head: str | None = option(
        "head model of the corpus, for --read_portrait; built-in ones are found by its name", None
    )
    condition_dropout: float = option("share of windows without condition, for classifier-free guidance", 0.1)
    context_noise: float = option(
        "share of windows read with random x and z, so that the portrait counts (point level)", 0.0
    )
    eval_split: str = option("held-out split", "validation")
    max_eval_avatars: int | None = option("held-out avatars to evaluate; by default all", None)
