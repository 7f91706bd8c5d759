"""Distances between identities, against a loop over pairs."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from gaussian_tokenizer.corpus.corpus import load_corpus
from gaussian_tokenizer.corpus.identity_stats import identity_stats, shapes_of_corpus, shapes_of_folders
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.heads.procedural_head import build_procedural_head

HEAD = build_procedural_head(600)


def shapes(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, HEAD.n_shape)).astype(np.float32)


def test_distances_are_those_of_all_pairs():
    points = shapes(9)
    neutral = HeadParameters.zeros(HEAD.n_shape, HEAD.n_expression)
    meshes = [HEAD.canonical_vertices(replace(neutral, shape=torch.from_numpy(shape))).numpy() for shape in points]
    found = identity_stats(HEAD, points)
    for (smallest, median), items in ((found.shape_distances, points), (found.vertex_distances, meshes)):
        pairs = itertools.combinations(items, 2)
        distances = [np.sqrt(((a - b) ** 2).sum(-1).mean() if a.ndim == 2 else ((a - b) ** 2).sum()) for a, b in pairs]
        assert (smallest, median) == pytest.approx(
            (min(distances), sorted(distances)[(len(distances) - 1) // 2]), rel=1e-4
        )
    assert "no two of 9 heads have the same shape; of all of them, the closest two are" in str(found)


def test_equal_heads_are_counted_wherever_they_are():
    points = shapes(2000)
    points[1999] = points[3]
    points[1000] = points[3]
    found = identity_stats(HEAD, points, sample_size=16)
    assert (found.num_subjects, found.num_duplicates, found.num_sampled) == (2000, 2, 16)
    assert str(found).startswith("2 of 2,000 heads have the shape of another; of 16 drawn at random")


def test_the_sample_is_drawn_evenly_and_is_the_same_again():
    points = np.arange(1000, dtype=np.float32)[:, None] * np.ones((1, HEAD.n_shape), np.float32) / 1000
    found = identity_stats(HEAD, iter(points), sample_size=200)
    assert found == identity_stats(HEAD, points, sample_size=200)
    # The median distance of two even random numbers in 0..1 is 1 - sqrt(1/2).
    assert found.shape_distances[1] / HEAD.n_shape**0.5 == pytest.approx(1 - 0.5**0.5, abs=0.03)


def test_one_subject_or_none_has_no_distances():
    assert str(identity_stats(HEAD, shapes(1))) == "no two of 1 heads have the same shape"
    assert identity_stats(HEAD, []).num_subjects == 0


def test_folders_and_corpus_give_the_same_shapes(tiny_corpus):
    folders = sorted((tiny_corpus.parent / "avatars").iterdir())
    found = [
        identity_stats(HEAD, source)
        for source in (shapes_of_folders(folders), shapes_of_corpus(load_corpus(tiny_corpus)))
    ]
    assert (
        found[0].num_subjects == found[1].num_subjects == 12 and found[0].num_duplicates == found[1].num_duplicates == 0
    )
    assert found[0].vertex_distances == pytest.approx(found[1].vertex_distances)
