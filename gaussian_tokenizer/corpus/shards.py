"""One Parquet file of a corpus: the ids, which need the bounds of all subjects, and what `sources.read_subject` wrote."""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features
from datasets.features.features import numpy_to_pyarrow_listarray
from safetensors import safe_open

from gaussian_tokenizer.avatars.anchoring import points_per_face
from gaussian_tokenizer.captures.subject import About
from gaussian_tokenizer.corpus.corpus import FINGERPRINT_KEY, tokenizer_fingerprint
from gaussian_tokenizer.corpus.sources import FRAME_SCALARS, subject_file
from gaussian_tokenizer.heads.head_parameters import FRAME_KEYS
from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer
from gaussian_tokenizer.utils.atomic import atomic_file

ROW_GROUP_BYTES = 8 * 2**20  # small enough that memory stays low, large enough for one request to an object store
ROW_GROUP_ROWS = 1000


@dataclass(frozen=True, slots=True)
class Rows:
    """One avatar, or the frames [start, stop) of one."""

    number: int  # of the subject
    start: int = 0
    stop: int = 1


@dataclass(frozen=True)
class ShardPlan:
    """One Parquet file to write."""

    file: str  # relative to the corpus
    configuration: str  # avatars or frames
    split: str
    rows: tuple[Rows, ...]
    key: str  # equal keys, equal bytes


def write_shard(staging: Path, plan: ShardPlan, tokenizer: GaussianTokenizer, features: Features) -> dict[str, Any]:
    """Write a file atomically, one row group in memory at a time; `features` are its columns.

    Returns its entry for `corpus.json`, and the counts behind the totals there.
    """
    rows = _frame_rows(staging / "subjects", plan)
    if plan.configuration == "avatars":
        rows = _avatar_rows(staging / "subjects", plan, tokenizer, features)
    schema = features.arrow_schema
    schema = schema.with_metadata({**schema.metadata, FINGERPRINT_KEY: tokenizer_fingerprint(tokenizer)})
    totals = {"rows": 0, "num_points": 0, "num_out_of_bounds": 0}
    with atomic_file(staging / "corpus" / plan.file) as file, ThreadPoolExecutor(1) as background:
        written = _Written(file.fileno())
        settled = []
        with pq.ParquetWriter(file, schema, **_encoding(schema)) as writer:
            for group in _row_groups(rows):
                writer.write_table(_to_table(group, schema))
                settled.append(background.submit(written.settle))
                totals["rows"] += len(group)
                for name in ("num_points", "num_out_of_bounds"):
                    totals[name] += sum(row.get(name, 0) for row in group)
        file.flush()
        settled.append(background.submit(written.settle))
        for future in settled:
            future.result()  # raises an error of the disk once
    entry = {"file": plan.file, "configuration": plan.configuration, "split": plan.split}
    return {**entry, "bytes": written.size, "sha256": written.digest.hexdigest(), **totals}


class _Written:
    """Flushes a growing file to the disk and computes its checksum, while the next rows are prepared."""

    def __init__(self, descriptor: int):
        self.descriptor, self.digest, self.size = descriptor, hashlib.sha256(), 0

    def settle(self) -> None:
        os.fsync(self.descriptor)
        while block := os.pread(self.descriptor, 2**20, self.size):
            self.digest.update(block)
            self.size += len(block)


# ---- rows


def _avatar_rows(
    folder: Path, plan: ShardPlan, tokenizer: GaussianTokenizer, features: Features
) -> Iterator[dict[str, Any]]:
    for chosen in plan.rows:
        with safe_open(subject_file(folder, chosen.number), framework="np") as file:
            others = json.loads(file.metadata()["subject"])
            positions, faces = file.get_tensor("positions"), file.get_tensor("faces")
            row = {name: file.get_tensor(name) for name in ("shape", *FRAME_KEYS, "head_vertices", "head_normals")}
            if "static_offset" in features:
                own = "static_offset" in file.keys()  # noqa: SIM118 (not a mapping)
                row["static_offset"] = file.get_tensor("static_offset") if own else np.zeros_like(row["head_vertices"])
        encoded = tokenizer({"positions": positions, "faces": faces}, on_out_of_bounds="ignore")
        about = About.of(others["metadata"])
        yield row | {
            "avatar_id": others["avatar_id"],
            "input_ids": encoded["input_ids"],
            "num_points": len(positions),
            "num_out_of_bounds": encoded["num_out_of_bounds"],
            "points_per_face": points_per_face(faces, tokenizer.n_faces).astype(np.int32),
            "license": about.license,
            "consent": about.consent,
            "metadata": json.dumps(others["metadata"], sort_keys=True, ensure_ascii=False),
            "split": plan.split,
        }


def _frame_rows(folder: Path, plan: ShardPlan) -> Iterator[dict[str, Any]]:
    for chosen in plan.rows:
        with safe_open(subject_file(folder, chosen.number), framework="np") as file:
            others = json.loads(file.metadata()["subject"])
            columns = {name: file.get_tensor(f"frames.{name}") for name in ("viewmat", *FRAME_KEYS)}
            columns |= {name: file.get_tensor(f"frames.{name}").tolist() for name in FRAME_SCALARS}
            rendered = None
            if "frames.images" in file.keys():  # noqa: SIM118 (not a mapping)
                ends = np.cumsum(file.get_tensor("frames.image_size"))
                rendered = np.split(file.get_tensor("frames.images"), ends[:-1])
        for number in range(chosen.start, chosen.stop):
            path = Path(others["images"][number])
            data = path.read_bytes() if rendered is None else rendered[number].tobytes()
            image = {"bytes": data, "path": f"{others['avatar_id']}_{path.name}"}
            row = {name: column[number] for name, column in columns.items()}
            yield {"avatar_id": others["avatar_id"], "image": image, **row}


# ---- Parquet


def _encoding(schema: pa.Schema) -> dict[str, Any]:
    """Compress all but images, which are compressed already; their statistics would store two of them once more."""
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    leaves = pq.ParquetFile(sink.getvalue()).schema
    paths = [leaves.column(number).path for number in range(len(leaves.names))]
    others = [path for path in paths if path != "image.bytes"]
    compression = {path: "zstd" if path in others else "none" for path in paths}
    return {"compression": compression, "use_dictionary": others, "write_statistics": others}


def _row_groups(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        group.append(row)
        size += sum(value.nbytes for value in row.values() if isinstance(value, np.ndarray))
        size += len(row["image"]["bytes"]) if "image" in row else 0
        if size >= ROW_GROUP_BYTES or len(group) >= ROW_GROUP_ROWS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _to_table(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    columns = [_to_column([row[field.name] for row in rows], field.type) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _to_column(values: list, kind: pa.DataType) -> pa.Array:
    """A column of the given type from Python scalars or from arrays, without making Python lists of the arrays."""
    if not isinstance(values[0], np.ndarray):
        return pa.array(values, type=kind)
    if isinstance(kind, pa.ExtensionType):
        return pa.ExtensionArray.from_storage(kind, numpy_to_pyarrow_listarray(np.stack(values)))
    flat = pa.array(np.concatenate(values))
    if isinstance(kind, pa.FixedSizeListType):
        return pa.FixedSizeListArray.from_arrays(flat, type=kind)
    ends = np.cumsum([0, *map(len, values)])
    return pa.ListArray.from_arrays(pa.array(ends.astype(np.int32)), flat, type=kind)
