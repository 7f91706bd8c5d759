"""The tokenizer against a slow twin in plain Python floats, its errors, and its life as a folder of files."""

import json
import math
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor

from gaussian_tokenizer import GaussianTokenizer
from gaussian_tokenizer.tokenizer.processing_conditions import portrait_rgba

IMAGENET_WHITE = (1 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])


def spelled(tokenizer, tokens):
    """x, y, z and face in the order of the tokenizer."""
    return [dict(zip("xyzf", tokens, strict=True))[letter] for letter in tokenizer.token_order]


def slow_encode(tokenizer, points):
    """The definition, one point at a time in Python floats."""
    lo, hi = tokenizer.bounds
    rows = []
    for position, face in zip(points["positions"].tolist(), points["faces"].tolist(), strict=True):
        bins = [math.floor((position[a] - lo[a]) / (hi[a] - lo[a]) * tokenizer.n_bins) for a in range(3)]
        bins = [min(max(b, 0), tokenizer.n_bins - 1) for b in bins]
        order = tuple(bins["xyz".index(axis)] for axis in tokenizer.axis_order)
        rows.append(((*order, face), spelled(tokenizer, [*bins, tokenizer.n_bins + face])))
    body = [token for _, tokens in sorted(rows) for token in tokens]
    return [tokenizer.bos_token_id, *body, tokenizer.eos_token_id]


def cloud(n_points, n_faces=10144, seed=0, lo=-0.3, hi=0.3):
    rng = np.random.default_rng(seed)
    positions = rng.uniform(lo, hi, (n_points, 3)).astype(np.float32).clip(np.float32(lo), np.float32(hi))
    return {"positions": positions * np.float32(0.999999), "faces": rng.integers(0, n_faces, n_points)}


@st.composite
def tokenizers(draw):
    n_bins = draw(st.sampled_from([1, 2, 3, 128, 1000, 1024, 4096, 65536]))
    n_faces = draw(st.sampled_from([1, 2, 600, 10144, 32768]))
    lo = [draw(st.floats(-1, 1, width=32)) for _ in range(3)]
    # Edges for which float32 can hold all the bin centers: 65536 bins near 1 m need more than 8 mm.
    edges = [draw(st.floats(0.125, 10)) for _ in range(3)]
    bounds = [lo, [low + edge for low, edge in zip(lo, edges, strict=True)]]
    axis_order = draw(st.permutations("xyz").map("".join))
    orders = {"axis_order": axis_order, "token_order": draw(st.permutations("xyzf").map("".join))}
    return GaussianTokenizer(n_bins=n_bins, n_faces=n_faces, bounds=bounds, **orders)


def sorted_ids(tokenizer, rng, n_points):
    bins = rng.integers(0, tokenizer.n_bins, (n_points, 3))
    faces = rng.integers(0, tokenizer.n_faces, n_points)
    order = ["xyz".index(axis) for axis in tokenizer.axis_order]
    rows = sorted(([*point[order].tolist(), face], spelled(tokenizer, [*point.tolist(), tokenizer.n_bins + face]))
                  for point, face in zip(bins, faces.tolist(), strict=True))  # fmt: skip
    body = [token for _, tokens in rows for token in tokens]
    return [tokenizer.bos_token_id, *body, tokenizer.eos_token_id]


# ---- points <-> ids


def test_the_vocabulary_of_flame_is_the_paper_s():
    tokenizer = GaussianTokenizer()
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.vocab_size]
    assert ids == [11168, 11169, 11170, 11171]


@settings(max_examples=60, deadline=None)
@given(tokenizers(), st.integers(1, 200), st.integers(0, 2**32))
def test_ids_agree_with_the_slow_twin_also_for_points_outside(tokenizer, n_points, seed):
    rng = np.random.default_rng(seed)
    lo, hi = np.array(tokenizer.bounds)
    positions = (lo + rng.uniform(-0.1, 1.1, (n_points, 3)) * (hi - lo)).astype(np.float32)
    points = {"positions": positions, "faces": rng.integers(0, tokenizer.n_faces, n_points)}
    encoded = tokenizer(points, on_out_of_bounds="ignore")
    assert encoded["input_ids"].tolist() == slow_encode(tokenizer, points)
    assert encoded["num_out_of_bounds"] == int(((positions < lo) | (positions > hi)).any(axis=1).sum())


