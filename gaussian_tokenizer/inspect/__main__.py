"""Say what a file or folder is, what is in it and what is wrong with it.

    python -m gaussian_tokenizer.inspect subjects/synthetic-0-000000 --image sheet.png
    python -m gaussian_tokenizer.inspect export/074_EMO-1 --head flame.safetensors --json

Trackings (see `tracking`) are looked at closely: with a head model, its projection is compared with images and masks.
Everything else the toolkit reads or writes is recognized, described in a few lines, and the command that looks deeper
is named. The exit status is 1 if anything is wrong, warnings aside.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError

from gaussian_tokenizer.captures.checks import Problem
from gaussian_tokenizer.captures.contact_sheet import contact_sheet
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.loading import load_head
from gaussian_tokenizer.inspect.kinds import Report, kind_of
from gaussian_tokenizer.utils.atomic import atomic_file


def inspect(path: str | Path, head: str | HeadModel | None = None) -> Report:
    """Look at a file or folder; FileNotFoundError if there is none. `head` as for `load_head`.

    Without a head, a tracking made on the procedural head (its metadata says so) is looked at with that.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    model = load_head(head) if isinstance(head, str) else head
    describe, what, commands = kind_of(path)
    report = Report(path, what, next=commands)
    try:
        describe(report, model)
    except (ValueError, OSError, SafetensorError) as error:
        report.problems.insert(0, Problem(" ".join(str(error).split()).removeprefix(f"{path}: ")))
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gaussian_tokenizer.inspect", description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="a tracking, avatar, corpus, model, head model, or a folder of such")
    parser.add_argument(
        "--head", help="head model the data was made on: procedural[:faces], .safetensors, FLAME .pkl, ICT"
    )
    parser.add_argument("--image", type=Path, help="write a contact sheet of a tracking to this PNG")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(arguments)
    try:
        report = inspect(options.path, options.head)
        if options.image is not None:
            _write_image(report, options.image)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report.to_json(), indent=2, ensure_ascii=False) if options.json else report)
    return 1 if report.has_errors else 0


def _write_image(report: Report, path: Path) -> None:
    if report.tracking is None or not report.tracking.frames or report.head is None:
        reason = "; give --head" if report.tracking is not None and report.head is None else ""
        raise ValueError(f"{report.path}: no image made, it is for trackings with images and a head model{reason}")
    sheet = contact_sheet(report.tracking, report.head)
    with atomic_file(path) as file:
        sheet.save(file, format="PNG", optimize=True)


if __name__ == "__main__":
    sys.exit(main())
