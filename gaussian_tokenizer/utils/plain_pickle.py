"""A pickle read without running it (opcodes: PEP 307, 3154 and 574, and the standard library's `pickletools`).

Plain data become themselves, objects inert `Thing`s; a name that is not allowed ends the reading. Nothing is called, hashed (except
text), compared or traversed, so that time and memory are linear in the length of the file, whatever its opcodes say.
"""

import codecs
import functools
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_STEPS = 1_000_000  # opcodes, and the highest index of the memo; FLAME has a few hundred
LONGEST_KEY = 100
NUMBER = re.compile(r"([<>=|]?)([biuf])([1248])")
OBJECT = "O8"  # the type of an array of anything; such an array is inert, too
OBJECTS = ("array", "chumpy", "columns", "rows")


@dataclass(eq=False)
class Name:
    """A name in the pickle, as what it stands for."""

    meaning: str


@dataclass(eq=False)
class Thing:
    """An object in the pickle: what its constructor stands for, the arguments, and the state that was set."""

    meaning: str
    arguments: tuple
    state: Any = None


def interpret(content: bytes, allowed: Mapping[tuple[str, str], str], persistent: Callable | None = None) -> Any:
    """The value of a pickle; ValueError, with "it" as the subject, for anything but plain data and `allowed` names.

    `persistent` turns the ids of objects outside the pickle into values; without it they are refused.
    """
    return _Machine(content, allowed, persistent).run()


@dataclass
class _Machine:
    content: bytes
    allowed: Mapping[tuple[str, str], str]
    persistent: Callable | None
    position: int = 0
    encoded: int = 0  # characters that were turned into bytes
    stack: list = field(default_factory=list)
    marked: list[list] = field(default_factory=list)  # the stacks below each mark
    memo: dict[int, Any] = field(default_factory=dict)

    def run(self) -> Any:
        for _ in range(MAX_STEPS):
            opcode = self.take(1)
            if opcode == b".":
                return self.pop()
            if opcode not in _OPCODES:
                raise ValueError(f"it has the opcode {opcode!r}, which no file of arrays needs")
            _OPCODES[opcode](self)
        raise ValueError(f"it has more than {MAX_STEPS:,} opcodes")

    def take(self, count: int) -> bytes:
        start, self.position = self.position, self.position + count
        if count < 0 or self.position > len(self.content):
            raise ValueError("it is cut short")
        return self.content[start : self.position]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> bytes:
        end = self.content.find(b"\n", self.position)
        if end < 0:
            raise ValueError("it is cut short")
        return self.take(end + 1 - self.position)[:-1]

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            raise ValueError("it takes more from its stack than is there")
        return self.stack.pop()

    def top(self) -> Any:
        self.push(value := self.pop())
        return value

    def mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def above_mark(self) -> list:
        if not self.marked:
            raise ValueError("it goes back to a mark that is not there")
        above, self.stack = self.stack, self.marked.pop()
        return above

    def discard(self) -> None:
        """POP removes a mark if nothing lies above it."""
        if self.stack:
            self.stack.pop()
        else:
            self.above_mark()

    def make_dictionary(self) -> None:
        items = self.above_mark()
        self.push({})
        self.set_items(items)

    def append(self, values: list) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, Thing):
            raise ValueError("it appends to something that is no list")

    def set_items(self, values: list) -> None:
        target = self.top()
        if isinstance(target, Thing):
            return
        if not isinstance(target, dict) or len(values) % 2:
            raise ValueError("it sets items of something that is no dictionary")
        # Other keys name nothing that is read, and hashing or comparing them could take arbitrarily long.
        target.update((k, v) for k, v in zip(values[::2], values[1::2]) if isinstance(k, str) and len(k) < LONGEST_KEY)

    def remember(self, index: int) -> None:
        if not 0 <= index < MAX_STEPS:
            raise ValueError(f"it remembers a value {str(index)[:20]}, expected fewer than {MAX_STEPS:,}")
        self.memo[index] = self.top()

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise ValueError(f"it refers to a value {str(index)[:20]} that it has not made")
        self.push(self.memo[index])

    def find(self, module: object, name: object) -> Name:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError("it has a name that is not text")
        if (module, name) not in self.allowed:
            raise ValueError(f"it names {module[:99]}.{name[:99]}, which no such file needs; nothing of it was run")
        return Name(self.allowed[module, name])

    def find_lines(self) -> Name:
        return self.find(self.line().decode("utf-8"), self.line().decode("utf-8"))

    def call(self, called: object, arguments: object) -> None:
        if not isinstance(called, Name) or not isinstance(arguments, tuple):
            raise ValueError("it calls something that is no function")
        meaning = called.meaning
        made_of = arguments[0].meaning if arguments and isinstance(arguments[0], Name) else ""
        if meaning == "encode":  # how Python 3 writes bytes in protocol 2
            self.push(self.encode(arguments))
        elif (meaning == "make array" and made_of == "array") or (meaning == "make object" and made_of in OBJECTS):
            self.push(Thing(made_of, ()))
        elif meaning.startswith("make "):
            raise ValueError("it makes an object of an unknown kind")
        elif meaning in ("bytes", "dictionary") and not arguments:
            self.push(b"" if meaning == "bytes" else {})
        else:
            if meaning == "dtype" and not (
                arguments
                and isinstance(arguments[0], str)
                and (NUMBER.fullmatch(arguments[0]) or arguments[0] == OBJECT)
            ):
                raise ValueError("it has an array of something else than numbers")
            self.push(Thing(meaning, arguments))

    def call_marked(self) -> None:
        called, *arguments = self.above_mark() or [None]
        self.call(called, tuple(arguments))

    def call_with_names(self) -> None:
        self.pop()
        self.call(*self.pop_last(2))

    def pop_last(self, count: int) -> list:
        """The values on top, in the order in which they were pushed."""
        return [self.pop() for _ in range(count)][::-1]

    def encode(self, arguments: tuple) -> bytes:
        if len(arguments) != 2 or not isinstance(arguments[0], str) or arguments[1] not in ("latin1", "latin-1"):
            raise ValueError("it encodes something other than bytes")
        self.encoded += len(arguments[0])
        if self.encoded > len(self.content):
            raise ValueError("it makes more bytes than it has")
        return arguments[0].encode("latin1")

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if not isinstance(target, Thing):
            raise ValueError("it sets the state of something that is no object")
        target.state = state

    def refer(self, identifier: Any) -> None:
        if self.persistent is None:
            raise ValueError("it refers to objects outside the file")
        self.push(self.persistent(identifier))