@settings(max_examples=60, deadline=None)
@given(tokenizers(), st.integers(1, 200), st.integers(0, 2**32))
def test_encoding_the_decoded_ids_gives_the_same_ids_in_every_configuration(tokenizer, n_points, seed):
    ids = sorted_ids(tokenizer, np.random.default_rng(seed), n_points)
    assert tokenizer(tokenizer.decode(ids), on_out_of_bounds="raise")["input_ids"].tolist() == ids


@pytest.mark.parametrize("n_points", [1, 8192, 8193, 40000])
def test_a_decoded_point_is_at_most_half_a_bin_away_and_keeps_its_face(n_points):
    tokenizer = GaussianTokenizer(bounds=[[-0.3, -0.4, -0.2], [0.3, 0.5, 0.25]])
    points = cloud(n_points, lo=-0.2, hi=0.25)
    encoded = tokenizer(points, return_order=True)
    decoded = tokenizer.decode(encoded["input_ids"])
    lo, hi = np.array(tokenizer.bounds)
    error = np.abs(decoded["positions"].astype(np.float64) - points["positions"][encoded["order"]])
    assert (error <= (hi - lo) / tokenizer.n_bins / 2 + 1e-7).all()  # 1e-7: float32 rounding
    assert (decoded["faces"] == points["faces"][encoded["order"]]).all()
    assert decoded["positions"].dtype == np.float32 and decoded["faces"].dtype == np.int64


def test_the_order_of_the_points_does_not_matter():
    tokenizer = GaussianTokenizer(n_bins=16)  # many points share a bin
    points = cloud(5000)
    shuffle = np.random.default_rng(1).permutation(5000)
    shuffled = {name: values[shuffle] for name, values in points.items()}
    assert (tokenizer(points)["input_ids"] == tokenizer(shuffled)["input_ids"]).all()


def test_points_on_the_upper_bound_fall_in_the_last_bin_and_are_not_outside():
    tokenizer = GaussianTokenizer(bounds=[[-1, -1, -1], [1, 1, 1]])
    encoded = tokenizer({"positions": np.ones((1, 3)), "faces": np.zeros(1, int)}, on_out_of_bounds="raise")
    assert encoded["input_ids"][1:4].tolist() == [1023] * 3 and encoded["num_out_of_bounds"] == 0


@pytest.mark.parametrize(
    "n_bins, n_faces, dtype", [(1, 1, np.uint16), (1024, 64509, np.uint16), (1024, 64510, np.uint32)]
)
def test_ids_take_the_smallest_type_that_holds_the_vocabulary(n_bins, n_faces, dtype):
    tokenizer = GaussianTokenizer(n_bins=n_bins, n_faces=n_faces)
    ids = tokenizer({"positions": np.zeros((1, 3)), "faces": [n_faces - 1]})["input_ids"]
    assert ids.dtype == dtype and ids[4] == n_bins + n_faces - 1
    assert tokenizer.decode(ids)["faces"].tolist() == [n_faces - 1]


def test_tensors_lists_and_arrays_are_the_same_points():
    tokenizer = GaussianTokenizer()
    points = cloud(10)
    expected = tokenizer(points)["input_ids"]
    tensors = {name: torch.from_numpy(values).requires_grad_(name == "positions") for name, values in points.items()}
    lists = {name: values.tolist() for name, values in points.items()}
    for same in (tensors, lists):
        assert (tokenizer(same)["input_ids"] == expected).all()
    for ids in (
        expected.tolist(),
        torch.from_numpy(expected.astype(np.int64)),
        expected[1:],
        expected[:-1],
        expected[1:-1],
    ):
        assert (tokenizer.decode(ids)["positions"] == tokenizer.decode(expected)["positions"]).all()


# ---- bad clouds


