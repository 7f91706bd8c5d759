"""A pickle is read without being run, in time and memory that its length bounds."""

import multiprocessing
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
from collections import OrderedDict

import numpy as np
import pytest

from gaussian_tokenizer.utils import plain_arrays, plain_pickle
from gaussian_tokenizer.utils.plain_arrays import FLAME, NUMPY, PlainArray, arrays_in_child, read_array, read_arrays
from gaussian_tokenizer.utils.plain_pickle import interpret

START = b"\x80\x02"
SET = b"c__builtin__\nset\n((%sltR."
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
FLOATS = b"cnumpy\ndtype\n(U\x02f8K\x00K\x01tR"


@pytest.fixture
def peak_megabytes():
    """Call it for the most memory that was taken since the test began."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()


@pytest.mark.parametrize("protocol", range(5))
def test_plain_values_of_every_protocol_are_those_that_were_written(protocol):
    value = {
        "numbers": [0, 1, 255, 256, 65536, -1, 2**40, -(2**80), 1.5, True, False, None],
        "texts": ("", "a" * 300, "ä€😀", "line\nbreak '\"\\"),
        "nested": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], {}, {"a": {"b": [1]}}],
        "twice": [shared := [1, 2], shared],
    }
    read = interpret(pickle.dumps(value, protocol), FLAME)
    assert read == value and read["twice"][0] is read["twice"][1]


@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.parametrize(
    "array",
    [
        np.arange(24.0).reshape(2, 3, 4),
        np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        np.arange(5, dtype=">i4"),
        np.zeros((0, 3)),
        np.array(7, np.uint16),
        np.array([True, False]),
        np.arange(200, 256, dtype=np.uint8),
    ],
)
def test_arrays_of_every_protocol_are_those_that_were_written(array, protocol):
    plain = read_array(interpret(pickle.dumps(array, protocol), NUMPY))
    assert isinstance(plain, PlainArray)
    order = "F" if plain.fortran_order else "C"
    read = np.frombuffer(plain.content, plain.dtype).reshape(plain.shape, order=order)
    assert read.dtype == array.dtype and np.array_equal(read, array)


def test_text_in_quotes_holds_the_bytes_of_python_2():
    """Protocol 0 of Python 2: an array's bytes as a literal with escapes."""
    content = np.array([1.5, -2.5e300]).tobytes()
    literal = "".join(f"\\x{byte:02x}" for byte in content).encode()
    state = b"(I1\n(I2\ntp1\n" + FLOATS + b"I00\nS'" + literal + b"'\np2\ntb."
    plain = read_array(interpret(ARRAY + state, FLAME))
    assert plain.content == content and plain.shape == (2,)


def test_sets_and_ordered_dictionaries_do_not_stand_in_the_way():
    value = {"a": {1, 2}, "b": OrderedDict(x=1), "c": np.float64, "d": frozenset({3})}
    del value["c"]
    read = interpret(pickle.dumps(value, 4), FLAME)
    assert read["b"] == {"x": 1} and list(read) == ["a", "b", "d"]


DEEP = b")" + b"\x85" * 200_000
DOUBLED = b")" + b"2\x86" * 40
HARMLESS = {
    "a set of a tuple 200,000 deep": START + SET % DEEP,
    "a set of a tuple doubled 40 times": START + SET % DOUBLED,
    "a frozen set of a tuple 200,000 deep": b"\x80\x04(" + DEEP + b"\x91.",
    "a dictionary whose key is a tuple 200,000 deep": START + b"}" + DEEP + b"Ns.",
    "a dictionary whose key is a tuple doubled 40 times": START + b"}" + DOUBLED + b"Ns.",
    "a dictionary of numbers with one hash": START
    + b"}("
    + b"".join(b"\x8a\x0b" + ((2**61 - 1) * k).to_bytes(11, "little") + b"N" for k in range(50_000))
    + b"u.",
    "lists that hold themselves": START + b"]q\x00h\x00a0" + b"h\x00" + b"h\x00a" * 1000 + b".",
}


