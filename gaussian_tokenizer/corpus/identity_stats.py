"""How different the heads of many subjects are: distances between identities, and whether any head is there twice.

Duplicates are looked for among all subjects, by a digest of each shape vector: 16 bytes a subject are kept, and only
equal vectors are found. Distances are those of all pairs of a random sample, so their cost and memory do not grow with
the number of subjects; the closest pair of the sample is not the closest of all.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from gaussian_tokenizer.avatars.avatar_files import PARAMETERS_NAME
from gaussian_tokenizer.corpus.corpus import Corpus, read_rows
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters

SAMPLE_SIZE = 512


@dataclass(frozen=True)
class IdentityStats:
    """Of the shape vectors of `num_subjects`; distances are (smallest, median) over the pairs of `num_sampled`."""

    num_subjects: int
    num_duplicates: int  # subjects with the shape of one before them
    num_sampled: int
    shape_distances: tuple[float, float]  # Euclidean, in the units of the shape space
    vertex_distances: tuple[float, float]  # root mean square over the vertices, meters

    def __str__(self) -> str:
        twins = f"{self.num_duplicates:,} of {self.num_subjects:,} heads have the shape of another"
        if not self.num_duplicates:
            twins = f"no two of {self.num_subjects:,} heads have the same shape"
        if self.num_sampled < 2:
            return twins
        (shape_min, shape_median), (low, median) = self.shape_distances, self.vertex_distances
        sample = "all of them" if self.num_sampled == self.num_subjects else f"{self.num_sampled:,} drawn at random"
        return (
            f"{twins}; of {sample}, the closest two are {1000 * low:.2f} mm apart, the median pair {1000 * median:.2f} mm "
            f"(root mean square over the vertices; {shape_min:.2f} and {shape_median:.2f} in shape space)"
        )


def identity_stats(head: HeadModel, shapes: Iterable[np.ndarray], sample_size: int = SAMPLE_SIZE) -> IdentityStats:
    """Statistics of shape vectors (S,), read once, one after the other; the sample is the same for the same vectors."""
    rng = np.random.default_rng(0)
    seen: set[bytes] = set()
    sample: list[np.ndarray] = []
    count = 0
    for shape in shapes:
        seen.add(hashlib.blake2b(np.float32(shape).tobytes(), digest_size=16).digest())
        # Reservoir sampling (Vitter 1985, algorithm R): every subject has the same chance, whatever their number.
        place = count if count < sample_size else int(rng.integers(count + 1))
        if place < sample_size:
            sample[place : place + 1] = [np.asarray(shape, np.float32)]
        count += 1
    points = np.stack(sample) if sample else np.zeros((0, head.n_shape), np.float32)
    neutral = HeadParameters.zeros(head.n_shape, head.n_expression)
    meshes = [head.canonical_vertices(replace(neutral, shape=torch.from_numpy(shape))).flatten() for shape in points]
    return IdentityStats(
        num_subjects=count,
        num_duplicates=count - len(seen),
        num_sampled=len(points),
        shape_distances=_smallest_and_median(torch.from_numpy(points)),
        vertex_distances=_smallest_and_median(torch.stack(meshes) / head.n_vertices**0.5) if meshes else (0.0, 0.0),
    )


def shapes_of_folders(folders: Sequence[Path]) -> Iterator[np.ndarray]:
    """The shape vector of every avatar folder."""
    return (HeadParameters.load(folder / PARAMETERS_NAME).shape.numpy() for folder in folders)


def shapes_of_corpus(corpus: Corpus) -> Iterator[np.ndarray]:
    """The shape vector of every avatar of a corpus; no other column is read."""
    return (row["shape"] for row in read_rows(corpus, "avatars", ["shape"]))


def _smallest_and_median(vectors: torch.Tensor) -> tuple[float, float]:
    """Over the Euclidean distances of all pairs of (M, D) vectors; zeros where there is no pair."""
    if len(vectors) < 2:
        return 0.0, 0.0
    distances = torch.pdist(vectors)
    return distances.min().item(), distances.median().item()
