"""Figures of a corpus: how much it holds, how long its sequences are, how points spread over faces and bins.

`statistics` streams the shards and holds one batch of rows at a time; images are not read. `statistics_table` is the text
of it, `statistics_plot` an image; `corpus_page` makes a page of both.
"""

import io
from collections import Counter
from dataclasses import dataclass

import numpy as np

from gaussian_tokenizer.corpus.corpus import Corpus, read_rows
from gaussian_tokenizer.tokenizer.point_codec import SLOTS
from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer

SEQUENCE_BARS = 40
GREY, BLUE, COLOURS = "#b0b0b0", "#3b6ea5", ("#b5432e", "#4b8b3b", "#3b6ea5")


@dataclass(frozen=True)
class Statistics:
    """Figures of a corpus; `points_per_face[k]` counts the faces with k points, over all subjects."""

    tokenizer: GaussianTokenizer
    subjects: dict[str, int]  # by split
    frames: dict[str, int]
    num_tokens: int
    num_points: np.ndarray  # (subjects,)
    num_out_of_bounds: int
    points_per_face: np.ndarray  # (max + 1,)
    slot_counts: tuple[np.ndarray, ...]  # of x, y, z: (n_bins,), of the face: (n_faces,); how often each token is there
    licenses: dict[str, int]
    consents: dict[str, int]

    @property
    def empty_faces(self) -> float:
        """The share of faces without a point."""
        return float(self.points_per_face[0] / self.points_per_face.sum())

    @property
    def slot_entropies(self) -> list[float]:
        """Bits a token of x, y, z and face has, if nothing but its slot is known; log2 of the bins or faces at most."""
        return [_entropy(counts) for counts in self.slot_counts]

    @property
    def extent(self) -> np.ndarray:
        """(2, 3) meters: the corners of the box around all points, to a bin."""
        used = [np.flatnonzero(counts)[[0, -1]] + (0, 1) for counts in self.slot_counts[:3]]
        lo, hi = np.array(self.tokenizer.bounds)
        return lo + np.array(used).T / self.tokenizer.n_bins * (hi - lo)


def statistics(corpus: Corpus) -> Statistics:
    """Figures of a whole corpus, from the columns of `avatars`."""
    tokenizer = corpus.tokenizer
    points, outside = [], 0
    histogram = np.zeros(1, dtype=np.int64)
    slots = tuple(np.zeros(size, np.int64) for size in (*[tokenizer.n_bins] * 3, tokenizer.n_faces))
    licenses: Counter[str] = Counter()
    consents: Counter[str] = Counter()
    columns = ["input_ids", "num_points", "num_out_of_bounds", "points_per_face", "license", "consent"]
    for row in read_rows(corpus, "avatars", columns):
        points.append(row["num_points"])
        outside += row["num_out_of_bounds"]
        own = row["points_per_face"]
        histogram = np.pad(histogram, (0, max(0, len(own) - len(histogram))))
        histogram[: len(own)] += own
        body = row["input_ids"][1:-1].reshape(-1, 4).astype(np.int64)
        body[:, 3] -= tokenizer.n_bins
        for slot, counts in enumerate(slots):
            counts += np.bincount(body[:, slot], minlength=len(counts))
        licenses[row["license"]] += 1
        consents[row["consent"]] += 1
    splits = corpus.manifest["splits"]
    return Statistics(
        tokenizer=tokenizer,
        subjects={name: counts["subjects"] for name, counts in splits.items()},
        frames={name: counts["frames"] for name, counts in splits.items()},
        num_tokens=4 * sum(points) + 2 * len(points),
        num_points=np.array(points),
        num_out_of_bounds=outside,
        points_per_face=histogram,
        slot_counts=slots,
        licenses=dict(sorted(licenses.items())),
        consents=dict(sorted(consents.items())),
    )


