"""The numeric arrays of a pickle, as plain bytes: NumPy's, also inside chumpy's, and scipy's compressed sparse matrices.

FLAME files are read in a process of their own, under limits of memory and time (`arrays_in_child`). It starts fast because it loads
nothing but this file, `plain_pickle` and the standard library: nothing else may be imported here.
"""

import marshal
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .plain_pickle import NUMBER, Name, Thing, interpret

MAX_NESTED = 8  # chumpy arrays inside one another
SECONDS, MEMORY, MAX_FILE = 60, 2**30, 2**30  # of the child; bytes, in addition to eight times the file
# What a pickle of arrays may name, and what it stands for.
NUMPY = {
    ("numpy", "ndarray"): "array",
    ("numpy", "dtype"): "dtype",
    ("numpy.core.multiarray", "_reconstruct"): "make array",
    ("numpy._core.multiarray", "_reconstruct"): "make array",
    ("_codecs", "encode"): "encode",
    ("__builtin__", "bytes"): "bytes",  # empty
    ("collections", "OrderedDict"): "dictionary",
}
FLAME = NUMPY | {
    (module, name): meaning
    for modules, name, meaning in (
        (("copy_reg", "copyreg"), "_reconstructor", "make object"),
        (("__builtin__", "builtins"), "object", "object"),
        (("__builtin__", "builtins"), "set", "set"),
        (("chumpy", "chumpy.ch"), "Ch", "chumpy"),
        (("scipy.sparse", "scipy.sparse.csc", "scipy.sparse._csc"), "csc_matrix", "columns"),
        (("scipy.sparse", "scipy.sparse.csr", "scipy.sparse._csr"), "csr_matrix", "rows"),
    )
    for module in modules
}
# The package's own __init__, which needs more than the standard library, is not run; the caller's path is not inherited, so that no
# module in the working folder is imported.
CHILD = (
    "import sys, types; package = types.ModuleType('package'); package.__path__ = [sys.argv[1]]; "
    "sys.modules['package'] = package; from package.plain_arrays import main; "
    "main(sys.argv[2], sys.argv[3:], sys.stdout.buffer)"
)


@dataclass(frozen=True, eq=False)
class PlainArray:
    """A numeric array as bytes."""

    dtype: str  # such as "<f8"
    shape: tuple[int, ...]
    fortran_order: bool
    content: bytes


@dataclass(frozen=True, eq=False)
class PlainSparse:
    """A compressed sparse matrix, by rows or by columns; the parts are those of scipy."""

    rows_first: bool
    shape: tuple[int, ...]
    data: PlainArray
    indices: PlainArray
    indptr: PlainArray


def read_arrays(content: object, keys: Sequence[str]) -> dict[str, PlainArray | PlainSparse]:
    """The arrays of these keys of an interpreted dictionary; ValueError that names the key."""
    if not isinstance(content, dict):
        kind = content.meaning if isinstance(content, Thing | Name) else type(content).__name__
        raise ValueError(f"holds a {kind}, expected a dictionary with {', '.join(keys)}")
    missing = [key for key in keys if key not in content]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}; expected {', '.join(keys)}")
    arrays = {}
    for key in keys:
        try:
            arrays[key] = read_array(content[key])
        except ValueError as error:
            raise ValueError(f"{key} is not a readable array: {error}") from None
    return arrays


