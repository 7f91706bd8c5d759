"""Drawing the next token of every row: where all rows are in one slot, from the tokens of that slot alone.

Sorting 34,332 faces for each coordinate would cost more than the decoder.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .configuration_pointillist import PointillistConfig
from .generation_grammar import PointGrammar

# These depend on the scores of one row only, and a score of minus infinity does not affect the others.
WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)


class Sampler:
    """Scores (B, C) -> classes (B,), drawn if `do_sample`, else greedy.

    `processors` are those of `generate`, in their order: the last of them that judge each row by itself are `warpers`.
    """

    def __init__(self, processors: LogitsProcessorList, do_sample: bool):
        first = len(processors)
        while first and isinstance(processors[first - 1], WARPERS):
            first -= 1
        self.processors: Callable[..., Tensor] = LogitsProcessorList(processors[:first])
        self.warpers: list[Callable[..., Tensor]] = processors[first:]
        self.has_processors, self.do_sample = first > 0, do_sample

    def choose(self, scores: Tensor) -> Tensor:
        """Warp the scores and choose."""
        for warper in self.warpers:
            scores = warper(None, scores)
        if not self.do_sample:
            return scores.argmax(-1)
        # The index of the least of exponential variables with these rates is a sample, without a host round trip.
        clocks = torch.empty_like(scores).exponential_().clamp_min(torch.finfo(scores.dtype).tiny)
        return (scores.softmax(-1) / clocks).argmax(-1)


class TokenSampler(Sampler):
    """Logits (B, vocabulary) of a step -> tokens (B,); `prompt` (B, L) are the ids that a sequence begins with."""

    def __init__(self, processors: LogitsProcessorList, config: PointillistConfig, prompt: Tensor, do_sample: bool):
        super().__init__(processors, do_sample)
        self.config = config
        starts = (prompt == config.first_special).int().argmax(1) + 1
        in_step = any(isinstance(each, PointGrammar) for each in processors) and bool((starts == starts[0]).all())
        self.start = int(starts[0]) if in_step else None

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """The token after ids (B, L)."""
        scores = self.processors(ids, logits)
        if self.start is None:
            return self.choose(scores)
        faces, others = self.config.slot_tokens()
        at_face = (ids.shape[1] - self.start) % 4 == self.config.slot_columns[3]
        scores = torch.cat([scores[:, part] for part in (faces if at_face else others)], dim=1)
        token = self.choose(scores)
        if at_face:
            return token + self.config.n_bins
        return torch.where(token < self.config.n_bins, token, token + self.config.n_faces)
