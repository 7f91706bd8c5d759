"""Options of every command that writes a corpus, and what it prints at its end."""

import argparse
import re
import sys
from collections.abc import Mapping
from typing import Any

SIZE_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


def print_counts(manifest: Mapping[str, Any]) -> None:
    """What a corpus holds, a line a split, and who was left out of it."""
    for name, counts in manifest["splits"].items():
        print(
            f"{name}: {counts['subjects']:,} subjects, {counts['frames']:,} frames, {counts['num_points']:,} points, "
            f"{counts['num_tokens']:,} tokens, {counts['num_out_of_bounds']:,} points out of bounds"
        )
    for entry in manifest["skipped"]:
        print(f"left out {entry['folder']}: {entry['reason']}", file=sys.stderr)


def add_corpus_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Options of every command that writes a corpus."""
    add = parser.add_argument
    add("--shard_size", type=_size, default="256MB", help="size of a Parquet file before compression, about")
    add("--n_bins", type=int, default=1024, help="levels an axis")
    add(
        "--bounds",
        type=_bounds,
        default="fit",
        help="fit: the box around all points and 5 %% more; default: the tokenizer's own; or lo_x,lo_y,lo_z,hi_x,hi_y,"
        "hi_z in meters (write --bounds=-0.3,...)",
    )
    add("--val_fraction", type=float, default=0.05, help="part of the subjects for validation, at least one of two")
    add("--num_validation", type=int, help="subjects for validation, instead of --val_fraction")
    add("--num_test", type=int, default=0, help="subjects for a test split")
    add("--overwrite", action="store_true", help="replace a corpus, or one in the making with other settings")


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
