"""Read damaged files of every format for some minutes.

python -m tests.fuzz --minutes 10 --seed 1                        findings in outputs/fuzz/findings
python -m tests.fuzz --seed 1 --start 4711 --count 1              one case again
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

from tests.fuzz.runner import fuzz, work


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--count", type=int, help="cases; default: as many as the time allows")
    parser.add_argument("--only", default="", help="formats whose name holds this; the cases are other ones then")
    parser.add_argument("--folder", type=Path, default=Path("outputs/fuzz"), help="where findings are kept")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--stop", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.folder, options.seed, options.start, options.stop, options.minutes, options.only)
        return 0
    count, found = fuzz(options.folder, options.seed, options.minutes, options.start, options.count, options.only)
    for each in found[:100]:
        print(f"{each.seed}-{each.index} {each.format}: {each.what} at {each.where}; {each.file}")
    kinds = Counter((each.format, each.what.split(":")[0], each.where) for each in found)
    for (name, what, where), times in kinds.most_common():
        print(f"{times:6} {name}: {what} at {where}")
    print(f"{count:,} damaged files of seed {options.seed}, {len(found)} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
