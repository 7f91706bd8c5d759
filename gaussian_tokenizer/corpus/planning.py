"""What goes where in a corpus: usable subjects, tokenizer, split, shards and the manifest. No file is written here."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import pyarrow
import torch
from datasets import Features

from gaussian_tokenizer.captures.subject import shared_ids
from gaussian_tokenizer.corpus.corpus import ENTRIES, FORMAT, SPLITS, tokenizer_fingerprint
from gaussian_tokenizer.corpus.options import BuildSettings
from gaussian_tokenizer.corpus.shards import Rows, ShardPlan
from gaussian_tokenizer.corpus.sources import SubjectSummary
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.tokenizer.point_codec import DEFAULT_BOUNDS
from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer

FIT_MARGIN = 0.05  # of the longest edge of the box around all points
LISTED_SUBJECTS = 5  # without license or consent
Split = dict[str, list[SubjectSummary]]
Entry = dict[str, Any]  # of corpus.json


def sort_out(
    summaries: list[SubjectSummary], settings: BuildSettings, where: str, max_points: int | None = None
) -> tuple[list[SubjectSummary], list[Entry]]:
    """Usable subjects, and the others with their reasons; ValueError that lists those unless they may be skipped."""
    twins = shared_ids((summary.avatar_id, summary.name) for summary in summaries)
    good, bad, unlicensed, lines = [], [], [], []
    for summary in summaries:
        problem = summary.problem
        others = [name for name in twins.get(summary.avatar_id, []) if name != summary.name]
        if problem is None and others:
            problem = f"has the avatar_id {summary.avatar_id!r}, like {', '.join(others)}; give each its own"
        if problem is None and max_points is not None and summary.num_points > max_points:
            problem = f"{summary.num_points} points, the tokenizer's max_points is {max_points}"
        if problem is not None:
            # Reasons go into the corpus, the location of the subjects does not.
            problem = problem.replace(f"{where}{os.sep}", "")
            lines.append(f"  {summary.name}: {problem}")
        elif not settings.allow_unknown_license and summary.about.missing:
            problem = f"{' and '.join(summary.about.missing)} unknown"
            unlicensed.append(summary.name)
        if problem is None:
            good.append(summary)
        else:
            bad.append({"folder": summary.name, "reason": problem})
    if unlicensed:
        more = len(unlicensed) - LISTED_SUBJECTS
        names = ", ".join(unlicensed[:LISTED_SUBJECTS]) + (f" and {more} more" if more > 0 else "")
        advice = "say both there, or build with --allow_unknown_license if you may use them"
        lines.append(f"  {len(unlicensed)} without license or consent in metadata.json: {names}; {advice}")
    if bad and not (settings.skip_bad and good):
        advice = "fix or remove them" + (", or leave them out with --skip_bad" if good else "")
        message = f"{len(bad)} of {len(summaries)} subjects in {where} cannot be used; {advice}; no corpus was written:"
        raise ValueError("\n".join([message, *lines]))
    return good, bad


def split_subjects(subjects: list[SubjectSummary], settings: BuildSettings) -> Split:
    """Subjects by split, in the order of a seeded hash of their ids: few change their split when subjects are added."""
    ordered = sorted(subjects, key=lambda each: hashlib.sha256(f"{settings.seed}:{each.avatar_id}".encode()).digest())
    validation = settings.num_validation
    if validation is None:
        enough = settings.val_fraction > 0 and len(ordered) > settings.num_test + 1
        validation = max(1, round(settings.val_fraction * len(ordered))) if enough else 0
    held_out = validation + settings.num_test
    if held_out >= len(ordered):
        found = f"{validation} validation and {settings.num_test} test subjects of {len(ordered)}"
        raise ValueError(f"{found} leave none to train on; lower --num_validation, --val_fraction or --num_test")
    parts = ordered[held_out:], ordered[:validation], ordered[validation:held_out]
    return {name: part for name, part in zip(SPLITS, parts) if part}


def check_tokenizer(tokenizer: GaussianTokenizer, head: HeadModel) -> None:
    if tokenizer.n_faces != head.n_faces:
        problem = f"{tokenizer.n_faces} faces, head model {head.name!r} has {head.n_faces}"
    elif tokenizer.head_hash not in (None, head.hash):
        given = f"{head.name!r} (hash {head.hash})"
        problem = f"head model {tokenizer.head_name!r} (hash {tokenizer.head_hash}), not of {given}"
    else:
        return
    raise ValueError(f"the tokenizer is of {problem}; give a tokenizer and a head model that belong together")


def make_tokenizer(subjects: list[SubjectSummary], head: HeadModel, settings: BuildSettings) -> GaussianTokenizer:
    tokenizer = GaussianTokenizer(
        n_bins=settings.n_bins,
        n_faces=head.n_faces,
        bounds=DEFAULT_BOUNDS if isinstance(settings.bounds, str) else settings.bounds,
        image_size=settings.image_size,
        head_name=head.name,
        head_hash=head.hash,
        token_order=settings.token_order,
    )
    if settings.bounds == "fit":
        corners = torch.from_numpy(np.concatenate([summary.box for summary in subjects]))
        tokenizer.fit({"positions": corners, "faces": torch.zeros(len(corners), dtype=torch.int64)}, FIT_MARGIN)
    return tokenizer


def plan_shards(
    split: Split, tokenizer: GaussianTokenizer, head: HeadModel, features: dict[str, Features], shard_size: int
) -> list[ShardPlan]:
    """The shards of each configuration (keys of `features`) and split, of about `shard_size` bytes."""
    basis = [FORMAT, versions(), tokenizer_fingerprint(tokenizer), head.hash, "static_offset" in features["avatars"]]
    digests = {summary.number: summary.digest.hex() for subjects in split.values() for summary in subjects}
    plans = []
    for configuration, (name, subjects) in itertools.product(features, split.items()):
        shards = list(_group(subjects, configuration, shard_size, head.n_vertices))
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
        costs = summary.image_sizes.tolist()
        if configuration == "avatars":
            costs = [8 * summary.num_points + 18 * n_vertices]
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
    split: Split, shards: list[Entry], bad: list[Entry], tokenizer: GaussianTokenizer, head: HeadModel, seed: int
) -> Entry:
    """The content of `corpus.json`; `shards` are what `write_shard` returned, `bad` from `sort_out`."""
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
    settings = {name: getattr(tokenizer, name) for name in ("n_bins", "vocab_size", "bounds")}
    return {
        "format": FORMAT,
        "versions": versions(),
        "head": {name: getattr(head, name) for name in ENTRIES["head"]},
        "tokenizer": {"fingerprint": tokenizer_fingerprint(tokenizer), **settings},
        "seed": seed,
        "splits": splits,
        "skipped": bad,
        "shards": [{name: shard[name] for name in ENTRIES["shards"]} for shard in shards],
    }


def versions() -> dict[str, str]:
    """Versions of the packages that write the bytes."""
    return {"datasets": datasets.__version__, "pyarrow": pyarrow.__version__}
