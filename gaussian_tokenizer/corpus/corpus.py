"""A corpus: tokenized avatars with their conditions, as a folder that `datasets.load_dataset` opens and streams.

    <corpus>/avatars/<split>-00000-of-0000N.parquet   one row per subject
    <corpus>/frames/<split>-00000-of-0000N.parquet    one row per image; an avatar's rows lie together
    <corpus>/tokenizer/                               the GaussianTokenizer the ids were made with
    <corpus>/head_faces.npy                           vertex indices (F, 3) of the head model's faces
    <corpus>/corpus.json                              head model, tokenizer, rows and checksum of every shard
    <corpus>/README.md                                the dataset card

`load_corpus` checks that the folder, or the URL of one of any scheme that fsspec knows, is whole and of one tokenizer before
anything is read from it; `validation` checks every byte.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, IterableDataset, load_dataset
from fsspec.core import url_to_fs
from fsspec.implementations.dirfs import DirFileSystem

from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer
from gaussian_tokenizer.utils.hub import one_line
from gaussian_tokenizer.utils.json_files import parse_json

FORMAT = "avatar-pointillist corpus 1"
MANIFEST_NAME, TOKENIZER_FOLDER, CARD_NAME = "corpus.json", "tokenizer", "README.md"
FACES_NAME = "head_faces.npy"
SPLITS = ("train", "validation", "test")
# What readers of corpus.json rely on; every split, skipped subject and shard has these.
ENTRIES: dict[str, dict[str, type]] = {
    "head": {"name": str, "hash": str, "n_vertices": int, "n_faces": int},
    "tokenizer": {"fingerprint": str},
    "splits": dict.fromkeys(("subjects", "frames", "num_points", "num_tokens", "num_out_of_bounds"), int),
    "skipped": {"folder": str, "reason": str},
    "shards": {"file": str, "configuration": str, "split": str, "rows": int, "bytes": int, "sha256": str},
}
AGAIN = "copy or build the corpus again"
BATCH_ROWS = 16
FINGERPRINT_KEY = b"gaussian_tokenizer"  # in the schema of every shard, so that a shard of another corpus is noticed


@dataclass(frozen=True)
class Corpus:
    """A whole corpus folder, as `load_corpus` returns it."""

    location: str  # the folder, or its URL
    manifest: dict[str, Any]  # the content of corpus.json
    tokenizer: GaussianTokenizer
    files: DirFileSystem  # of the folder

    @property
    def path(self) -> Path:
        """The folder; for a URL only its name is meaningful."""
        return Path(self.location)

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.manifest["splits"])

    def avatars(self, split: str = "train", streaming: bool = False) -> Dataset | IterableDataset:
        """One row per subject: `input_ids`, `num_points`, `points_per_face`, head parameters, `head_vertices`, ..."""
        return self._load("avatars", split, streaming)

    def frames(self, split: str = "train", streaming: bool = False) -> Dataset | IterableDataset:
        """One row per image: `avatar_id`, `image`, camera and head parameters. ValueError if the corpus has none."""
        return self._load("frames", split, streaming)

    def head_faces(self) -> np.ndarray:
        """(F, 3) vertex indices of the head model's faces. ValueError for a corpus built before they were kept."""
        try:
            with self.files.open(FACES_NAME) as file:
                faces = np.load(file, allow_pickle=False)
        except FileNotFoundError:
            raise ValueError(
                f"{self.location}: has no {FACES_NAME}; build the corpus again for mesh-aware faces"
            ) from None
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(
                f"{self.location}/{FACES_NAME}: corrupted ({one_line(error)}); build the corpus again"
            ) from None
        head = self.manifest["head"]
        expected = (head["n_faces"], 3)
        if (
            faces.shape != expected
            or faces.dtype.kind not in "iu"
            or not 0 <= faces.min() <= faces.max() < head["n_vertices"]
        ):
            raise ValueError(
                f"{self.location}/{FACES_NAME}: {faces.dtype} {faces.shape} is not {expected} indices below {head['n_vertices']}"
            )
        return faces

    def frame_rows(self, split: str = "train") -> dict[str, range]:
        """avatar_id -> its rows in `frames(split)`; avatars without images have an empty range."""
        rows = {avatar_id: range(0) for avatar_id in self._avatar_ids("avatars", split)}
        start = 0
        for avatar_id, own in groupby(self._avatar_ids("frames", split)):
            rows[avatar_id] = range(start, start + len(list(own)))
            start = rows[avatar_id].stop
        return rows

    def _load(self, configuration: str, split: str, streaming: bool) -> Dataset | IterableDataset:
        shards = shards_of(self.manifest, configuration, split)
        if not shards:
            found = sorted({(shard["configuration"], shard["split"]) for shard in self.manifest["shards"]})
            raise ValueError(f"{self.location}: no {configuration} of the split {split!r}; the corpus has {found}")
        if not is_url(self.location):
            return load_dataset(self.location, configuration, split=split, streaming=streaming)
        urls = {split: [f"{self.location}/{shard['file']}" for shard in shards]}
        return load_dataset("parquet", data_files=urls, split=split, streaming=streaming)

    def _avatar_ids(self, configuration: str, split: str) -> list[str]:
        ids = []
        for shard in shards_of(self.manifest, configuration, split):
            with self.open_shard(shard) as file:
                ids += pq.read_table(file, columns=["avatar_id"])["avatar_id"].to_pylist()
        return ids

    @contextmanager
    def open_shard(self, shard: Mapping[str, Any]) -> Iterator[BinaryIO]:
        """The Parquet file of a shard; ValueError that names the file for what pyarrow cannot read of it."""
        try:
            with self.files.open(shard["file"]) as file:
                yield file
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self.location}/{shard['file']}: corrupted shard ({one_line(error)}); {AGAIN}") from None