@pytest.mark.parametrize("name", HARMLESS)
@pytest.mark.timeout(60)
def test_what_hangs_or_kills_an_unpickler_is_no_effort(name):
    interpret(HARMLESS[name], FLAME)


REFUSED = {
    "a memo index of 2^28": (START + b"Nr\x00\x00\x00\x10.", "remembers a value 268435456"),
    "a memo index of 10^20": (b"Np100000000000000000000\n.", "remembers a value 1000"),
    "a memo index below 0": (b"Np-1\n.", "remembers a value -1"),
    "a value never made": (START + b"h\x05.", "refers to a value 5"),
    "a text longer than the file": (START + b"X\xff\xff\xff\xff", "cut short"),
    "a text of 2^63 bytes": (b"\x80\x04\x8d" + b"\xff" * 8, "cut short"),
    "a text of negative length": (START + b"T\xff\xff\xff\xff.", "cut short"),
    "an empty stack": (START + b".", "takes more from its stack"),
    "no mark": (START + b"t.", "a mark that is not there"),
    "a number of 10,000 digits": (b"I" + b"9" * 10_000 + b"\n.", "4300 digits"),
    "items of a list": (START + b"]NNs.", "no dictionary"),
    "an odd number of items": (START + b"}(Nu.", "no dictionary"),
    "appending to a number": (START + b"K\x01K\x02a.", "no list"),
    "calling a number": (START + b"K\x01)R.", "no function"),
    "calling without a tuple": (START + b"c__builtin__\nset\n]R.", "no function"),
    "the state of a name": (START + b"c_codecs\nencode\n}b.", "no object"),
    "an extension": (START + b"\x82\x01.", "opcode"),
    "a buffer outside": (b"\x80\x05\x97.", "opcode"),
    "nothing": (b"", "cut short"),
    "one text encoded again and again": (
        START + b"c_codecs\nencode\nq\x000X\x10\x27\x00\x00" + b"a" * 10_000 + b"X\x06\x00\x00\x00latin1\x86q\x010"
        + b"h\x00h\x01R0" * 5000 + b"N.",
        "makes more bytes than it has",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_pickle_that_asks_for_too_much_is_refused(name, peak_megabytes):
    content, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        interpret(content, FLAME)
    assert peak_megabytes() < 100


def test_a_pickle_of_more_opcodes_than_any_file_has_is_refused(monkeypatch):
    monkeypatch.setattr(plain_pickle, "MAX_STEPS", 1000)
    with pytest.raises(ValueError, match="more than 1,000 opcodes"):
        interpret(START + b"N0" * 500 + b"N.", FLAME)


def sparse(shape: bytes, indptr: bytes = ARRAY) -> bytes:
    made = b"ccopy_reg\n_reconstructor\n(cscipy.sparse.csc\ncsc_matrix\nc__builtin__\nobject\nNtR"
    return (
        made
        + b"}(U\x06_shape"
        + shape
        + b"U\x04data"
        + ARRAY
        + b"U\x07indices"
        + ARRAY
        + b"U\x06indptr"
        + indptr
        + b"ub"
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"cchumpy.ch\nCh\n)Rq\x00}U\x01xh\x00sb", "found chumpy"),  # a chumpy array around itself
        (b"cchumpy.ch\nCh\n)R]b", "without its x"),
        (ARRAY, "without its content"),
        (ARRAY + b"(K\x01U\x01a" + FLOATS + b"\x89U\x00tb", "no tuple of sizes"),
        (ARRAY + b"(K\x01(NNt" + FLOATS + b"\x89U\x00tb", "no tuple of sizes"),
        (ARRAY + b"(K\x01(J\xff\xff\xff\xfft" + FLOATS + b"\x89U\x00tb", "no tuple of sizes"),
        (ARRAY + b"(K\x01(K\x09t" + FLOATS + b"\x89U\x08abcdefghtb", r"8 bytes for the shape \(9,\)"),
        (ARRAY + b"(K\x01(K\x01tN\x89U\x08abcdefghtb", "something else than numbers"),
        (ARRAY + b"(K\x01(K\x01t" + FLOATS + b"\x89Ntb", "something else than numbers"),
        (sparse(b"U\x02ab"), "no tuple of sizes"),
        (sparse(b"(U\x01aU\x01bt"), "no tuple of sizes"),
        (sparse(b"(K\x01t"), "without its content|no arrays"),
        (b"U\x04none", "found str"),
    ],
)
def test_an_object_that_is_no_array_is_named(value, message):
    with pytest.raises(ValueError, match=f"weights is not a readable array: .*({message})"):
        read_arrays(interpret(START + b"}U\x07weights" + value + b"s.", FLAME), ["weights"])


