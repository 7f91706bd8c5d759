"""Face-anchored points to token ids and back, in NumPy alone: the arithmetic of `GaussianTokenizer`.

A point (canonical position in meters + face of the head model) becomes four tokens x, y, z, face, or these in `token_order`:

    bin = floor((x - lo) / (hi - lo) * n_bins), clamped;  face token = n_bins + face     [bos, x, y, z, face, ..., eos]

Points are sorted by their quantized (y, z, x, face), so a cloud has one sequence whatever its order. `decode` gives bin
centers. Travels with checkpoints; imports neither transformers nor torch.
"""

import math
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

SLOTS = ("x", "y", "z", "face")
DEFAULT_BOUNDS = ((-0.3, -0.3, -0.3), (0.3, 0.3, 0.3))  # meters: a head with hair and neck about the origin
BLOCK = 8192  # points worked on at a time: the temporaries stay in the cache, so the time stays linear


class Encoded(NamedTuple):
    """One cloud as ids."""

    ids: np.ndarray  # (4N + 2,) of the smallest of uint16 and uint32 that holds the vocabulary
    order: np.ndarray | None  # (N,) from sorted to given points
    num_out_of_bounds: int  # points clamped to the border bin
    overshoot: float  # meters, how far out the farthest of them is


class PointCodec:
    """Encodes and decodes clouds of points; arguments as of `GaussianTokenizer`."""

    def __init__(
        self,
        n_bins: int = 1024,
        n_faces: int = 10144,
        bounds: Sequence[Sequence[float]] = DEFAULT_BOUNDS,
        axis_order: str = "yzx",
        max_points: int | None = None,
        head_name: str | None = None,
        head_hash: str | None = None,
        token_order: str = "xyzf",
    ) -> None:
        self.n_bins = positive_integer("n_bins", n_bins)
        self.n_faces = positive_integer("n_faces", n_faces)
        self.max_points = None if max_points is None else positive_integer("max_points", max_points)
        if not isinstance(axis_order, str) or sorted(axis_order) != ["x", "y", "z"]:
            raise ValueError(f'axis_order is {axis_order!r}; expected an order of the three axes, such as "yzx"')
        self.axis_order = axis_order
        if not isinstance(token_order, str) or sorted(token_order) != ["f", "x", "y", "z"]:
            expected = 'the letters x, y, z and f (the face) in some order, such as "yzxf"'
            raise ValueError(f"token_order is {token_order!r}; expected {expected}")
        self.token_order = token_order
        for name, value in (("head_name", head_name), ("head_hash", head_hash)):
            if not isinstance(value, (str, type(None))):
                raise ValueError(f"{name} is {value!r}; expected text, or None where the head model is not known")
        self.head_name, self.head_hash = head_name, head_hash
        # One int64 sorting key per point: the coordinate bins in sorting order, then the face in the low bits.
        self._coordinate_bits = (self.n_bins - 1).bit_length()
        self._face_bits = (self.n_faces - 1).bit_length()
        bits = 3 * self._coordinate_bits + self._face_bits
        if bits > 63 or self.vocab_size > 2**32:
            found = f"n_bins={n_bins} and n_faces={n_faces} need {bits} bits per point and {self.vocab_size} ids"
            raise ValueError(f"{found}; at most 63 fit a sorting key and 2**32 a vocabulary: lower n_bins")
        self._sorting_axes = ["xyz".index(axis) for axis in axis_order]
        self._id_dtype = np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)
        # Lowest id of each slot and the span above it, for every token of a block: broadcasting a row of four is slower.
        limits = [0, 0, 0, self.n_bins], [self.n_bins - 1] * 3 + [self.n_faces - 1]
        self._slot_limits = [self._per_token(each, self._id_dtype) for each in limits]
        self._set_bounds(bounds)

    @property
    def slots(self) -> tuple[str, ...]:
        """The names of the four tokens of a point, in their order."""
        return tuple(SLOTS["xyzf".index(letter)] for letter in self.token_order)

    @property
    def slot_columns(self) -> list[int]:
        """Where x, y, z and face stand among the four tokens of a point: `ids.reshape(-1, 4)[:, slot_columns]` has them so."""
        return [self.token_order.index(letter) for letter in "xyzf"]

    @property
    def bos_token_id(self) -> int:
        return self.n_bins + self.n_faces

    @property
    def eos_token_id(self) -> int:
        return self.n_bins + self.n_faces + 1

    @property
    def pad_token_id(self) -> int:
        return self.n_bins + self.n_faces + 2

    @property
    def vocab_size(self) -> int:
        return self.n_bins + self.n_faces + 3

    def fit(self, avatars: Any, margin: float = 0.05) -> list[list[float]]:
        """Set `bounds` to the box around all points of one or many avatars or points mappings, and return them.

        On every side the box grows by `margin` times its longest edge, room for other subjects.
        """
        if not math.isfinite(margin) or margin < 0:
            raise ValueError(f"margin is {margin}; expected a fraction of the box, 0 or more")
        lo, hi = np.full(3, np.inf), np.full(3, -np.inf)
        is_batch = isinstance(avatars, Iterable) and not isinstance(avatars, Mapping)
        for index, item in enumerate(avatars if is_batch else [avatars]):
            positions, _ = self._points(item, index)
            _check_finite(positions, index)
            lo, hi = np.minimum(lo, positions.min(axis=0)), np.maximum(hi, positions.max(axis=0))
        if not np.isfinite(lo).all():
            raise ValueError("no avatars to fit the bounds to")
        room = margin * float((hi - lo).max())
        self._set_bounds([(lo - room).tolist(), (hi + room).tolist()])
        return self.bounds

    def encode(self, points: Any, return_order: bool = False, index: int = 0) -> Encoded:
        """An avatar or a points mapping to ids; errors name it as cloud `index`."""
        positions, faces = self._points(points, index)
        keys, outside, overshoot = self._keys(positions, faces, index)
        order = np.argsort(keys, kind="stable") if return_order else None
        return Encoded(self._ids(keys), order, outside, overshoot)

    def decode(self, ids: Any, errors: str = "strict") -> dict[str, Any]:
        """Ids (L,) of one cloud -> `positions` (N, 3) float32 bin centers in meters and `faces` (N,) int64.

        bos, eos and padding at the ends may be there or not. An id that does not fit its slot, a point cut short, or
        ids after eos raise ValueError with the position. With `errors="truncate"` the points before it are kept, a
        warning says what was wrong, and `dropped` counts the ids left out (0 for a clean sequence).
        """
        one_of("errors", errors, ("strict", "truncate"))
        ids = self._integer_ids(ids)
        body, start = self._strip(ids)
        decoded = self._dequantize(body)
        dropped = 0
        if decoded is None:
            n_points, problem = self._first_problem(body, start)
            if errors == "strict":
                raise ValueError(f'{problem}; errors="truncate" keeps the {n_points} points before it')
            warnings.warn(f"{problem}; kept the {n_points} points before it", stacklevel=2)
            decoded = self._dequantize(body[: 4 * n_points])
            assert decoded is not None
            # An eos right behind the kept points is not lost, only what comes after it.
            dropped = len(body) - 4 * n_points - int(body[4 * n_points] == self.eos_token_id)
        points: dict[str, Any] = dict(zip(("positions", "faces"), decoded))
        return points if errors == "strict" else points | {"dropped": dropped}

    def batch_decode(self, batch: Any, errors: str = "strict") -> list[dict[str, Any]]:
        """(B, L) ids or a list of B sequences -> a list of B results of `decode`."""
        decoded = []
        for row, ids in enumerate(batch):
            try:
                decoded.append(self.decode(ids, errors))
            except ValueError as error:
                raise ValueError(f"sequence {row}: {error}") from error
        return decoded

    # ---- points -> ids

    def _points(self, item: Any, index: int) -> tuple[np.ndarray, np.ndarray]:
        """An avatar or a points mapping -> checked positions (N, 3) of any float type and faces (N,) of any integer."""
        if not isinstance(item, Mapping):
            try:
                head_hash, canonical_points = item.head_hash, item.canonical_points
            except AttributeError:
                expected = "an avatar, or a mapping with `positions` (N, 3) and `faces` (N,)"
                raise ValueError(f"cloud {index} is a {type(item).__name__}; expected {expected}") from None
            if None not in (self.head_hash, head_hash) and head_hash != self.head_hash:
                problem = f"on the head model {head_hash}, this tokenizer on {self.head_hash} ({self.head_name})"
                raise ValueError(f"avatar {index} was made {problem}; use the tokenizer of its own head model")
            item = canonical_points()
        missing = {"positions", "faces"} - set(item)
        if missing:
            raise ValueError(f"cloud {index} lacks {sorted(missing)}; it has {sorted(map(str, item))}")
        positions, faces = as_array(item["positions"], "positions"), as_array(item["faces"], "faces")
        if positions.size == 0:
            raise ValueError(f"cloud {index} has no points; expected at least one")
        if positions.ndim != 2 or positions.shape[1] != 3 or positions.dtype.kind not in "fiu":
            found = f"{positions.dtype} {positions.shape}"
            raise ValueError(f"the positions of cloud {index} are {found}; expected float32 (N, 3)")
        if faces.shape != positions.shape[:1] or faces.dtype.kind not in "iu":
            found = f"{faces.dtype} {faces.shape}"
            raise ValueError(f"the faces of cloud {index} are {found}; expected integers ({len(positions)},)")
        if self.max_points is not None and len(positions) > self.max_points:
            raise ValueError(f"cloud {index} has {len(positions)} points; max_points is {self.max_points}")
        if faces.min() < 0 or faces.max() >= self.n_faces:
            row = int(np.argmax((faces < 0) | (faces >= self.n_faces)))
            where = f"face {faces[row]} of point {row} in cloud {index}"
            raise ValueError(f"{where} is out of range; the head model of this tokenizer has {self.n_faces} faces")
        return positions, faces

    def _keys(self, positions: np.ndarray, faces: np.ndarray, index: int) -> tuple[np.ndarray, int, float]:
        """Sorting keys (N,) int64 in the given order, the number of points outside, and how far out the farthest is."""
        keys = np.empty(len(positions), dtype=np.int64)
        inside = True
        with np.errstate(all="ignore"):  # NaN and overflow fail the comparison with the bounds and are reported below
            for start in range(0, len(positions), BLOCK):
                rows = slice(start, start + BLOCK)
                key = keys[rows]
                for rank, axis in enumerate(self._sorting_axes):
                    column = positions[rows, axis].astype(np.float64)
                    inside &= bool(column.min() >= self._lo[axis] and column.max() <= self._hi[axis])
                    bins = self._quantize(column, self._lo[axis], self._hi[axis])
                    if rank == 0:
                        key[:] = bins
                    else:
                        key <<= self._coordinate_bits
                        key |= bins
                key <<= self._face_bits
                key |= faces[rows].astype(np.int64, copy=False)
        if inside:
            return keys, 0, 0.0
        _check_finite(positions, index)
        exact = positions.astype(np.float64)
        overshoot = np.maximum(self._lo - exact, exact - self._hi).max(axis=1)
        return keys, int((overshoot > 0).sum()), float(overshoot.max())

    def _quantize(self, column: np.ndarray, lo: np.float64, hi: np.float64) -> np.ndarray:
        """Meters (N,) float64, overwritten -> bins (N,) int64. In the order of the formula, to round as it does."""
        column -= lo
        column /= hi - lo
        column *= self.n_bins
        # Clamped to values of one sign, for which the conversion is the floor.
        np.clip(column, 0, self.n_bins - 1, out=column)
        return column.astype(np.int64)

    def _ids(self, keys: np.ndarray) -> np.ndarray:
        """Sorting keys (N,), sorted in place -> ids (4N + 2,). The key holds the whole point: no index is needed."""
        keys.sort()
        ids = np.empty(4 * len(keys) + 2, dtype=self._id_dtype)
        ids[0], ids[-1] = self.bos_token_id, self.eos_token_id
        points, columns = ids[1:-1].reshape(len(keys), 4), self.slot_columns
        for start in range(0, len(keys), BLOCK):
            rows = slice(start, start + BLOCK)
            for rank, axis in enumerate(self._sorting_axes):
                bins = keys[rows] >> (self._face_bits + (2 - rank) * self._coordinate_bits)
                bins &= (1 << self._coordinate_bits) - 1
                points[rows, columns[axis]] = bins
            face = keys[rows] & ((1 << self._face_bits) - 1)
            face += self.n_bins
            points[rows, columns[3]] = face
        return ids

    # ---- ids -> points

    def _integer_ids(self, ids: Any) -> np.ndarray:
        """Ids (L,) of any integer type that can hold the whole vocabulary."""
        array = as_array(ids, "ids")
        if array.ndim != 1:
            raise ValueError(f"ids have the shape {array.shape}; expected (L,). For a batch use batch_decode")
        if array.size == 0:
            return array.astype(self._id_dtype)
        if array.dtype.kind not in "iu":
            raise ValueError(f"ids are {array.dtype}, the first is {array[0]!r}; expected integers")
        if np.iinfo(array.dtype).max < self.vocab_size or not array.dtype.isnative:
            return array.astype(np.int64)
        return array

    def _strip(self, ids: np.ndarray) -> tuple[np.ndarray, int]:
        """Ids without padding, bos and a final eos, and the position of the first one kept."""
        start, end = 0, len(ids)
        while end > start and ids[end - 1] == self.pad_token_id:  # a search of all ids would take as long as decoding
            end -= 1
        while start < end and ids[start] == self.pad_token_id:
            start += 1
        if start < end and ids[start] == self.bos_token_id:
            start += 1
        if start < end and ids[end - 1] == self.eos_token_id and (end - 1 - start) % 4 == 0:
            end -= 1
        return ids[start:end], start

    def _dequantize(self, body: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Ids (4N,) -> positions (N, 3) and faces (N,), or None where an id is not of its slot or a point is cut."""
        if len(body) % 4:
            return None
        unsigned = body.view(f"u{body.itemsize}")
        lowest, span = (limit.astype(unsigned.dtype, copy=False) for limit in self._slot_limits)
        scale, offset = self._slot_meters
        *axis_columns, face_column = self.slot_columns
        positions = np.empty((len(body) // 4, 3), dtype=np.float32)
        faces = np.empty(len(body) // 4, dtype=np.int64)
        for start in range(0, len(faces), BLOCK):
            rows = slice(start, start + BLOCK)
            tokens = unsigned[4 * start : 4 * (start + BLOCK)]
            values = tokens - lowest[: len(tokens)]  # unsigned: too low wraps around to too high
            if (values > span[: len(tokens)]).any():
                return None
            meters = values.astype(np.float32)  # as in _set_bounds, which checks this arithmetic for every bin
            meters *= scale[: len(tokens)]
            meters += offset[: len(tokens)]
            for axis, column in enumerate(axis_columns):
                positions[rows, axis] = meters[column::4]
            faces[rows] = values[face_column::4]
        return positions, faces

    def _first_problem(self, body: np.ndarray, start: int) -> tuple[int, str]:
        """The number of whole points before the first id that does not fit, and what is wrong with it."""
        face_slot = np.arange(len(body)) % 4 == self.slot_columns[3]
        lowest, end = np.where(face_slot, self.n_bins, 0), np.where(face_slot, self.bos_token_id, self.n_bins)
        wrong = np.flatnonzero((body < lowest) | (body >= end))
        at = int(wrong[0]) if len(wrong) else len(body)
        slot = self.slots[at % 4]
        wanted = f"[{self.n_bins}, {self.bos_token_id})" if slot == "face" else f"[0, {self.n_bins})"
        where = f"position {start + at}"
        if not len(wrong):
            return at // 4, f"the ids end at {where} in the middle of a point; expected its {slot} in {wanted}"
        if at % 4 == 0 and body[at] == self.eos_token_id:
            return at // 4, f"eos at {where} is followed by {len(body) - at - 1} more ids; expected the end or padding"
        found = f"{self._describe(int(body[at]))} in the {slot} slot of point {at // 4}"
        return at // 4, f"{where} holds id {body[at]} ({found}); expected an id in {wanted}"

    def _describe(self, token: int) -> str:
        if not 0 <= token < self.vocab_size:
            return f"beyond the vocabulary of {self.vocab_size}"
        if token >= self.bos_token_id:
            return ("bos", "eos", "pad")[token - self.bos_token_id]
        return "a coordinate" if token < self.n_bins else f"face {token - self.n_bins}"

    def _set_bounds(self, bounds: Any) -> None:
        try:
            lo, hi = np.asarray(bounds, dtype=np.float64).reshape(2, 3)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"bounds are {bounds!r}; expected [[lo x, y, z], [hi x, y, z]] in meters") from None
        with np.errstate(all="ignore"):
            width = (hi - lo) / self.n_bins
            if not (np.isfinite(width).all() and (lo < hi).all()):
                raise ValueError(f"bounds are {bounds!r}; expected finite numbers with lo < hi on every axis")
            scale, offset = width.astype(np.float32), (lo + width / 2).astype(np.float32)
            bins = np.arange(self.n_bins)
            for axis, name in enumerate("xyz"):
                # What makes encode(decode(ids)) == ids: a decoded center must fall back into its own bin.
                centers = bins.astype(np.float32) * scale[axis] + offset[axis]
                if not np.array_equal(self._quantize(centers.astype(np.float64), lo[axis], hi[axis]), bins):
                    problem = f"{self.n_bins} bins apart between {lo[axis]} and {hi[axis]} on axis {name}"
                    advice = "widen the bounds, move them towards zero or lower n_bins"
                    raise ValueError(f"float32 cannot tell {problem}: {advice}")
        self.bounds = [lo.tolist(), hi.tolist()]
        self._lo, self._hi = lo, hi
        self._slot_meters = self._per_token([*scale, 0], np.float32), self._per_token([*offset, 0], np.float32)

    def _per_token(self, slots: list, dtype: Any) -> np.ndarray:
        """What belongs to x, y, z and face, for each token of a block."""
        return np.tile(np.array([slots[SLOTS.index(slot)] for slot in self.slots], dtype=dtype), BLOCK)


def as_array(values: Any, name: str) -> np.ndarray:
    """Tensor on any device, array or nested list -> array; `name` is what the error calls it."""
    torch = sys.modules.get("torch")  # without it there are no tensors
    if torch is not None and isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    try:
        return np.asarray(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} are not an array: {error}") from error


def positive_integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} is {value!r}; expected an integer of at least 1")
    return int(value)


def one_of(name: str, value: Any, choices: Sequence[Any]) -> Any:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {list(choices)}")
    return value


def _check_finite(positions: np.ndarray, index: int) -> None:
    finite = np.isfinite(positions).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise ValueError(f"point {row} of cloud {index} is at {positions[row].tolist()}; expected finite meters")
