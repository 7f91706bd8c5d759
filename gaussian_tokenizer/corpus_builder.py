"""Builds a corpus from subjects: each read once, then bounds, split, shards, card, and one rename at the end.

Everything is written to `.<name>.partial` beside the output: `settings.json` (what was asked for), `subjects/` (what was
read of each), `corpus/` (the corpus so far) and `done/` (one record for every finished shard, with a key over all that
went into it). A build that was killed and is started again keeps the shards whose key is still right and writes the
others. Nothing depends on the number of processes, their order or the clock, so the bytes are the same as those of one
uninterrupted build.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from gaussian_tokenizer.atomic import _exchange, atomic_file
from gaussian_tokenizer.corpus import (
    CARD_NAME,
    CONFIGURATIONS,
    FORMAT,
    MANIFEST_NAME,
    TOKENIZER_FOLDER,
    read_manifest,
    sha256_of,
    staging_folder,
)
from gaussian_tokenizer.corpus_card import write_card
from gaussian_tokenizer.corpus_plan import (
    BuildSettings,
    check_tokenizer,
    make_manifest,
    make_tokenizer,
    plan_shards,
    sort_out,
    split_subjects,
    versions,
)
from gaussian_tokenizer.corpus_shards import ShardPlan, write_shard
from gaussian_tokenizer.corpus_subjects import FolderSource, SubjectSource, Survey, read_subject
from gaussian_tokenizer.head_model import HeadModel
from gaussian_tokenizer.parallel import runner
from gaussian_tokenizer.processing_gaussian_tokenizer import GaussianTokenizer

HEAD_NAME = "head.safetensors"


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
    """Build the corpus folder `output` from the subject folders in `avatars`; returns the content of `corpus.json`.

    `avatars` may also be another source of subjects, such as `synthesize.SyntheticSource`.
    With `tokenizer` its bins and bounds are used; those of `settings` are not. A build of the same settings that was
    interrupted is continued. Raises FileNotFoundError or ValueError with one clear line for every reason not to build.
    """
    settings = settings or BuildSettings()
    output = Path(os.path.abspath(output))
    staging = staging_folder(output)
    if tokenizer is not None:
        check_tokenizer(tokenizer, head)
    if output.exists() and staging.exists() and not (staging / "corpus").exists():
        shutil.rmtree(staging)  # killed between its last two steps: all is done
        return read_manifest(output)
    _check_output(output, overwrite)
    source = FolderSource(Path(avatars)) if isinstance(avatars, str | os.PathLike) else avatars
    names = source.names()
    output.parent.mkdir(parents=True, exist_ok=True)
    with _lock(staging, made=source.recipe is not None):
        _open_staging(staging, settings, head, tokenizer, source, overwrite)
        with runner(num_proc, head, staging / HEAD_NAME) as run:
            jobs = [(number, name, source, staging / "subjects") for number, name in enumerate(names)]
            surveys = run(read_subject, jobs, "reading subjects", progress)
            max_points = None if tokenizer is None else tokenizer.max_points
            good, bad = sort_out(surveys, settings, source.where, max_points)
            split = split_subjects(good, settings)
            tokenizer = tokenizer or make_tokenizer(good, head, settings)
            static_offset = any(survey.static_offset for survey in good)
            plans = plan_shards(split, tokenizer, settings, head, static_offset)
            records = _finished(staging, plans)
            missing = [plan for plan in plans if plan.file not in records]
            work = partial(_write_and_record, staging, tokenizer=tokenizer, static_offset=static_offset)
            done = len(plans) - len(missing)
            for record in run(work, [(plan,) for plan in missing], "writing shards", progress, done):
                records[record["file"]] = record
        manifest = make_manifest(split, [records[plan.file] for plan in plans], bad, tokenizer, head, settings)
        _finish(staging, output, plans, manifest, tokenizer, head, good, static_offset)
    return manifest


# ---- the folder in the making


def _check_output(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output}: is a file, expected a folder name for the corpus")
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise ValueError(f"{output}: exists already; choose another --output, or --overwrite to replace it")


@contextlib.contextmanager
def _lock(staging: Path, made: bool) -> Iterator[None]:
    """One build at a time; the lock goes with the process that held it, however it ends.

    `made`: the subjects that are ready were made for this corpus, and the next run continues with them.
    """
    staging.mkdir(exist_ok=True)
    with open(staging / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{staging}: another process is building this corpus; wait for it to end") from None
        try:
            yield
        except BaseException:
            useful = [*staging.glob("done/*"), *(staging.glob("subjects/*") if made else ())]
            if not useful:
                shutil.rmtree(staging, ignore_errors=True)
            raise


def _open_staging(
    staging: Path,
    settings: BuildSettings,
    head: HeadModel,
    tokenizer: GaussianTokenizer | None,
    source: SubjectSource,
    overwrite: bool,
) -> None:
    """Start a new staging folder, or continue one of the same settings."""
    wanted: dict[str, Any] = {"format": FORMAT, "head_hash": head.hash, **asdict(settings), "versions": versions()}
    wanted["recipe"] = source.recipe
    wanted["tokenizer"] = None if tokenizer is None else json.loads(tokenizer.to_json_string())
    wanted = json.loads(json.dumps(wanted))
    file = staging / "settings.json"
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        different = [name for name in wanted if found.get(name) != wanted[name]]
        if different and not overwrite:
            changes = ", ".join(f"{name} {found.get(name)!r} (now {wanted[name]!r})" for name in different)
            raise ValueError(
                f"{staging}: half-built corpus of other settings: {changes}; finish it with those, or start afresh "
                "with --overwrite"
            )
        if different:
            for name in ("corpus", "done", "subjects"):
                shutil.rmtree(staging / name, ignore_errors=True)
    for name in ("done", "subjects", *(f"corpus/{configuration}" for configuration in CONFIGURATIONS)):
        (staging / name).mkdir(parents=True, exist_ok=True)
    _write_json(file, wanted)
    head.save(staging / HEAD_NAME)


def _finished(staging: Path, plans: list[ShardPlan]) -> dict[str, dict[str, Any]]:
    """The records of the planned shards that are there already. What is not planned is removed."""
    records = {}
    for plan in plans:
        try:
            record = json.loads(_record_path(staging, plan.file).read_text(encoding="utf-8"))
            if record.pop("key") != plan.key:
                continue
            with open(staging / "corpus" / plan.file, "rb") as file:
                if sha256_of(file) == record["sha256"]:
                    records[plan.file] = record
        except (FileNotFoundError, ValueError, KeyError):
            continue
    kept = {staging / "corpus" / file for file in records}
    for configuration in CONFIGURATIONS:
        for path in (staging / "corpus" / configuration).iterdir():
            if path not in kept:
                path.unlink()
    return records


def _write_and_record(
    staging: Path, plan: ShardPlan, head: HeadModel, tokenizer: GaussianTokenizer, static_offset: bool
) -> dict[str, Any]:
    record = write_shard(staging / "corpus", staging / "subjects", plan, tokenizer, head, static_offset)
    _write_json(_record_path(staging, plan.file), {**record, "key": plan.key})
    return record


def _record_path(staging: Path, file: str) -> Path:
    return staging / "done" / (file.replace("/", "-") + ".json")


def _finish(
    staging: Path,
    output: Path,
    plans: list[ShardPlan],
    manifest: dict[str, Any],
    tokenizer: GaussianTokenizer,
    head: HeadModel,
    subjects: list[Survey],
    static_offset: bool,
) -> None:
    corpus = staging / "corpus"
    planned = {corpus / plan.file for plan in plans}
    # A build that was killed just here, or a process that outlived one for a moment, may have left temporary files.
    for path in [path for path in corpus.rglob("*") if path.is_file() and path not in planned]:
        path.unlink()
    for configuration in CONFIGURATIONS:
        if not any((corpus / configuration).iterdir()):
            (corpus / configuration).rmdir()
    tokenizer.save_pretrained(corpus / TOKENIZER_FOLDER)
    write_card(corpus / CARD_NAME, manifest, subjects, tokenizer, head, static_offset)
    _write_json(corpus / MANIFEST_NAME, manifest)
    if output.exists() and any(output.iterdir()):
        if not _exchange(corpus, output):
            os.rename(output, staging / "replaced")
            os.rename(corpus, output)
    else:
        os.rename(corpus, output)  # also onto an empty folder
    shutil.rmtree(staging, ignore_errors=True)


def _write_json(path: Path, content: Any) -> None:
    with atomic_file(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