def _quoted(line: bytes) -> str:
    if len(line) < 2 or line[:1] not in (b"'", b'"') or line[-1:] != line[:1]:
        raise ValueError("it has a string without quotes")
    return codecs.escape_decode(line[1:-1])[0].decode("latin1")  # type: ignore[attr-defined]


def _decimal(line: bytes) -> int | bool:
    if line in (b"00", b"01"):
        return line == b"01"
    return int(line.removesuffix(b"L"))


def _binary(form: str) -> Callable[[_Machine], None]:
    return lambda m: m.push(m.number(form))


def _counted(form: str, convert: Callable[[bytes], Any]) -> Callable[[_Machine], None]:
    return lambda m: m.push(convert(m.take(m.number(form))))


def _line(convert: Callable[[bytes], Any]) -> Callable[[_Machine], None]:
    return lambda m: m.push(convert(m.line()))


_LATIN = functools.partial(str, encoding="latin1")
_UTF8 = functools.partial(str, encoding="utf-8", errors="surrogatepass")
_LITTLE_ENDIAN = functools.partial(int.from_bytes, byteorder="little", signed=True)
_OPCODES: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": lambda m: m.take(1),  # the protocol
    b"\x95": lambda m: m.take(8),  # a frame
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"I": _line(_decimal),
    b"L": _line(_decimal),
    b"F": _line(float),
    b"J": _binary("<i"),
    b"K": _binary("<B"),
    b"M": _binary("<H"),
    b"G": _binary(">d"),
    b"\x8a": _counted("<B", _LITTLE_ENDIAN),
    b"\x8b": _counted("<i", _LITTLE_ENDIAN),
    b"S": _line(_quoted),
    b"T": _counted("<i", _LATIN),
    b"U": _counted("<B", _LATIN),
    b"V": _line(lambda line: line.decode("raw-unicode-escape")),
    b"X": _counted("<I", _UTF8),
    b"\x8c": _counted("<B", _UTF8),
    b"\x8d": _counted("<Q", _UTF8),
    b"B": _counted("<I", bytes),
    b"C": _counted("<B", bytes),
    b"\x8e": _counted("<Q", bytes),
    b"\x96": _counted("<Q", bytes),
    b"(": _Machine.mark,
    b"0": _Machine.discard,
    b"1": _Machine.above_mark,
    b"2": lambda m: m.push(m.top()),
    b")": lambda m: m.push(()),
    b"\x85": lambda m: m.push(tuple(m.pop_last(1))),
    b"\x86": lambda m: m.push(tuple(m.pop_last(2))),
    b"\x87": lambda m: m.push(tuple(m.pop_last(3))),
    b"t": lambda m: m.push(tuple(m.above_mark())),
    b"]": lambda m: m.push([]),
    b"l": lambda m: m.push(m.above_mark()),
    b"a": lambda m: m.append([m.pop()]),
    b"e": lambda m: m.append(m.above_mark()),
    b"}": lambda m: m.push({}),
    b"d": _Machine.make_dictionary,
    b"s": lambda m: m.set_items(m.pop_last(2)),
    b"u": lambda m: m.set_items(m.above_mark()),
    b"\x8f": lambda m: m.push(Thing("set", ())),
    b"\x90": lambda m: m.append(m.above_mark()),
    b"\x91": lambda m: m.push(Thing("set", tuple(m.above_mark()))),
    b"p": lambda m: m.remember(int(m.line())),
    b"q": lambda m: m.remember(m.number("<B")),
    b"r": lambda m: m.remember(m.number("<I")),
    b"\x94": lambda m: m.remember(len(m.memo)),
    b"g": lambda m: m.recall(int(m.line())),
    b"h": lambda m: m.recall(m.number("<B")),
    b"j": lambda m: m.recall(m.number("<I")),
    b"c": lambda m: m.push(m.find_lines()),
    b"\x93": lambda m: m.push(m.find(*m.pop_last(2))),
    b"R": lambda m: m.call(*m.pop_last(2)),
    b"\x81": lambda m: m.call(*m.pop_last(2)),
    b"\x92": _Machine.call_with_names,
    b"i": lambda m: m.call(m.find_lines(), tuple(m.above_mark())),
    b"o": _Machine.call_marked,
    b"b": _Machine.build,
    b"P": lambda m: m.refer(m.line().decode("latin1")),
    b"Q": lambda m: m.refer(m.pop()),
}
