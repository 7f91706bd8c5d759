"""Build, count and check a corpus from the command line.

    python -m gaussian_tokenizer.build_corpus --avatars DIR --head HEAD --output DIR [--num_proc N] [--push_to_hub REPO]
    python -m gaussian_tokenizer.build_corpus stats CORPUS [--picture histogram.png]
    python -m gaussian_tokenizer.build_corpus validate CORPUS

A build that was killed is continued by the same command and ends with the same bytes. On a small CPU, from subjects
that were made on the built-in head:

    python -m gaussian_tokenizer.build_corpus --avatars subjects --head procedural:600 --output corpus --num_proc 2
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

SIZE_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    commands = {"stats": (_stats_parser, _stats), "validate": (_validate_parser, _validate)}
    make_parser, command = (_build_parser, _build)
    if words and words[0] in commands:
        make_parser, command = commands[words.pop(0)]
    options = make_parser().parse_args(words)
    try:
        return command(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def push_to_hub(corpus: Path, repository: str, private: bool) -> str:
    """Upload a corpus folder as a dataset repository; returns its address. OSError of one line if that fails."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, repo_type="dataset", folder_path=corpus, commit_message="Upload corpus")
    except Exception as error:  # the kinds are those of the HTTP library of the day
        reason = " ".join(str(error).split())
        raise OSError(
            f"{corpus} is complete, but was not uploaded to {repository!r}: {reason}; when online and logged in "
            f"(hf auth login), upload it with: hf upload {repository} {corpus} . --repo-type dataset"
        ) from None
    return str(address)


def _build(options: argparse.Namespace) -> int:
    from gaussian_tokenizer.corpus_builder import build
    from gaussian_tokenizer.corpus_plan import BuildSettings
    from gaussian_tokenizer.head_model import load_head
    from gaussian_tokenizer.processing_gaussian_tokenizer import GaussianTokenizer

    settings = BuildSettings(
        n_bins=options.n_bins,
        bounds=options.bounds,
        image_size=options.image_size,
        val_fraction=options.val_fraction,
        num_validation=options.num_validation,
        num_test=options.num_test,
        seed=options.seed,
        shard_size=options.shard_size,
        skip_bad=options.skip_bad,
    )
    manifest = build(
        options.avatars,
        load_head(options.head),
        options.output,
        settings,
        tokenizer=GaussianTokenizer.from_pretrained(options.tokenizer) if options.tokenizer else None,
        num_proc=options.num_proc,
        overwrite=options.overwrite,
    )
    for name, counts in manifest["splits"].items():
        print(
            f"{name}: {counts['subjects']:,} subjects, {counts['frames']:,} frames, {counts['num_points']:,} points, "
            f"{counts['num_tokens']:,} tokens, {counts['num_out_of_bounds']:,} points out of bounds"
        )
    for entry in manifest["skipped"]:
        print(f"left out {entry['folder']}: {entry['reason']}", file=sys.stderr)
    print(f"corpus: {options.output}")
    if options.push_to_hub:
        print(f"uploaded: {push_to_hub(options.output, options.push_to_hub, options.hub_private_repo)}")
    return 0


def _stats(options: argparse.Namespace) -> int:
    from gaussian_tokenizer.corpus_checks import draw_points_per_face, statistics, statistics_table

    figures = statistics(options.corpus)
    print(statistics_table(figures))
    if options.picture:
        draw_points_per_face(figures, options.picture)
        print(f"\npicture: {options.picture}")
    return 0


def _validate(options: argparse.Namespace) -> int:
    from gaussian_tokenizer.corpus_checks import validate

    verdicts = validate(options.corpus, progress=True)
    for verdict in verdicts:
        print(f"{'bad ' if verdict.problems else 'good'} {verdict.file}")
        for problem in verdict.problems:
            print(f"       {problem}")
    bad = sum(bool(verdict.problems) for verdict in verdicts)
    print(f"{options.corpus}: {f'{bad} of {len(verdicts)} files are bad' if bad else 'whole and consistent'}")
    return 1 if bad else 0


# ---- options


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gaussian_tokenizer.build_corpus",
        description="Tokenise a folder of avatars into a corpus that datasets.load_dataset opens.",
        epilog="Other commands: `stats CORPUS` prints figures and draws points per face, `validate CORPUS` checks "
        "every file; each has its own --help.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--avatars", required=True, type=Path, help="folder of subject folders")
    add("--head", required=True, help="procedural, procedural:600, a .safetensors, a FLAME .pkl, an ICT-FaceKit folder")
    add("--output", required=True, type=Path, help="corpus folder to make")
    add("--num_proc", type=int, default=1, help="processes; the result is the same for any number")
    add("--shard_size", type=_size, default="256MB", help="size of a Parquet file before compression, about")
    add("--n_bins", type=int, default=1024, help="levels an axis")
    add(
        "--bounds",
        type=_bounds,
        default="fit",
        help="fit: the box around all points and 5 %% more; default: the tokenizer's own; or lo_x,lo_y,lo_z,hi_x,hi_y,"
        "hi_z in metres (write --bounds=-0.3,...)",
    )
    add("--image_size", type=int, default=224, help="side of the pictures that the tokenizer prepares, pixels")
    add("--tokenizer", type=Path, help="use this tokenizer as it is, not --n_bins, --bounds and --image_size")
    add("--val_fraction", type=float, default=0.05, help="part of the subjects for validation, at least one of two")
    add("--num_validation", type=int, help="subjects for validation, instead of --val_fraction")
    add("--num_test", type=int, default=0, help="subjects for a test split")
    add("--seed", type=int, default=0, help="of the split")
    add("--skip_bad", action="store_true", help="leave out subjects that cannot be used, and record them")
    add("--overwrite", action="store_true", help="replace a corpus, or one in the making with other settings")
    add("--push_to_hub", metavar="REPO", help="upload the corpus as this dataset repository")
    add("--hub_private_repo", action="store_true", help="make that repository private")
    return parser


def _stats_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gaussian_tokenizer.build_corpus stats")
    parser.add_argument("corpus", type=Path, help="corpus folder")
    parser.add_argument("--picture", type=Path, help="draw the histogram of points per face to this PNG")
    return parser


def _validate_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gaussian_tokenizer.build_corpus validate")
    parser.add_argument("corpus", type=Path, help="corpus folder")
    return parser


def _size(text: str) -> int:
    match = re.fullmatch(r"([0-9]+)\s*([kmg]?)b?", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write bytes, or 500KB, 256MB, 1GB")
    return int(match[1]) * SIZE_UNITS[match[2]]


def _bounds(text: str) -> str | list[list[float]]:
    if text in ("fit", "default"):
        return text
    try:
        numbers = [float(number) for number in re.split(r"[,\s]+", text.strip())]
    except ValueError:
        numbers = []
    if len(numbers) != 6:
        raise argparse.ArgumentTypeError(f"{text!r} is not fit, default or six numbers lo_x,lo_y,lo_z,hi_x,hi_y,hi_z")
    return [numbers[:3], numbers[3:]]


if __name__ == "__main__":
    sys.exit(main())
