"""What goes where in a corpus: usable subjects, tokenizer, split, shards and the manifest. No file is written here.

All of it follows from the summaries, the head model and the settings; ids are ranked by a seeded hash, so neither the
order of folders nor that of processes matters.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow
import torch

from gaussian_tokenizer.corpus.corpus import CONFIGURATIONS, FORMAT, SPLITS, tokenizer_fingerprint
from gaussian_tokenizer.corpus.shards import Rows, ShardPlan
from gaussian_tokenizer.corpus.sources import ABOUT, UNKNOWN, SubjectSummary
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.tokenizer.point_codec import DEFAULT_BOUNDS
from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer

FIT_MARGIN = 0.05  # of the longest edge of the box around all points
REQUIRED = ("license", "consent")  # of a subject's metadata
LISTED_SUBJECTS = 5  # of those that lack them


@dataclass(frozen=True)
class BuildSettings:
    """What decides the bytes of a corpus, besides the subjects and the head model."""

    n_bins: int = 1024
    bounds: str | Sequence[Sequence[float]] = "fit"  # "fit", "default" or [[lo x, y, z], [hi x, y, z]] in meters
    image_size: int = 224  # of the tokenizer's pixel_values
    val_fraction: float = 0.05
    num_validation: int | None = None  # overrides val_fraction
    num_test: int = 0
    seed: int = 0
    shard_size: int = 256 * 10**6  # bytes before compression, about
    skip_bad: bool = False
    allow_unknown_license: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.bounds, str) and self.bounds not in ("fit", "default"):
            raise ValueError(f"bounds are {self.bounds!r}; expected fit, default or two corners of x, y, z in meters")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction is {self.val_fraction}; expected a part of the subjects, 0 <= it < 1")
        if self.shard_size < 1 or min(self.num_validation or 0, self.num_test) < 0:
            raise ValueError(
                f"shard_size={self.shard_size}, num_validation={self.num_validation}, num_test={self.num_test}: "
                "expected a size of at least 1 byte and counts of 0 or more"
            )


def sort_out(
    summaries: list[SubjectSummary], settings: BuildSettings, where: str, max_points: int | None = None
) -> tuple[list[SubjectSummary], list[dict[str, str]]]:
    """Usable subjects, and the others with their reasons; ValueError that lists those unless they may be skipped."""
    named = defaultdict(list)
    for summary in summaries:
        named[summary.avatar_id].append(summary.name)
    good, bad, unlicensed, lines = [], [], [], []
    for summary in summaries:
        problem = summary.problem
        others = [name for name in named[summary.avatar_id] if name != summary.name]
        if problem is None and others:
            problem = f"has the avatar_id {summary.avatar_id!r}, like {', '.join(others)}; give each its own"
        if problem is None and max_points is not None and summary.num_points > max_points:
            problem = f"{summary.num_points} points, the tokenizer's max_points is {max_points}"
        if problem is not None:
            # Where the subjects lie is no business of a corpus.
            problem = problem.replace(f"{where}{os.sep}", "")
            lines.append(f"  {summary.name}: {problem}")
        elif not settings.allow_unknown_license and unknown(summary):
            problem = f"{' and '.join(unknown(summary))} unknown"
            unlicensed.append(summary.name)
        if problem is None:
            good.append(summary)
        else:
            bad.append({"folder": summary.name, "reason": problem})
    if unlicensed:
        shown, more = unlicensed[:LISTED_SUBJECTS], len(unlicensed) - LISTED_SUBJECTS
        names = ", ".join(shown) + (f" and {more} more" if more > 0 else "")
        lines.append(
            f"  {len(unlicensed)} without license or consent in metadata.json: {names}; say both there, or build with "
            "--allow_unknown_license if you may use them"
        )
    if bad and not (settings.skip_bad and good):
        advice = "mend or remove them" + (", or leave them out with --skip_bad" if good else "")
        raise ValueError(
            f"{len(bad)} of {len(summaries)} subjects in {where} cannot be used; {advice}; no corpus was written:\n"
            + "\n".join(lines)
        )
    return good, bad


def unknown(summary: SubjectSummary) -> list[str]:
    """Which of license and consent the subject's metadata do not say."""
    return [name for name in REQUIRED if summary.about[ABOUT.index(name)] == UNKNOWN]


def split_subjects(subjects: list[SubjectSummary], settings: BuildSettings) -> dict[str, list[SubjectSummary]]:
    """Subjects by split, in the order of a seeded hash of their ids: few change sides when subjects are added."""

    def rank(summary: SubjectSummary) -> bytes:
        return hashlib.sha256(f"{settings.seed}:{summary.avatar_id}".encode()).digest()

    ordered = sorted(subjects, key=rank)
    validation = settings.num_validation
    if validation is None:
        enough = settings.val_fraction > 0 and len(ordered) > settings.num_test + 1
        validation = max(1, round(settings.val_fraction * len(ordered))) if enough else 0
    held_out = validation + settings.num_test
    if held_out >= len(ordered):
        raise ValueError(
            f"{validation} validation and {settings.num_test} test subjects of {len(ordered)} leave none to train on; "
            "lower --num_validation, --val_fraction or --num_test"
        )
    parts = ordered[held_out:], ordered[:validation], ordered[validation:held_out]
    return {name: part for name, part in zip(SPLITS, parts) if part}


