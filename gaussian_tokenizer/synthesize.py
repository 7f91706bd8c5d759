"""Make synthetic subjects, as avatar folders or directly as a corpus: training data where there are no captures.

    python -m gaussian_tokenizer.synthesize --num_subjects 200 --head procedural:600 --output_dir subjects --num_proc 2
    python -m gaussian_tokenizer.synthesize --num_subjects 10000 --head procedural:600 --corpus corpus --num_proc 2

With `--output_dir`, each subject becomes a folder in the layout of GaussianAvatars and VHAP (see `captures.subject`). With
`--corpus`, the subjects go directly into the corpus that `build_corpus` would make of those folders, byte for byte. Run
again, the command keeps what is finished; the number of processes does not change a byte.
"""

import argparse
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gaussian_tokenizer.avatars.avatar_files import METADATA_NAME
from gaussian_tokenizer.captures.subject import write_subject
from gaussian_tokenizer.corpus.building import build
from gaussian_tokenizer.corpus.options import BuildSettings, count_of, print_counts
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.loading import load_head
from gaussian_tokenizer.synthetic.source import PLAIN, SyntheticSettings, SyntheticSource, render_subject
from gaussian_tokenizer.utils.json_files import read_json
from gaussian_tokenizer.utils.locks import exclusive
from gaussian_tokenizer.utils.options import add_options, from_options
from gaussian_tokenizer.utils.parallel import runner

PRELOADED = ("gaussian_tokenizer.synthetic.source",)  # imported once for all processes
LOCK_NAME = ".synthesize.lock"  # held while subjects are made; other runs must not remove their temporary folders


def synthesize(
    output: str | Path, num_subjects: int, head: str = "procedural:600", num_proc: int = 1, **settings: Any
) -> list[Path]:
    """Make the missing folders `synthetic-<seed>-<index>` in `output`; returns all of them.

    `head` as for `load_head`, `settings` are fields of SyntheticSettings. ValueError, before anything is written, if a folder
    of that name was made with other settings.
    """
    chosen = SyntheticSettings(**settings)
    source = SyntheticSource(num_subjects, chosen)
    if not 1 <= num_proc <= 1024:
        raise ValueError(f"num_proc is {num_proc}, expected 1 to 1024")
    output, model = Path(output), load_head(head)
    folders = [output / name for name in source.names()]
    with exclusive(output / LOCK_NAME) as mine:
        if not mine:
            raise ValueError(f"{output}: another process is making subjects in it; wait for it to end")
        try:
            jobs = [(folder, chosen) for folder in folders if not _is_finished(folder, chosen, model)]
            _remove_leftovers(output, {folder.name for folder, _ in jobs})
            with TemporaryDirectory() as temporary:
                head_file = Path(temporary) / "head.safetensors"
                model.save(head_file)
                with runner(max(1, min(num_proc, len(jobs))), partial(HeadModel.load, head_file), PRELOADED) as run:
                    run(_write, jobs, "synthesize", progress=True, done=num_subjects - len(jobs))
        finally:
            (output / LOCK_NAME).unlink()
    return folders


def options_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m gaussian_tokenizer.synthesize",
        description="Make synthetic subjects (avatars with portraits) as GaussianAvatars folders or as a corpus.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--num_subjects", type=int, required=True, help="how many subjects to make")
    add("--output_dir", type=Path, help="folder to put the subjects' folders in")
    add("--head", default="procedural:600", help="procedural[:faces], .safetensors, FLAME .pkl or ICT-FaceKit folder")
    add("--num_proc", type=int, default=1, help="processes; the result is the same for any number")
    add_options(parser, SyntheticSettings)
    plain = " ".join(f"--{name} {value}" for name, value in PLAIN.items())
    add("--plain", action="store_true", help=f"subjects and captures without this variety: {plain}")
    corpus = parser.add_argument_group("directly to a corpus, instead of --output_dir")
    corpus.add_argument("--corpus", type=Path, help="corpus folder to make; see build_corpus for the options below")
    corpus.add_argument("--tokenizer_image_size", type=int, default=224, help="side of what the tokenizer prepares")
    # The rest of what build_corpus asks for follows from the subjects.
    add_options(corpus, BuildSettings, skip=("image_size", "seed", "skip_bad", "allow_unknown_license"))
    corpus.add_argument("--overwrite", action="store_true", help="replace an existing corpus")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options_parser()
    options = parser.parse_args(arguments)
    vars(options).update(PLAIN if options.plain else {})
    if (options.output_dir is None) == (options.corpus is None):
        parser.error("give either --output_dir, for folders, or --corpus")
    try:
        (_to_folders if options.corpus is None else _to_corpus)(options)
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")


def _to_folders(options: argparse.Namespace) -> None:
    settings = asdict(from_options(SyntheticSettings, vars(options)))
    folders = synthesize(options.output_dir, options.num_subjects, options.head, options.num_proc, **settings)
    print(f"{count_of(len(folders), 'subject')} in {options.output_dir}")


def _to_corpus(options: argparse.Namespace) -> None:
    source = SyntheticSource(options.num_subjects, from_options(SyntheticSettings, vars(options)))
    settings = from_options(BuildSettings, vars(options) | {"image_size": options.tokenizer_image_size})
    head = load_head(options.head)
    print_counts(build(source, head, options.corpus, settings, num_proc=options.num_proc, overwrite=options.overwrite))
    print(f"corpus: {options.corpus}")


def _write(folder: Path, settings: SyntheticSettings, head: HeadModel) -> None:
    subject = render_subject(folder.name, settings, head)
    write_subject(folder, subject.avatar, subject.images, subject.metadata)


def _is_finished(folder: Path, settings: SyntheticSettings, head: HeadModel) -> bool:
    if not folder.exists():
        return False
    try:
        metadata = read_json(folder / METADATA_NAME)
        found = {"recipe": metadata["recipe"], "head_hash": metadata["head_hash"]}
    except (OSError, ValueError, KeyError):
        raise ValueError(f"{folder}: exists, but is no synthetic subject; choose another output folder") from None
    expected = {"recipe": settings.recipe, "head_hash": head.hash}
    if found != expected:
        raise ValueError(f"{folder}: made with {found}, not {expected}; choose another output folder or remove it")
    return True


def _remove_leftovers(output: Path, names: set[str]) -> None:
    """Temporary folders of subjects that a killed run left unfinished."""
    for path in output.glob(".synthetic-*.tmp"):
        match = re.fullmatch(r"\.(.+)\.[0-9a-f]+\.tmp", path.name)
        if match and match[1] in names:
            shutil.rmtree(path)


if __name__ == "__main__":
    main()
