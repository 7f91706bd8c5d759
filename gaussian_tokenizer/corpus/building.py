"""Builds a corpus from subjects: reads each once, then bounds, split, shards, card, and one rename at the end.

Everything is written to `.<name>.partial` beside the output: `settings.json` (what was asked for), `subjects/` (what was
read of each), `corpus/` (the corpus so far) and `done/` (one record per finished shard, with a key over all its inputs).
Only the holder of its `lock` changes that folder or the output. Nothing depends on the number of processes, their order or
the clock, so a build that was killed and continued ends with the same bytes.

While `settings.json` and `corpus/` are both there, a command of the same settings continues the build; one of other
settings is refused, or discards it with --overwrite. If one of the two is missing, the rest is a leftover and is removed:
`settings.json` is written last and removed first, and `corpus/` is moved away before it becomes the output in one rename or
exchange. An existing output is never taken for the result, because its inputs are unknown.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Features

from gaussian_tokenizer.corpus import planning
from gaussian_tokenizer.corpus.card import card_text
from gaussian_tokenizer.corpus.corpus import (
    CARD_NAME,
    FACES_NAME,
    FORMAT,
    MANIFEST_NAME,
    TOKENIZER_FOLDER,
    staging_folder,
)
from gaussian_tokenizer.corpus.options import BuildSettings
from gaussian_tokenizer.corpus.schema import CONFIGURATIONS, corpus_features
from gaussian_tokenizer.corpus.shards import ShardPlan, write_shard
from gaussian_tokenizer.corpus.sources import FolderSource, SubjectSource, read_subject
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer
from gaussian_tokenizer.utils.atomic import atomic_file, exchange_names
from gaussian_tokenizer.utils.json_files import read_json, to_json
from gaussian_tokenizer.utils.locks import exclusive
from gaussian_tokenizer.utils.parallel import runner

HEAD_NAME, SETTINGS_NAME, LOCK_NAME = "head.safetensors", "settings.json", "lock"
PRELOADED = ("gaussian_tokenizer.corpus.shards",)  # imported once for all processes


def build(
    avatars: str | os.PathLike | SubjectSource,
    head: HeadModel,
    output: str | os.PathLike,
    settings: BuildSettings | None = None,
    tokenizer: GaussianTokenizer | None = None,
    num_proc: int = 1,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Build the corpus folder `output`, or continue a build of the same settings; returns the content of `corpus.json`.

    `avatars` is a folder of subject folders, or another source such as `synthetic.SyntheticSource`. With `tokenizer`, the
    bins, bounds and token order of `settings` are not used. FileNotFoundError or ValueError if there is nothing to build.
    """
    settings = settings or BuildSettings()
    output = Path(os.path.abspath(output))
    staging = staging_folder(output)
    if tokenizer is not None:
        planning.check_tokenizer(tokenizer, head)
    source = FolderSource(Path(avatars)) if isinstance(avatars, str | os.PathLike) else avatars
    names = source.names()
    wanted = {"format": FORMAT, "head_hash": head.hash, **asdict(settings), "versions": planning.versions()}
    wanted["tokenizer"] = None if tokenizer is None else json.loads(tokenizer.to_json_string())
    wanted = json.loads(json.dumps(wanted | {"recipe": source.recipe}))  # as read from the file
    with _lock(staging):
        _check_output(output, overwrite)
        _open_staging(staging, wanted, head, overwrite)
        with runner(num_proc, partial(HeadModel.load, staging / HEAD_NAME), PRELOADED) as run:
            jobs = [(number, name, source, staging / "subjects") for number, name in enumerate(names)]
            summaries = run(read_subject, jobs, "reading subjects", progress)
            max_points = None if tokenizer is None else tokenizer.max_points
            good, bad = planning.sort_out(summaries, settings, source.where, max_points)
            split = planning.split_subjects(good, settings)
            tokenizer = tokenizer or planning.make_tokenizer(good, head, settings)
            features = corpus_features(tokenizer, head, any(summary.static_offset for summary in good))
            plans = planning.plan_shards(split, tokenizer, head, features, settings.shard_size)
            records = _finished(staging, plans)
            missing = [(staging, plan, tokenizer, features) for plan in plans if plan.file not in records]
            written = run(_write_and_record, missing, "writing shards", progress, len(records))
        records |= {record["file"]: record for record in written}
        shards = [records[plan.file] for plan in plans]
        manifest = planning.make_manifest(split, shards, bad, tokenizer, head, settings.seed)
        _remove_unplanned(staging / "corpus", plans)
        for configuration in features.keys() - {plan.configuration for plan in plans}:
            (staging / "corpus" / configuration).rmdir()
        tokenizer.save_pretrained(staging / "corpus" / TOKENIZER_FOLDER)
        np.save(staging / "corpus" / FACES_NAME, head.faces.numpy().astype(np.int32))
        _write(staging / "corpus" / CARD_NAME, card_text(manifest, good, features, tokenizer))
        _write(staging / "corpus" / MANIFEST_NAME, to_json(manifest))
        _check_output(output, overwrite)  # again, because building took its time
        _publish(staging, output)
    return manifest