def load_corpus(path: str | os.PathLike, tokenizer: GaussianTokenizer | None = None) -> Corpus:
    """Open a corpus folder or the URL of one; with `tokenizer`, check that the corpus was made with it.

    Raises FileNotFoundError or ValueError, naming the file, for a folder that is half-built or not a corpus, a shard
    that is missing or has other rows, another size or another schema than recorded, and ids of another tokenizer.
    """
    location = os.fspath(path).rstrip("/") or "/"
    files = open_files(location)
    manifest = read_manifest(location, files)
    where = f"{location}/{TOKENIZER_FOLDER}"
    if is_url(location):
        with TemporaryDirectory() as folder:
            for name in files.ls(TOKENIZER_FOLDER, detail=False):
                Path(folder, Path(name).name).write_bytes(files.cat_file(name))
            own = GaussianTokenizer.from_pretrained(folder)
    else:
        own = GaussianTokenizer.from_pretrained(where)
    found, recorded = tokenizer_fingerprint(own), manifest["tokenizer"]["fingerprint"]
    if found != recorded:
        problem = f"fingerprint {found}, {MANIFEST_NAME} says {recorded}"
        raise ValueError(f"{where}: is not the tokenizer this corpus was made with ({problem}); {AGAIN}")
    if tokenizer is not None and tokenizer_fingerprint(tokenizer) != recorded:
        problem = f"was made with another tokenizer ({_describe(own)}) than the one given ({_describe(tokenizer)})"
        raise ValueError(f"{location}: {problem}; use the corpus' own, or build the corpus with --tokenizer")
    for shard in manifest["shards"]:
        check_shard(location, files, shard, recorded)
    return Corpus(location, manifest, own, files)


def is_url(location: str) -> bool:
    return "://" in location


def open_files(location: str) -> DirFileSystem:
    """The files of a folder or of the URL of one; ValueError for a scheme that cannot be read here."""
    try:
        filesystem, root = url_to_fs(location)
    except (ImportError, ValueError) as error:  # the package for this scheme is not installed, or there is none
        raise ValueError(f"{location}: {one_line(error)}") from None
    return DirFileSystem(root, filesystem)


def read_manifest(location: str, files: DirFileSystem) -> dict[str, Any]:
    """The content of `corpus.json`; FileNotFoundError that says what the folder is instead."""
    where = f"{location}/{MANIFEST_NAME}"
    try:
        content = files.cat_file(MANIFEST_NAME)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise FileNotFoundError(f"{location}: {_what_else(location)}") from None
    manifest = parse_json(content, where)
    if manifest.get("format") != FORMAT:
        found = manifest.get("format")
        raise ValueError(f"{where}: format {found!r}, expected {FORMAT!r}; build the corpus again with this version")
    for name, kinds in ENTRIES.items():
        rows = manifest.get(name)
        if name == "splits" and isinstance(rows, dict):
            rows = list(rows.values())
        elif name not in ("skipped", "shards") or not isinstance(rows, list):
            rows = [rows]
        for row in rows:
            entry = row if isinstance(row, dict) else {}
            if wrong := [key for key, kind in kinds.items() if type(entry.get(key)) is not kind]:
                raise ValueError(f"{where}: {name} lacks {', '.join(wrong)}, or has something else there; {AGAIN}")
    for shard in manifest["shards"]:
        if not re.fullmatch(r"[\w-]+/[\w.-]+\.parquet", shard["file"]):
            raise ValueError(f"{where}: names the shard {shard['file']!r}, expected <configuration>/<name>.parquet")
    return manifest