def test_points_outside_are_counted_and_reported_once_with_the_remedy():
    points = cloud(100)
    points["positions"][3] = [0.0, 0.8, 0.0]
    points["positions"][7] = [-0.4, 0.0, 0.0]
    tokenizer = GaussianTokenizer()
    with pytest.warns(UserWarning, match=r"2 points lie outside.*0\.5 m.*fit") as caught:
        encoded = tokenizer([points, cloud(4)])
    assert len(caught) == 1 and encoded["num_out_of_bounds"] == [2, 0]
    assert caught[0].filename == __file__
    with pytest.raises(ValueError, match="2 points lie outside"):
        tokenizer(points, on_out_of_bounds="raise")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenizer(points, on_out_of_bounds="ignore")["num_out_of_bounds"] == 2


def broken_cloud(**changes):
    return {**cloud(20), **changes}


def with_value(row, value):
    positions = cloud(20)["positions"].copy()
    positions[row, 1] = value
    return positions


@pytest.mark.parametrize(
    "points, message",
    [
        (broken_cloud(positions=with_value(12, np.nan)), "point 12 of cloud 0 .*nan"),
        (broken_cloud(positions=with_value(5, np.inf)), "point 5 of cloud 0 .*inf"),
        (broken_cloud(positions=np.zeros((0, 3)), faces=np.zeros(0, int)), "no points"),
        (broken_cloud(positions=np.zeros((20, 2))), r"positions .*\(20, 2\)"),
        (broken_cloud(positions=[["a", "b", "c"]] * 20), "positions"),
        (broken_cloud(positions=[[0.0, 0.0, 0.0], [0.0]]), "positions"),
        (broken_cloud(faces=np.zeros(19, int)), r"faces .*\(19,\); expected integers \(20,\)"),
        (broken_cloud(faces=np.zeros(20)), "faces .*float64.*expected integers"),
        (broken_cloud(faces=np.full(20, 10144)), "face 10144 of point 0 .*10144 faces"),
        (broken_cloud(faces=np.full(20, -1)), "face -1 of point 0"),
        ({"positions": np.zeros((1, 3))}, r"lacks \['faces'\]"),
        (np.zeros((20, 3)), "ndarray; expected an avatar"),
        ([], "empty list"),
        ([cloud(3), broken_cloud(faces=np.zeros(20))], "cloud 1"),
        (cloud(31), "31 points; max_points is 30"),
    ],
)
def test_a_bad_cloud_is_refused_with_what_is_wrong(points, message):
    with pytest.raises(ValueError, match=message):
        GaussianTokenizer(max_points=30)(points)


class Avatar:
    head_hash = "feedfacefeedface"

    def canonical_points(self):
        return cloud(5)


def test_an_avatar_gives_its_canonical_points():
    assert (GaussianTokenizer()(Avatar())["input_ids"] == GaussianTokenizer()(cloud(5))["input_ids"]).all()


def test_an_avatar_of_another_head_model_is_refused():
    GaussianTokenizer(head_hash="feedfacefeedface")(Avatar())
    with pytest.raises(ValueError, match="feedfacefeedface, this tokenizer on 0123"):
        GaussianTokenizer(head_hash="0123")(Avatar())


# ---- bad ids


def sequence(*tokens):
    """One good point and then the tokens, for 8 bins and 10 faces: faces 8..17, bos 18, eos 19, pad 20."""
    return [18, 1, 2, 3, 12, *tokens]


