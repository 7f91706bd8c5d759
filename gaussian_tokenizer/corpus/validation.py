"""The deep check of a corpus: `validate` reads every byte.

`load_corpus` looks at names, sizes and footers only, which is quick; here every checksum is computed, every sequence
decoded and every image opened, and, where the subjects are at hand, each is compared with what it was made from. The
Parquet files are streamed, one batch of rows in memory at a time.
"""

import functools
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from gaussian_tokenizer.captures.subject import Frame, Subject, find_subject_folders
from gaussian_tokenizer.corpus.corpus import (
    CARD_NAME,
    MANIFEST_NAME,
    TOKENIZER_FOLDER,
    check_shard,
    open_files,
    read_manifest,
    read_shard,
    sha256_of,
    tokenizer_fingerprint,
)
from gaussian_tokenizer.corpus.schema import points_per_face
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.tokenizer.image_files import open_image
from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer

SHOWN_PROBLEMS = 5  # of one file
ROUNDING = 1e-6  # meters: what float32 costs on the way


@dataclass(frozen=True)
class Verdict:
    """What `validate` says of one file; no problems: good."""

    file: str
    problems: list[str] = field(default_factory=list)


def validate(
    path: str | os.PathLike,
    avatars: str | os.PathLike | None = None,
    head: HeadModel | None = None,
    progress: bool = False,
) -> list[Verdict]:
    """Check every file of a corpus in depth; one verdict a file. Raises only where there is no corpus to check.

    With `avatars`, the folder of subject folders the corpus was built from, and their `head` model, every sequence is also
    compared with its avatar, and every image with its file.
    """
    path = Path(path)
    manifest = read_manifest(path)
    fingerprint = manifest["tokenizer"]["fingerprint"]
    originals = None if avatars is None else Originals.of(avatars, head, manifest)
    verdicts = []
    tokenizer: GaussianTokenizer | None = None
    problems: list[str]
    try:
        tokenizer = GaussianTokenizer.from_pretrained(path / TOKENIZER_FOLDER)
        found = tokenizer_fingerprint(tokenizer)
        problems = [] if found == fingerprint else [f"fingerprint {found}, {MANIFEST_NAME} says {fingerprint}"]
    except (ValueError, OSError) as error:
        problems = [_one_line(error)]
    verdicts.append(Verdict(TOKENIZER_FOLDER, problems))
    met = _Met()
    for shard in tqdm(manifest["shards"], "checking shards", disable=not progress):
        problems = []
        try:
            check_shard(str(path), open_files(str(path)), shard, fingerprint)
            with open(path / shard["file"], "rb") as file:
                if sha256_of(file) != shard["sha256"]:
                    problems.append("corrupted shard: its bytes are not those that were written (sha256)")
            for number, row in enumerate(read_shard(path / shard["file"])):
                if shard["configuration"] == "avatars":
                    wrong = _avatar_problems(
                        row, shard["split"], tokenizer, manifest["head"]["n_faces"], met, originals
                    )
                else:
                    wrong = _frame_problems(row, shard["split"], met, originals)
                problems += [f"row {number} ({row['avatar_id']}): {problem}" for problem in wrong]
        except Exception as error:  # what a damaged Parquet file raises depends on where the damage is
            problems.append(_one_line(error).removeprefix(f"{path / shard['file']}: "))
        verdicts.append(Verdict(shard["file"], _shorten(problems)))
    problems = _manifest_problems(path, manifest, met)
    if originals is not None:
        skipped = {entry["folder"] for entry in manifest["skipped"]}
        left = [id for id, folder in originals.folders.items() if id not in met.split_of and folder.name not in skipped]
        problems += [f"{originals.where} holds {avatar_id}, the corpus does not" for avatar_id in left]
    verdicts.append(Verdict(MANIFEST_NAME, _shorten(problems)))
    return verdicts


@dataclass(frozen=True, eq=False)
class Originals:
    """The subjects a corpus was built from."""

    where: str
    folders: dict[str, Path]  # by avatar_id
    head: HeadModel

    @classmethod
    def of(cls, avatars: str | os.PathLike, head: HeadModel | None, manifest: dict[str, Any]) -> "Originals":
        made_on = manifest["head"]
        if head is None or head.hash != made_on["hash"]:
            found = "none was given" if head is None else f"given is {head.name!r} (hash {head.hash})"
            raise ValueError(
                f"the avatars are of head model {made_on['name']!r} (hash {made_on['hash']}), {found}; give theirs with --head"
            )
        folders = {}
        for folder in find_subject_folders(avatars):
            try:
                folders[Subject.open(folder).avatar_id] = folder
            except ValueError:  # left out of the corpus too
                continue
        return cls(str(avatars), folders, head)

    def subject(self, avatar_id: str) -> Subject:
        if avatar_id not in self.folders:
            raise ValueError(f"{self.where} holds no such subject")
        return Subject.open(self.folders[avatar_id])

    @functools.lru_cache(maxsize=1)  # noqa: B019 (an avatar's frames lie together, and one object lives as long as a check)
    def images(self, avatar_id: str) -> dict[tuple[int, int], Frame]:
        """By timestep and camera."""
        return {(frame.timestep, frame.camera): frame for frame in self.subject(avatar_id).frames()}


