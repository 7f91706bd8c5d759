"""A corpus: tokenised avatars with their conditions, as a folder that `datasets.load_dataset` opens and streams.

    <corpus>/avatars/<split>-00000-of-0000N.parquet   one row a subject
    <corpus>/frames/<split>-00000-of-0000N.parquet    one row a picture; an avatar's rows lie together
    <corpus>/tokenizer/                               the GaussianTokenizer the ids were made with
    <corpus>/corpus.json                              head model, tokenizer, rows and checksum of every shard
    <corpus>/README.md                                the dataset card

`load_corpus` checks that the folder is whole and of one tokenizer before anything is read from it. The folder is made
by `corpus_builder` (`python -m gaussian_tokenizer.build_corpus`) and checked in depth by `corpus_checks`.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Array2D, Dataset, Features, Image, IterableDataset, List, Value, load_dataset

from gaussian_tokenizer.head_model import HeadModel
from gaussian_tokenizer.processing_gaussian_tokenizer import GaussianTokenizer

FORMAT = "avatar-pointillist corpus 1"
MANIFEST_NAME, TOKENIZER_FOLDER, CARD_NAME = "corpus.json", "tokenizer", "README.md"
CONFIGURATIONS = ("avatars", "frames")
SPLITS = ("train", "validation", "test")
POSE_SIZES = {"rotation": 3, "neck_pose": 3, "jaw_pose": 3, "eyes_pose": 6, "translation": 3}
# In the schema of every shard, so that a shard of another corpus is noticed.
FINGERPRINT_KEY = b"gaussian_tokenizer"


@dataclass(frozen=True)
class Corpus:
    """A whole corpus folder; `load_corpus` makes it."""

    path: Path
    manifest: dict[str, Any]  # the content of corpus.json
    tokenizer: GaussianTokenizer

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.manifest["splits"])

    def avatars(self, split: str = "train", streaming: bool = False) -> Dataset | IterableDataset:
        """One row a subject: `input_ids`, `num_points`, `points_per_face`, head parameters, `head_vertices`, ..."""
        return self._load("avatars", split, streaming)

    def frames(self, split: str = "train", streaming: bool = False) -> Dataset | IterableDataset:
        """One row a picture: `avatar_id`, `image`, camera and head parameters. ValueError if the corpus has none."""
        return self._load("frames", split, streaming)

    def frame_rows(self, split: str = "train") -> dict[str, range]:
        """avatar_id -> its rows in `frames(split)`; every avatar of the split is a key, also one without pictures."""
        ids = _column(self.path, self.manifest, "frames", split, "avatar_id")
        rows = {avatar_id: range(0) for avatar_id in _column(self.path, self.manifest, "avatars", split, "avatar_id")}
        starts = [0, *(row for row in range(1, len(ids)) if ids[row] != ids[row - 1])] if ids else []
        for start, stop in zip(starts, [*starts[1:], len(ids)]):
            rows[ids[start]] = range(start, stop)
        return rows

    def _load(self, configuration: str, split: str, streaming: bool) -> Dataset | IterableDataset:
        if not shards_of(self.manifest, configuration, split):
            found = sorted({(shard["configuration"], shard["split"]) for shard in self.manifest["shards"]})
            raise ValueError(f"{self.path}: no {configuration} of the split {split!r}; the corpus has {found}")
        return load_dataset(str(self.path), configuration, split=split, streaming=streaming)


def load_corpus(path: str | os.PathLike, tokenizer: GaussianTokenizer | None = None) -> Corpus:
    """Open a corpus folder; `tokenizer` is the one it must have been made with, where that matters (a model's).

    Raises FileNotFoundError or ValueError, naming the file, for a folder that is half-built or not a corpus, a shard
    that is missing or has other rows, another size or another schema than recorded, and ids of another tokenizer.
    """
    path = Path(path)
    manifest = read_manifest(path)
    own = GaussianTokenizer.from_pretrained(path / TOKENIZER_FOLDER)
    recorded = manifest["tokenizer"]["fingerprint"]
    if tokenizer_fingerprint(own) != recorded:
        raise ValueError(
            f"{path / TOKENIZER_FOLDER}: is not the tokenizer this corpus was made with (fingerprint "
            f"{tokenizer_fingerprint(own)}, {MANIFEST_NAME} says {recorded}); restore it, or build the corpus again"
        )
    if tokenizer is not None and tokenizer_fingerprint(tokenizer) != recorded:
        raise ValueError(
            f"{path}: was made with another tokenizer ({_describe(own)}) than the one given ({_describe(tokenizer)}); "
            "use the corpus' own, or build the corpus with --tokenizer"
        )
    for shard in manifest["shards"]:
        check_shard(path, shard, recorded)
    return Corpus(path, manifest, own)


def read_manifest(path: Path) -> dict[str, Any]:
    """The content of `corpus.json`; FileNotFoundError that says what the folder is instead."""
    file = path / MANIFEST_NAME
    if not file.is_file():
        staging = staging_folder(path)
        if path.name.startswith(".") and path.name.endswith(".partial"):
            problem = "a corpus in the making, not a whole one"
        elif staging.exists():
            problem = f"no whole corpus; {staging.name} beside it is half-built"
        elif path.is_dir():
            raise FileNotFoundError(f"{path}: not a corpus, it has no {MANIFEST_NAME}; make one with build_corpus")
        else:
            raise FileNotFoundError(f"{path}: no such corpus folder; make one with build_corpus")
        raise FileNotFoundError(f"{path}: {problem}; run build_corpus again with the same arguments to finish it")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        found = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: is not the file that build_corpus writes: {error}") from None
    if found != FORMAT:
        raise ValueError(f"{file}: format {found!r}, expected {FORMAT!r}; build the corpus again with this version")
    return manifest


def check_shard(path: Path, shard: Mapping[str, Any], fingerprint: str) -> None:
    """Compare size, footer, rows and tokenizer of one Parquet file with its entry in `corpus.json`; no data is read."""
    file = path / shard["file"]
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing from the corpus; copy it again, or build the corpus again")
    size = file.stat().st_size
    if size != shard["bytes"]:
        raise ValueError(f"{file}: corrupted shard, {size} bytes, expected {shard['bytes']}; copy or build it again")
    try:
        footer = pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file}: corrupted shard, not a readable Parquet file ({_one_line(error)})") from None
    if footer.num_rows != shard["rows"]:
        raise ValueError(f"{file}: {footer.num_rows} rows, expected {shard['rows']}; copy or build it again")
    found = (footer.metadata or {}).get(FINGERPRINT_KEY, b"").decode()
    if found != fingerprint:
        raise ValueError(f"{file}: its ids are of another tokenizer ({found or 'unknown'}, expected {fingerprint})")


def staging_folder(output: Path) -> Path:
    """Where the corpus of this name is built."""
    return output.with_name(f".{output.name}.partial")


def shards_of(manifest: Mapping[str, Any], configuration: str, split: str) -> list[dict[str, Any]]:
    """The entries of the Parquet files of one configuration and split, in order."""
    wanted = (configuration, split)
    return [shard for shard in manifest["shards"] if (shard["configuration"], shard["split"]) == wanted]


def tokenizer_fingerprint(tokenizer: GaussianTokenizer) -> str:
    """16 hex digits over all that decides which ids a cloud gets."""
    settings = [tokenizer.n_bins, tokenizer.n_faces, tokenizer.bounds, tokenizer.axis_order, tokenizer.vocab_size]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def sha256_of(file: BinaryIO) -> str:
    """Hex digest of what is left to read of an open file."""
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def points_per_face(faces: np.ndarray, n_faces: int) -> np.ndarray:
    """Face of every point (N,) -> histogram (max + 1,) int32: entry k counts the faces that have k points."""
    return np.bincount(np.bincount(faces, minlength=n_faces)).astype(np.int32)


def avatars_features(tokenizer: GaussianTokenizer, head: HeadModel, static_offset: bool) -> Features:
    """Columns of `avatars`; `static_offset` is there if any subject has one. Head parameters are of the first frame."""
    mesh = (head.n_vertices, 3)
    columns = {
        "avatar_id": Value("string"),
        "input_ids": List(Value("uint16" if tokenizer.vocab_size <= 2**16 else "uint32")),
        "num_points": Value("int32"),
        "num_out_of_bounds": Value("int32"),  # points clamped to the border of the bounds
        "points_per_face": List(Value("int32")),  # entry k: how many faces have k points
        "shape": List(Value("float32"), length=head.n_shape),
        **_pose_features(head),
        "static_offset": Array2D(mesh, "float32"),
        "head_vertices": Array2D(mesh, "float32"),  # metres, own shape, no expression, no pose
        "head_normals": Array2D(mesh, "float16"),
        "licence": Value("string"),
        "consent": Value("string"),
        "metadata": Value("string"),  # the subject's metadata.json
        "split": Value("string"),
    }
    if not static_offset:
        del columns["static_offset"]
    return Features(columns)


def frames_features(head: HeadModel) -> Features:
    """Columns of `frames`. Shape and static offset are the subject's: they stand in `avatars`."""
    return Features(
        {
            "avatar_id": Value("string"),
            "timestep": Value("int32"),
            "camera": Value("int32"),
            "image": Image(),  # the bytes of the file, as they were
            **{name: Value("float32") for name in ("fx", "fy", "cx", "cy")},  # pixels from the upper left corner
            "width": Value("int32"),
            "height": Value("int32"),
            "viewmat": Array2D((4, 4), "float32"),  # world-to-camera, OpenCV axes, metres
            **_pose_features(head),
        }
    )


def _pose_features(head: HeadModel) -> dict[str, List]:
    sizes = {"expr": head.n_expression, **POSE_SIZES}
    return {name: List(Value("float32"), length=size) for name, size in sizes.items()}


def _column(path: Path, manifest: Mapping[str, Any], configuration: str, split: str, name: str) -> list:
    files = [path / shard["file"] for shard in shards_of(manifest, configuration, split)]
    return [value for file in files for value in pq.ParquetFile(file).read(columns=[name])[name].to_pylist()]


def _describe(tokenizer: GaussianTokenizer) -> str:
    return f"{tokenizer.n_bins} bins, {tokenizer.n_faces} faces, bounds {tokenizer.bounds}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
