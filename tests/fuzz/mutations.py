"""Ways to damage a file: bytes, numbers in text, JSON, and the members of containers (zip, npz, safetensors).

Every mutation is a function (content, other files of the format, rng) -> content that depends on nothing else, so that a
seed and a number name a damaged file for good.
"""

import io
import json
import re
import struct
import zipfile
from collections.abc import Callable, Sequence
from random import Random

import numpy as np

Mutation = Callable[[bytes, Sequence[bytes], Random], bytes]
MAX_LENGTH = 4 * 2**20
PACKED = [
    struct.pack("<f", value) for value in (np.nan, np.inf, -np.inf, 1e38, -1e38, 1e-45, 0.0, -0.0, 2.0**31, 0.5)
] + [
    value.to_bytes(size, "little")
    for size in (1, 2, 4, 8)
    for value in (0, 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1)
]
NUMBERS = [b"0", b"-1", b"1.5", b"1e400", b"-1e999", b"NaN", b"Infinity", b"1e-320", b"2147483648", b"9223372036854775808",
           b"1" + b"0" * 400, b"9" * 5000, b"1099511627776", b"", b"true", b"null", b'"1"', b"[]", b"-0"]  # fmt: skip
OPCODES = [b"\x85" * 50_000, b"2\x86" * 60, b"\x8f(N\x90", b")", b"]", b"}", b"N", b"0", b"(", b"1", b"2", b".", b"\x94", b"h\x00",
           b"r\xff\xff\xff\x7f", b"X\xff\xff\xff\xff", b"U\x03abc", b"I" + b"9" * 5000 + b"\n", b"J\xff\xff\xff\x7f", b"K\x05",
           b"R", b"b", b"s", b"u", b"t", b"l", b"e", b"a", b"\x81", b"o", b"Q", b"\x85", b"\x86", b"cos\nsystem\n",
           b"c__builtin__\nset\n", b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"G\x7f\xf8\0\0\0\0\0\0"]  # fmt: skip
VALUES = [None, True, False, 0, -1, 1, 1.5, 1e308, float("nan"), float("inf"), -float("inf"), 2**31, 2**40, 2**63, -(2**63),
          10**400, "", "a", "\0", "../../etc/passwd", "/etc/passwd", "x" * 10_000, "\ud800", "1", "nan", [], [[]], {}, [0] * 1000,
          [None], {"a": 1}, [1, 2, 3], [[0, 0, 0], [1, 1, 1]], [1e400], "procedural:600", "C:\\x"]  # fmt: skip