@pytest.mark.parametrize(
    "ids, dropped, message",
    [
        (sequence(1, 2), 2, r"the ids end at position 7 in the middle of a point; expected its z in \[0, 8\)"),
        (sequence(1, 2, 19), 3, r"position 7 holds id 19 \(eos in the z slot of point 1\)"),
        (sequence(1, 2, 3, 4, 19), 4, r"position 8 holds id 4 \(a coordinate in the face slot .*expected .* \[8, 18\)"),
        (sequence(1, 9, 3, 12, 19), 4, r"position 6 holds id 9 \(face 1 in the y slot of point 1\)"),
        (sequence(1, 2, 3, 21, 19), 4, "position 8 holds id 21 .beyond the vocabulary of 21"),
        (sequence(-1, 2, 3, 12, 19), 4, "position 5 holds id -1 .beyond the vocabulary"),
        (sequence(18, 1, 2, 3, 12), 5, r"position 5 holds id 18 \(bos in the x slot"),
        (sequence(20, 1, 2, 3, 12), 5, r"position 5 holds id 20 \(pad in the x slot"),
        (sequence(19, 1, 2, 3, 12, 19), 5, "eos at position 5 is followed by 5 more ids"),
        (sequence(19, 20, 1, 20), 2, "eos at position 5 is followed by 2 more ids"),
    ],
)
def test_malformed_ids_name_the_position_and_truncation_keeps_the_points_before_it(ids, dropped, message):
    tokenizer = GaussianTokenizer(n_bins=8, n_faces=10)
    with pytest.raises(ValueError, match=message):
        tokenizer.decode(ids)
    with pytest.warns(UserWarning, match=message):
        decoded = tokenizer.decode(ids, errors="truncate")
    assert decoded["faces"].tolist() == [4]
    assert decoded["dropped"] == dropped
    with pytest.raises(ValueError, match=r"sequence 1: .*position"):
        tokenizer.batch_decode([sequence(19), ids])


@pytest.mark.parametrize(
    "ids, message",
    [
        ([18, 12, 1, 2, 3, 13, 1], r"position 7 in the middle of a point; expected its z in \[0, 8\)"),
        (
            [18, 12, 1, 2, 3, 4, 1, 2, 3],
            r"position 5 holds id 4 \(a coordinate in the face slot .*expected .* \[8, 18\)",
        ),
        ([18, 12, 1, 2, 3, 13, 1, 2, 19], r"position 8 holds id 19 \(eos in the x slot of point 1\)"),
        ([18, 12, 1, 2, 3, 19, 13, 1, 2, 3], "eos at position 5 is followed by 4 more ids"),
    ],
)
def test_malformed_ids_are_named_by_the_slots_of_another_token_order(ids, message):
    tokenizer = GaussianTokenizer(n_bins=8, n_faces=10, token_order="fyzx")
    with pytest.raises(ValueError, match=message):
        tokenizer.decode(ids)
    with pytest.warns(UserWarning, match=message):
        assert tokenizer.decode(ids, errors="truncate")["faces"].tolist() == [4]


@pytest.mark.parametrize(
    "ids, message",
    [
        (np.array([1.0, 2.0]), "float64"),
        ([True, False], "bool"),
        (["1"], "expected integers"),
        ([2**70], "expected integers"),
        (torch.zeros((1, 4), dtype=torch.long), "batch_decode"),
        (7, "shape"),
    ],
)
def test_what_is_no_sequence_of_integers_is_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        GaussianTokenizer().decode(ids)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint32, np.int64, np.uint64, ">i8", ">u2"])
def test_every_integer_type_of_ids_gives_the_same_points(dtype):
    tokenizer = GaussianTokenizer(n_bins=100, n_faces=100)  # int8 holds the ids below, not the vocabulary
    ids = np.array([1, 2, 99, 102, 99, 0, 5, 101], dtype=np.int64)
    assert tokenizer.decode(ids.astype(dtype))["faces"].tolist() == [2, 1]
    with pytest.raises(ValueError, match="position 3"):
        tokenizer.decode(np.array([1, 2, 99, 99], dtype=dtype))
    assert tokenizer.decode(np.repeat(ids, 2).astype(dtype)[::2])["faces"].tolist() == [2, 1]


def test_padding_on_either_side_and_an_empty_cloud_are_decoded():
    tokenizer = GaussianTokenizer(n_bins=8, n_faces=10)
    for ids in (sequence(19), sequence(19, 20, 20), [20, 20, *sequence(19)], sequence(20)):
        assert tokenizer.decode(ids)["faces"].tolist() == [4]
    for ids in ([], [18], [18, 19], [18, 19, 20]):
        assert tokenizer.decode(ids)["positions"].shape == (0, 3)
    assert tokenizer.decode(sequence(19), errors="truncate")["dropped"] == 0


