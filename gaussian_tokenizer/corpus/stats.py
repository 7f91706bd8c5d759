"""Stats of a corpus: how much it holds, how long its sequences are, how its points spread over faces and bins."""

import io
from collections import Counter
from dataclasses import dataclass

import numpy as np

from gaussian_tokenizer.corpus.corpus import Corpus, read_rows
from gaussian_tokenizer.tokenizer.point_codec import SLOTS
from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer

SEQUENCE_BARS = 40
GRAY, BLUE, AXIS_COLORS = "#b0b0b0", "#3b6ea5", ("#b5432e", "#4b8b3b", "#3b6ea5")


@dataclass(frozen=True)
class CorpusStats:
    """Counts over all subjects of a corpus."""

    tokenizer: GaussianTokenizer
    subjects: dict[str, int]  # by split
    frames: dict[str, int]
    num_points: np.ndarray  # (subjects,)
    num_out_of_bounds: int
    points_per_face: np.ndarray  # (max + 1,) entry k: number of faces with k points
    slot_counts: tuple[np.ndarray, ...]  # frequency of each token; x, y, z: (n_bins,), face: (n_faces,)
    licenses: dict[str, int]
    consents: dict[str, int]

    @property
    def num_tokens(self) -> int:
        return int(4 * self.num_points.sum() + 2 * len(self.num_points))

    @property
    def empty_faces(self) -> float:
        """Share of faces without points, 0..1."""
        return float(self.points_per_face[0] / self.points_per_face.sum())

    @property
    def slot_entropies(self) -> list[float]:
        """Entropy of the unigram distribution of x, y, z and face in bits; at most log2 of the bins or faces."""
        shares = [counts[counts > 0] / counts.sum() for counts in self.slot_counts]
        return [float(-(share * np.log2(share)).sum()) for share in shares]

    @property
    def extent(self) -> np.ndarray:
        """(2, 3) meters: corners of the box around all points, rounded outwards to a bin."""
        used = [np.flatnonzero(counts)[[0, -1]] + (0, 1) for counts in self.slot_counts[:3]]
        lo, hi = np.array(self.tokenizer.bounds)
        return lo + np.array(used).T / self.tokenizer.n_bins * (hi - lo)


def compute_stats(corpus: Corpus) -> CorpusStats:
    """Stats of a whole corpus, from the columns of `avatars`; one batch of rows is in memory at a time."""
    tokenizer = corpus.tokenizer
    points, outside = [], 0
    histogram = np.zeros(1, dtype=np.int64)
    slots = tuple(np.zeros(size, np.int64) for size in (*[tokenizer.n_bins] * 3, tokenizer.n_faces))
    terms: dict[str, Counter[str]] = {"license": Counter(), "consent": Counter()}
    columns = ["input_ids", "num_points", "num_out_of_bounds", "points_per_face", *terms]
    for row in read_rows(corpus, "avatars", columns):
        points.append(row["num_points"])
        outside += row["num_out_of_bounds"]
        own = row["points_per_face"]
        histogram = np.pad(histogram, (0, max(0, len(own) - len(histogram))))
        histogram[: len(own)] += own
        body = row["input_ids"][1:-1].reshape(-1, 4)[:, tokenizer.slot_columns].astype(np.int64)
        body[:, 3] -= tokenizer.n_bins
        for slot, counts in enumerate(slots):
            counts += np.bincount(body[:, slot], minlength=len(counts))
        for name, counter in terms.items():
            counter[row[name]] += 1
    splits = corpus.manifest["splits"]
    return CorpusStats(
        tokenizer=tokenizer,
        subjects={name: counts["subjects"] for name, counts in splits.items()},
        frames={name: counts["frames"] for name, counts in splits.items()},
        num_points=np.array(points),
        num_out_of_bounds=outside,
        points_per_face=histogram,
        slot_counts=slots,
        licenses=dict(sorted(terms["license"].items())),
        consents=dict(sorted(terms["consent"].items())),
    )