def damage(content: bytes, others: Sequence[bytes], rng: Random, special: Sequence[Mutation]) -> bytes:
    """One to three mutations, mostly those that the format knows; what does not apply leaves the bytes as they are."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        chosen = rng.choice(special) if special and rng.random() < 0.6 else rng.choice(ANY)
        try:
            content = chosen(content, others, rng)
        except Exception:
            content = flip(content, others, rng)
    return content[:MAX_LENGTH]


# ---- bytes


def flip(content: bytes, others: Sequence[bytes], rng: Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        if damaged:
            at = rng.randrange(min(len(damaged), 400)) if rng.random() < 0.4 else rng.randrange(len(damaged))
            damaged[at] = rng.choice((damaged[at] ^ 1 << rng.randrange(8), rng.randrange(256), 0, 255))
    return bytes(damaged)


def cut(content: bytes, others: Sequence[bytes], rng: Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def overwrite(content: bytes, others: Sequence[bytes], rng: Random) -> bytes:
    value, at = rng.choice(PACKED), rng.randrange(len(content) + 1)
    return content[:at] + value + content[at + len(value) :]


def drop(content: bytes, others: Sequence[bytes], rng: Random) -> bytes:
    start, stop = _span(content, rng)
    return content[:start] + content[stop:]


def repeat(content: bytes, others: Sequence[bytes], rng: Random) -> bytes:
    start, stop = _span(content, rng)
    return content[:stop] + content[start:stop] * rng.choice((1, 2, 50)) + content[stop:]


def splice(content: bytes, others: Sequence[bytes], rng: Random) -> bytes:
    other = rng.choice(others)
    (start, stop), (begin, end) = _span(content, rng), _span(other, rng)
    return content[:start] + other[begin:end] + content[stop:]


def blank(content: bytes, others: Sequence[bytes], rng: Random) -> bytes:
    start, stop = _span(content, rng)
    return content[:start] + rng.choice((b"\0", b"\xff", b" ", b"(", b"[")) * (stop - start) + content[stop:]


ANY: list[Mutation] = [flip, flip, cut, overwrite, overwrite, drop, repeat, splice, blank]


def _span(content: bytes, rng: Random) -> tuple[int, int]:
    start = rng.randrange(len(content) + 1)
    return start, min(len(content), start + rng.choice((1, 2, 4, 8, 50, 1000)))


# ---- text


def number_in_text(content: bytes, others: Sequence[bytes], rng: Random) -> bytes:
    found = list(re.finditer(rb"-?\d+(\.\d+)?(e-?\d+)?", content[:50_000]))
    at = rng.choice(found)
    return content[: at.start()] + rng.choice(NUMBERS) + content[at.end() :]


def line_of_text(content: bytes, others: Sequence[bytes], rng: Random) -> bytes:
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    change = rng.choice(("drop", "repeat", "swap", "other"))
    if change == "drop":
        del lines[at]
    elif change == "repeat":
        lines[at:at] = [lines[at]] * rng.choice((1, 3, 100))
    elif change == "swap":
        to = rng.randrange(len(lines))
        lines[at], lines[to] = lines[to], lines[at]
    else:
        lines[at] = rng.choice(rng.choice(others).split(b"\n"))
    return b"\n".join(lines)


def json_value(content: bytes, others: Sequence[bytes], rng: Random) -> bytes:
    """Another value, a key more or less, or 100,000 brackets, anywhere in a JSON."""
    if rng.random() < 0.03:
        return rng.choice((b"[", b'{"a":')) * 100_000
    tree = json.loads(content)
    places = list(_places(tree))
    if not places:
        return json.dumps(rng.choice(VALUES)).encode()
    parent, key = rng.choice(places)
    change = rng.random()
    if change < 0.5:
        parent[key] = rng.choice(VALUES)
    elif change < 0.6:
        del parent[key]
    elif change < 0.7:
        source, other = rng.choice(places)
        parent[key] = source[other]
    elif change < 0.8 and isinstance(parent, list):
        parent.insert(key, rng.choice(VALUES))
    elif change < 0.9 and isinstance(parent, dict):
        parent[rng.choice(("", "a", "dtype", "format", "\0", key + "x"))] = rng.choice((parent[key], *VALUES))
    elif isinstance(parent[key], int | float) and not isinstance(parent[key], bool):
        parent[key] = rng.choice(
            (-parent[key], parent[key] + 1, parent[key] * 1e6, str(parent[key]), parent[key] + 0.5)
        )
    else:
        parent[key] = [parent[key]]
    text = json.dumps(tree)
    if rng.random() < 0.02:
        text = text.replace("1", "[" * 100_000 + "]" * 100_000, 1)
    return text.encode("utf-8", "surrogatepass")


def _places(tree: object):
    items = enumerate(tree) if isinstance(tree, list) else tree.items() if isinstance(tree, dict) else ()
    for key, value in items:
        yield tree, key
        if isinstance(value, list | dict):
            yield from _places(value)


# ---- containers


def safetensors_header(content: bytes, others: Sequence[bytes], rng: Random) -> bytes:
    """A change of the header's JSON, or of a JSON inside its metadata; the length before it stays right."""
    length = struct.unpack("<Q", content[:8])[0]
    header, rest = content[8 : 8 + length], content[8 + length :]
    tree = json.loads(header)
    if rng.random() < 0.5 and "__metadata__" in tree:
        key = rng.choice(list(tree["__metadata__"]))
        inner = json_value(tree["__metadata__"][key].encode(), others, rng)
        tree["__metadata__"][key] = inner.decode("utf-8", "replace")
        header = json.dumps(tree).encode()
    else:
        header = json_value(header, others, rng)
    return struct.pack("<Q", len(header)) + header + rest