@settings(max_examples=400, deadline=None)
@given(
    st.one_of(
        st.lists(st.integers(-2, 22), max_size=14),
        st.lists(st.integers(-(2**63), 2**64 - 1), max_size=9),
        st.lists(st.sampled_from([*sequence(), 19, 20]), max_size=14),
    )
)
def test_any_integers_are_decoded_or_refused_and_truncation_always_gives_a_prefix(ids):
    tokenizer = GaussianTokenizer(n_bins=8, n_faces=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            decoded = tokenizer.decode(ids)
        except ValueError:
            try:
                decoded = tokenizer.decode(ids, errors="truncate")
            except ValueError as error:  # numbers no integer type holds
                assert "expected integers" in str(error)
                return
            assert 0 < decoded["dropped"] <= len(ids)
    again = [v for p, f in zip(decoded["positions"], decoded["faces"], strict=True) for v in (*p, f)]
    assert len(again) == 4 * len(decoded["faces"]) <= len(ids)
    assert ((decoded["faces"] >= 0) & (decoded["faces"] < 10)).all() and np.isfinite(decoded["positions"]).all()


# ---- batches and conditions


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_is_padded_on_the_chosen_side_and_decodes_row_by_row(side):
    tokenizer = GaussianTokenizer()
    clouds = [cloud(3, seed=1), cloud(7, seed=2)]
    batch = tokenizer(clouds, return_tensors="pt", padding_side=side)
    assert batch["input_ids"].shape == (2, 30) and batch["input_ids"].dtype == torch.int64
    assert batch["attention_mask"].sum(dim=1).tolist() == [14, 30]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()
    assert bool(batch["attention_mask"][0, 0]) == (side == "right")
    assert set(batch) <= set(tokenizer.model_input_names)
    for points, decoded in zip(clouds, tokenizer.batch_decode(batch["input_ids"]), strict=True):
        assert sorted(decoded["faces"]) == sorted(points["faces"])


def test_one_cloud_becomes_a_batch_of_one_tensor():
    assert GaussianTokenizer()(cloud(2), return_tensors="pt")["input_ids"].shape == (1, 10)


def white_pixels(values):
    return np.allclose(values, IMAGENET_WHITE[:, None, None], atol=1e-5)


def test_every_kind_of_image_of_one_color_gives_the_same_pixels():
    tokenizer = GaussianTokenizer(image_size=28)
    gray = Image.new("L", (40, 40), 51)
    rgba = Image.new("RGBA", (40, 40), (0, 0, 0, 204))  # black at 80 % on white = 51
    deep = Image.fromarray(np.full((40, 40), 51 * 257, dtype=np.uint16))
    images = [
        gray, gray.convert("RGB"), gray.convert("P"), gray.convert("LA"), gray.convert("I").point(lambda v: v * 257),
        rgba, deep, np.full((40, 40), 51, np.uint8), np.full((40, 40, 3), 0.2), torch.full((3, 40, 40), 0.2),
        np.full((40, 40, 1), 51 * 257, np.uint16), np.array(rgba),
    ]  # fmt: skip
    pixels = tokenizer(images=images)["pixel_values"]
    assert pixels.shape == (12, 3, 28, 28) and pixels.dtype == np.float32
    expected = (0.2 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(pixels, np.broadcast_to(expected[:, None, None], pixels.shape), atol=1e-2)


def test_an_image_is_turned_upright_and_kept_whole_on_white(tmp_path):
    tokenizer = GaussianTokenizer(image_size=20)
    image = Image.new("RGB", (40, 20), "black")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees: tall
    image.save(tmp_path / "turned.png", exif=exif)
    pixels = tokenizer(images=str(tmp_path / "turned.png"), return_tensors="pt")["pixel_values"][0].numpy()
    assert white_pixels(pixels[:, :, :5]) and white_pixels(pixels[:, :, 15:])
    assert (pixels[:, :, 5:15] < -1.5).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1)])
def test_the_thinnest_images_are_accepted(size):
    assert GaussianTokenizer(image_size=8)(images=Image.new("RGB", size))["pixel_values"].shape == (1, 3, 8, 8)


