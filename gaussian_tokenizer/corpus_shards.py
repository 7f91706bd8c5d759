"""The work on single subjects and single Parquet files of a corpus: what `corpus_builder` hands to its processes.

`survey_subject` reads one subject folder and says what is in it, or what is wrong with it. `write_shard` writes one
Parquet file from a list of rows. Both depend on nothing but their arguments and the files, so that a shard has the same
bytes whichever process writes it and however often the build was interrupted. Memory is that of one row group.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features
from PIL import Image

from gaussian_tokenizer.atomic import atomic_file
from gaussian_tokenizer.corpus import (
    FINGERPRINT_KEY,
    POSE_SIZES,
    avatars_features,
    frames_features,
    points_per_face,
    sha256_of,
    tokenizer_fingerprint,
)
from gaussian_tokenizer.head_model import HeadModel
from gaussian_tokenizer.head_parameters import HeadParameters
from gaussian_tokenizer.processing_gaussian_tokenizer import GaussianTokenizer
from gaussian_tokenizer.subject import Frame, Subject

ROW_GROUP_BYTES = 32 * 2**20
ROW_GROUP_ROWS = 1000


@dataclass(frozen=True, eq=False)
class Survey:
    """What one subject folder holds; `problem` says why it cannot go into a corpus."""

    path: Path
    avatar_id: str
    metadata: dict[str, Any]
    problem: str | None = None
    num_points: int = 0
    lo: tuple[float, ...] = ()  # box of the canonical points, metres
    hi: tuple[float, ...] = ()
    static_offset: bool = False
    image_sizes: tuple[int, ...] = ()  # bytes, one a frame
    digest: str = ""  # over everything that goes into the corpus


@dataclass(frozen=True)
class Rows:
    """One avatar, or the frames [start, stop) of one."""

    path: Path
    digest: str
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


def survey_subject(path: Path, head: HeadModel) -> Survey:
    """Read a subject folder whole, once; never raises for anything that is in the files."""
    avatar_id, metadata = path.name, {}
    try:
        subject = Subject.open(path)
        avatar_id, metadata = subject.avatar_id, subject.metadata
        avatar = subject.load_avatar(head)
        points = avatar.canonical_points()
        positions = points["positions"].numpy()
        if not np.isfinite(positions).all():
            row = int(np.argmin(np.isfinite(positions).all(axis=1)))
            raise ValueError(f"{path}: point {row} is at {positions[row].tolist()} on the canonical head")
        digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
        digest.update(positions.tobytes() + points["faces"].numpy().tobytes())
        for name, value in (avatar.params.tensors() if avatar.params is not None else {}).items():
            digest.update(name.encode() + value.numpy().tobytes())
        image_sizes = tuple(_survey_frame(frame, head, digest) for frame in subject.frames())
    except Exception as error:
        # Pillow alone has a dozen kinds of errors for a damaged file; to the user all are a subject that is not usable.
        reason = " ".join(str(error).split())
        if not reason or not isinstance(error, ValueError | OSError):
            reason = f"{type(error).__name__}: {reason}"
        return Survey(path, avatar_id, metadata, problem=reason)
    return Survey(
        path=path,
        avatar_id=avatar_id,
        metadata=metadata,
        num_points=len(avatar),
        lo=tuple(positions.min(axis=0).tolist()),
        hi=tuple(positions.max(axis=0).tolist()),
        static_offset=avatar.params is not None and avatar.params.static_offset is not None,
        image_sizes=image_sizes,
        digest=digest.hexdigest(),
    )


def write_shard(
    folder: Path, plan: ShardPlan, tokenizer: GaussianTokenizer, head: HeadModel, static_offset: bool
) -> dict[str, Any]:
    """Write `folder / plan.file` atomically; returns its entry for `corpus.json`, and the counts behind its totals."""
    if plan.configuration == "avatars":
        features = avatars_features(tokenizer, head, static_offset)
        rows = _avatar_rows(plan, tokenizer, head, static_offset)
    else:
        features = frames_features(head)
        rows = _frame_rows(plan, head)
    schema = features.arrow_schema
    schema = schema.with_metadata({**schema.metadata, FINGERPRINT_KEY: tokenizer_fingerprint(tokenizer)})
    entry: dict[str, Any] = {"file": plan.file, "configuration": plan.configuration, "split": plan.split}
    totals = {"rows": 0, "num_points": 0, "num_out_of_bounds": 0}
    with atomic_file(folder / plan.file) as file:
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for group in _row_groups(rows):
                writer.write_table(_to_table(group, features, schema))
                totals["rows"] += len(group)
                for name in ("num_points", "num_out_of_bounds"):
                    totals[name] += sum(row.get(name, 0) for row in group)
        file.flush()
        entry["bytes"] = file.seek(0, 2)
        file.seek(0)
        entry["sha256"] = sha256_of(file)
    return {**entry, **totals}


# ---- survey


def _survey_frame(frame: Frame, head: HeadModel, digest: Any) -> int:
    """Check one frame's picture and parameters, add them to the digest; returns the bytes of the picture."""
    assert isinstance(frame.image, Path) and isinstance(frame.params, Path)  # as read
    with Image.open(frame.image) as picture:
        if picture.size != (frame.width, frame.height):
            raise ValueError(f"{frame.image}: {picture.size} pixels, transforms.json says {frame.width, frame.height}")
        try:
            picture.verify()
        except Exception as error:
            raise ValueError(f"{frame.image}: damaged picture ({error})") from None
    try:
        head.check(frame.load_params())
    except ValueError as error:
        raise ValueError(f"{frame.params}: {error}") from None
    digest.update(repr((frame.timestep, frame.camera, frame.viewmat.tolist(), frame.K.tolist())).encode())
    for path in (frame.image, frame.params):
        state = path.stat()
        # The time stands for the content: it is only asked whether a shard of an interrupted build is still good.
        digest.update(f"{path.name} {state.st_size} {state.st_mtime_ns}".encode())
    return frame.image.stat().st_size


