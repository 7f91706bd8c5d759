import pickle
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch

from gaussian_tokenizer.heads.flame import read_flame
from gaussian_tokenizer.heads.flame_teeth import find_lip_rings
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.heads.loading import load_head

AROUND, RINGS, SHAPES, EXPRESSIONS = 32, 8, 6, 100


class Chumpy:
    """Marks an array that the pickle shall hold as a chumpy array."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array


def python2_pickle(value: object) -> bytes:
    """Protocol 2 as Python 2 with NumPy 1, chumpy and scipy wrote it, opcode by opcode."""
    return b"\x80\x02" + _emit(value) + b"."


def _text(text: str | bytes) -> bytes:
    content = text.encode() if isinstance(text, str) else text
    if len(content) < 256:
        return b"U" + bytes([len(content)]) + content
    return b"T" + struct.pack("<i", len(content)) + content


def _emit(value: object) -> bytes:
    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return b"J" + struct.pack("<i", value)
        case str() | bytes():
            return _text(value)
        case tuple():
            return b"(" + b"".join(map(_emit, value)) + b"t"
        case dict():
            return b"}(" + b"".join(_emit(key) + _emit(item) for key, item in value.items()) + b"u"
        case np.ndarray():
            code, order = value.dtype.str[1:], value.dtype.str[0]
            dtype = b"cnumpy\ndtype\n(" + _text(code) + b"K\x00K\x01tR"
            dtype += b"(K\x03" + _text(order) + b"NNN" + 2 * b"J\xff\xff\xff\xff" + b"K\x00tb"
            empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
            fortran = value.flags.f_contiguous and not value.flags.c_contiguous
            content = value.tobytes("F" if fortran else "C")
            return empty + b"(K\x01" + _emit(value.shape) + dtype + _emit(fortran) + _text(content) + b"tb"
        case Chumpy():
            dirty = b"c__builtin__\nset\n(]tR"
            state = b"}(" + _text("x") + _emit(value.array) + _text("_dirty_vars") + dirty + _text("_itr") + b"Nu"
            return b"ccopy_reg\n_reconstructor\n(cchumpy.ch\nCh\nc__builtin__\nobject\nNtR" + state + b"b"
        case scipy.sparse.csc_matrix() | scipy.sparse.csr_matrix():
            module = value.format.encode()
            state = {"_shape": value.shape, "data": value.data, "indices": value.indices, "indptr": value.indptr}
            made = b"ccopy_reg\n_reconstructor\n(cscipy.sparse." + module + b"\n" + module + b"_matrix\n"
            return made + b"c__builtin__\nobject\nNtR" + _emit({**state, "maxprint": 50, "format": value.format}) + b"b"
    raise TypeError(type(value))


def flame_like(seed: int = 0) -> dict:
    """A face with a mouth hole of 32 edges and lips around it, and an outer border far behind; FLAME's keys."""
    angle = 2 * np.pi * np.arange(AROUND) / AROUND
    wide = np.array((0.022, 0.023, 0.0235, 0.024, 0.028, 0.045, 0.07, 0.08))
    high = np.array((0.001, 0.002, 0.0035, 0.0045, 0.009, 0.03, 0.07, 0.12))
    depth = np.array((-0.012, -0.006, -0.002, 0.0, -0.003, -0.01, -0.04, -0.09))
    x, y = wide[:, None] * np.cos(angle), high[:, None] * np.sin(angle)
    z = depth[:, None] - 8 * x**2
    vertices = np.stack((x, y, z), -1).reshape(-1, 3)
    grid = np.arange(AROUND * RINGS).reshape(RINGS, AROUND)
    inner, outer = grid[:-1], grid[1:]
    following = np.roll(grid, -1, axis=1)
    first = np.stack((inner, outer, following[1:]), -1).reshape(-1, 3)
    second = np.stack((inner, following[1:], following[:-1]), -1).reshape(-1, 3)
    generator = np.random.default_rng(seed)
    count = len(vertices)
    weights = generator.random((count, 5))
    regressor = scipy.sparse.random(5, count, 0.2, "csc", random_state=1)
    return {
        "v_template": Chumpy(vertices),
        "f": np.concatenate((first, second)).astype(np.uint32),
        "shapedirs": Chumpy(0.01 * generator.normal(size=(count, 3, SHAPES + EXPRESSIONS))),
        "posedirs": np.asfortranarray(0.01 * generator.normal(size=(count, 3, 36))),
        "J_regressor": regressor,
        "kintree_table": np.array([[2**32 - 1, 0, 1, 1, 1], [0, 1, 2, 3, 4]], np.uint32),
        "weights": weights / weights.sum(1, keepdims=True),
        "bs_style": "lbs",
        "J": generator.normal(size=(5, 3)),
    }