def safetensors_values(content: bytes, others: Sequence[bytes], rng: Random) -> bytes:
    """An extreme number among the values of a tensor."""
    start = 8 + struct.unpack("<Q", content[:8])[0]
    value, at = rng.choice(PACKED), start + 4 * rng.randrange((len(content) - start) // 4)
    return content[:at] + value + content[at + len(value) :]


def zip_member(content: bytes, others: Sequence[bytes], rng: Random) -> bytes:
    """One member damaged, dropped, renamed or doubled; checksums stay right."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    at = rng.randrange(len(members))
    name, member = members[at]
    change = rng.random()
    if change < 0.003:
        return zip_bomb(content, others, rng)
    if change < 0.6:
        special = [npy_array, npy_array, npy_header] if name.endswith(".npy") else [pickle_opcodes]
        members[at] = (name, damage(member, [each for _, each in members], rng, special))
    elif change < 0.7:
        del members[at]
    elif change < 0.8:
        members[at] = (rng.choice((name + "x", "", "../" + name, name[1:], "a" * 5000)), member)
    elif change < 0.9:
        members[at] = (name, rng.choice(members)[1])
    else:
        members.append(rng.choice(members))
    return _zipped(members, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))


def zip_bomb(content: bytes, others: Sequence[bytes], rng: Random) -> bytes:
    """One array of zeros that is far larger than the file."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    at = rng.randrange(len(members))
    stream = io.BytesIO()
    shape = (rng.choice((2**20, 2**25)),)
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    members[at] = (rng.choice((members[at][0], "other.npy")), stream.getvalue() + bytes(4 * shape[0]))
    return _zipped(members, zipfile.ZIP_DEFLATED)


def npy_array(content: bytes, others: Sequence[bytes], rng: Random) -> bytes:
    """An array of another shape, type or content."""
    array = np.load(io.BytesIO(content), allow_pickle=False)
    kind = rng.choice(("value", "value", "dtype", "shape", "empty", "rows", "scalar", "text", "order"))
    if kind == "value" and array.size and array.dtype.kind in "iuf":
        array = array.copy()
        array.flat[rng.randrange(array.size)] = rng.choice(
            (0, 1, 127) if array.dtype.kind != "f" else (np.nan, np.inf, 1e38, -1e38)
        )
    elif kind == "dtype":
        array = array.astype(rng.choice(("f8", "f2", "i4", "u1", "?", "c8", "S3", "U3", ">f4", "M8[s]", "V4")))
    elif kind == "shape":
        array = array.reshape(rng.choice(((-1,), (1, *array.shape), (*array.shape, 1), array.shape[::-1])))
    elif kind == "empty":
        array = np.zeros(rng.choice(((0,), (0, 3), (1, 0), (2**40, 0), (0,) * 32)), array.dtype)
    elif kind == "rows":
        array = np.concatenate([array] * rng.choice((1, 2, 3)))[rng.choice((0, 1)) :]
    elif kind == "scalar":
        array = np.array(rng.choice((0, 1.5, "a", b"b", True)))
    elif kind == "text":
        array = np.array(["a", "\0", "é"][: rng.randrange(4)])
    else:
        array = np.asfortranarray(array)
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def npy_header(content: bytes, others: Sequence[bytes], rng: Random) -> bytes:
    """Other words in an array's header; its length stays right."""
    length = struct.unpack("<H", content[8:10])[0]
    header = content[10 : 10 + length]
    header = rng.choice((number_in_text, flip, drop, repeat, blank))(header, others, rng)
    if rng.random() < 0.3:
        header = re.sub(
            rb"'<f4'", rng.choice((b"'|O'", b"'<f8'", b"[('a','<f4')]", b"'V0'", b"'" + b"a" * 99 + b"'")), header
        )
    return content[:8] + struct.pack("<H", min(len(header), 65535)) + header + content[10 + length :]


def pickle_opcodes(content: bytes, others: Sequence[bytes], rng: Random) -> bytes:
    """Opcodes put in, doubled or exchanged."""
    starts = [at.start() for at in re.finditer(rb"[(tRb}u\]N.c]", content)] or [0]
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.choice(starts)
        content = content[:at] + rng.choice(OPCODES) * rng.choice((1, 1, 1, 60)) + content[at + rng.choice((0, 1)) :]
    return content


def _zipped(members: Sequence[tuple[str, bytes]], compression: int) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, member in members:
            archive.writestr(zipfile.ZipInfo(name), member, compression)
    return stream.getvalue()