# ---- the build folder


def _check_output(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output}: is a file, expected a folder name for the corpus")
    if _is_occupied(output) and not overwrite:
        raise ValueError(f"{output}: exists already; choose another --output_dir, or --overwrite to replace it")


def _is_occupied(output: Path) -> bool:
    return output.exists() and any(output.iterdir())


@contextlib.contextmanager
def _lock(staging: Path) -> Iterator[None]:
    """One build at a time. If it fails without progress, its folder is removed."""
    with exclusive(staging / LOCK_NAME) as mine:
        if not mine:
            raise ValueError(f"{staging}: another process is building this corpus; wait for it to end")
        try:
            yield
        except BaseException:
            if not _has_progress(staging):
                _remove(staging)
            raise


def _settings_in(staging: Path) -> dict[str, Any]:
    """The settings of the unfinished build; {} if there is none."""
    if (staging / "corpus").is_dir():
        with contextlib.suppress(FileNotFoundError, ValueError):
            return read_json(staging / SETTINGS_NAME)
    return {}


def _has_progress(staging: Path) -> bool:
    """Whether an unfinished build has completed a shard, or a generated subject."""
    settings = _settings_in(staging)
    generated = settings.get("recipe") is not None and any(staging.glob("subjects/*.safetensors"))
    return bool(settings) and (generated or any(staging.glob("done/*.json")))


def _open_staging(staging: Path, wanted: dict[str, Any], head: HeadModel, overwrite: bool) -> None:
    """Start a new build, or continue one of the same settings."""
    found = _settings_in(staging)
    different = [name for name in wanted if found.get(name) != wanted[name]]
    if different and _has_progress(staging) and not overwrite:
        changes = ", ".join(f"{name} {found.get(name)!r} (now {wanted[name]!r})" for name in different)
        raise ValueError(f"{staging}: half-built corpus of other settings: {changes}; finish it, or use --overwrite")
    if different:
        _clear(staging)
    for name in ("done", "subjects", *(f"corpus/{configuration}" for configuration in CONFIGURATIONS)):
        (staging / name).mkdir(parents=True, exist_ok=True)
    head.save(staging / HEAD_NAME)
    if different:
        _write(staging / SETTINGS_NAME, to_json(wanted))


def _clear(staging: Path) -> None:
    """Remove everything but the lock."""
    (staging / SETTINGS_NAME).unlink(missing_ok=True)
    for path in staging.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK_NAME:
            path.unlink()


def _remove(staging: Path) -> None:
    """Remove the folder, the lock last: until then no other build changes it."""
    _clear(staging)
    with contextlib.suppress(OSError):  # the folder may already belong to the next build
        (staging / LOCK_NAME).unlink()
        staging.rmdir()


def _finished(staging: Path, plans: list[ShardPlan]) -> dict[str, dict[str, Any]]:
    """The records of the planned shards that are written already; other files are removed."""
    records = {}
    for plan in plans:
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
            record = read_json(_record_path(staging, plan.file))
            if record.pop("key") == plan.key:
                with open(staging / "corpus" / plan.file, "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() == record["sha256"]:
                        records[plan.file] = record
    _remove_unplanned(staging / "corpus", [plan for plan in plans if plan.file in records])
    return records


def _remove_unplanned(corpus: Path, plans: list[ShardPlan]) -> None:
    """Remove the files that are not those of `plans`, such as temporary ones of a killed build."""
    planned = {corpus / plan.file for plan in plans}
    for path in [path for path in corpus.rglob("*") if path.is_file() and path not in planned]:
        path.unlink()


def _write_and_record(
    staging: Path, plan: ShardPlan, tokenizer: GaussianTokenizer, features: dict[str, Features], head: HeadModel
) -> dict[str, Any]:
    """One job; `head` is what the runner gives to every job."""
    record = write_shard(staging, plan, tokenizer, features[plan.configuration])
    _write(_record_path(staging, plan.file), to_json({**record, "key": plan.key}))
    return record


def _record_path(staging: Path, file: str) -> Path:
    return staging / "done" / (file.replace("/", "-") + ".json")


def _publish(staging: Path, output: Path) -> None:
    corpus, other = staging / "corpus", staging / "replaced"
    if not _is_occupied(output):
        os.rename(corpus, output)  # also onto an empty folder
    else:
        os.rename(corpus, other)  # what was the output must never be found as `corpus`
        if not exchange_names(other, output):
            os.rename(other, corpus)  # if killed while there is no output, the next build publishes it
            os.rename(output, other)
            os.rename(corpus, output)
    _remove(staging)


def _write(path: Path, content: str) -> None:
    with atomic_file(path) as file:
        file.write(content.encode())
