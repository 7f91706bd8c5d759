"""Make synthetic subjects, as avatar folders or straight as a corpus: what to train on where there are no captured subjects.

    python -m gaussian_tokenizer.synthesize --num_subjects 200 --head procedural:600 --output_dir subjects --num_proc 2
    python -m gaussian_tokenizer.synthesize --num_subjects 10000 --head procedural:600 --corpus corpus --num_proc 2

With `--output_dir` each subject (see `synthetic`) becomes a folder in the layout of GaussianAvatars and VHAP (see `subject`):
the avatar, its head parameters, and images drawn by `render` with their cameras and moments. A folder appears whole or
not at all. With `--corpus` the subjects go into the corpus that `build_corpus` would make of those folders, byte for byte,
without the folders. Run again, the command keeps what is finished and makes the rest; the number of processes does not
change a byte. Time grows with the number of subjects, memory does not.
"""

import argparse
import re
import shutil
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from gaussian_tokenizer.avatars.avatar_files import METADATA_NAME
from gaussian_tokenizer.captures.subject import write_subject
from gaussian_tokenizer.corpus.building import build
from gaussian_tokenizer.corpus.corpus import load_corpus
from gaussian_tokenizer.corpus.identity_stats import identity_statistics, shapes_of_corpus, shapes_of_folders
from gaussian_tokenizer.corpus.options import add_corpus_options, print_counts
from gaussian_tokenizer.corpus.planning import BuildSettings
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.loading import load_head
from gaussian_tokenizer.synthetic.layout import MIN_POINTS_PER_FACE
from gaussian_tokenizer.synthetic.source import MAX_VIEWS, SyntheticSource, _make
from gaussian_tokenizer.utils.json_files import read_json
from gaussian_tokenizer.utils.locks import exclusive
from gaussian_tokenizer.utils.parallel import runner

PRELOADED = ("gaussian_tokenizer.synthetic.source",)  # what each of the processes needs
RECIPE = ("seed", "image_size", "views", "timesteps", "num_points", "identity_scale", "min_points_per_face")
LOCK_NAME = (
    ".synthesize.lock"  # while subjects are being made; nobody else may take their temporary folders for leftovers
)


def synthesize(
    output: str | Path,
    num_subjects: int,
    head: str = "procedural:600",
    num_proc: int = 1,
    seed: int = 0,
    image_size: int = 128,
    views: int = 1,
    timesteps: int = 1,
    num_points: int | None = None,
    identity_scale: float = 1.0,
    min_points_per_face: int = MIN_POINTS_PER_FACE,
) -> list[Path]:
    """Make the folders `synthetic-<seed>-<index>` in `output` that are not there yet; returns all of them.

    `head` as for `load_head`, the last three as for `synthesize_subject`. ValueError if a folder of
    that name is there and was not made by the same command (then nothing is written).
    """
    recipe = {
        "seed": seed,
        "num_points": num_points,
        "image_size": image_size,
        "views": views,
        "timesteps": timesteps,
        "identity_scale": identity_scale,
        "min_points_per_face": min_points_per_face,
    }
    source = SyntheticSource(num_subjects, recipe)
    if not 1 <= num_proc <= 1024:
        raise ValueError(f"num_proc is {num_proc}, expected 1 to 1024")
    output, model = Path(output), load_head(head)
    folders = [output / name for name in source.names()]
    with exclusive(output / LOCK_NAME) as mine:
        if not mine:
            raise ValueError(f"{output}: another process is making subjects in it; wait for it to end")
        try:
            missing = [index for index, folder in enumerate(folders) if not _is_finished(folder, recipe, model)]
            _remove_leftovers(output, {folders[index].name for index in missing})
            with TemporaryDirectory() as temporary:
                head_file = Path(temporary) / "head.safetensors"
                model.save(head_file)
                jobs = [(folders[index], recipe) for index in missing]
                with runner(max(1, min(num_proc, len(jobs))), partial(HeadModel.load, head_file), PRELOADED) as run:
                    run(_write, jobs, "synthesize", progress=True, done=num_subjects - len(jobs))
        finally:
            (output / LOCK_NAME).unlink()
    return folders


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gaussian_tokenizer.synthesize",
        description="Write synthetic subjects (avatars with portraits) as GaussianAvatars folders.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--num_subjects", type=int, required=True, help="how many subjects to make")
    parser.add_argument("--output_dir", type=Path, help="folder to put the subjects' folders in")
    parser.add_argument(
        "--head",
        default="procedural:600",
        help="procedural[:faces], a .safetensors head model, a FLAME .pkl or an ICT-FaceKit folder",
    )
    parser.add_argument("--num_proc", type=int, default=1, help="processes; the result does not depend on it")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other subjects")
    parser.add_argument("--image_size", type=int, default=128, help="pixels, both sides of a portrait")
    parser.add_argument("--views", type=int, default=1, help=f"cameras around a subject, 1 (front) to {MAX_VIEWS}")
    parser.add_argument("--timesteps", type=int, default=1, help="moments: at rest, then random expressions and turns")
    parser.add_argument(
        "--num_points",
        type=int,
        help="Gaussians of an average subject; by default 400 on 600 faces, 26,000 on 10,144 or more",
    )
    parser.add_argument(
        "--identity_scale", type=float, default=1.0, help="how much heads differ: 1 a crowd, 2 caricatures"
    )
    parser.add_argument(
        "--min_points_per_face",
        type=int,
        default=MIN_POINTS_PER_FACE,
        help="on an occupied face; fewer spread the points over more faces",
    )
    corpus = parser.add_argument_group("straight to a corpus, instead of --output_dir")
    corpus.add_argument("--corpus", type=Path, help="corpus folder to make; see build_corpus for the options below")
    corpus.add_argument("--tokenizer_image_size", type=int, default=224, help="side of what the tokenizer prepares")
    add_corpus_options(corpus)
    options = parser.parse_args(arguments)
    if (options.output_dir is None) == (options.corpus is None):
        parser.error("give either --output_dir, for folders, or --corpus")
    try:
        (_to_folders if options.corpus is None else _to_corpus)(options)
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")