def statistics_rows(figures: Statistics) -> list[tuple[str, str]]:
    """The figures as names and texts."""
    points, faces = figures.num_points, figures.points_per_face
    occupied = faces[1:].sum()
    mean = (faces * np.arange(len(faces))).sum() / max(1, occupied)
    entropies = zip(SLOTS, figures.slot_entropies, figures.slot_counts)
    boxes = [np.array(figures.tokenizer.bounds), figures.extent]
    bounds, extent = (" x ".join(f"{lo:.3f}..{hi:.3f}" for lo, hi in box.T) for box in boxes)
    return [
        ("subjects", f"{len(points):,} ({_counts(figures.subjects)})"),
        ("frames", f"{sum(figures.frames.values()):,} ({_counts(figures.frames)})"),
        ("tokens", f"{figures.num_tokens:,}"),
        ("points", f"{points.sum():,}"),
        ("points a subject", f"min {points.min():,}, median {np.median(points):,.0f}, max {points.max():,}"),
        ("bounds (x, y, z)", f"{bounds} m in {figures.tokenizer.n_bins:,} bins"),
        ("of them used", f"{extent} m"),
        ("points out of bounds", f"{figures.num_out_of_bounds:,}"),
        ("faces without points", f"{figures.empty_faces:.1%}"),
        ("points an occupied face", f"mean {mean:.2f}, max {len(faces) - 1}"),
        (
            "entropy of a slot",
            ", ".join(f"{slot} {bits:.2f} of {np.log2(len(n)):.2f}" for slot, bits, n in entropies) + " bits",
        ),
        ("licenses", _counts(figures.licenses)),
        ("consent", _counts(figures.consents)),
    ]


def statistics_table(figures: Statistics) -> str:
    """The figures as lines of text."""
    faces = figures.points_per_face
    lines = [f"{name:<24} {value}" for name, value in statistics_rows(figures)]
    lines += ["", f"{'points on a face':<18} {'faces':>12}  {'share':>7}"]
    lines += [
        f"{count:<18} {number:>12,}  {number / faces.sum():>7.2%}" for count, number in enumerate(faces) if number
    ]
    return "\n".join(lines)


def statistics_plot(figures: Statistics) -> bytes:
    """Points per face, sequence lengths, use of the bins and entropy of the slots as a PNG."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError('an image needs matplotlib: pip install "avatar-pointillist[demo]"') from None
    figure = Figure(figsize=(11, 7), dpi=100, layout="constrained")
    (on_faces, lengths), (bins, slots) = figure.subplots(2, 2)
    occupied = figures.points_per_face[1:]
    on_faces.bar(np.arange(1, len(occupied) + 1), 100 * occupied / max(1, occupied.sum()), color=BLUE)
    on_faces.set(xlabel=f"points on a face ({figures.empty_faces:.1%} have none)", ylabel="% of the others")
    lengths.hist(4 * figures.num_points + 2, bins=SEQUENCE_BARS, color=BLUE)
    lengths.set(xlabel="tokens of a sequence", ylabel="subjects")
    lo, hi = np.array(figures.tokenizer.bounds)
    for axis, (counts, color) in enumerate(zip(figures.slot_counts[:3], COLOURS)):
        edges = np.linspace(lo[axis], hi[axis], len(counts) + 1)
        bins.stairs(100 * counts / counts.sum(), edges, color=color, label="xyz"[axis])
    bins.set(xlabel="meters, from bound to bound", ylabel="% of points in a bin")
    bins.legend(frameon=False)
    most = [np.log2(len(counts)) for counts in figures.slot_counts]
    slots.barh(SLOTS, most, color=GREY, label="if all tokens were as frequent")
    slots.barh(SLOTS, figures.slot_entropies, color=BLUE, height=0.5, label="here")
    slots.set(xlabel="entropy of a slot, bits")
    slots.invert_yaxis()
    slots.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    for axes in (on_faces, lengths, bins, slots):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{len(figures.num_points):,} subjects, {figures.num_points.sum():,} points")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _entropy(counts: np.ndarray) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())
