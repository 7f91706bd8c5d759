"""Which metrics can be computed on this machine, and what is missing for the others: `python -m eval.metrics doctor`."""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from itertools import zip_longest

from eval.networks.registry import OPENERS, Missing, NetworkOptions, add_network_flags
from gaussian_tokenizer.utils.options import from_options

NETWORK_OF_METRIC = {"LPIPS": "lpips", "FID": "inception", "AKD, APD, AED": "face", "CSIM": "arcface", "CLIP": "clip"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `doctor`; returns the exit status: 0, or 1 if a given file is not what its flag expects."""
    parser = argparse.ArgumentParser(prog="python -m eval.metrics", description="Metrics of avatars.")
    commands = parser.add_subparsers(dest="command", required=True)
    about = "list the metrics, the network each needs, and what is missing on this machine"
    doctor = commands.add_parser("doctor", help=about, description=f"{about[0].upper()}{about[1:]}. Downloads nothing.")
    add_network_flags(doctor)
    rows = _diagnosis(from_options(NetworkOptions, vars(parser.parse_args(arguments))))
    _print_table([("metric", "status", "network", "weights, or what is missing and what to do"), *rows])
    print("\nThe formulas of all metrics are ready: features, landmarks and rotations from elsewhere need no network.")
    return int(any(status == "wrong" for _, status, *_ in rows))


def _diagnosis(options: NetworkOptions) -> list[tuple[str, str, str, str]]:
    """Rows (metric, status, network, what to do) of the table."""
    rows = [(metric, "ready", "none needed", "") for metric in ("PSNR", "SSIM", "Coverage")]
    for metric, name in NETWORK_OF_METRIC.items():
        try:
            network = OPENERS[name](options)
        except (ValueError, OSError) as error:
            message = textwrap.fill(str(error), 100, break_long_words=False, break_on_hyphens=False)
            rows.append((metric, "wrong", name, message))
            continue
        if isinstance(network, Missing):
            rows.append((metric, "missing", network.network, f"{network.reason}\n{network.remedy}"))
        else:
            about = network.about
            weights = f"{about['weights']}\nsha256 {about['sha256'][:16]}"
            rows.append((metric, "ready", f"{about['name']}, {about['package']} {about['version']}", weights))
    return rows


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(line) for row in rows for line in row[column].split("\n")) for column in range(len(rows[0]))]
    widths[-1] = len(rows[0][-1])
    for row in [rows[0], tuple("-" * width for width in widths), *rows[1:]]:
        for line in zip_longest(*(cell.split("\n") for cell in row), fillvalue=""):
            print("  ".join(part.ljust(width) for part, width in zip(line, widths)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