def _to_folders(options: argparse.Namespace) -> None:
    names = ("num_subjects", "head", "num_proc", *RECIPE)
    folders = synthesize(options.output_dir, **{name: vars(options)[name] for name in names})
    print(f"{len(folders)} subjects in {options.output_dir}")
    print(f"identities: {identity_statistics(load_head(options.head), shapes_of_folders(folders))}")


def _to_corpus(options: argparse.Namespace) -> None:
    source = SyntheticSource(options.num_subjects, {name: vars(options)[name] for name in RECIPE})
    own = vars(options) | {"image_size": options.tokenizer_image_size}
    settings = BuildSettings(**{field.name: own[field.name] for field in fields(BuildSettings) if field.name in own})
    head = load_head(options.head)
    print_counts(build(source, head, options.corpus, settings, num_proc=options.num_proc, overwrite=options.overwrite))
    print(f"corpus: {options.corpus}")
    print(f"identities: {identity_statistics(head, shapes_of_corpus(load_corpus(options.corpus)))}")


def _write(folder: Path, recipe: dict, head: HeadModel) -> None:
    made = _make(folder.name, recipe, head)
    write_subject(folder, made.avatar, made.images, made.metadata)


def _is_finished(folder: Path, recipe: dict, head: HeadModel) -> bool:
    if not folder.exists():
        return False
    try:
        metadata = read_json(folder / METADATA_NAME)
        found = {"recipe": metadata["recipe"], "head_hash": metadata["head_hash"]}
    except (OSError, ValueError, KeyError):
        raise ValueError(f"{folder}: is there, but no synthetic subject; choose another output folder") from None
    expected = {"recipe": recipe, "head_hash": head.hash}
    if found != expected:
        raise ValueError(
            f"{folder}: made with {found}, asked for {expected}; choose another output folder or remove it"
        )
    return True


def _remove_leftovers(output: Path, names: set[str]) -> None:
    """Temporary folders of subjects that a killed run left unfinished."""
    for path in output.glob(".synthetic-*.tmp"):
        match = re.fullmatch(r"\.(.+)\.[0-9a-f]+\.tmp", path.name)
        if match and match[1] in names:
            shutil.rmtree(path)


if __name__ == "__main__":
    main()
