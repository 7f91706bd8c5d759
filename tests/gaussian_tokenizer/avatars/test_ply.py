"""Gaussian PLY files: byte-exact round trips, an independent reader, and one line for whatever is wrong."""

import io
import re

import numpy as np
import plyfile
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gaussian_tokenizer.avatars.ply import PlyGaussians, property_names, read_gaussian_ply, write_gaussian_ply


def random_rows(num_rows, sh_degree, with_faces=True, seed=0, n_faces=10144):
    names = property_names(sh_degree, with_faces)
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((num_rows, len(names))).astype("<f4")
    rows[:, 3:6] = 0
    if with_faces:
        rows[:, -1] = rng.integers(0, n_faces, num_rows)
    return names, rows


def ply_bytes(names, rows):
    """A PLY as the plyfile package writes it (which is what GaussianAvatars uses)."""
    table = np.empty(len(rows), dtype=[(name, "f4") for name in names])
    for column, name in enumerate(names):
        table[name] = rows[:, column]
    buffer = io.BytesIO()
    plyfile.PlyData([plyfile.PlyElement.describe(table, "vertex")]).write(buffer)
    return buffer.getvalue()


def read_bytes(tmp_path, content, with_faces=True, **options):
    (tmp_path / "in.ply").write_bytes(content)
    return read_gaussian_ply(tmp_path / "in.ply", with_faces=with_faces, **options)


@pytest.mark.parametrize("sh_degree", [0, 1, 2, 3])
def test_the_properties_are_those_of_gaussian_avatars(sh_degree):
    names = property_names(sh_degree, with_faces=True)
    assert len(names) == {0: 18, 1: 27, 2: 42, 3: 63}[sh_degree]
    assert names[:9] == ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2"]
    assert names[-9:] == ["opacity", *(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4)), "binding_0"]


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), num_rows=st.integers(1, 6), sh_degree=st.integers(0, 3), with_faces=st.booleans())
def test_a_file_is_written_back_byte_for_byte(tmp_path, data, num_rows, sh_degree, with_faces):
    names = property_names(sh_degree, with_faces)
    any_number = st.floats(width=32, allow_nan=False, allow_infinity=False)
    rows = data.draw(hnp.arrays("<f4", (num_rows, len(names)), elements=any_number))
    rows[:, 3:6] = 0
    if with_faces:
        rows[:, -1] = data.draw(hnp.arrays("<f4", num_rows, elements=st.integers(0, 2**24 - 1)))
    content = ply_bytes(names, rows)
    write_gaussian_ply(tmp_path / "out.ply", read_bytes(tmp_path, content, with_faces))
    assert (tmp_path / "out.ply").read_bytes() == content


def test_columns_land_where_they_belong(tmp_path):
    names, rows = random_rows(5, 3)
    gaussians = read_bytes(tmp_path, ply_bytes(names, rows), n_faces=10144)
    value = {name: rows[:, column] for column, name in enumerate(names)}
    np.testing.assert_array_equal(gaussians.positions[:, 2], value["z"])
    np.testing.assert_array_equal(gaussians.opacities, value["opacity"])
    np.testing.assert_array_equal(gaussians.scales[:, 1], value["scale_1"])
    np.testing.assert_array_equal(gaussians.quats[:, 0], value["rot_0"])
    np.testing.assert_array_equal(gaussians.faces, value["binding_0"].astype(np.int64))
    np.testing.assert_array_equal(gaussians.sh[:, 0, 1], value["f_dc_1"])
    # Channel-major: 0..14 are coefficients 1..15 of red, 15..29 of green, 30..44 of blue.
    np.testing.assert_array_equal(gaussians.sh[:, 1, 0], value["f_rest_0"])
    np.testing.assert_array_equal(gaussians.sh[:, 4, 1], value["f_rest_18"])
    np.testing.assert_array_equal(gaussians.sh[:, 15, 2], value["f_rest_44"])


@pytest.mark.parametrize("with_faces", [True, False])
def test_an_independent_reader_sees_what_we_write(tmp_path, with_faces):
    rng = np.random.default_rng(1)
    faces = rng.integers(0, 10144, 7) if with_faces else None
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in [(7, 3), (7, 9, 3), (7,), (7, 3), (7, 4)]]
    write_gaussian_ply(tmp_path / "a.ply", PlyGaussians(*arrays, faces=faces))
    table = plyfile.PlyData.read(tmp_path / "a.ply")["vertex"]
    assert [p.name for p in table.properties] == property_names(2, with_faces)
    np.testing.assert_array_equal(table["y"], arrays[0][:, 1])
    np.testing.assert_array_equal(table["nz"], np.zeros(7))
    np.testing.assert_array_equal(table["f_rest_8"], arrays[1][:, 1, 1])  # first of green
    np.testing.assert_array_equal(table["rot_3"], arrays[4][:, 3])
    if with_faces:
        np.testing.assert_array_equal(table["binding_0"], faces)


def test_properties_are_found_by_name_and_normals_are_optional(tmp_path):
    names, rows = random_rows(4, 1)
    order = [column for column in reversed(range(len(names))) if names[column] not in ("nx", "ny", "nz")]
    shuffled = read_bytes(tmp_path, ply_bytes([names[column] for column in order], rows[:, order]))
    straight = read_bytes(tmp_path, ply_bytes(names, rows))
    for name, value in straight.__dict__.items():
        np.testing.assert_array_equal(shuffled.__dict__[name], value)


