"""The deep check of a corpus: `validate` computes every checksum, decodes every sequence and opens every image.

Given the subject folders, it compares each subject with what it was made from. One batch of rows is in memory at a time.
"""

import contextlib
import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from gaussian_tokenizer.avatars.anchoring import points_per_face
from gaussian_tokenizer.captures.frame import Frame
from gaussian_tokenizer.captures.subject import Subject, find_subject_folders
from gaussian_tokenizer.corpus.corpus import (
    CARD_NAME,
    FACES_NAME,
    MANIFEST_NAME,
    TOKENIZER_FOLDER,
    check_shard,
    load_corpus,
    open_files,
    read_manifest,
    read_shard,
    tokenizer_fingerprint,
)
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.tokenizer.image_files import open_image
from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer
from gaussian_tokenizer.utils.hub import one_line

SHOWN_PROBLEMS = 5  # per file
ROUNDING = 1e-6  # meters, of float32


@dataclass(frozen=True)
class Verdict:
    """What `validate` says of one file; without problems it is good."""

    file: str
    problems: list[str]


def validate(
    path: str | os.PathLike,
    avatars: str | os.PathLike | None = None,
    head: HeadModel | None = None,
    progress: bool = False,
) -> list[Verdict]:
    """One verdict per file of a corpus. Raises only where there is no corpus to check.

    With `avatars`, the folder of subject folders the corpus was built from, and their `head` model, every sequence is also
    compared with its avatar, and every image with its file.
    """
    manifest = read_manifest(str(path), open_files(str(path)))
    originals = None if avatars is None else Originals.of(avatars, head, manifest["head"])
    check = _Check(Path(path), manifest, originals)
    verdicts = [Verdict(TOKENIZER_FOLDER, check.load_tokenizer())]
    for shard in tqdm(manifest["shards"], "checking shards", disable=not progress):
        verdicts.append(Verdict(shard["file"], _shorten(check.shard(shard))))
    return [*verdicts, Verdict(MANIFEST_NAME, _shorten(list(check.totals())))]


@dataclass(frozen=True, eq=False)
class Originals:
    """The subjects a corpus was built from."""

    where: str
    folders: dict[str, Path]  # by avatar_id
    head: HeadModel

    @classmethod
    def of(cls, avatars: str | os.PathLike, head: HeadModel | None, made_on: dict[str, Any]) -> "Originals":
        if head is None or head.hash != made_on["hash"]:
            found = "none was given" if head is None else f"given is {head.name!r} (hash {head.hash})"
            expected = f"the avatars are of head model {made_on['name']!r} (hash {made_on['hash']})"
            raise ValueError(f"{expected}, {found}; give theirs with --head")
        folders = {}
        for folder in find_subject_folders(avatars):
            with contextlib.suppress(ValueError):  # left out of the corpus too
                folders[Subject.open(folder).avatar_id] = folder
        return cls(str(avatars), folders, head)

    def subject(self, avatar_id: str) -> Subject:
        if avatar_id not in self.folders:
            raise ValueError(f"{self.where} holds no such subject")
        return Subject.open(self.folders[avatar_id])

    @functools.lru_cache(maxsize=1)  # noqa: B019 (an avatar's frames lie together, and one object lives as long as a check)
    def frames(self, avatar_id: str) -> dict[tuple[int, int], Frame]:
        """By timestep and camera."""
        return {frame.key: frame for frame in self.subject(avatar_id).frames()}

    def differences(self, row: dict[str, Any], points: dict[str, Any], tokenizer: GaussianTokenizer) -> Iterator[str]:
        """How the decoded points, the mesh and the metadata differ from those of the subject's folder."""
        subject, head = self.subject(row["avatar_id"]), self.head
        avatar = subject.load_avatar(head)
        params = avatar.params or HeadParameters.zeros(head.n_shape, head.n_expression)
        vertices = head.canonical_vertices(params.frame(0)).numpy()
        if not np.allclose(row["head_vertices"].reshape(-1, 3), vertices, rtol=0, atol=ROUNDING):
            yield f"head_vertices are not those of {subject.path}"
        if json.loads(row["metadata"]) != subject.metadata:
            yield f"metadata are not those of {subject.path}"
        counts = [np.bincount(faces, minlength=head.n_faces) for faces in (points["faces"], avatar.faces.numpy())]
        if (counts[0] != counts[1]).any():
            face = int(np.argmax(counts[0] != counts[1]))
            yield f"{counts[0][face]} points on face {face}, {counts[1][face]} in {subject.path}"
            return
        # Any pairing within the faces that stays within half a bin will do; the tokenizer's order is one if there is any.
        order = tokenizer(avatar, return_order=True, on_out_of_bounds="ignore")["order"]
        order = order[np.argsort(avatar.faces.numpy()[order], kind="stable")]
        lo, hi = np.array(tokenizer.bounds)
        positions = avatar.canonical_points()["positions"].numpy()[order].clip(lo, hi)  # as the tokenizer moves them
        errors = np.abs(points["positions"][np.argsort(points["faces"], kind="stable")] - positions)
        wrong = (errors > (hi - lo) / tokenizer.n_bins / 2 + ROUNDING).any(axis=1)
        if wrong.any():
            yield f"{wrong.sum()} points are not where they are in {subject.path}, by up to {1000 * errors.max():.3g} mm"


