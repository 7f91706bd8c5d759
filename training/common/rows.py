"""Random access to the token sequences and conditions of one split of a corpus."""

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

from gaussian_tokenizer.corpus.corpus import Corpus

HEAD_COLUMNS = ("head_vertices", "head_normals")
CONDITION = ("pixel_values", *HEAD_COLUMNS, "face_centers", "face_normals")


class AvatarRows:
    """The sequences of one split of a corpus, and those of the `CONDITION` that `inputs` names."""

    def __init__(self, corpus: Corpus, split: str, inputs: Iterable[str]):
        self.tokenizer, inputs = corpus.tokenizer, set(inputs)
        self.faces = corpus.head_faces() if "face_centers" in inputs else None
        self.avatars = corpus.avatars(split).with_format("numpy")
        self.frames, self.frame_rows = None, {}
        if "pixel_values" in inputs:
            self.frame_rows = corpus.frame_rows(split)
            without = [avatar_id for avatar_id, rows in self.frame_rows.items() if not rows]
            if without:
                raise ValueError(
                    f"{corpus.path}: {len(without)} avatars of {split!r} have no images, first {without[0]!r}, but the model "
                    "reads a portrait; build the corpus with frames, or train with --use_vision_encoder false"
                )
            self.frames = corpus.frames(split).select_columns(["image"])
        # Every column that is read costs a fifth of a millisecond a row.
        self.sequences = self.avatars.select_columns(["input_ids"])
        self.head_columns = HEAD_COLUMNS if inputs - {"pixel_values"} else ()
        self.conditions = self.avatars.select_columns(["avatar_id", *self.head_columns])
        # A point has four tokens; bos and eos enclose the sequence.
        self.lengths = 4 * np.asarray(self.avatars["num_points"], dtype=np.int64) + 2
        self.ids = [str(avatar_id) for avatar_id in self.avatars["avatar_id"]]

    def __len__(self) -> int:
        return len(self.avatars)

    def sequence(self, row: int) -> np.ndarray:
        """Token ids (L,) int64."""
        return np.asarray(self.sequences[row]["input_ids"]).astype(np.int64)

    def portrait_row(self, row: int, pick: np.random.Generator | None) -> int:
        """The row in `frames` of one of the subject's images, the first if `pick` is None."""
        rows = self.frame_rows[self.ids[row]]
        return rows[0] if pick is None else rows[int(pick.integers(len(rows)))]

    def portrait(self, row: int, pick: np.random.Generator | None) -> Image.Image:
        """The image in `portrait_row`."""
        assert self.frames is not None
        return self.frames[self.portrait_row(row, pick)]["image"]

    def any_portrait(self, random: np.random.Generator) -> Image.Image:
        """A random image of a random subject."""
        assert self.frames is not None
        return self.frames[int(random.integers(len(self.frames)))]["image"]

    def condition(self, row: int, pick: np.random.Generator | None, image: Image.Image | None = None) -> dict[str, Any]:
        """Portrait (`image`, or else that in `portrait_row`) and canonical head mesh."""
        avatar = self.conditions[row]
        condition: dict[str, Any] = {}
        if self.frames is not None:
            image = self.portrait(row, pick) if image is None else image
            condition["pixel_values"] = self.tokenizer(images=image)["pixel_values"][0]
        condition |= {name: np.asarray(avatar[name], np.float32) for name in self.head_columns}
        if self.faces is not None:
            of_faces = self.tokenizer.face_condition(condition["head_vertices"][None], self.faces)
            condition |= {name: value[0] for name, value in of_faces.items()}
        return condition


def shuffled_row(index: int, num_rows: int, seed: int) -> tuple[int, np.random.Generator]:
    """The row of item `index` of an endless training set, each epoch in another order, and the item's random numbers."""
    epoch, position = divmod(index, num_rows)
    return int(_order(seed, epoch, num_rows)[position]), np.random.default_rng((seed, 1, index))


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    return np.random.default_rng((seed, 0, epoch)).permutation(num_rows)
