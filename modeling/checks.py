"""Whether the parts of an avatar's generation belong together: tokenizer, point model, Gaussian decoder and head model."""

from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer

from .gaussian_decoder.configuration_gaussian_decoder import GaussianDecoderConfig
from .pointillist.configuration_pointillist import PointillistConfig


def check_vocabulary(
    config: PointillistConfig,
    tokenizer: GaussianTokenizer,
    model: str = "the point model",
    other: str = "the tokenizer",
) -> None:
    """Raise `ValueError`, which calls the two `model` and `other`, unless the point model has the tokenizer's ids in its order."""
    if (config.n_bins, config.n_faces) != (tokenizer.n_bins, tokenizer.n_faces):
        found = f"{config.n_bins} levels and {config.n_faces} faces, {other} {tokenizer.n_bins} and {tokenizer.n_faces}"
    elif config.token_order != tokenizer.token_order:
        found = f"token_order {config.token_order}, {other} {tokenizer.token_order}"
    else:
        return
    raise ValueError(
        f"{model} has {found}; take both from one training, or build the corpus with the model's tokenizer"
    )


def check_head(tokenizer: GaussianTokenizer, head: HeadModel, name: str) -> None:
    """Raise `ValueError` unless the tokenizer's faces are those of the head model."""
    if tokenizer.n_faces != head.n_faces or tokenizer.head_hash not in (None, head.hash):
        raise ValueError(
            f"the tokenizer is for head model {tokenizer.head_name!r} ({tokenizer.n_faces} faces, hash {tokenizer.head_hash}), "
            f"but {name} has {head.n_faces} faces and hash {head.hash}; give that head model"
        )


def check_width(decoder: GaussianDecoderConfig, config: PointillistConfig, name: str = "the Gaussian decoder") -> None:
    """Raise `ValueError` unless the decoder reads no point features, or those of the point model's width."""
    if decoder.reads_point_features and decoder.point_feature_size != config.hidden_size:
        raise ValueError(
            f"{name} reads point features of width {decoder.point_feature_size}, the point model has width "
            f"{config.hidden_size}; combine a decoder with the point model it was trained with"
        )