def write(folder: Path, content: dict) -> Path:
    path = folder / "flame.pkl"
    path.write_bytes(python2_pickle(content))
    return path


def test_a_python_2_pickle_with_chumpy_and_sparse_arrays_loads(tmp_path):
    content = flame_like()
    head = read_flame(write(tmp_path, content), teeth=False)
    assert head.name == "flame" and (head.n_shape, head.n_expression) == (SHAPES, EXPRESSIONS)
    for ours, theirs in (
        (head.template, content["v_template"].array),
        (head.shape_dirs, content["shapedirs"].array[:, :, :SHAPES]),
        (head.expression_dirs, content["shapedirs"].array[:, :, SHAPES:]),
        (head.pose_dirs, content["posedirs"]),
        (head.joint_regressor, content["J_regressor"].toarray()),
        (head.skinning_weights, content["weights"]),
    ):
        np.testing.assert_array_equal(ours.numpy(), theirs.astype(np.float32))
    np.testing.assert_array_equal(head.faces.numpy(), content["f"].astype(np.int64))


def test_row_compressed_regressors_and_python_3_pickles_load_too(tmp_path):
    content = flame_like()
    content["J_regressor"] = content["J_regressor"].tocsr()
    head = read_flame(write(tmp_path, content), teeth=False)
    np.testing.assert_array_equal(head.joint_regressor.numpy(), content["J_regressor"].toarray().astype(np.float32))
    plain = {key: value.array if isinstance(value, Chumpy) else value for key, value in flame_like().items()}
    path = tmp_path / "python3.pkl"
    for protocol in (2, 4):
        path.write_bytes(pickle.dumps(plain, protocol=protocol))
        assert read_flame(path, teeth=False).hash == read_flame(write(tmp_path, flame_like()), teeth=False).hash