@dataclass
class _Met:
    """What has been seen so far."""

    split_of: dict[str, str] = field(default_factory=dict)  # of every avatar
    framed: set[str] = field(default_factory=set)  # avatars whose frames have begun
    avatar_id: str = ""  # of the last frame
    moments: set[tuple[int, int]] = field(default_factory=set)  # its timesteps and cameras


# ---- problems


def _avatar_problems(
    row: dict[str, Any],
    split: str,
    tokenizer: GaussianTokenizer | None,
    n_faces: int,
    met: _Met,
    originals: Originals | None,
) -> Iterator[str]:
    avatar_id = row["avatar_id"]
    if avatar_id in met.split_of:
        yield f"avatar_id is there twice, first in {met.split_of[avatar_id]}"
    met.split_of.setdefault(avatar_id, split)
    if row["split"] != split:
        yield f"says it is of the split {row['split']!r}, stands in {split!r}"
    if not np.isfinite(row["head_vertices"]).all():
        yield "head_vertices hold NaN or Inf"
    if tokenizer is None:
        return
    ids = row["input_ids"]
    if len(ids) < 6 or (ids[0], ids[-1]) != (tokenizer.bos_token_id, tokenizer.eos_token_id):
        yield f"{len(ids)} ids that do not go from bos to eos"
        return
    try:
        points = tokenizer.decode(ids)
    except ValueError as error:
        yield _one_line(error)
        return
    body = ids[1:-1].reshape(-1, 4)
    if len(body) != row["num_points"]:
        yield f"num_points is {row['num_points']}, the ids hold {len(body)}"
    order = [body[:, 3], *(body[:, "xyz".index(axis)] for axis in reversed(tokenizer.axis_order))]
    if (np.lexsort(order, axis=0) != np.arange(len(body))).any():
        yield f"the points are not sorted by {tokenizer.axis_order}, face"
    if points_per_face(points["faces"], n_faces).tolist() != row["points_per_face"].tolist():
        yield "points_per_face is not that of the ids"
    if originals is not None:
        try:
            yield from _differences(row, points, tokenizer, originals.subject(avatar_id), originals.head)
        except (ValueError, OSError) as error:
            yield _one_line(error)


def _differences(
    row: dict[str, Any], points: dict[str, Any], tokenizer: GaussianTokenizer, subject: Subject, head: HeadModel
) -> Iterator[str]:
    """How the decoded points, the mesh and the metadata differ from those of the subject's folder."""
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
    # Any pairing within the faces that stays within half a bin will do; the tokenizer's order has it if there is one.
    order = tokenizer(avatar, return_order=True, on_out_of_bounds="ignore")["order"]
    order = order[np.argsort(avatar.faces.numpy()[order], kind="stable")]
    lo, hi = np.array(tokenizer.bounds)
    positions = avatar.canonical_points()["positions"].numpy()[order].clip(lo, hi)  # those outside are moved there
    errors = np.abs(points["positions"][np.argsort(points["faces"], kind="stable")] - positions)
    wrong = (errors > (hi - lo) / tokenizer.n_bins / 2 + ROUNDING).any(axis=1)
    if wrong.any():
        yield f"{wrong.sum()} points are not where they are in {subject.path}, by up to {1000 * errors.max():.3g} mm"


def _frame_problems(row: dict[str, Any], split: str, met: _Met, originals: Originals | None) -> Iterator[str]:
    avatar_id, moment = row["avatar_id"], (row["timestep"], row["camera"])
    if avatar_id != met.avatar_id:
        if avatar_id in met.framed:
            yield "its frames do not lie together"
        met.framed.add(avatar_id)
        met.avatar_id = avatar_id
        met.moments.clear()
    if moment in met.moments:
        yield f"timestep {row['timestep']}, camera {row['camera']} is there twice"
    met.moments.add(moment)
    own = met.split_of.get(avatar_id)
    if own != split:
        yield "no such avatar" if own is None else f"frame in {split!r}, its avatar in {own!r}"
    data = row["image"]["bytes"]
    try:
        image = open_image(data)
        if image.size != (row["width"], row["height"]):
            yield f"image of {image.size} pixels, its camera has {row['width'], row['height']}"
    except ValueError as error:
        yield f"image does not open ({_one_line(error)})"
    if originals is not None:
        try:
            if originals.images(avatar_id)[moment].image_bytes() != data:
                yield f"image is not that of {originals.folders[avatar_id]}"
        except (ValueError, OSError) as error:
            yield _one_line(error)
        except KeyError:
            yield f"no frame of timestep {row['timestep']} and camera {row['camera']} in {originals.folders[avatar_id]}"


def _manifest_problems(path: Path, manifest: dict[str, Any], met: _Met) -> list[str]:
    problems = []
    found = Counter(met.split_of.values())
    for name, counts in manifest["splits"].items():
        if found[name] != counts["subjects"]:
            problems.append(f"{counts['subjects']} subjects in {name}, found {found[name]}")
    known = {shard["file"] for shard in manifest["shards"]}
    strangers = sorted(str(file.relative_to(path)) for file in path.glob("*/*.parquet"))
    problems += [f"does not know {file}" for file in strangers if file not in known]
    if not (path / CARD_NAME).is_file():
        problems.append(f"{CARD_NAME} is missing: load_dataset cannot tell the configurations apart")
    return problems


# ---- small things


def _shorten(problems: list[str]) -> list[str]:
    more = len(problems) - SHOWN_PROBLEMS
    return problems if more <= 0 else [*problems[:SHOWN_PROBLEMS], f"and {more} more problems"]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
