"""The settings of a build, which are the options of the commands that build a corpus, and the counts these print."""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gaussian_tokenizer.utils.options import option

SIZE_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
BOUNDS = "fit: box around all points, plus 5 %%; default: the tokenizer's own; or meters as --bounds=lo_x,lo_y,lo_z,hi_x,hi_y,hi_z"


def _size(text: str) -> int:
    match = re.fullmatch(r"([0-9]+)\s*([kmg]?)b?", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; expected bytes, or 500KB, 256MB, 1GB")
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


@dataclass(frozen=True)
class BuildSettings:
    """What decides the bytes of a corpus, besides the subjects and the head model."""

    n_bins: int = option(1024, "levels per axis")
    # "fit", "default" or [[lo x, y, z], [hi x, y, z]] in meters
    bounds: str | Sequence[Sequence[float]] = option("fit", BOUNDS, type=_bounds)
    token_order: str = option("xyzf", "order of a point's tokens x, y, z and face (f), as yzxf")
    image_size: int = option(224, "side of the images that the tokenizer prepares, pixels")
    val_fraction: float = option(0.05, "share of the subjects for validation, at least one of two")
    num_validation: int | None = option(None, "subjects for validation, instead of --val_fraction", type=int)
    num_test: int = option(0, "subjects for a test split")
    seed: int = option(0, "of the split")
    shard_size: int = option(256 * 10**6, "bytes of a Parquet file before compression, or 256MB", type=_size)
    skip_bad: bool = option(False, "leave out subjects that cannot be used, and record them")
    allow_unknown_license: bool = option(False, "accept subjects without license or consent; the card names them")

    def __post_init__(self) -> None:
        if isinstance(self.bounds, str) and self.bounds not in ("fit", "default"):
            raise ValueError(f"bounds are {self.bounds!r}; expected fit, default or two corners of x, y, z in meters")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction is {self.val_fraction}; expected a share of the subjects in [0, 1)")
        if self.shard_size < 1 or min(self.num_validation or 0, self.num_test) < 0:
            raise ValueError(
                f"shard_size={self.shard_size}, num_validation={self.num_validation}, num_test={self.num_test}: "
                "expected a size of at least 1 byte and counts of 0 or more"
            )


def count_of(count: int, noun: str) -> str:
    """A number of things, such as "1 subject" or "2,000 subjects"."""
    return f"{count:,} {noun}" + "s" * (count != 1)


def print_counts(manifest: Mapping[str, Any]) -> None:
    """What a corpus holds, a line per split, and the subjects that were left out."""
    for name, counts in manifest["splits"].items():
        keys = {"subject": "subjects", "frame": "frames", "point": "num_points", "token": "num_tokens"}
        texts = [count_of(counts[key], noun) for noun, key in keys.items()]
        print(f"{name}: {', '.join(texts)}, {count_of(counts['num_out_of_bounds'], 'point')} out of bounds")
    for entry in manifest["skipped"]:
        print(f"left out {entry['folder']}: {entry['reason']}", file=sys.stderr)