def read_array(value: object) -> PlainArray | PlainSparse:
    """The numbers of a NumPy array, which may be inside a chumpy array, or of a sparse matrix."""
    for _ in range(MAX_NESTED):
        if not (isinstance(value, Thing) and value.meaning == "chumpy"):
            break
        value = _member(value.state, "x")
    if not isinstance(value, Thing) or value.meaning not in ("array", "columns", "rows"):
        raise ValueError(f"found {value.meaning if isinstance(value, Thing | Name) else type(value).__name__}")
    if value.meaning != "array":
        state = value.state
        shape = _shape(_member(state, "_shape" if isinstance(state, dict) and "_shape" in state else "shape"))
        parts = [read_array(_member(state, key)) for key in ("data", "indices", "indptr")]
        if len(shape) != 2 or not all(isinstance(part, PlainArray) for part in parts):
            raise ValueError("a sparse matrix whose parts are no arrays")
        return PlainSparse(value.meaning == "rows", shape, *parts)  # type: ignore[arg-type]
    if not isinstance(value.state, tuple) or len(value.state) != 5:
        raise ValueError("an array without its content")
    _, stated, dtype, fortran_order, content = value.state
    content = content.encode("latin1") if isinstance(content, str) else content  # a Python-2 string is bytes
    is_type = isinstance(dtype, Thing) and dtype.meaning == "dtype"
    number = NUMBER.fullmatch(dtype.arguments[0]) if is_type else None
    if number is None or not isinstance(content, bytes):
        raise ValueError("an array of something else than numbers")
    shape, (order, kind, size) = _shape(stated), number.groups()
    if isinstance(dtype.state, tuple) and len(dtype.state) > 1:
        order = dtype.state[1]
    if math.prod(shape) * int(size) != len(content):
        raise ValueError(f"{len(content)} bytes for the shape {shape} of {kind}{size}")
    return PlainArray((">" if order == ">" else "<") + kind + size, shape, bool(fortran_order), content)


def arrays_in_child(path: Path, keys: Sequence[str]) -> dict[str, PlainArray | PlainSparse]:
    """`read_arrays` of a FLAME pickle in a process of its own, under limits; ValueError that does not name the file."""
    size = path.stat().st_size
    if size > MAX_FILE:
        raise ValueError(f"not a FLAME pickle: {size:,} bytes, expected less than {MAX_FILE:,}")
    command = [sys.executable, "-I", "-S", "-c", CHILD, str(Path(__file__).parent), str(path.absolute()), *keys]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError(f"not a FLAME pickle: reading it took more than {SECONDS} seconds") from None
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().rpartition("\n")[2] or f"status {done.returncode}"
        raise ValueError(f"not a FLAME pickle that can be read within {SECONDS} seconds and its memory ({reason})")
    found = marshal.loads(done.stdout)
    if isinstance(found, str):
        raise ValueError(found)
    return {key: _as_array(parts) for key, parts in found.items()}


def main(path: str, keys: Sequence[str], output: BinaryIO) -> None:
    """The child process: write the arrays, or what is wrong with the file, with `marshal`."""
    _limit_this_process(MEMORY + 8 * Path(path).stat().st_size)
    found: dict[str, tuple] | str
    try:
        try:
            content = interpret(Path(path).read_bytes(), FLAME)
        except ValueError as error:
            raise ValueError(f"not a FLAME pickle that is safe to read: {error}") from None
        found = {key: astuple(value) for key, value in read_arrays(content, keys).items()}
    except ValueError as error:
        found = str(error)
    output.write(marshal.dumps(found))
    output.flush()


def _member(state: object, key: str) -> Any:
    if not isinstance(state, dict) or key not in state:
        raise ValueError(f"an object without its {key}")
    return state[key]


def _shape(value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > 8 or not all(type(n) is int and 0 <= n < 2**40 for n in value):
        raise ValueError("an array whose shape is no tuple of sizes")
    return value


def _as_array(parts: tuple) -> PlainArray | PlainSparse:
    if isinstance(parts[0], str):
        return PlainArray(*parts)
    rows_first, shape, *inner = parts
    return PlainSparse(rows_first, shape, *(PlainArray(*each) for each in inner))


def _limit_this_process(memory: int) -> None:
    """Where the system can: not on Windows; macOS refuses a memory limit."""
    try:
        import resource
    except ImportError:
        return
    for what, limit in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, SECONDS)):
        hard = resource.getrlimit(what)[1]
        try:
            resource.setrlimit(what, (limit if hard < 0 else min(limit, hard), hard))
        except (ValueError, OSError):
            continue