def write(tmp_path, content):
    path = tmp_path / "flame.pkl"
    path.write_bytes(content)
    return path


def test_a_process_of_its_own_gives_the_arrays_that_lie_in_the_file(tmp_path):
    value = {"weights": np.arange(6.0).reshape(2, 3), "f": np.arange(4, dtype=np.uint32)}
    path = write(tmp_path, pickle.dumps(value, 2))
    assert arrays_in_child(path, ["f", "weights"])["weights"].content == value["weights"].tobytes()
    with pytest.raises(ValueError, match="lacks v_template"):
        arrays_in_child(path, ["v_template"])


def test_nothing_in_the_working_folder_or_the_callers_path_steps_in(tmp_path, monkeypatch):
    for name in ("json", "struct", "pickle", "codecs", "gaussian_tokenizer", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    path = write(tmp_path, pickle.dumps({"f": np.arange(3)}, 2))
    assert arrays_in_child(path, ["f"])["f"].shape == (3,)
    assert not (tmp_path / "ran").exists()


def test_a_daemonic_process_can_read_too(tmp_path):
    path = write(tmp_path, pickle.dumps({"f": np.arange(3)}, 2))
    child = multiprocessing.get_context("fork").Process(target=arrays_in_child, args=(path, ["f"]), daemon=True)
    child.start()
    child.join(60)
    assert child.exitcode == 0


def test_a_script_without_a_main_guard_can_read_too(tmp_path):
    path = write(tmp_path, pickle.dumps({"f": np.arange(3)}, 2))
    script = tmp_path / "script.py"
    script.write_text(
        f"import pathlib\nfrom gaussian_tokenizer.utils.plain_arrays import arrays_in_child\n"
        f"print(arrays_in_child(pathlib.Path({str(path)!r}), ['f'])['f'].shape)\n"
    )
    assert subprocess.check_output([sys.executable, script], text=True) == "(3,)\n"


def test_reading_ends_when_the_time_is_over(tmp_path, monkeypatch):
    monkeypatch.setattr(plain_arrays, "SECONDS", 0.0)
    with pytest.raises(ValueError, match="reading it took more than"):
        arrays_in_child(write(tmp_path, b"N."), ["f"])


def test_a_file_larger_than_any_such_file_is_not_read(tmp_path, monkeypatch):
    path = write(tmp_path, b"N.")
    os.truncate(path, plain_arrays.MAX_FILE + 1)
    with pytest.raises(ValueError, match=r"1,073,741,825 bytes, expected less than 1,073,741,824"):
        arrays_in_child(path, ["f"])


def test_the_process_cannot_take_more_memory_than_it_is_given():
    pytest.importorskip("resource")
    if sys.platform == "darwin":
        pytest.skip("macOS has no limit of memory for a process")
    script = "from gaussian_tokenizer.utils import plain_arrays as p; p._limit_this_process(2**28); bytes(2**29)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.endswith("MemoryError\n")


def test_a_system_without_limits_still_reads(tmp_path, monkeypatch, capsysbinary):
    monkeypatch.setitem(sys.modules, "resource", None)
    path = write(tmp_path, START + b"Nr" + struct.pack("<I", 2**28) + b".")
    plain_arrays.main(str(path), ["f"], sys.stdout.buffer)
    assert b"remembers a value" in capsysbinary.readouterr().out
