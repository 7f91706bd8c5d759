"""The deep checks of a corpus and its figures: `validate` reads every byte, `statistics` the columns it needs.

`load_corpus` looks at names, sizes and footers only, which is quick; here every checksum is computed, every sequence
decoded and every picture opened. Both stream the Parquet files and hold one batch of rows at a time.
"""

import io
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from tqdm.auto import tqdm

from gaussian_tokenizer.atomic import atomic_file
from gaussian_tokenizer.corpus import (
    CARD_NAME,
    MANIFEST_NAME,
    TOKENIZER_FOLDER,
    check_shard,
    load_corpus,
    points_per_face,
    read_manifest,
    sha256_of,
    tokenizer_fingerprint,
)
from gaussian_tokenizer.processing_gaussian_tokenizer import GaussianTokenizer

BATCH_ROWS = 16
SHOWN_PROBLEMS = 5  # of one file


@dataclass(frozen=True)
class Verdict:
    """What `validate` says of one file; no problems: good."""

    file: str
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Statistics:
    """Figures of a corpus; `points_per_face[k]` counts the faces with k points, over all subjects."""

    subjects: dict[str, int]  # by split
    frames: dict[str, int]
    num_tokens: int
    num_points: np.ndarray  # (subjects,)
    num_out_of_bounds: int
    points_per_face: np.ndarray  # (max + 1,)
    licences: dict[str, int]
    consents: dict[str, int]

    @property
    def empty_faces(self) -> float:
        """The share of faces without a point."""
        return float(self.points_per_face[0] / self.points_per_face.sum())


def validate(path: str | os.PathLike, progress: bool = False) -> list[Verdict]:
    """Check every file of a corpus in depth; one verdict a file. Raises only where there is no corpus to check."""
    path = Path(path)
    manifest = read_manifest(path)
    fingerprint = manifest["tokenizer"]["fingerprint"]
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
    split_of: dict[str, str] = {}  # of every avatar met so far
    keys: set[tuple] = set()  # of every frame met so far
    for shard in tqdm(manifest["shards"], "checking shards", disable=not progress):
        problems = []
        try:
            check_shard(path, shard, fingerprint)
            with open(path / shard["file"], "rb") as file:
                if sha256_of(file) != shard["sha256"]:
                    problems.append("corrupted shard: its bytes are not those that were written (sha256)")
            for number, row in enumerate(_rows(path / shard["file"])):
                if shard["configuration"] == "avatars":
                    wrong = _avatar_problems(row, shard["split"], tokenizer, manifest["head"]["n_faces"], split_of)
                else:
                    wrong = _frame_problems(row, shard["split"], split_of, keys)
                problems += [f"row {number} ({row['avatar_id']}): {problem}" for problem in wrong]
        except Exception as error:  # what a damaged Parquet file raises depends on where the damage is
            problems.append(_one_line(error).removeprefix(f"{path / shard['file']}: "))
        verdicts.append(Verdict(shard["file"], _shorten(problems)))
    verdicts.append(Verdict(MANIFEST_NAME, _manifest_problems(path, manifest, split_of)))
    return verdicts


def statistics(path: str | os.PathLike) -> Statistics:
    """Figures of a whole corpus, from the columns of `avatars`; the ids and pictures are not read."""
    corpus = load_corpus(path)
    points, outside = [], 0
    histogram = np.zeros(1, dtype=np.int64)
    licences: Counter[str] = Counter()
    consents: Counter[str] = Counter()
    for shard in corpus.manifest["shards"]:
        if shard["configuration"] == "avatars":
            columns = ["num_points", "num_out_of_bounds", "points_per_face", "licence", "consent"]
            for row in _rows(corpus.path / shard["file"], columns):
                points.append(row["num_points"])
                outside += row["num_out_of_bounds"]
                own = np.asarray(row["points_per_face"])
                histogram = np.pad(histogram, (0, max(0, len(own) - len(histogram))))
                histogram[: len(own)] += own
                licences[row["licence"]] += 1
                consents[row["consent"]] += 1
    splits = corpus.manifest["splits"]
    return Statistics(
        subjects={name: counts["subjects"] for name, counts in splits.items()},
        frames={name: counts["frames"] for name, counts in splits.items()},
        num_tokens=4 * sum(points) + 2 * len(points),
        num_points=np.array(points),
        num_out_of_bounds=outside,
        points_per_face=histogram,
        licences=dict(sorted(licences.items())),
        consents=dict(sorted(consents.items())),
    )


