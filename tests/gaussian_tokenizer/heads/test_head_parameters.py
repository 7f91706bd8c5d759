"""Head parameters and their files: byte-exact round trips, and one line for whatever is wrong."""

import io
import pickle
import warnings
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gaussian_tokenizer.heads.head_parameters import HeadParameters


def flame_arrays(num_frames=3, vertices=5, static_ndim=3, shape_size=300, expression_size=100, seed=0):
    """The arrays of a flame_param.npz as GaussianAvatars writes it, in its order."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    arrays = {
        "translation": normal(num_frames, 3),
        "rotation": normal(num_frames, 3),
        "neck_pose": normal(num_frames, 3),
        "jaw_pose": normal(num_frames, 3),
        "eyes_pose": normal(num_frames, 6),
        "shape": normal(shape_size),
        "expr": normal(num_frames, expression_size),
    }
    if vertices:
        arrays["static_offset"] = normal(vertices, 3) if static_ndim == 2 else normal(1, vertices, 3)
        arrays["dynamic_offset"] = normal(num_frames, vertices, 3)
    return arrays


def saved(path, arrays, save=np.savez):
    save(path, **arrays)
    return path


def test_loading_gives_the_arrays_of_the_file(tmp_path):
    arrays = flame_arrays()
    params = HeadParameters.load(saved(tmp_path / "flame_param.npz", arrays))
    assert params.num_frames == 3
    for name, value in params.tensors().items():
        stored = arrays[name][0] if name == "static_offset" else arrays[name]
        assert value.dtype == torch.float32
        np.testing.assert_array_equal(value.numpy(), stored)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_frames=st.integers(1, 4),
    vertices=st.sampled_from([0, 1, 7]),
    static_ndim=st.sampled_from([2, 3]),
    expression_size=st.integers(1, 12),
    compressed=st.booleans(),
    seed=st.integers(0, 1000),
    order=st.randoms(use_true_random=False),
)
def test_a_file_is_written_back_byte_for_byte(
    tmp_path, num_frames, vertices, static_ndim, expression_size, compressed, seed, order
):
    arrays = flame_arrays(num_frames, vertices, static_ndim, 4, expression_size, seed)
    arrays |= {"timestep_id": np.array(["00000", "00003"]), "file": np.arange(3), "image_size": np.array(7)}
    keys = list(arrays)
    order.shuffle(keys)
    buffer = io.BytesIO()
    # Not by keyword: "file" is a name np.savez keeps to itself.
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
        for key in keys:
            with archive.open(f"{key}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, arrays[key])
    (tmp_path / "in.npz").write_bytes(buffer.getvalue())
    HeadParameters.load(tmp_path / "in.npz").save(tmp_path / "out.npz")
    assert (tmp_path / "out.npz").read_bytes() == buffer.getvalue()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_saves_is_written_back_byte_for_byte(tmp_path, save):
    source = saved(tmp_path / "in.npz", flame_arrays(), save)
    HeadParameters.load(source).save(tmp_path / "out.npz")
    assert (tmp_path / "out.npz").read_bytes() == source.read_bytes()


def test_saving_is_deterministic_and_numpy_reads_it(tmp_path):
    params = HeadParameters.zeros(4, 3, num_frames=2)
    params.save(tmp_path / "a.npz")
    params.save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["expr"].shape == (2, 3) and arrays["eyes_pose"].shape == (2, 6)
        assert "static_offset" not in arrays


def test_static_offset_made_here_is_stored_as_flame_tools_expect_it(tmp_path):
    params = HeadParameters(**{**HeadParameters.zeros(4, 3).tensors(), "static_offset": torch.ones(5, 3)})
    params.save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["static_offset"].shape == (1, 5, 3)


def test_a_frame_keeps_the_identity_and_takes_the_rest_of_that_time(tmp_path):
    arrays = flame_arrays(num_frames=4)
    params = HeadParameters.load(saved(tmp_path / "p.npz", arrays))
    last = params.frame(-1)
    assert last.num_frames == 1
    np.testing.assert_array_equal(last.jaw_pose.numpy(), arrays["jaw_pose"][3:])
    np.testing.assert_array_equal(last.dynamic_offset.numpy(), arrays["dynamic_offset"][3:])
    assert torch.equal(last.shape, params.shape) and torch.equal(last.static_offset, params.static_offset)
    assert torch.equal(params.frame(np.int64(3)).expr, last.expr)
    assert params.frame(slice(1, 3)).num_frames == 2
    with pytest.raises(ValueError, match="frame 4 asked of head parameters that hold 4 frames"):
        params.frame(4)


def test_canonical_is_the_own_head_at_rest(tmp_path):
    params = HeadParameters.load(saved(tmp_path / "p.npz", flame_arrays()))
    rest = params.canonical(jaw_angle=0.3)
    assert rest.num_frames == 1
    assert torch.equal(rest.dynamic_offset, torch.zeros_like(params.dynamic_offset[:1]))
    assert torch.equal(rest.shape, params.shape) and torch.equal(rest.static_offset, params.static_offset)
    assert rest.jaw_pose.tolist() == [[pytest.approx(0.3), 0, 0]]
    for name in ("expr", "rotation", "neck_pose", "eyes_pose", "translation"):
        assert not rest.tensors()[name].any()


@pytest.mark.parametrize("key", ["shape", "expr", "rotation", "neck_pose", "jaw_pose", "eyes_pose", "translation"])
def test_a_missing_key_is_named(tmp_path, key):
    arrays = flame_arrays()
    del arrays[key]
    with pytest.raises(ValueError, match=rf"^.*p\.npz: lacks {key};.*$"):
        HeadParameters.load(saved(tmp_path / "p.npz", arrays))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("jaw_pose", np.zeros((2, 3), np.float32), r"jaw_pose is \(2, 3\), expected \(3, 3\): expr holds 3 frames"),
        ("eyes_pose", np.zeros((3, 3), np.float32), r"eyes_pose is \(3, 3\), expected \(3, 6\)"),
        ("expr", np.zeros(100, np.float32), r"expr is \(100,\), expected \(T, E\)"),
        ("expr", np.zeros((0, 100), np.float32), r"expr is \(0, 100\), expected \(T, E\) with at least one frame"),
        ("shape", np.zeros((1, 300), np.float32), r"shape is \(1, 300\), expected \(S,\)"),
        ("static_offset", np.zeros((2, 5, 3), np.float32), r"static_offset is \(2, 5, 3\), expected \(1, V, 3\)"),
        ("static_offset", np.zeros((1, 6, 3), np.float32), "static_offset is of 6 vertices, dynamic_offset of 5"),
        ("dynamic_offset", np.zeros((2, 5, 3), np.float32), r"dynamic_offset is \(2, 5, 3\), expected \(3, V, 3\)"),
        ("rotation", np.zeros((3, 3)), "rotation is float64, expected float32"),
        ("neck_pose", np.full((3, 3), np.nan, np.float32), r"neck_pose holds nan at index \[0, 0\]"),
        ("dynamic_offset", np.full((3, 5, 3), np.inf, np.float32), r"dynamic_offset holds inf at index \[0, 0, 0\]"),
    ],
)
def test_arrays_that_disagree_are_named(tmp_path, key, value, message):
    arrays = flame_arrays() | {key: value}
    with pytest.raises(ValueError, match=message) as caught:
        HeadParameters.load(saved(tmp_path / "p.npz", arrays))
    assert "p.npz" in str(caught.value) and "\n" not in str(caught.value)


class Bomb:
    exploded = False

    def __reduce__(self):
        return (setattr, (Bomb, "exploded", True))


@pytest.mark.parametrize("key", ["expr", "something_else"])
def test_pickled_objects_are_refused_and_never_opened(tmp_path, key):
    arrays = flame_arrays() | {key: np.array([Bomb()], dtype=object)}
    path = saved(tmp_path / "p.npz", arrays)
    with pytest.raises(ValueError, match=f"{key} holds pickled objects, which are never opened"):
        HeadParameters.load(path)
    assert not Bomb.exploded
    pickle.loads(pickle.dumps(Bomb()))  # the bomb is a live one
    assert Bomb.exploded
    Bomb.exploded = False


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY garbage", b"ply\nformat ascii 1.0\n"])
def test_a_file_that_is_no_npz_is_refused(tmp_path, content):
    (tmp_path / "p.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"p\.npz: not a readable npz"):
        HeadParameters.load(tmp_path / "p.npz")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"p\.npz: no such head parameter file"):
        HeadParameters.load(tmp_path / "p.npz")


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), compressed=st.booleans())
def test_a_damaged_file_gives_finite_parameters_or_one_line(tmp_path, data, compressed):
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **flame_arrays(2, 2, 3, 2, 2))
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    (tmp_path / "p.npz").write_bytes(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            params = HeadParameters.load(tmp_path / "p.npz")
    except ValueError as error:
        assert "p.npz" in str(error) and "\n" not in str(error)
    else:
        assert all(torch.isfinite(value).all() for value in params.tensors().values())