def test_the_reader_needs_neither_chumpy_nor_scipy(tmp_path):

    path = write(tmp_path, flame_like())
    code = (
        "import sys; sys.modules['scipy'] = sys.modules['chumpy'] = None\n"
        "from gaussian_tokenizer.heads.flame import read_flame\n"
        f"print(read_flame({str(path)!r}).n_faces)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(printed) == len(flame_like()["f"]) + 168


def test_lip_rings_are_the_ridges_of_the_lips_in_order():
    content = flame_like()
    vertices, faces = content["v_template"].array, content["f"].astype(np.int64)
    upper, lower = find_lip_rings(vertices, faces)
    ridge = 3 * AROUND  # the ring that the mesh above puts furthest forward
    np.testing.assert_array_equal(upper, ridge + np.arange(15, 0, -1))
    np.testing.assert_array_equal(lower, ridge + np.arange(17, 32))
    assert (np.diff(vertices[upper, 0]) > 0).all() and (np.diff(vertices[lower, 0]) > 0).all()


def test_teeth_follow_the_rule_of_gaussian_avatars(tmp_path):
    content = flame_like()
    path = write(tmp_path, content)
    bare, head = read_flame(path, teeth=False), read_flame(path)
    v, f = bare.n_vertices, bare.n_faces
    assert (head.n_vertices, head.n_faces) == (v + 120, f + 168)
    upper, lower = find_lip_rings(content["v_template"].array, content["f"].astype(np.int64))
    up, low = bare.template[upper].double(), bare.template[lower].double()
    distance = (up - low).norm(dim=1).mean()
    middle = (up + low) / 2
    middle[:, 1] = middle[:, 1].mean()
    middle[:, 2] -= 1.5 * distance
    rows = head.template[v:].reshape(8, 15, 3).double()
    y, z = torch.tensor([0, 1.0, 0]) * distance, torch.tensor([0, 0, 1.0]) * distance
    expected = {
        0: middle + 2.1 * y,
        1: middle - 2.1 * y - 0.4 * z,
        2: middle + 0.1 * y,
        3: middle - 0.1 * y - 0.4 * z,
        4: middle + 2.1 * y - z,
        5: middle + 0.1 * y - z,
        6: middle - 2.1 * y - 1.4 * z,
        7: middle - 0.1 * y - 1.4 * z,
    }
    for row, positions in expected.items():
        torch.testing.assert_close(rows[row], positions, atol=1e-6, rtol=0)
    shape = head.shape_dirs[v:].reshape(8, 15, 3, SHAPES)
    torch.testing.assert_close(shape, ((bare.shape_dirs[upper] + bare.shape_dirs[lower]) / 2).expand(8, -1, -1, -1))
    assert not head.expression_dirs[v:].any() and not head.pose_dirs[v:].any() and not head.joint_regressor[:, v:].any()
    joints = head.skinning_weights[v:].reshape(8, 15, 5).argmax(-1)
    assert joints[:, 0].tolist() == [1, 2, 1, 2, 1, 1, 2, 2] and (head.skinning_weights[v:].amax(1) == 1).all()
    assert head.regions["mouth_interior"].nonzero()[:, 0].tolist() == list(range(v, v + 120))

    teeth = head.faces[f:].numpy()
    edges = np.sort(teeth[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    _, counts = np.unique(edges, axis=0, return_counts=True)
    assert (len(counts), (counts == 2).sum(), (counts == 1).sum()) == (286, 218, 68)
    assert teeth[:84].max() < teeth.max() and set(joints.flatten()[teeth[:84] - v].flatten().tolist()) == {1}
    a, b, c = (head.template[teeth[:, corner]] for corner in range(3))
    normals = torch.linalg.cross(b - a, c - a)
    assert (normals[:28, 2] > 0).all() and (normals[28:56, 2] < 0).all() and (normals[56:84, 1] < 0).all()


def test_given_lip_rings_are_used_in_either_direction(tmp_path):
    path = write(tmp_path, flame_like())
    upper, lower = find_lip_rings(flame_like()["v_template"].array, flame_like()["f"].astype(np.int64))
    assert read_flame(path, lip_rings=(upper, lower)).hash == read_flame(path).hash
    backwards = read_flame(path, lip_rings=(upper[::-1], lower[::-1]))
    a, b, c = (backwards.template[backwards.faces[-168:-140, corner]] for corner in range(3))
    assert (torch.linalg.cross(b - a, c - a)[:, 2] > 0).all()
    with pytest.raises(ValueError, match=r"flame\.pkl.*lip rings of \(3,\)"):
        read_flame(path, lip_rings=(upper[:3], lower))


def test_a_flame_head_poses_and_converts_once_to_safetensors(tmp_path):
    head = load_head(write(tmp_path, flame_like()))
    head.save(tmp_path / "flame.safetensors")
    loaded = load_head(tmp_path / "flame.safetensors")
    assert loaded.hash == head.hash
    posed = loaded.pose(HeadParameters.zeros(SHAPES, EXPRESSIONS, 2))
    torch.testing.assert_close(posed.vertices[1], head.template, atol=1e-6, rtol=0)


def hostile_pickles(marker: Path) -> dict[str, bytes]:
    command = _text(f"touch {marker}")
    unicode_command = b"X" + struct.pack("<I", len(f"touch {marker}")) + f"touch {marker}".encode()
    valid = python2_pickle(flame_like())[2:-1]
    touch = f"open({str(marker)!r}, 'w')"
    return {
        "posix.system": b"\x80\x02cposix\nsystem\n(" + command + b"tR.",
        "os.system": b"(" + command + b"ios\nsystem\n.",
        "subprocess.Popen": b"(csubprocess\nPopen\n" + command + b"o.",
        "builtins.eval": b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93" + _text(touch) + b"\x85R.",
        "__builtin__.getattr": b"\x80\x02c__builtin__\ngetattr\n(cnumpy\nndarray\n" + _text("tofile") + b"tR.",
        "numpy.f2py.os.system": b"\x80\x04\x8c\x05numpy\x8c\x0ef2py.os.system\x93" + unicode_command + b"\x85R.",
        "numpy.testing._private.utils.runstring": b"\x80\x02cnumpy.testing._private.utils\nrunstring\n("
        + _text(touch) + b"}tR.",
        "numpy.load": b"\x80\x02cnumpy\nload\n(" + command + b"tR.",
        "scipy.sparse.load_npz": b"\x80\x02cscipy.sparse\nload_npz\n(" + command + b"tR.",
        "nt.system": b"\x80\x02" + valid + b"0cnt\nsystem\n(" + command + b"tR.",
    }  # fmt: skip


@pytest.mark.parametrize("name", hostile_pickles(Path("x")))
def test_a_pickle_that_names_anything_else_is_refused_and_nothing_in_it_runs(name, tmp_path):
    marker = tmp_path / "it_ran"
    path = tmp_path / "hostile.pkl"
    path.write_bytes(hostile_pickles(marker)[name])
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as caught:
        read_flame(path)
    assert str(path) in str(caught.value)
    assert not marker.exists()


def test_allowed_names_cannot_be_bent_to_other_uses(tmp_path):
    path = tmp_path / "hostile.pkl"
    for content in (
        b"\x80\x02c_codecs\nencode\n}(U\x01xU\x01yub.",  # sets attributes of a function
        b"\x80\x02ccopy_reg\n_reconstructor\n(c__builtin__\nset\nc__builtin__\nobject\nNtR.",
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(c__builtin__\nset\n(K\x00tU\x01btR.",
        b"\x80\x02cnumpy\ndtype\n(U\x01OK\x00K\x01tR.",  # arrays of objects
        b"\x80\x02U\x04nameQ.",  # a persistent id
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"hostile\.pkl: not a FLAME pickle"):
            read_flame(path)


def test_damaged_and_foreign_files_are_named(tmp_path):
    content = flame_like()
    path = write(tmp_path, content)
    whole = path.read_bytes()
    for length in (0, 1, 50, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"flame\.pkl: not a FLAME pickle"):
            read_flame(path)
    count = AROUND * RINGS
    cases = {
        "lacks f, weights": {key: value for key, value in content.items() if key not in ("f", "weights")},
        rf"weights is \({count}, 4\), expected \({count}, 5\)": content | {"weights": content["weights"][:, :4].copy()},
        "f has a vertex index outside": content | {"f": content["f"] + np.uint32(9)},
        "shapedirs holds 50 directions": content | {"shapedirs": Chumpy(content["shapedirs"].array[:, :, :50].copy())},
        "J_regressor is not a readable array": content | {"J_regressor": "none"},
        "v_template holds": content | {"v_template": Chumpy(content["v_template"].array * np.nan)},
        "parents of joints": content | {"kintree_table": np.zeros((2, 5), np.uint32)},
        "no teeth: found 0 borders": content | {"f": content["f"][:5]},
    }
    for message, changed in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            read_flame(write(tmp_path, changed))
        assert str(path) in str(caught.value)
    path.write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ValueError, match="holds a list"):
        read_flame(path)


@pytest.mark.parametrize("name", ["a tuple 200,000 deep", "a tuple doubled 40 times", "a memo index of 2^28"])
def test_a_pickle_that_kills_an_unpickler_is_one_line(name, tmp_path):
    in_a_set = b"c__builtin__\nset\n(](%sletR."
    content = {
        "a tuple 200,000 deep": in_a_set % (b")" + b"\x85" * 200_000),
        "a tuple doubled 40 times": in_a_set % (b")" + b"2\x86" * 40),
        "a memo index of 2^28": b"Nr\x00\x00\x00\x10.",
    }[name]
    path = tmp_path / "flame.pkl"
    path.write_bytes(b"\x80\x02" + content)
    with pytest.raises(ValueError, match=r"flame\.pkl: ") as caught:
        read_flame(path)
    assert "\n" not in str(caught.value)


def test_empty_sparse_matrices_are_counted_before_any_is_filled(tmp_path):
    empty = scipy.sparse.csc_matrix((10_000, 10_000))
    path = write(tmp_path, {key: empty for key in ("v_template", "f", *list(flame_like())[2:7])})
    tracemalloc.start()
    with pytest.raises(ValueError, match="its arrays have 700,000,000 numbers, expected at most 33,554,432 in all"):
        read_flame(path)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


@pytest.mark.parametrize("part", ["indptr", "indices", "data"])
@pytest.mark.parametrize("damage", [lambda a: a[:-1], lambda a: a[None], lambda a: a.reshape(-1)[0], lambda a: -a - 1])
def test_a_sparse_matrix_whose_parts_disagree_is_named(tmp_path, part, damage):
    content = flame_like()
    regressor = content["J_regressor"]
    if part == "data" and damage(np.ones(1)).tolist() == [-2.0]:
        pytest.skip("any number is a fine weight")
    setattr(regressor, part, np.array(damage(getattr(regressor, part))))
    with pytest.raises(ValueError, match="J_regressor is not a readable array"):
        read_flame(write(tmp_path, content))


@pytest.mark.parametrize("key", ["v_template", "f", "shapedirs", "weights"])
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3,)])
def test_an_array_without_rows_is_named(tmp_path, key, shape):
    with pytest.raises(ValueError, match=r"flame\.pkl: \w+ is .*, expected .* and at least one row"):
        read_flame(write(tmp_path, flame_like() | {key: np.zeros(shape)}))


def test_a_number_that_float32_does_not_hold_is_named(tmp_path):
    content = flame_like()
    content["posedirs"][0, 0, 0] = 1e300
    with pytest.raises(ValueError, match="posedirs holds float64 values that are not all finite float32 numbers"):
        read_flame(write(tmp_path, content))


def test_the_command_converts_a_file_and_says_in_one_line_what_is_missing(tmp_path):
    def command(*arguments):
        run = [sys.executable, "-m", "gaussian_tokenizer.flame", *map(str, arguments)]
        return subprocess.run(run, capture_output=True, text=True)

    done = command(write(tmp_path, flame_like()), tmp_path / "head.safetensors", "--no-teeth")
    assert done.stdout == f"256 vertices and 448 faces in {tmp_path / 'head.safetensors'}\n"
    assert load_head(tmp_path / "head.safetensors").n_vertices == AROUND * RINGS
    marks = {"lmk_face_idx": np.arange(51), "lmk_b_coords": np.tile((0.5, 0.25, 0.25), (51, 1))}
    (tmp_path / "marks.pkl").write_bytes(pickle.dumps(marks))
    options = ("--no-teeth", "--landmark_embedding", tmp_path / "marks.pkl")
    assert not command(tmp_path / "flame.pkl", tmp_path / "head.safetensors", *options).stderr
    assert load_head(tmp_path / "head.safetensors").landmark_faces.tolist() == list(range(51))
    missing = command(tmp_path / "flame2023.pkl", tmp_path / "head.safetensors")
    assert missing.returncode == 1 and missing.stderr.startswith("error: ") and missing.stderr.count("\n") == 1
