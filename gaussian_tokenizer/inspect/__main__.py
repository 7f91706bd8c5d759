"""Say what a file or folder is, what it holds and what is wrong with it.

    python -m gaussian_tokenizer.inspect subjects/synthetic-0-000000 --image sheet.png
    python -m gaussian_tokenizer.inspect export/074_EMO-1 --head flame.safetensors --json

With a head model, its projection is compared with the images and masks of a tracking. The exit status is 1 if there are
errors; warnings do not count.
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
from gaussian_tokenizer.utils.hub import one_line


def inspect(path: str | Path, head: str | HeadModel | None = None) -> Report:
    """Describe and check a file or folder; FileNotFoundError if there is none. `head` as for `load_head`."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    model = load_head(head) if isinstance(head, str) else head
    describe, what, commands = kind_of(path)
    report = Report(path, what, next=commands)
    try:
        describe(report, model)
    except (ValueError, OSError, SafetensorError) as error:
        report.problems.insert(0, Problem(one_line(error).removeprefix(f"{path}: ")))
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gaussian_tokenizer.inspect", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("path", type=Path, help="a tracking, avatar, corpus, model, head model, or a folder of these")
    add("--head", help="head model the data was made on: procedural[:faces], .safetensors, FLAME .pkl, ICT")
    add("--image", type=Path, metavar="FILE", help="contact sheet of a tracking as this PNG")
    add("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(arguments)
    try:
        report = inspect(options.path, options.head)
        if options.image is not None:
            _write_contact_sheet(report, options.image)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report.to_json(), indent=2, ensure_ascii=False) if options.json else report)
    return 1 if report.has_errors else 0


def _write_contact_sheet(report: Report, path: Path) -> None:
    if report.tracking is None or not report.tracking.frames or report.head is None:
        advice = "; give --head" if report.tracking is not None and report.head is None else ""
        raise ValueError(f"{report.path}: a contact sheet needs a tracking with images and a head model{advice}")
    sheet = contact_sheet(report.tracking, report.head)
    with atomic_file(path) as file:
        sheet.save(file, format="PNG", optimize=True)


if __name__ == "__main__":
    sys.exit(main())