def test_headers_with_comments_and_windows_line_ends_are_read(tmp_path):
    names, rows = random_rows(2, 0)
    content = ply_bytes(names, rows)
    header, body = content.split(b"end_header\n")
    header = header.replace(b"element", b"comment made by hand\nobj_info x\nelement").replace(b"\n", b"\r\n")
    header = header.replace(b"property float x", b"property float32 x")
    gaussians = read_bytes(tmp_path, header + b"end_header\r\n" + body)
    np.testing.assert_array_equal(gaussians.positions, rows[:, :3])


def damaged_files():
    """By kind of damage, to 4 rows of degree 1 (108 bytes each): the content and the message it must give."""
    names, rows = random_rows(4, 1)
    column = names.index
    good = ply_bytes(names, rows)
    body_start = good.index(b"end_header\n") + len(b"end_header\n")

    def with_value(name, row, value):
        changed = rows.copy()
        changed[row, column(name)] = value
        return ply_bytes(names, changed)

    def without(*gone):
        keep = [c for c, name in enumerate(names) if name not in gone]
        return ply_bytes([names[c] for c in keep], rows[:, keep])

    return {
        "truncated": (good[: body_start + 3 * 108 + 10], "truncated: .* 4 rows of 108 bytes, the file ends in row 3"),
        "no body": (good[:body_start], r"truncated: .* ends in row 0 \(0 of 432 bytes\)"),
        "cut header": (good[: body_start - 20], "no end_header"),
        "trailing": (good + b"123", "3 bytes follow the 4 rows"),
        "ascii": (good.replace(b"binary_little_endian", b"ascii"), "PLY of 'format ascii 1.0'.*little-endian"),
        "big endian": (good.replace(b"little_endian", b"big_endian"), "binary_big_endian 1.0'.*little-endian"),
        "not a ply": (b"PK\x03\x04" + good, "not a PLY file"),
        "empty file": (b"", "not a PLY file"),
        "binary header": (good.replace(b"element", b"comment \xff\nelement"), "not ASCII"),
        "no format": (good.replace(b"format binary_little_endian 1.0\n", b""), "line 2 .* not the format line"),
        "no binding": (without("binding_0"), "lacks property binding_0"),
        "no opacity": (without("opacity", "rot_2"), "lacks property opacity, rot_2"),
        "rest count": (without("f_rest_8"), r"8 f_rest properties, expected \[0, 9, 24, 45\]"),
        "unknown": (good.replace(b"property float nx", b"property float segment"), "unknown property segment"),
        "twice": (good.replace(b"property float nx", b"property float x"), "line 7 is 'property float x'"),
        "double": (good.replace(b"float opacity", b"double opacity"), "opacity is double, expected float32"),
        "uchar": (good.replace(b"float nx", b"uchar red"), "property red is uchar, expected float32"),
        "list": (good.replace(b"float nx", b"list uchar int nx"), "property nx is list uchar int, expected float32"),
        "second element": (good.replace(b"end_header", b"element face 0\nend_header"), "one element 'vertex'"),
        "other element": (good.replace(b"element vertex", b"element points"), "one element 'vertex'"),
        "no element": (re.sub(rb"element.*\n", b"", good), "line 3 is not understood"),
        "rows": (good.replace(b"vertex 4", b"vertex -4"), "'-4' is not a number of rows"),
        "garbage line": (good.replace(b"end_header", b"hello\nend_header"), "not understood: 'hello'"),
        "no rows": (re.sub(rb"vertex 4", b"vertex 0", good[:body_start]), "no Gaussians"),
        "nan": (with_value("scale_1", 2, np.nan), "property scale_1 of row 2 is nan"),
        "inf": (with_value("f_rest_3", 1, -np.inf), "property f_rest_3 of row 1 is -inf"),
        "fraction": (with_value("binding_0", 3, 7.5), "binding_0 of row 3 is 7.5, expected a face index"),
        "negative": (with_value("binding_0", 0, -1), "binding_0 of row 0 is -1, expected a face index from 0 to 10143"),
        "beyond": (with_value("binding_0", 1, 10144), "binding_0 of row 1 is 10144, .* from 0 to 10143"),
    }


@pytest.mark.parametrize("kind", damaged_files())
def test_a_damaged_file_is_refused_in_one_line(tmp_path, kind):
    content, message = damaged_files()[kind]
    with pytest.raises(ValueError, match=message) as caught:
        read_bytes(tmp_path, content, n_faces=10144)
    assert "in.ply" in str(caught.value) and "\n" not in str(caught.value)


def test_an_avatar_is_not_taken_for_world_space(tmp_path):
    with pytest.raises(ValueError, match="face-local"):
        read_bytes(tmp_path, ply_bytes(*random_rows(2, 1)), with_faces=False)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.ply: no such PLY file"):
        read_gaussian_ply(tmp_path / "a.ply", with_faces=True)


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), sh_degree=st.integers(0, 1))
def test_a_mutated_file_gives_finite_gaussians_or_one_line(tmp_path, data, sh_degree):
    content = bytearray(ply_bytes(*random_rows(2, sh_degree)))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[position] = data.draw(st.integers(0, 255))
        else:
            content[position:position] = data.draw(st.binary(max_size=3))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    try:
        gaussians = read_bytes(tmp_path, content, n_faces=10144)
    except ValueError as error:
        assert "in.ply" in str(error) and "\n" not in str(error)
    else:
        assert all(np.isfinite(value).all() for value in gaussians.__dict__.values())
        assert gaussians.faces.min() >= 0 and gaussians.faces.max() < 10144
