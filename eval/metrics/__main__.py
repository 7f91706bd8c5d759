"""Which metrics can be computed on this machine, and what the others lack: `python -m eval.metrics.functional doctor`."""

import argparse
import sys
import textwrap
from collections.abc import Sequence

NETWORK_OF_METRIC = {"LPIPS": "lpips", "FID": "inception", "AKD, APD, AED": "face", "CSIM": "arcface", "CLIP": "clip"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `doctor`; returns the exit status: 0, or 1 if a file that was given is not what its flag asks for."""
    from eval.networks.registry import add_network_flags, options_from

    parser = argparse.ArgumentParser(prog="python -m eval.metrics.functional", description="Metrics of avatars.")
    commands = parser.add_subparsers(dest="command", required=True)
    about = "list the metrics, the network each needs, and what is missing on this machine"
    doctor = commands.add_parser("doctor", help=about, description=f"{about[0].upper()}{about[1:]}. Downloads nothing.")
    add_network_flags(doctor)
    rows, status = _diagnosis(options_from(parser.parse_args(arguments)))
    _print_table([("metric", "status", "network", "weights, or what is missing and what to do"), *rows])
    print(
        "\nThe mathematics of every metric is ready: features, landmarks and rotations from elsewhere need no network."
    )
    return status


def _diagnosis(options) -> tuple[list[tuple[str, str, str, str]], int]:
    """Rows (metric, status, network, what to do) of the table, and the exit status."""
    from eval.networks.registry import OPENERS, Missing

    rows = [(metric, "ready", "none: mathematics", "") for metric in ("PSNR", "SSIM")]
    status = 0
    for metric, name in NETWORK_OF_METRIC.items():
        try:
            network = OPENERS[name](options)
        except (ValueError, OSError) as error:
            lines = textwrap.wrap(str(error), 100, break_long_words=False, break_on_hyphens=False)
            rows.append((metric, "wrong", name, "\n".join(lines)))
            status = 1
            continue
        if isinstance(network, Missing):
            rows.append((metric, "missing", network.network, f"{network.reason}\n{network.remedy}"))
        else:
            about = network.describe()
            weights = f"{about['weights']}\nsha256 {about['sha256'][:16]}"
            rows.append((metric, "ready", f"{about['name']}, {about['package']} {about['version']}", weights))
    return rows, status


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(line) for row in rows for line in row[column].split("\n")) for column in range(len(rows[0]))]
    widths[-1] = 0
    for index, row in enumerate(rows):
        cells = [cell.split("\n") for cell in row]
        for line in range(max(map(len, cells))):
            parts = [cell[line] if line < len(cell) else "" for cell in cells]
            print("  ".join(part.ljust(width) for part, width in zip(parts, widths)).rstrip())
        if index == 0:
            print("  ".join("-" * max(width, len(name)) for width, name in zip(widths, row)))


if __name__ == "__main__":
    sys.exit(main())