def statistics_table(figures: Statistics) -> str:
    """The figures as lines of text."""
    points, faces = figures.num_points, figures.points_per_face
    occupied = faces[1:].sum()
    mean = (faces * np.arange(len(faces))).sum() / max(1, occupied)
    rows = [
        ("subjects", f"{len(points):,} ({_counts(figures.subjects)})"),
        ("frames", f"{sum(figures.frames.values()):,} ({_counts(figures.frames)})"),
        ("tokens", f"{figures.num_tokens:,}"),
        ("points", f"{points.sum():,}"),
        ("points a subject", f"min {points.min():,}, median {np.median(points):,.0f}, max {points.max():,}"),
        ("points out of bounds", f"{figures.num_out_of_bounds:,}"),
        ("faces without points", f"{figures.empty_faces:.1%}"),
        ("points an occupied face", f"mean {mean:.2f}, max {len(faces) - 1}"),
        ("licences", _counts(figures.licences)),
        ("consent", _counts(figures.consents)),
    ]
    lines = [f"{name:<24} {value}" for name, value in rows]
    lines += ["", f"{'points on a face':<18} {'faces':>12}  {'share':>7}"]
    lines += [
        f"{count:<18} {number:>12,}  {number / faces.sum():>7.2%}" for count, number in enumerate(faces) if number
    ]
    return "\n".join(lines)


def draw_points_per_face(figures: Statistics, path: str | os.PathLike) -> None:
    """Write the histogram of points per face as a picture (PNG)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError('a picture needs matplotlib: pip install "avatar-pointillist[demo]"') from None
    share = 100 * figures.points_per_face / figures.points_per_face.sum()
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.bar(np.arange(len(share)), share, color=["#b0b0b0"] + ["#3b6ea5"] * (len(share) - 1))
    axes.set(xlabel="points on a face", ylabel="% of faces", xlim=(-0.7, len(share) - 0.3))
    axes.set_title(f"{len(figures.num_points):,} subjects, {figures.num_points.sum():,} points")
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", metadata={"Software": None})


# ---- problems


def _avatar_problems(
    row: dict[str, Any], split: str, tokenizer: GaussianTokenizer | None, n_faces: int, split_of: dict[str, str]
) -> Iterator[str]:
    avatar_id = row["avatar_id"]
    if avatar_id in split_of:
        yield f"avatar_id is there twice, first in {split_of[avatar_id]}"
    split_of.setdefault(avatar_id, split)
    if row["split"] != split:
        yield f"says it is of the split {row['split']!r}, stands in {split!r}"
    if not np.isfinite(np.asarray(row["head_vertices"])).all():
        yield "head_vertices hold NaN or Inf"
    if tokenizer is None:
        return
    ids = np.asarray(row["input_ids"])
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
    if points_per_face(points["faces"], n_faces).tolist() != row["points_per_face"]:
        yield "points_per_face is not that of the ids"


def _frame_problems(row: dict[str, Any], split: str, split_of: dict[str, str], keys: set[tuple]) -> Iterator[str]:
    key = (row["avatar_id"], row["timestep"], row["camera"])
    if key in keys:
        yield f"timestep {row['timestep']}, camera {row['camera']} is there twice"
    keys.add(key)
    own = split_of.get(row["avatar_id"])
    if own != split:
        yield "no such avatar" if own is None else f"frame in {split!r}, its avatar in {own!r}"
    try:
        with Image.open(io.BytesIO(row["image"]["bytes"])) as picture:
            picture.load()
        if picture.size != (row["width"], row["height"]):
            yield f"picture of {picture.size} pixels, its camera has {row['width'], row['height']}"
    except Exception as error:  # Pillow has a dozen kinds for a damaged picture
        yield f"picture does not open ({_one_line(error)})"


def _manifest_problems(path: Path, manifest: dict[str, Any], split_of: dict[str, str]) -> list[str]:
    problems = []
    found = Counter(split_of.values())
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


def _rows(file: Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file; lists of numbers as arrays where that is quick, a few rows in memory at a time."""
    with pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(BATCH_ROWS, columns=columns):
            names = [name for name in batch.schema.names if name != "input_ids"]
            ids = batch.column("input_ids") if "input_ids" in batch.schema.names else None
            for number, row in enumerate(batch.select(names).to_pylist()):
                if ids is not None:
                    row["input_ids"] = ids[number].values.to_numpy()
                yield row


def _shorten(problems: list[str]) -> list[str]:
    more = len(problems) - SHOWN_PROBLEMS
    return problems if more <= 0 else [*problems[:SHOWN_PROBLEMS], f"and {more} more problems"]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