# ---- rows


def _avatar_rows(
    plan: ShardPlan, tokenizer: GaussianTokenizer, head: HeadModel, static_offset: bool
) -> Iterator[dict[str, Any]]:
    for chosen in plan.rows:
        subject = Subject.open(chosen.path)
        avatar = subject.load_avatar(head)
        params = avatar.params or HeadParameters.zeros(head.n_shape, head.n_expression)
        params = replace(params.frame(0), dynamic_offset=None)
        vertices = head.canonical_vertices(params)
        encoded = tokenizer(avatar, on_out_of_bounds="ignore")
        row = {
            "avatar_id": subject.avatar_id,
            "input_ids": encoded["input_ids"],
            "num_points": len(avatar),
            "num_out_of_bounds": encoded["num_out_of_bounds"],
            "points_per_face": points_per_face(avatar.faces.numpy(), head.n_faces),
            "shape": params.shape.numpy(),
            **_pose(params),
            "head_vertices": vertices.numpy(),
            "head_normals": head.normals(vertices).numpy().astype(np.float16),
            "licence": subject.licence,
            "consent": subject.consent,
            "metadata": json.dumps(subject.metadata, sort_keys=True, ensure_ascii=False),
            "split": plan.split,
        }
        if static_offset:
            own = params.static_offset
            row["static_offset"] = np.zeros((head.n_vertices, 3), np.float32) if own is None else own.numpy()
        yield row


def _frame_rows(plan: ShardPlan, head: HeadModel) -> Iterator[dict[str, Any]]:
    for chosen in plan.rows:
        subject = Subject.open(chosen.path)
        params_path: object = None
        pose: dict[str, np.ndarray] = {}
        for frame in subject.frames()[chosen.start : chosen.stop]:
            if frame.params != params_path:  # the cameras of one moment share it
                params = frame.load_params()
                head.check(params)
                params_path, pose = frame.params, _pose(params.frame(0))
            assert isinstance(frame.image, Path)
            yield {
                "avatar_id": subject.avatar_id,
                "timestep": frame.timestep,
                "camera": frame.camera,
                "image": {"bytes": frame.image_bytes(), "path": f"{subject.avatar_id}_{frame.image.name}"},
                "fx": frame.fx,
                "fy": frame.fy,
                "cx": frame.cx,
                "cy": frame.cy,
                "width": frame.width,
                "height": frame.height,
                "viewmat": frame.viewmat.astype(np.float32),
                **pose,
            }


def _pose(params: HeadParameters) -> dict[str, np.ndarray]:
    """Expression and pose of T = 1 parameters, each (size,) float32."""
    values = params.tensors()
    return {name: values[name][0].numpy() for name in ("expr", *POSE_SIZES)}


# ---- Parquet


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


def _to_table(rows: list[dict[str, Any]], features: Features, schema: pa.Schema) -> pa.Table:
    columns = [_to_column([row[name] for row in rows], schema.field(name).type) for name in features]
    return pa.Table.from_arrays(columns, schema=schema)


def _to_column(values: list, kind: pa.DataType) -> pa.Array:
    """Python scalars, or arrays of one, two or no fixed sizes, to a column of the given type, without Python lists."""
    if not isinstance(values[0], np.ndarray):
        return pa.array(values, type=kind)
    flat = pa.array(np.concatenate([value.reshape(-1) for value in values]))
    if isinstance(kind, pa.ExtensionType):
        height, width = values[0].shape
        rows = pa.ListArray.from_arrays(_offsets([width] * (len(values) * height)), flat)
        return pa.ExtensionArray.from_storage(kind, pa.ListArray.from_arrays(_offsets([height] * len(values)), rows))
    if isinstance(kind, pa.FixedSizeListType):
        return pa.FixedSizeListArray.from_arrays(flat, type=kind)
    return pa.ListArray.from_arrays(_offsets([len(value) for value in values]), flat, type=kind)


def _offsets(lengths: list[int]) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