def test_a_portrait_that_is_read_keeps_its_aspect_and_its_alpha():
    pixels = np.zeros((6, 12, 4), np.uint8)
    pixels[:, :6] = (255, 51, 0, 255)
    read = portrait_rgba(Image.fromarray(pixels), 24)
    assert read.shape == (4, 12, 24) and read.dtype == np.float32
    np.testing.assert_allclose(read[:, 6, 2], [1, 0.2, 0, 1])
    assert (read[3, :, 18:] == 0).all() and (portrait_rgba(pixels[..., :3], 12)[3] == 1).all()


def test_a_stack_of_images_is_a_batch():
    assert GaussianTokenizer(image_size=8)(images=torch.zeros(5, 3, 9, 9))["pixel_values"].shape == (5, 3, 8, 8)


@pytest.mark.parametrize(
    "image",
    [object(), np.zeros((0, 3)), np.full((4, 4), np.nan), np.full((4, 4), 7.0), np.zeros((4, 4), int), np.zeros(3)],
)
def test_what_is_not_an_image_is_refused(image):
    with pytest.raises(ValueError, match="image 0 cannot be read"):
        GaussianTokenizer()(images=[image])


def test_a_file_that_is_not_an_image_is_named(tmp_path):
    (tmp_path / "portrait.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"portrait\.png"):
        GaussianTokenizer()(images=tmp_path / "portrait.png")
    with pytest.raises(FileNotFoundError, match=r"absent\.png"):
        GaussianTokenizer()(images=tmp_path / "absent.png")


OCTAHEDRON = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]], dtype=np.float32)
OCTAHEDRON_FACES = [[0, 2, 4], [2, 1, 4], [1, 3, 4], [3, 0, 4], [2, 0, 5], [1, 2, 5], [3, 1, 5], [0, 3, 5]]


def test_head_normals_point_outwards_as_the_sum_of_face_areas_in_a_loop():
    tokenizer = GaussianTokenizer(n_faces=8)
    vertices = OCTAHEDRON * [1, 2, 3] + np.random.default_rng(0).normal(0, 0.1, (6, 3))
    batch = tokenizer(head_vertices=[OCTAHEDRON, vertices], head_faces=OCTAHEDRON_FACES, return_tensors="pt")
    np.testing.assert_allclose(batch["head_normals"][0], OCTAHEDRON, atol=1e-6)
    expected = np.zeros((6, 3))
    for a, b, c in OCTAHEDRON_FACES:
        for corner in (a, b, c):
            expected[corner] += np.cross(vertices[b] - vertices[a], vertices[c] - vertices[a])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(batch["head_normals"][1], expected, atol=1e-6)
    assert batch["head_vertices"].dtype == batch["head_normals"].dtype == torch.float32


def test_a_flat_face_gives_zero_normals_not_nan():
    normals = GaussianTokenizer(n_faces=1)(head_vertices=np.zeros((3, 3)), head_faces=[[0, 1, 2]])["head_normals"]
    assert (normals == 0).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "nothing to encode"),
        ({"head_faces": OCTAHEDRON_FACES}, "without head_vertices"),
        ({"head_vertices": OCTAHEDRON, "head_faces": OCTAHEDRON_FACES[:7]}, r"\(7, 3\); expected integers \(8, 3\)"),
        ({"head_vertices": OCTAHEDRON[:5], "head_faces": OCTAHEDRON_FACES}, "name vertices 0 to 5 of 5"),
        ({"head_vertices": OCTAHEDRON * np.nan}, "NaN"),
        ({"head_vertices": np.zeros((6, 2))}, "head_vertices are float64"),
        ({"images": []}, "empty list of images"),
        ({"points": [cloud(2, 8)] * 3, "images": [Image.new("L", (2, 2))] * 2}, "batch sizes disagree"),
        ({"points": cloud(2, 8), "return_tensors": "tf"}, "return_tensors"),
        ({"points": cloud(2, 8), "on_out_of_bounds": "clip"}, "on_out_of_bounds"),
        ({"points": cloud(2, 8), "padding_side": "both"}, "padding_side"),
    ],
)
def test_contradictory_inputs_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianTokenizer(n_faces=8)(**arguments)


# ---- settings


