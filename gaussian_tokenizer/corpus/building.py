"""Builds a corpus from subjects: each read once, then bounds, split, shards, card, and one rename at the end.

Everything is written to `.<name>.partial` beside the output: `settings.json` (what was asked for), `subjects/` (what was
read of each), `corpus/` (the corpus so far) and `done/` (one record for every finished shard, with a key over all that
went into it). Nothing depends on the number of processes, their order or the clock, so the bytes of a build that was
killed and continued are those of one that was not.

Whoever holds the lock on `.<name>.partial/lock`, and nobody else, changes that folder or the output. It is in one of two
states:

    making    `settings.json` and `corpus/` are both there. The build is continued by a command of these settings: it keeps
              the shards whose key is still right and writes the others. A command of other settings is refused, or discards
              the build with --overwrite.
    nothing   One of the two is missing. Whatever else is there is what an ended build left, and is removed.

    nothing -> making    `settings.json` is written last, when all folders are there
    making -> nothing    the build is published: `corpus/` is moved away, and is the output in one rename or exchange
                         the build is discarded, or failed before anything was finished: `settings.json` is removed first

So the output is always the whole corpus of one command. An output that is there is refused or, with --overwrite, replaced
by a build of its own, never taken for the result: what went into it is not known.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from gaussian_tokenizer.corpus.card import write_card
from gaussian_tokenizer.corpus.corpus import (
    CARD_NAME,
    CONFIGURATIONS,
    FORMAT,
    MANIFEST_NAME,
    TOKENIZER_FOLDER,
    sha256_of,
    staging_folder,
)
from gaussian_tokenizer.corpus.planning import (
    BuildSettings,
    check_tokenizer,
    make_manifest,
    make_tokenizer,
    plan_shards,
    sort_out,
    split_subjects,
    versions,
)
from gaussian_tokenizer.corpus.shards import ShardPlan, write_shard
from gaussian_tokenizer.corpus.sources import FolderSource, SubjectSource, SubjectSummary, read_subject
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer
from gaussian_tokenizer.utils.atomic import atomic_file, exchange_names
from gaussian_tokenizer.utils.json_files import read_json
from gaussian_tokenizer.utils.locks import exclusive
from gaussian_tokenizer.utils.parallel import runner

HEAD_NAME, SETTINGS_NAME, LOCK_NAME = "head.safetensors", "settings.json", "lock"
PRELOADED = ("gaussian_tokenizer.corpus.shards",)  # what each of the processes needs


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
    source = FolderSource(Path(avatars)) if isinstance(avatars, str | os.PathLike) else avatars
    names = source.names()
    with _lock(staging):
        _check_output(output, overwrite)
        _open_staging(staging, settings, head, tokenizer, source, overwrite)
        with runner(num_proc, partial(HeadModel.load, staging / HEAD_NAME), PRELOADED) as run:
            jobs = [(number, name, source, staging / "subjects") for number, name in enumerate(names)]
            summaries = run(read_subject, jobs, "reading subjects", progress)
            max_points = None if tokenizer is None else tokenizer.max_points
            good, bad = sort_out(summaries, settings, source.where, max_points)
            split = split_subjects(good, settings)
            tokenizer = tokenizer or make_tokenizer(good, head, settings)
            static_offset = any(summary.static_offset for summary in good)
            plans = plan_shards(split, tokenizer, settings, head, static_offset)
            records = _finished(staging, plans)
            missing = [plan for plan in plans if plan.file not in records]
            work = partial(_write_and_record, staging, tokenizer=tokenizer, static_offset=static_offset)
            done = len(plans) - len(missing)
            for record in run(work, [(plan,) for plan in missing], "writing shards", progress, done):
                records[record["file"]] = record
        manifest = make_manifest(split, [records[plan.file] for plan in plans], bad, tokenizer, head, settings)
        _complete(staging / "corpus", plans, manifest, tokenizer, head, good, static_offset)
        _check_output(output, overwrite)  # once more: that took its time
        _publish(staging, output)
    return manifest


# ---- the folder in the making


def _check_output(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output}: is a file, expected a folder name for the corpus")
    if _is_occupied(output) and not overwrite:
        raise ValueError(f"{output}: exists already; choose another --output_dir, or --overwrite to replace it")


def _is_occupied(output: Path) -> bool:
    return output.exists() and any(output.iterdir())


@contextlib.contextmanager
def _lock(staging: Path) -> Iterator[None]:
    """One build at a time. If it fails, what the next one cannot go on from is removed."""
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
    """What the build in the making was asked for; {} if there is none."""
    if not (staging / "corpus").is_dir():
        return {}
    try:
        return read_json(staging / SETTINGS_NAME)
    except (FileNotFoundError, ValueError):
        return {}


def _has_progress(staging: Path) -> bool:
    """Whether a build is in the making that has finished a shard, or a subject that was made and not found."""
    settings = _settings_in(staging)
    made = settings.get("recipe") is not None and any(staging.glob("subjects/*.safetensors"))
    return made or (bool(settings) and any(staging.glob("done/*.json")))


def _open_staging(
    staging: Path,
    settings: BuildSettings,
    head: HeadModel,
    tokenizer: GaussianTokenizer | None,
    source: SubjectSource,
    overwrite: bool,
) -> None:
    """Start a new build, or continue one of the same settings."""
    wanted: dict[str, Any] = {"format": FORMAT, "head_hash": head.hash, **asdict(settings), "versions": versions()}
    wanted["recipe"] = source.recipe
    wanted["tokenizer"] = None if tokenizer is None else json.loads(tokenizer.to_json_string())
    wanted = json.loads(json.dumps(wanted))
    found = _settings_in(staging)
    different = [name for name in wanted if found.get(name) != wanted[name]]
    if different and _has_progress(staging) and not overwrite:
        changes = ", ".join(f"{name} {found.get(name)!r} (now {wanted[name]!r})" for name in different)
        raise ValueError(
            f"{staging}: half-built corpus of other settings: {changes}; finish it with those, or start afresh "
            "with --overwrite"
        )
    if different:
        _clear(staging)
    for name in ("done", "subjects", *(f"corpus/{configuration}" for configuration in CONFIGURATIONS)):
        (staging / name).mkdir(parents=True, exist_ok=True)
    head.save(staging / HEAD_NAME)
    if different:
        _write_json(staging / SETTINGS_NAME, wanted)


def _clear(staging: Path) -> None:
    """Remove everything but the lock."""
    (staging / SETTINGS_NAME).unlink(missing_ok=True)
    for path in staging.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK_NAME:
            path.unlink()


def _remove(staging: Path) -> None:
    """Remove the folder, the lock last: until then nobody else makes anything in it."""
    _clear(staging)
    with contextlib.suppress(OSError):  # the folder may be that of the next build already
        (staging / LOCK_NAME).unlink()
        staging.rmdir()


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


def _complete(
    corpus: Path,
    plans: list[ShardPlan],
    manifest: dict[str, Any],
    tokenizer: GaussianTokenizer,
    head: HeadModel,
    subjects: list[SubjectSummary],
    static_offset: bool,
) -> None:
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


def _write_json(path: Path, content: Any) -> None:
    with atomic_file(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
