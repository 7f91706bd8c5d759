"""Points as they are generated: a streamer that turns the tokens of `generate()` into points, one at a time."""

from collections.abc import Callable, Iterator
from functools import partial
from queue import Queue

import torch
from transformers.generation.streamers import BaseStreamer


class PointStreamer(BaseStreamer):
    """Decodes every four tokens with a `GaussianTokenizer` into a point `{"positions": (1, 3), "faces": (1,)}`.

    Each point is passed to `callback`. Without one, iterate over it in one thread while `model.generate(..., streamer=streamer)`
    runs in another; the iterator waits `timeout` seconds for a point before it raises `queue.Empty` (None: without limit).
    """

    def __init__(self, tokenizer, callback: Callable[[dict], None] | None = None, timeout: float | None = None):
        self.tokenizer = tokenizer
        self.timeout = timeout
        self.queue: Queue[dict | None] = Queue()
        self.emit = self.queue.put if callback is None else callback
        self.pending: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        """Token ids, (1, L) of the prompt or (1,) of a step."""
        if len(value) != 1:
            raise ValueError(f"PointStreamer follows one sequence, found a batch of {len(value)}: stream one by one")
        for token in value.flatten().tolist():
            if token < self.tokenizer.bos_token_id:
                self.pending.append(token)
            if len(self.pending) == 4:
                self.emit(self.tokenizer.decode(self.pending))
                self.pending = []

    def end(self) -> None:
        self.pending = []
        self.queue.put(None)

    def __iter__(self) -> Iterator[dict]:
        return iter(partial(self.queue.get, timeout=self.timeout), None)