def test_fitted_bounds_hold_every_point_with_room():
    tokenizer = GaussianTokenizer()
    clouds = [cloud(50, lo=-1, hi=2), cloud(50, seed=3, lo=-2, hi=1), Avatar()]
    bounds = tokenizer.fit(iter(clouds), margin=0.1)
    stacked = np.concatenate([cloud(50, lo=-1, hi=2)["positions"], cloud(50, seed=3, lo=-2, hi=1)["positions"]])
    low, high = stacked.min(axis=0), stacked.max(axis=0)
    room = 0.1 * (high - low).max()
    np.testing.assert_allclose(bounds, [low - room, high + room], rtol=1e-6)
    assert tokenizer.bounds == bounds
    assert tokenizer(clouds, on_out_of_bounds="raise")["num_out_of_bounds"] == [0, 0, 0]
    assert tokenizer.fit(clouds[0], margin=0.0)  # one cloud, held exactly
    tokenizer(clouds[0], on_out_of_bounds="raise")


@pytest.mark.parametrize("margin", [-0.1, math.nan])
def test_fit_refuses_a_senseless_margin(margin):
    with pytest.raises(ValueError, match="margin"):
        GaussianTokenizer().fit([cloud(3)], margin=margin)


def test_fit_refuses_what_gives_no_box_and_leaves_the_bounds():
    tokenizer = GaussianTokenizer()
    before = tokenizer.bounds
    nan = {"positions": np.full((2, 3), np.nan), "faces": np.zeros(2, int)}
    spot = {"positions": np.zeros((2, 3)), "faces": np.zeros(2, int)}
    far = {"positions": np.array([[1e6, 0, 0], [1e6 + 1, 1, 1]], dtype=np.float64), "faces": np.zeros(2, int)}
    for avatars, message in (([], "no avatars"), (nan, "finite"), (spot, "lo < hi"), (far, "float32 cannot tell")):
        with pytest.raises(ValueError, match=message):
            tokenizer.fit(avatars)
    assert tokenizer.bounds == before and tokenizer(cloud(3), on_out_of_bounds="raise")["num_out_of_bounds"] == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"n_bins": 0}, "n_bins is 0"),
        ({"n_bins": "1024"}, "n_bins is '1024'"),
        ({"n_faces": 2.5}, "n_faces is 2.5"),
        ({"n_bins": 2**20, "n_faces": 10144}, "63 fit"),
        ({"n_bins": 1, "n_faces": 2**33}, "vocabulary"),
        ({"bounds": [[0, 0, 0], [1, 1, 0]]}, "lo < hi"),
        ({"bounds": [[0, 0, 0], [1, 1, math.inf]]}, "finite"),
        ({"bounds": [[0, 0], [1, 1]]}, "expected"),
        ({"bounds": "wide"}, "expected"),
        ({"bounds": [[1e6, 0, 0], [1e6 + 1, 1, 1]]}, "float32 cannot tell 1024 bins apart .*axis x"),
        ({"bounds": [[0, 0, 0], [1e39, 1, 1]]}, "float32 cannot tell"),
        ({"axis_order": "xxy"}, "axis_order"),
        *(
            ({"token_order": order}, "token_order is .*expected the letters x, y, z and f")
            for order in ("yzx", "yzxb", 5)
        ),
        ({"max_points": 0}, "max_points"),
        ({"padding_side": "up"}, "padding_side"),
    ],
)
def test_senseless_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianTokenizer(**arguments)


# ---- files

SETTINGS = {
    "n_bins": 512,
    "n_faces": 600,
    "bounds": [[-0.1, -0.2, -0.3], [0.1, 0.2, 0.30000000000000004]],
    "axis_order": "zxy",
    "max_points": 1000,
    "padding_side": "left",
    "image_size": 56,
    "head_name": "procedural",
    "head_hash": "0123456789abcdef",
    "token_order": "yfzx",
}


def test_a_saved_tokenizer_comes_back_through_auto_processor_with_all_its_settings(tmp_path):
    GaussianTokenizer(**SETTINGS).save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is GaussianTokenizer
    assert {name: value for name, value in loaded.to_dict().items() if name in SETTINGS} == SETTINGS
    assert not list(tmp_path.glob(".*")), "a temporary file was left behind"


