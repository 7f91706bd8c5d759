"""What an npz may hold, and how much of it is unpacked."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest

from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.utils.npz import read_npz


def parameters(num_frames=2):
    sizes = {"expr": 4, "rotation": 3, "neck_pose": 3, "jaw_pose": 3, "eyes_pose": 6, "translation": 3}
    values = {name: np.zeros((num_frames, size), np.float32) for name, size in sizes.items()}
    return {"shape": np.zeros(3, np.float32), **values}


def write_bomb(path, arrays, key, megabytes):
    """A compressed npz with zeros beside the arrays, written without holding them."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, value)
            archive.writestr(f"{name}.npy", buffer.getvalue())
        with archive.open(f"{key}.npy", "w", force_zip64=True) as entry:
            header = {"descr": "<f4", "fortran_order": False, "shape": (megabytes * 2**18,)}
            np.lib.format.write_array_header_1_0(entry, header)
            for _ in range(megabytes):
                entry.write(bytes(2**20))
    return path


@pytest.mark.parametrize(
    ("key", "megabytes", "message"),
    [
        ("texture", 65, r"in arrays that are not needed \(texture\), expected at most 67,108,864"),
        ("dynamic_offset", 33, "bytes when unpacked, expected at most 33,554,432"),
    ],
)
def test_a_small_file_of_large_zeros_is_refused_before_it_is_unpacked(tmp_path, monkeypatch, key, megabytes, message):
    monkeypatch.setattr("gaussian_tokenizer.utils.npz.MAX_BYTES", 2**25)
    path = write_bomb(tmp_path / "p.npz", parameters(), key, megabytes)
    assert path.stat().st_size < 1e6
    tracemalloc.start()
    with pytest.raises(ValueError, match=message):
        HeadParameters.load(path)
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


def test_an_array_is_as_large_as_its_header_says_not_as_its_entry(tmp_path):
    path = tmp_path / "p.npz"
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(4, np.float32))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("expr.npy", buffer.getvalue() + bytes(1000))
    with pytest.raises(ValueError, match=r"expr is cut short: 1016 bytes, expected 16 for \(4,\)"):
        read_npz(path)


def test_what_a_file_holds_uncompressed_may_be_as_large_as_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("gaussian_tokenizer.utils.npz.MAX_OTHER_BYTES", 1000)
    arrays = parameters() | {"texture": np.ones(1000, np.float32)}
    np.savez(tmp_path / "p.npz", **arrays)
    params = HeadParameters.load(tmp_path / "p.npz")
    params.save(tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "p.npz").read_bytes()
    np.savez_compressed(tmp_path / "p.npz", **arrays)
    with pytest.raises(ValueError, match=r"not needed \(texture\)"):
        HeadParameters.load(tmp_path / "p.npz")


def test_one_array_under_two_entries_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "p.npz", "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a.npy", b"")
        archive.writestr("a.npy", b"")
    with pytest.raises(ValueError, match="holds an array twice"):
        read_npz(tmp_path / "p.npz")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"p\.npz: no such npz file"):
        read_npz(tmp_path / "p.npz")
