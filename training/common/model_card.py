"""The README.md beside a trained model: what it is, what it was trained on, how well it does, how to use it."""

from typing import Any

from gaussian_tokenizer.corpus.card import HUB_LICENSES
from gaussian_tokenizer.corpus.corpus import Corpus
from gaussian_tokenizer.utils.templates import render_template


def model_card(kind: str, corpus: Corpus, **values: Any) -> str:
    """Markdown of a `point_model` or `gaussian_decoder`; values of the template: config, report and arguments."""
    given = {"corpus": corpus, "license": hub_license(corpus), "slots": corpus.tokenizer.slots, **values}
    return render_template(__package__, f"{kind}.md.j2", **given)


def hub_license(corpus: Corpus) -> str:
    """The license that all training subjects share, by the Hub's name; "other" if they differ or the Hub has no name for it."""
    found = {license.lower() for license in corpus.avatars("train")["license"]}
    license = found.pop() if len(found) == 1 else "other"
    return license if license in HUB_LICENSES else "other"