def test_settings_without_a_token_order_have_the_papers(tmp_path):
    GaussianTokenizer(**SETTINGS).save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "token_order"}))
    assert AutoProcessor.from_pretrained(tmp_path).token_order == "xyzf"


def test_it_loads_from_a_model_s_folder_too(tmp_path):
    GaussianTokenizer(**SETTINGS).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "avatar_pointillist", "vocab_size": 1115}))
    assert type(AutoProcessor.from_pretrained(tmp_path)) is GaussianTokenizer


def test_a_bare_folder_loads_with_remote_code_where_the_toolkit_is_not_installed(tmp_path):
    folder = tmp_path / "checkpoint"
    GaussianTokenizer(**SETTINGS).save_pretrained(folder)
    script = f"""
import importlib.util
assert importlib.util.find_spec("gaussian_tokenizer") is None
from transformers import AutoProcessor
tokenizer = AutoProcessor.from_pretrained({str(folder)!r}, trust_remote_code=True)
points = {{"positions": [[0.0, 0.1, 0.2]], "faces": [7]}}
assert tokenizer.decode(tokenizer(points, return_tensors="pt")["input_ids"][0])["faces"].tolist() == [7]
tokenizer.save_pretrained({str(tmp_path / "again")!r})
print(tokenizer.bounds)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    packages = [path for path in sys.path if path.endswith("-packages")]
    # -S and an explicit path: site-packages without its .pth files, so that an editable install is not seen.
    run = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path += {packages}\n{script}"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(SETTINGS["bounds"])
    for name in (
        "processor_config.json",
        "processing_gaussian_tokenizer.py",
        "processing_conditions.py",
        "image_files.py",
        "point_codec.py",
    ):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_a_damaged_or_contradictory_settings_file_is_refused(tmp_path):
    GaussianTokenizer(**SETTINGS).save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    good = json.loads(path.read_text())
    cases = [
        ({**good, "n_faces": 10144}, "contradicts itself: .*vocab_size is 1115"),
        ({name: value for name, value in good.items() if name != "bounds"}, r"lacks \['bounds'\]"),
        ({**good, "bounds": [[0, 0, 0], [0, 1, 1]]}, "lo < hi"),
        ({**good, "axis_order": "zzz"}, "axis_order"),
        ({**good, "n_bins": "512"}, "n_bins is '512'"),
        ({**good, "bounds": [[0, 0, 0], [1, 1, 10**400]]}, "bounds are .*expected"),
        ({**good, "head_hash": ["0123"]}, r"head_hash is \['0123'\]; expected text"),
        ({**good, "head_name": {"a": 1}}, "head_name is {'a': 1}; expected text"),
        ({**good, "image_size": 2**40}, "image_size is 1099511627776; expected at most 16384 pixels"),
    ]
    for settings_, message in cases:
        path.write_text(json.dumps(settings_))
        with pytest.raises(ValueError, match=message):
            AutoProcessor.from_pretrained(tmp_path)
    path.write_text(json.dumps(good)[:100])
    with pytest.raises(OSError, match="not a valid JSON"):
        AutoProcessor.from_pretrained(tmp_path)
    for content in (json.dumps(good)[:100].encode(), b"[" * 100_000, b"[]", b"null", b"\xff{}"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"processor_config.json of .* is not a JSON object: .*restore the file"):
            GaussianTokenizer.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="absent"):
        GaussianTokenizer.from_pretrained(tmp_path)


def test_a_failed_save_leaves_the_old_file(tmp_path):
    GaussianTokenizer(n_bins=16).save_pretrained(tmp_path)
    before = (tmp_path / "processor_config.json").read_bytes()
    broken = GaussianTokenizer(n_bins=32)
    broken.head_name = object()  # cannot be written as JSON
    with pytest.raises(TypeError):
        broken.save_pretrained(tmp_path)
    assert (tmp_path / "processor_config.json").read_bytes() == before
    assert not list(tmp_path.glob(".*")), "a temporary file was left behind"