@dataclass
class _Check:
    path: Path
    manifest: dict[str, Any]
    originals: Originals | None
    tokenizer: GaussianTokenizer | None = None
    split_of: dict[str, str] = field(default_factory=dict)  # of every avatar
    framed: set[str] = field(default_factory=set)  # avatars whose frames have begun
    avatar_id: str = ""  # of the last frame
    frames: set[tuple[int, int]] = field(default_factory=set)  # its timesteps and cameras

    def load_tokenizer(self) -> list[str]:
        expected = self.manifest["tokenizer"]["fingerprint"]
        try:
            self.tokenizer = GaussianTokenizer.from_pretrained(self.path / TOKENIZER_FOLDER)
        except (ValueError, OSError) as error:
            return [one_line(error)]
        found = tokenizer_fingerprint(self.tokenizer)
        return [] if found == expected else [f"fingerprint {found}, {MANIFEST_NAME} says {expected}"]

    def shard(self, shard: dict[str, Any]) -> list[str]:
        file, problems = self.path / shard["file"], []
        try:
            check_shard(str(self.path), open_files(str(self.path)), shard, self.manifest["tokenizer"]["fingerprint"])
            with open(file, "rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != shard["sha256"]:
                    problems.append("corrupted shard: its bytes are not those that were written (sha256)")
            problems_of = self._avatar if shard["configuration"] == "avatars" else self._frame
            for number, row in enumerate(read_shard(file)):
                where = f"row {number} ({row['avatar_id']})"
                try:
                    for problem in problems_of(row, shard["split"]):
                        problems.append(f"{where}: {problem}")
                except (ValueError, OSError) as error:
                    problems.append(f"{where}: {one_line(error)}")
        except Exception as error:  # the type depends on where a Parquet file is damaged
            problems.append(one_line(error).removeprefix(f"{file}: "))
        return problems

    def totals(self) -> Iterator[str]:
        """Problems of the manifest, which the rows of all shards show."""
        found = Counter(self.split_of.values())
        for name, counts in self.manifest["splits"].items():
            if found[name] != counts["subjects"]:
                yield f"{counts['subjects']} subjects in {name}, found {found[name]}"
        files = sorted(str(file.relative_to(self.path)) for file in self.path.glob("*/*.parquet"))
        known = {shard["file"] for shard in self.manifest["shards"]}
        yield from (f"does not know {file}" for file in files if file not in known)
        if not (self.path / CARD_NAME).is_file():
            yield f"{CARD_NAME} is missing: load_dataset cannot tell the configurations apart"
        if (self.path / FACES_NAME).is_file():  # corpora of 0.1 have none
            try:
                load_corpus(self.path).head_faces()
            except (ValueError, OSError) as error:
                yield one_line(error)
        if self.originals is not None:
            skipped = {entry["folder"] for entry in self.manifest["skipped"]}
            for avatar_id, folder in self.originals.folders.items():
                if avatar_id not in self.split_of and folder.name not in skipped:
                    yield f"{self.originals.where} holds {avatar_id}, the corpus does not"

    def _avatar(self, row: dict[str, Any], split: str) -> Iterator[str]:
        """Problems of a row of `avatars`; ValueError for one that makes the rest of the check impossible."""
        tokenizer, avatar_id = self.tokenizer, row["avatar_id"]
        if avatar_id in self.split_of:
            yield f"avatar_id is there twice, first in {self.split_of[avatar_id]}"
        self.split_of.setdefault(avatar_id, split)
        if row["split"] != split:
            yield f"says it is of the split {row['split']!r}, but is in {split!r}"
        if not np.isfinite(row["head_vertices"]).all():
            yield "head_vertices hold NaN or Inf"
        if tokenizer is None:
            return
        ids = row["input_ids"]
        if len(ids) < 6 or (ids[0], ids[-1]) != (tokenizer.bos_token_id, tokenizer.eos_token_id):
            yield f"{len(ids)} ids that do not go from bos to eos"
            return
        points = tokenizer.decode(ids)
        body = ids[1:-1].reshape(-1, 4)[:, tokenizer.slot_columns]
        if len(body) != row["num_points"]:
            yield f"num_points is {row['num_points']}, the ids hold {len(body)}"
        order = [body[:, 3], *(body[:, "xyz".index(axis)] for axis in reversed(tokenizer.axis_order))]
        if (np.lexsort(order, axis=0) != np.arange(len(body))).any():
            yield f"the points are not sorted by {tokenizer.axis_order}, face"
        histogram = points_per_face(points["faces"], self.manifest["head"]["n_faces"])
        if histogram.tolist() != row["points_per_face"].tolist():
            yield "points_per_face is not that of the ids"
        if self.originals is not None:
            yield from self.originals.differences(row, points, tokenizer)

    def _frame(self, row: dict[str, Any], split: str) -> Iterator[str]:
        """Problems of a row of `frames`; ValueError or OSError if its original cannot be read."""
        avatar_id, key = row["avatar_id"], (row["timestep"], row["camera"])
        if avatar_id != self.avatar_id:
            if avatar_id in self.framed:
                yield "its frames do not lie together"
            self.framed.add(avatar_id)
            self.avatar_id = avatar_id
            self.frames.clear()
        if key in self.frames:
            yield f"timestep {row['timestep']}, camera {row['camera']} is there twice"
        self.frames.add(key)
        own = self.split_of.get(avatar_id)
        if own != split:
            yield "no such avatar" if own is None else f"frame in {split!r}, its avatar in {own!r}"
        data = row["image"]["bytes"]
        try:
            size = open_image(data).size
            if size != (row["width"], row["height"]):
                yield f"image of {size} pixels, its camera has {row['width'], row['height']}"
        except ValueError as error:
            yield f"image does not open ({one_line(error)})"
        if self.originals is not None:
            frame = self.originals.frames(avatar_id).get(key)
            if frame is None:
                yield f"no frame of timestep {key[0]} and camera {key[1]} in {self.originals.folders[avatar_id]}"
            elif frame.image_bytes() != data:
                yield f"image is not that of {self.originals.folders[avatar_id]}"


def _shorten(problems: list[str]) -> list[str]:
    more = len(problems) - SHOWN_PROBLEMS
    return problems if more <= 0 else [*problems[:SHOWN_PROBLEMS], f"and {more} more problems"]