def check_tokenizer(tokenizer: GaussianTokenizer, head: HeadModel) -> None:
    if tokenizer.n_faces != head.n_faces:
        raise ValueError(
            f"the tokenizer is of {tokenizer.n_faces} faces, head model {head.name!r} has {head.n_faces}; give the "
            "tokenizer and the head model that belong together"
        )
    if tokenizer.head_hash not in (None, head.hash):
        raise ValueError(
            f"the tokenizer is of head model {tokenizer.head_name!r} (hash {tokenizer.head_hash}), not of "
            f"{head.name!r} (hash {head.hash}); give the tokenizer and the head model that belong together"
        )


def make_tokenizer(subjects: list[SubjectSummary], head: HeadModel, settings: BuildSettings) -> GaussianTokenizer:
    bounds = DEFAULT_BOUNDS if isinstance(settings.bounds, str) else settings.bounds
    tokenizer = GaussianTokenizer(
        n_bins=settings.n_bins,
        n_faces=head.n_faces,
        bounds=bounds,
        image_size=settings.image_size,
        head_name=head.name,
        head_hash=head.hash,
    )
    if settings.bounds == "fit":
        corners = torch.from_numpy(np.concatenate([summary.box for summary in subjects]))
        tokenizer.fit({"positions": corners, "faces": torch.zeros(len(corners), dtype=torch.int64)}, FIT_MARGIN)
    return tokenizer


def plan_shards(
    split: dict[str, list[SubjectSummary]],
    tokenizer: GaussianTokenizer,
    settings: BuildSettings,
    head: HeadModel,
    static_offset: bool,
) -> list[ShardPlan]:
    basis = [FORMAT, versions(), tokenizer_fingerprint(tokenizer), head.hash, static_offset]
    digests = {summary.number: summary.digest.hex() for subjects in split.values() for summary in subjects}
    plans = []
    for configuration in CONFIGURATIONS:
        for name, subjects in split.items():
            shards = list(_group(subjects, configuration, settings.shard_size, head.n_vertices))
            for number, rows in enumerate(shards):
                file = f"{configuration}/{name}-{number:05d}-of-{len(shards):05d}.parquet"
                content = [*basis, file, [(digests[row.number], row.start, row.stop) for row in rows]]
                key = hashlib.sha256(json.dumps(content).encode()).hexdigest()
                plans.append(ShardPlan(file, configuration, name, tuple(rows), key))
    return plans


def _group(subjects: list[SubjectSummary], configuration: str, limit: int, n_vertices: int) -> Iterator[list[Rows]]:
    """Consecutive rows of about `limit` bytes a shard; frames of one avatar in one shard are one `Rows`."""
    shard: list[Rows] = []
    size = 0
    for summary in subjects:
        costs = (
            [8 * summary.num_points + 18 * n_vertices] if configuration == "avatars" else summary.image_sizes.tolist()
        )
        start = 0
        for row, cost in enumerate(costs):
            if size + cost > limit and size > 0:
                if row > start:
                    shard.append(Rows(summary.number, start, row))
                yield shard
                shard, size, start = [], 0, row
            size += cost
        if len(costs) > start:
            shard.append(Rows(summary.number, start, len(costs)))
    if shard:
        yield shard


def make_manifest(
    split: dict[str, list[SubjectSummary]],
    shards: list[dict[str, Any]],
    bad: list[dict[str, str]],
    tokenizer: GaussianTokenizer,
    head: HeadModel,
    settings: BuildSettings,
) -> dict[str, Any]:
    splits = {}
    for name, subjects in split.items():
        own = [shard for shard in shards if shard["split"] == name]
        points = sum(shard["num_points"] for shard in own)
        splits[name] = {
            "subjects": len(subjects),
            "frames": sum(shard["rows"] for shard in own if shard["configuration"] == "frames"),
            "num_points": points,
            "num_tokens": 4 * points + 2 * len(subjects),
            "num_out_of_bounds": sum(shard["num_out_of_bounds"] for shard in own),
        }
    entry = ("file", "configuration", "split", "rows", "bytes", "sha256")
    return {
        "format": FORMAT,
        "versions": versions(),
        "head": {"name": head.name, "hash": head.hash, "n_vertices": head.n_vertices, "n_faces": head.n_faces},
        "tokenizer": {
            "fingerprint": tokenizer_fingerprint(tokenizer),
            "n_bins": tokenizer.n_bins,
            "vocab_size": tokenizer.vocab_size,
            "bounds": tokenizer.bounds,
        },
        "seed": settings.seed,
        "splits": splits,
        "skipped": bad,
        "shards": [{name: shard[name] for name in entry} for shard in shards],
    }


def versions() -> dict[str, str]:
    """What besides our own code writes the bytes."""
    return {"datasets": datasets.__version__, "pyarrow": pyarrow.__version__}