def _what_else(location: str) -> str:
    """What is at the location of a corpus that has no `corpus.json`."""
    path, staging = Path(location), staging_folder(Path(location))
    again = "run build_corpus again with the same arguments to finish it"
    if is_url(location):
        return f"no {MANIFEST_NAME} there; expected the URL of a folder that build_corpus has made"
    if path.name.startswith(".") and path.name.endswith(".partial"):
        return f"an unfinished corpus; {again}"
    if staging.exists():
        return f"no whole corpus; {staging.name} beside it is half-built; {again}"
    if path.is_dir():
        return f"not a corpus, it has no {MANIFEST_NAME}; make one with build_corpus"
    return "no such corpus folder; make one with build_corpus"


def check_shard(location: str, files: DirFileSystem, shard: Mapping[str, Any], fingerprint: str) -> None:
    """Compare size, footer, rows and tokenizer of one Parquet file with its entry in `corpus.json`; no data is read."""
    where = f"{location}/{shard['file']}"
    if not files.isfile(shard["file"]):
        raise FileNotFoundError(f"{where}: missing from the corpus; {AGAIN}")
    if (size := files.size(shard["file"])) != shard["bytes"]:
        raise ValueError(f"{where}: corrupted shard, {size} bytes, expected {shard['bytes']}; {AGAIN}")
    try:
        with files.open(shard["file"]) as file:
            footer = pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{where}: corrupted shard, not a readable Parquet file ({one_line(error)})") from None
    if footer.num_rows != shard["rows"]:
        raise ValueError(f"{where}: {footer.num_rows} rows, expected {shard['rows']}; {AGAIN}")
    found = (footer.metadata or {}).get(FINGERPRINT_KEY, b"").decode()
    if found != fingerprint:
        raise ValueError(f"{where}: its ids are of another tokenizer ({found or 'unknown'}, expected {fingerprint})")


def read_rows(corpus: Corpus, configuration: str, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The given columns of all rows of all splits, a few rows in memory at a time; see `read_shard`."""
    for shard in shards_of(corpus.manifest, configuration):
        with corpus.open_shard(shard) as file:
            yield from read_shard(file, columns)


def read_shard(file: Path | BinaryIO, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file; nested lists of numbers become one flat array."""
    with pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(BATCH_ROWS, columns=columns):
            for number in range(len(batch)):
                yield {name: _plain(batch.column(name)[number]) for name in batch.schema.names}


def staging_folder(output: Path) -> Path:
    """Where the corpus of this name is built."""
    return output.with_name(f".{output.name}.partial")


def shards_of(manifest: Mapping[str, Any], configuration: str, split: str | None = None) -> list[dict[str, Any]]:
    """The entries of the Parquet files of one configuration and split (None: of all), in order."""
    shards = [shard for shard in manifest["shards"] if shard["configuration"] == configuration]
    return [shard for shard in shards if split in (None, shard["split"])]


def tokenizer_fingerprint(tokenizer: GaussianTokenizer) -> str:
    """16 hex digits over all settings that decide the ids of a cloud."""
    settings = [tokenizer.n_bins, tokenizer.n_faces, tokenizer.bounds, tokenizer.axis_order, tokenizer.vocab_size]
    if tokenizer.token_order != "xyzf":  # corpora of other orders came later; the others keep their fingerprints
        settings.append(tokenizer.token_order)
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def _plain(value: pa.Scalar) -> Any:
    if isinstance(value, pa.ExtensionScalar):
        value = value.value
    if not isinstance(value, pa.ListScalar):
        return value.as_py()
    values = value.values
    while isinstance(values, pa.ListArray | pa.FixedSizeListArray):
        values = values.flatten()
    return values.to_numpy(zero_copy_only=False)


def _describe(tokenizer: GaussianTokenizer) -> str:
    vocabulary = f"{tokenizer.n_bins} bins, {tokenizer.n_faces} faces"
    return f"{vocabulary}, token order {tokenizer.token_order}, bounds {tokenizer.bounds}"
