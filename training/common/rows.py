"""Random access to the token sequences and conditions of one split of a corpus."""

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image

from gaussian_tokenizer.avatars.avatar_files import check_hash
from gaussian_tokenizer.corpus.corpus import Corpus
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import FRAME_KEYS, HeadParameters
from gaussian_tokenizer.heads.loading import load_head
from gaussian_tokenizer.rendering.cameras import Cameras
from gaussian_tokenizer.rendering.portrait_points import Portrait, face_pixels

HEAD_COLUMNS = ("head_vertices", "head_normals")
CONDITION = ("pixel_values", *HEAD_COLUMNS, "face_centers", "face_normals", "face_pixels")
CAMERA_COLUMNS = ("viewmat", "fx", "fy", "cx", "cy")


class AvatarRows:
    """The sequences of one split of a corpus, and those of the `CONDITION` that `inputs` names.

    `head` is needed for face_pixels; None: the built-in head model of the corpus' name. ValueError where there is none.
    """

    def __init__(self, corpus: Corpus, split: str, inputs: Iterable[str], head: HeadModel | None = None):
        self.tokenizer, inputs = corpus.tokenizer, set(inputs)
        self.reads_image = "pixel_values" in inputs
        self.head = head_of(corpus, head) if "face_pixels" in inputs else None
        self.faces = corpus.head_faces() if "face_centers" in inputs else None
        self.avatars = corpus.avatars(split).with_format("numpy")
        self.frames, self.frame_rows = None, {}
        if self.reads_image or self.head is not None:
            self.frame_rows = corpus.frame_rows(split)
            without = [avatar_id for avatar_id, rows in self.frame_rows.items() if not rows]
            if without:
                raise ValueError(
                    f"{corpus.path}: {len(without)} avatars of {split!r} have no images, first {without[0]!r}, but the model "
                    "reads a portrait; build the corpus with frames, or train with --use_vision_encoder false and without "
                    "--read_portrait"
                )
            frames = corpus.frames(split)
            self.frames = frames.select_columns(["image"])
            self.moments = frames.select_columns([*CAMERA_COLUMNS, *FRAME_KEYS])
        # Every column that is read costs a fifth of a millisecond a row.
        self.sequences = self.avatars.select_columns(["input_ids"])
        self.head_columns = HEAD_COLUMNS if inputs - {"pixel_values", "face_pixels"} else ()
        shapes = [name for name in ("shape", "static_offset") if name in self.avatars.column_names]
        self.shapes = shapes if self.head is not None else []
        self.conditions = self.avatars.select_columns(["avatar_id", *self.head_columns, *self.shapes])
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

    def image(self, frame_row: int) -> Image.Image:
        assert self.frames is not None
        return self.frames[frame_row]["image"]

    def any_image(self, random: np.random.Generator) -> Image.Image:
        """A random image of a random subject."""
        assert self.frames is not None
        return self.image(int(random.integers(len(self.frames))))

    def condition(
        self,
        row: int,
        pick: np.random.Generator | None,
        chosen: int | None = None,
        image: Image.Image | None = None,
    ) -> dict[str, Any]:
        """Portrait and canonical head mesh. The portrait is the row `chosen` of `frames`, or else `portrait_row`.

        `image`: what the augmentation has made of it.
        """
        avatar = self.conditions[row]
        condition: dict[str, Any] = {}
        if self.frames is not None:
            chosen = self.portrait_row(row, pick) if chosen is None else chosen
            image = self.image(chosen) if image is None else image
            if self.reads_image:
                condition["pixel_values"] = self.tokenizer(images=image)["pixel_values"][0]
            if self.head is not None:
                params = {name: torch.from_numpy(np.asarray(avatar[name], np.float32)) for name in self.shapes}
                seen = self.portrait(image, self.moments[chosen], params)
                condition["face_pixels"] = face_pixels(seen, self.head).numpy()
        condition |= {name: np.asarray(avatar[name], np.float32) for name in self.head_columns}
        if self.faces is not None:
            of_faces = self.tokenizer.face_condition(condition["head_vertices"][None], self.faces)
            condition |= {name: value[0] for name, value in of_faces.items()}
        return condition

    def portrait(self, image: Image.Image, moment: dict[str, Any], shape: dict[str, torch.Tensor]) -> Portrait:
        """The portrait of a subject at a row of `moments`; `shape` are the head parameters that do not change."""
        assert self.head is not None
        K = [[moment["fx"], 0, moment["cx"]], [0, moment["fy"], moment["cy"]], [0, 0, 1]]
        camera = Cameras(torch.tensor(moment["viewmat"])[None].float(), torch.tensor(K)[None].float(), *image.size)
        pose = {name: torch.tensor(moment[name])[None].float() for name in FRAME_KEYS}
        return Portrait.of(image, HeadParameters(**shape, **pose), camera, self.head, self.tokenizer.image_size)


def head_of(corpus: Corpus, head: HeadModel | None) -> HeadModel:
    """The head model of a corpus; `ValueError` if it is not the one given, or none is given and it is not built in."""
    made_on = corpus.manifest["head"]
    if head is None:
        if not str(made_on["name"]).startswith("procedural:"):
            raise ValueError(
                f"{corpus.path}: this model reads the portrait at the faces of the posed head, and the corpus does not hold its "
                f"head model {made_on['name']!r}; give it with --head"
            )
        head = load_head(made_on["name"])
    check_hash(f"the corpus {corpus.path}", made_on["name"], made_on["hash"], head)
    return head


def shuffled_row(index: int, num_rows: int, seed: int) -> tuple[int, np.random.Generator]:
    """The row of item `index` of an endless training set, each epoch in another order, and the item's random numbers."""
    epoch, position = divmod(index, num_rows)
    return int(_order(seed, epoch, num_rows)[position]), np.random.default_rng((seed, 1, index))


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    return np.random.default_rng((seed, 0, epoch)).permutation(num_rows)
