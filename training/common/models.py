"""What both networks take from a corpus: the point model that fits its vocabulary, and entries of new configurations."""

from dataclasses import fields
from typing import Any

import numpy as np

from gaussian_tokenizer.corpus.corpus import Corpus
from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer
from modeling import PointillistForCausalLM
from modeling.checks import check_vocabulary
from training.common.arguments import flag_named


def open_point_model(flag: str, name: str, corpus: Corpus, **options: Any) -> PointillistForCausalLM:
    """`PointillistForCausalLM.from_pretrained(name, **options)`; ValueError if the corpus has another vocabulary."""
    with flag_named(flag, name):
        model = PointillistForCausalLM.from_pretrained(name, **options)
    check_vocabulary(model.config, corpus.tokenizer, f"{flag} {name}", f"the corpus {corpus.path}")
    return model


def shared_fields(arguments: Any, config: type, tokenizer: GaussianTokenizer) -> dict[str, Any]:
    """The values of the arguments that are fields of a configuration class too, and the box that the tokenizer quantizes."""
    lower, upper = np.asarray(tokenizer.bounds)
    box = {"point_center": ((lower + upper) / 2).tolist(), "point_extent": float((upper - lower).max()) / 2}
    names = {field.name for field in fields(config)}
    return {field.name: getattr(arguments, field.name) for field in fields(arguments) if field.name in names} | box