def stats_rows(stats: CorpusStats) -> list[tuple[str, str]]:
    """The stats as names and texts."""
    points, faces = stats.num_points, stats.points_per_face
    mean = (faces * np.arange(len(faces))).sum() / max(1, faces[1:].sum())
    slots = zip(SLOTS, stats.slot_entropies, stats.slot_counts)
    entropies = [f"{slot} {bits:.2f} of {np.log2(len(counts)):.2f}" for slot, bits, counts in slots]
    boxes = [np.array(stats.tokenizer.bounds), stats.extent]
    bounds, extent = (" x ".join(f"{lo:.3f}..{hi:.3f}" for lo, hi in box.T) for box in boxes)
    return [
        ("subjects", f"{len(points):,} ({_counts(stats.subjects)})"),
        ("frames", f"{sum(stats.frames.values()):,} ({_counts(stats.frames)})"),
        ("tokens", f"{stats.num_tokens:,}"),
        ("points", f"{points.sum():,}"),
        ("points per subject", f"min {points.min():,}, median {np.median(points):,.0f}, max {points.max():,}"),
        ("bounds (x, y, z)", f"{bounds} m in {stats.tokenizer.n_bins:,} bins"),
        ("box around all points", f"{extent} m"),
        ("points out of bounds", f"{stats.num_out_of_bounds:,}"),
        ("faces without points", f"{stats.empty_faces:.1%}"),
        ("points per occupied face", f"mean {mean:.2f}, max {len(faces) - 1}"),
        ("entropy of a slot", f"{', '.join(entropies)} bits"),
        ("licenses", _counts(stats.licenses)),
        ("consent", _counts(stats.consents)),
    ]


def stats_table(stats: CorpusStats) -> str:
    """The stats as lines of text."""
    faces = stats.points_per_face
    lines = [f"{name:<24} {value}" for name, value in stats_rows(stats)]
    lines += ["", f"{'points on a face':<18} {'faces':>12}  {'share':>7}"]
    lines += [f"{k:<18} {number:>12,}  {number / faces.sum():>7.2%}" for k, number in enumerate(faces) if number]
    return "\n".join(lines)


def plot_stats(stats: CorpusStats) -> bytes:
    """Points per face, sequence lengths, use of the bins and entropy of the slots as a PNG."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError('an image needs matplotlib: pip install "avatar-pointillist[demo]"') from None
    figure = Figure(figsize=(11, 7), dpi=100, layout="constrained")
    (on_faces, lengths), (bins, slots) = figure.subplots(2, 2)
    occupied = stats.points_per_face[1:]
    on_faces.bar(np.arange(1, len(occupied) + 1), 100 * occupied / max(1, occupied.sum()), color=BLUE)
    on_faces.set(xlabel=f"points on a face ({stats.empty_faces:.1%} have none)", ylabel="% of the others")
    lengths.hist(4 * stats.num_points + 2, bins=SEQUENCE_BARS, color=BLUE)
    lengths.set(xlabel="tokens of a sequence", ylabel="subjects")
    lo, hi = np.array(stats.tokenizer.bounds)
    for axis, (counts, color) in enumerate(zip(stats.slot_counts[:3], AXIS_COLORS)):
        edges = np.linspace(lo[axis], hi[axis], len(counts) + 1)
        bins.stairs(100 * counts / counts.sum(), edges, color=color, label="xyz"[axis])
    bins.set(xlabel="meters, from bound to bound", ylabel="% of points in a bin")
    bins.legend(frameon=False)
    most = [np.log2(len(counts)) for counts in stats.slot_counts]
    slots.barh(SLOTS, most, color=GRAY, label="if all tokens were as frequent")
    slots.barh(SLOTS, stats.slot_entropies, color=BLUE, height=0.5, label="here")
    slots.set(xlabel="entropy of a slot, bits")
    slots.invert_yaxis()
    slots.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    for axes in (on_faces, lengths, bins, slots):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{len(stats.num_points):,} subjects, {stats.num_points.sum():,} points")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())
