"""Build, count and check a corpus. The same command continues a build that was killed, and ends with the same bytes.

python -m gaussian_tokenizer.build_corpus --avatars DIR --head HEAD --output_dir DIR [--num_proc N] [--push_to_hub REPO]
python -m gaussian_tokenizer.build_corpus stats CORPUS [--plot stats.png] [--page page.html]
python -m gaussian_tokenizer.build_corpus validate CORPUS [--avatars DIR --head HEAD]
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from gaussian_tokenizer.corpus.building import build
from gaussian_tokenizer.corpus.corpus import load_corpus
from gaussian_tokenizer.corpus.html_page import write_page
from gaussian_tokenizer.corpus.options import BuildSettings, print_counts
from gaussian_tokenizer.corpus.stats import compute_stats, plot_stats, stats_table
from gaussian_tokenizer.corpus.validation import validate
from gaussian_tokenizer.heads.loading import load_head
from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer
from gaussian_tokenizer.utils.atomic import atomic_file
from gaussian_tokenizer.utils.hub import upload
from gaussian_tokenizer.utils.options import add_options, from_options

PROGRAM = "python -m gaussian_tokenizer.build_corpus"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    commands = {"stats": _stats, "validate": _validate}
    command = commands[words.pop(0)] if words and words[0] in commands else _build
    try:
        return command(words)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _build(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Tokenize a folder of avatars into a corpus that datasets.load_dataset opens.",
        epilog="`stats CORPUS` prints and plots stats, `validate CORPUS` checks every file; each has its own --help.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--avatars", required=True, type=Path, help="folder of subject folders")
    add("--head", required=True, help="procedural[:faces], .safetensors, FLAME .pkl or ICT-FaceKit folder")
    add("--output_dir", required=True, type=Path, help="corpus folder to make")
    add("--num_proc", type=int, default=1, help="processes; the result is the same for any number")
    add_options(parser, BuildSettings)
    add("--tokenizer", type=Path, help="use this tokenizer, not --n_bins, --bounds, --token_order and --image_size")
    add("--overwrite", action="store_true", help="replace an existing corpus, or an unfinished one of other settings")
    add("--push_to_hub", metavar="REPO", help="upload the corpus as this dataset repository")
    add("--hub_private_repo", action="store_true", help="make that repository private")
    options = parser.parse_args(words)
    tokenizer = GaussianTokenizer.from_pretrained(options.tokenizer) if options.tokenizer else None
    settings, processes = from_options(BuildSettings, vars(options)), options.num_proc
    head = load_head(options.head)
    print_counts(build(options.avatars, head, options.output_dir, settings, tokenizer, processes, options.overwrite))
    print(f"corpus: {options.output_dir}")
    if options.push_to_hub:
        print("uploaded:", upload(options.output_dir, options.push_to_hub, "dataset", options.hub_private_repo))
    return 0


def _stats(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog=f"{PROGRAM} stats")
    parser.add_argument("corpus", help="corpus folder, or its URL")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot the stats as this PNG")
    parser.add_argument("--page", type=Path, metavar="FILE", help="HTML page of the stats, portraits and licenses")
    options = parser.parse_args(words)
    corpus = load_corpus(options.corpus)
    stats = compute_stats(corpus)
    print(stats_table(stats))
    if options.plot:
        with atomic_file(options.plot) as file:
            file.write(plot_stats(stats))
        print(f"\nplot: {options.plot}")
    if options.page:
        print(f"\npage: {write_page(corpus, stats, options.page)}")
    return 0


def _validate(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog=f"{PROGRAM} validate")
    parser.add_argument("corpus", type=Path, help="corpus folder")
    parser.add_argument("--avatars", type=Path, help="compare with the subject folders the corpus was built from")
    parser.add_argument("--head", help="their head model")
    options = parser.parse_args(words)
    if (options.avatars is None) != (options.head is None):
        raise ValueError("--avatars and --head belong together: the subject folders, and the head model they are of")
    head = None if options.head is None else load_head(options.head)
    verdicts = validate(options.corpus, options.avatars, head, progress=True)
    for verdict in verdicts:
        print(f"{'bad ' if verdict.problems else 'good'} {verdict.file}")
        for problem in verdict.problems:
            print(f"       {problem}")
    bad = sum(bool(verdict.problems) for verdict in verdicts)
    print(f"{options.corpus}: {f'{bad} of {len(verdicts)} files are bad' if bad else 'complete and consistent'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
