"""Speed of the tokenizer on one core, beside plain NumPy and beside the limits that nothing can pass.

    python benchmarks/tokenizer.py                      # 1,000 to 1,000,000 points, about a minute
    python benchmarks/tokenizer.py --sizes 1000 27000 --rounds 5

Rows: plain NumPy (the formula, one lexsort), ours, NumPy's stable argsort of as many int64 keys, and a copy of the
points in memory. Times are processor time of the one thread; all rows of a size are timed in turns and the fastest turn
counts, as in timeit. Targets: at 27,000 points encode takes at most 2 x the argsort and decode a third of encode; both
are linear to the largest size (time ~ points ** exponent; a sort alone has 1.08, fresh memory pages add some).
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import platform
import time
from collections.abc import Callable

import numpy as np
import torch
from report import markdown_table, write_report

from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer

REFERENCE_SIZE = 27_000  # points of an avatar of the paper
LIMIT = "stable argsort of the keys"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, REFERENCE_SIZE, 100_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=41, help="timed turns for each size; a third of it above 500,000")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = GaussianTokenizer()
    rows = []
    for n_points in arguments.sizes:
        rows += measure(tokenizer, n_points, max(3, arguments.rounds // (3 if n_points > 500_000 else 1)))
        print(f"{n_points:>9,} points measured", flush=True)
    targets = judge(rows)
    print(markdown_table(rows), markdown_table(targets), sep="\n\n")
    print(f"\nwritten: {write_report('tokenizer', rows, targets=targets, threads=1)}")


def measure(tokenizer: GaussianTokenizer, n_points: int, rounds: int) -> list[dict]:
    points = shell(tokenizer, n_points)
    positions, faces = points["positions"], points["faces"]
    ids = tokenizer(points)["input_ids"]
    assert np.array_equal(ids, plain_encode(tokenizer, positions, faces))
    decoded = tokenizer.decode(ids)
    plain = plain_decode(tokenizer, ids)
    assert np.array_equal(decoded["faces"], plain[1]) and np.allclose(decoded["positions"], plain[0], atol=1e-7)
    keys = packed_keys(tokenizer, positions, faces)
    calls: dict[str, Callable[[], object]] = {
        "plain NumPy encode": lambda: plain_encode(tokenizer, positions, faces),
        "ours encode": lambda: tokenizer(points),
        "plain NumPy decode": lambda: plain_decode(tokenizer, ids),
        "ours decode": lambda: tokenizer.decode(ids),
        LIMIT: lambda: np.argsort(keys, kind="stable"),
        "copy of the points": lambda: (positions.copy(), faces.copy()),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with one_core():
        for _ in range(rounds):
            for name, call in calls.items():
                call()  # not timed: so that no row pays for the memory of the row before it
                start = time.thread_time()
                call()
                seconds[name].append(time.thread_time() - start)
    best = {name: min(values) for name, values in seconds.items()}
    return [
        {
            "points": n_points,
            "what": name,
            "milliseconds": 1e3 * fastest,
            "ns per point": 1e9 * fastest / n_points,
            "x argsort": fastest / best[LIMIT],
        }
        for name, fastest in best.items()
    ]


def judge(rows: list[dict]) -> list[dict]:
    """The targets that the measured sizes allow to judge."""
    time_of = {(row["points"], row["what"]): row["milliseconds"] for row in rows}
    sizes = sorted({row["points"] for row in rows})
    targets = []
    if REFERENCE_SIZE in sizes:
        encode, decode = (time_of[REFERENCE_SIZE, f"ours {name}"] for name in ("encode", "decode"))
        ratio = encode / time_of[REFERENCE_SIZE, LIMIT]
        targets += [("encode / argsort at 27,000 points", ratio, 2.0), ("decode / encode", decode / encode, 1 / 3)]
        for name in ("encode", "decode") if sizes[-1] > REFERENCE_SIZE else ():
            growth = time_of[sizes[-1], f"ours {name}"] / time_of[REFERENCE_SIZE, f"ours {name}"]
            exponent = float(np.log(growth) / np.log(sizes[-1] / REFERENCE_SIZE))
            targets.append((f"{name}: exponent of the growth to {sizes[-1]:,}", exponent, 1.2))
    return [
        {"target": name, "measured": value, "at most": most, "reached": value <= most} for name, value, most in targets
    ]


def shell(tokenizer: GaussianTokenizer, n_points: int) -> dict[str, np.ndarray]:
    """Points near an ellipsoid the size of a head, in random order."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(n_points, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    positions = directions * [0.09, 0.14, 0.11] + rng.normal(0, 0.004, (n_points, 3))
    return {"positions": positions.astype(np.float32), "faces": rng.integers(0, tokenizer.n_faces, n_points)}


def plain_bins(tokenizer: GaussianTokenizer, positions: np.ndarray) -> np.ndarray:
    lo, hi = np.array(tokenizer.bounds)
    bins = np.floor((positions - lo) / (hi - lo) * tokenizer.n_bins).astype(np.int64)
    return bins.clip(0, tokenizer.n_bins - 1)


def plain_encode(tokenizer: GaussianTokenizer, positions: np.ndarray, faces: np.ndarray) -> np.ndarray:
    bins = plain_bins(tokenizer, positions)
    order = np.lexsort((faces, bins[:, 0], bins[:, 2], bins[:, 1]))
    tokens = np.concatenate([bins, faces[:, None] + tokenizer.n_bins], axis=1)[order]
    return np.concatenate([[tokenizer.bos_token_id], tokens.ravel(), [tokenizer.eos_token_id]]).astype(np.uint16)


def plain_decode(tokenizer: GaussianTokenizer, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    lo, hi = np.array(tokenizer.bounds)
    tokens = ids[1:-1].reshape(-1, 4).astype(np.int64)
    positions = lo + (tokens[:, :3] + 0.5) * ((hi - lo) / tokenizer.n_bins)
    return positions.astype(np.float32), tokens[:, 3] - tokenizer.n_bins


def packed_keys(tokenizer: GaussianTokenizer, positions: np.ndarray, faces: np.ndarray) -> np.ndarray:
    x, y, z = plain_bins(tokenizer, positions).T
    return ((y * tokenizer.n_bins + z) * tokenizer.n_bins + x) * tokenizer.n_faces + faces


class one_core:
    """Keep this process on one CPU core for a while, where the system can (Linux)."""

    def __enter__(self) -> None:
        if platform.system() == "Linux":
            self.cores = os.sched_getaffinity(0)
            os.sched_setaffinity(0, {min(self.cores)})

    def __exit__(self, *_: object) -> None:
        if platform.system() == "Linux":
            os.sched_setaffinity(0, self.cores)


if __name__ == "__main__":
    main()
