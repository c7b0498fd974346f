"""Plain values and arrays out of pickles of others: an interpreter of the opcodes that published files have,
which calls nothing that a pickle names.

1. None, numbers, strings, bytes, lists, tuples and dicts; of all protocols, 0 to 5. A string of Python 2 is
   text where it is ASCII, else bytes.
2. NumPy arrays and numbers, of Python 2 and of NumPy 1 and 2: a pickle names the functions that make them
   (`CALLS`), which stand for our own here. An array is a view of the pickle's bytes, made once its shape and
   its dtype are read and fit them.
3. An array of one object, as `numpy.save` writes a dict: that object.

Whatever else an opcode, or a name, asks for is refused, and so is what takes more memory or time than its
bytes account for: all that is announced is compared with what is left of the data before it is read.
"""

import codecs
import math
import re
from collections.abc import Callable, Collection, Mapping
from struct import Struct
from struct import error as StructError
from typing import Any, Literal

import numpy as np

from raylib.errors import reading

MAX_STEPS = (
    2_000_000  # opcodes, and values in lists and dicts: ten times what 100 regions have as plain lists
)
MAX_DEPTH = 32
MAX_DIGITS = 400  # of a number in decimals
CODES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
DTYPES = {order + code: np.dtype(order + code) for order in "<>|" for code in CODES}
NUMBER = re.compile(rb"[+-]?[0-9]+L?")
MEMOIZE, BININT1, BINGET, SHORT_BINUNICODE, BINPUT, TUPLE1 = b"\x94Kh\x8cq\x85"
MARK, TUPLE, NEWFALSE, NONE, STOP = b"(t\x89N."
UINT1, UINT2, INT4, UINT4, UINT8, FLOAT8 = map(Struct, ("<B", "<H", "<i", "<I", "<Q", ">d"))


class Refused(ValueError):
    """A pickle that is none, or asks for more than plain values; the message says why."""


def load_plain(data: bytes, what: str) -> Any:
    """Load the one value that is pickled in `data`. what: names it in the line of an error.

    Raises:
        UserError: no whole pickle, or one that asks for more than plain values and arrays of numbers.
    """
    with reading(what, "a pickle of plain values"):
        machine = Machine(data)
        value = machine.run()
        if left := len(data) - machine.at:
            raise Refused(f"{left} bytes after its end")
        require_plain(value, len(data))
        return value


class _Type:
    """A dtype, of letters: an array's own is made of them when the array is."""

    def __init__(self, code: str):
        self.code, self.order = code, ""

    def make(self) -> np.dtype:
        name = self.order + self.code
        if not self.order or name not in DTYPES:
            raise Refused(f"a dtype {self.order or '?'}{self.code}, and only numbers are read")
        return DTYPES[name]


class _Hollow:
    """An array before its state has come, and what a pickle remembers of it after: `value` is the array."""

    def __init__(self) -> None:
        self.value: Any = self


class Name:
    """A function, or type, of `CALLS` that a pickle names."""

    def __init__(self, name: str):
        self.name = name


def _require(condition: Any, reason: str) -> None:
    if not condition:
        raise Refused(reason)


def _to_bytes(value: Any) -> bytes:
    """Bytes that a pickle holds as such, or as a string of Python 2."""
    _require(
        type(value) in (bytes, str) and (type(value) is bytes or value.isascii()), "an array without bytes"
    )
    return value if isinstance(value, bytes) else value.encode()


def _python2_string(data: bytes) -> str | bytes:
    return data.decode("ascii") if data.isascii() else data


def _text(data: bytes, encoding: str = "utf-8") -> str:
    try:
        return data.decode(encoding, "surrogatepass" if encoding == "utf-8" else "strict")
    except ValueError as e:
        raise Refused(f"a string that is none: {e}") from None


def _to_array(data: Any, dtype: Any, shape: Any, order: Literal["C", "F"]) -> np.ndarray:
    """Numbers in `data` as an array, which they fill."""
    content = data if type(data) is bytes else _to_bytes(data)
    _require(type(dtype) is _Type and type(shape) is tuple, "an array without dtype and shape")
    kind, count, is_valid = dtype.make(), 1, len(shape) <= MAX_DEPTH
    for length in shape:
        is_valid = is_valid and type(length) is int and length >= 0
        count *= length if is_valid else 0
    if not is_valid or count * kind.itemsize != len(content):
        raise Refused(f"{len(content):,} bytes for an array of {kind} {shape}")
    # one without numbers must not be longer than NumPy counts
    _require(count or math.prod(filter(None, shape)) < 1 << 32, "an array of no numbers that is too long")
    return np.frombuffer(content, kind).reshape(shape, order=order)


# ---- what a pickle may call


def _make_hollow(subtype: Any, *_: Any) -> _Hollow:
    _require(isinstance(subtype, Name) and subtype.name == "numpy.ndarray", "an array of another type")
    return _Hollow()


def _make_type(code: Any, *_: Any) -> _Type:
    _require(type(code) is str, "a dtype without a name")
    return _Type(code)


def _make_scalar(dtype: Any, data: Any) -> Any:
    return _to_array(data, dtype, (), "C")[()]


def _make_from_buffer(data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> Any:
    if order != "K":
        _require(order in ("C", "F"), "an array of another order")
        return _to_array(data, dtype, shape, order)
    array = _to_array(data, dtype, shape, "C")
    _require(
        type(axes) is tuple and all(type(n) is int for n in axes) and sorted(axes) == [*range(array.ndim)],
        "an array of another order",
    )
    return array.transpose(axes)


def make_bytes(text: Any = "", encoding: Any = "latin1") -> bytes:
    """Bytes as Python 3 writes them for Python 2: characters of Latin 1."""
    _require(type(text) is str and encoding in ("latin1", "latin-1"), "bytes in another encoding")
    try:
        return text.encode("latin-1")
    except ValueError:
        raise Refused("bytes of characters that are none") from None


def refuse_call(*_: Any) -> None:
    raise Refused("it calls a type, as no file of this kind does")


CALLS: dict[str, Callable[..., Any]] = {
    "numpy.ndarray": refuse_call,
    "numpy.dtype": _make_type,
    "_codecs.encode": make_bytes,
    "__builtin__.bytes": make_bytes,
    "builtins.bytes": make_bytes,
}
for core in ("core", "_core"):  # of NumPy 1 and 2
    CALLS[f"numpy.{core}.multiarray._reconstruct"] = _make_hollow
    CALLS[f"numpy.{core}.multiarray.scalar"] = _make_scalar
    CALLS[f"numpy.{core}.numeric._frombuffer"] = _make_from_buffer


class Machine:
    """A stack, as a pickle expects it. What an opcode does with it is its entry of `OPCODES`. Files with
    other kinds of objects have a machine of their own (`raylib.torch_files`), with other `opcodes`, `calls`,
    `find` and `build`.

    at: where in `data` the next pickle begins.
    """

    calls: Mapping[str, Callable[..., Any]] = CALLS  # what a pickle may call, by name

    def __init__(self, data: bytes):
        self.data, self.at = data, 0
        self.opcodes = OPCODES
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Run the opcodes of the next pickle to their end; return the value that is left, which
        `require_plain` checks."""
        self.stack, self.below, self.memo = [], [], {}
        try:
            self.run_to_end()
            (value,) = self.stack
        except KeyError as e:
            raise Refused(f"it recalls {e}, which is nothing") from None
        except (IndexError, StructError):
            is_short = self.at >= len(self.data)
            raise Refused("it ends early" if is_short else "its opcodes do not fit") from None
        except ValueError as e:
            raise e if isinstance(e, Refused) else Refused(f"its opcodes do not fit: {e}") from None
        _require(not self.below, "its opcodes do not fit")
        return value

    def run_to_end(self) -> None:
        # a record of features has some 200 opcodes: the commonest are written out here, which takes half the
        # time of a call; the others are functions
        opcodes, data, at, stack, memo = self.opcodes, self.data, self.at, self.stack, self.memo
        for _ in range(MAX_STEPS):
            self.at = at
            opcode = data[at]
            at += 1
            if opcode == MEMOIZE:
                memo[len(memo)] = stack[-1]
            elif opcode == BININT1:
                stack.append(data[at])
                at += 1
            elif opcode == BINGET:
                value = memo[data[at]]
                stack.append(value.value if type(value) is _Hollow else value)
                at += 1
            elif opcode == SHORT_BINUNICODE:
                end = at + 1 + data[at]
                stack.append(str(data[at + 1 : end], "utf-8", "surrogatepass"))
                at = end
            elif opcode == BINPUT:
                memo[data[at]] = stack[-1]
                at += 1
            elif opcode == TUPLE1:
                stack[-1] = (stack[-1],)
            elif opcode == MARK:
                self.below.append(stack)
                self.stack = stack = []
            elif opcode == TUPLE:
                items = tuple(stack)
                self.stack = stack = self.below.pop()
                stack.append(items)
            elif opcode == NEWFALSE:
                stack.append(False)
            elif opcode == NONE:
                stack.append(None)
            elif opcode == STOP:
                self.at = at
                return
            else:
                self.at = at
                if opcode not in opcodes:
                    raise Refused(_describe_opcode(opcode, at - 1))
                opcodes[opcode](self)
                at, stack = self.at, self.stack
        raise Refused(f"more than {MAX_STEPS:,} opcodes")

    # ---- reading

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        end = self.at + count
        if count < 0 or end > len(self.data):
            raise Refused(f"it ends early: {count:,} bytes are to follow, {len(self.data) - self.at:,} do")
        chunk, self.at = self.data[self.at : end], end
        return chunk

    def take_number(self, layout: Struct) -> Any:
        return layout.unpack(self.take(layout.size))[0]

    def take_line(self) -> bytes:
        end = self.data.find(b"\n", self.at)
        _require(end >= 0, "it ends early, within a line")
        line, self.at = self.data[self.at : end], end + 1
        return line

    def take_decimal(self, end: bytes = b"") -> int:
        line = self.take_line()
        if len(line) > MAX_DIGITS or not NUMBER.fullmatch(line):
            raise Refused(f"a number {line[:20]!r}")
        return int(line.removesuffix(end))

    # ---- the stack

    def pop_to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def append(self, items: list[Any]) -> None:
        _require(type(self.stack[-1]) is list, "items of no list")
        self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        _require(type(self.stack[-1]) is dict and len(items) % 2 == 0, "items of no dict")
        self.stack[-1].update(_pairs(items))

    def remember(self, number: int) -> None:
        self.memo[number] = self.stack[-1]

    def recall(self, number: int) -> None:
        value = self.memo[number]
        self.stack.append(value.value if type(value) is _Hollow else value)

    def name(self, module: Any, name: Any) -> None:
        self.stack.append(self.find(f"{module}.{name}"))

    def find(self, name: str) -> Any:
        """Return what a name in a pickle stands for."""
        if name not in self.calls:
            raise Refused(f"it wants {name[:100]}, and only plain values and arrays are read")
        return Name(name)

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        _require(type(function) is Name and type(arguments) is tuple, "it calls what is no function")
        try:
            self.stack.append(self.calls[function.name](*arguments))
        except TypeError:  # of the number of arguments: each is looked at
            raise Refused(f"it calls {function.name} with {len(arguments)} arguments") from None

    def build(self) -> None:
        """Give a dtype, or an array, its state."""
        state, target = self.stack.pop(), self.stack[-1]
        _require(type(state) is tuple, "a state that is none")
        if type(target) is _Type:
            _require(
                len(state) in (7, 8) and state[1] in ("<", ">", "|") and not target.order, "a dtype's state"
            )
            _require(state[2:5] == (None, None, None), "a dtype with fields, and only numbers are read")
            target.order = state[1]
            return
        _require(type(target) is _Hollow and len(state) == 5 and state[0] == 1, "a state of something else")
        _, shape, dtype, by_columns, data = state
        if isinstance(dtype, _Type) and dtype.code in ("O", "O4", "O8"):
            is_one = type(data) is list and len(data) == 1 and shape == ()
            _require(is_one, "an array of objects, and only those of one are read")
            value = data[0]
        else:
            value = _to_array(data, dtype, shape, "F" if by_columns else "C")
        self.stack[-1] = target.value = value


def _pairs(items: list[Any]) -> dict[Any, Any]:
    keys = items[::2]
    for key in keys:
        # others than these may take forever to be compared: many floats, or large integers, have one hash
        is_plain = type(key) in (str, bytes) or (type(key) is int and abs(key) < 1 << 60)
        _require(is_plain, f"a key of a dict that is {type(key).__name__}")
    return dict(zip(keys, items[1::2], strict=True))


LEAVES = frozenset((type(None), bool, int, float))


def require_plain(value: Any, size: int, leaves: Collection[type] = ()) -> None:
    """Raise Refused unless `value` holds finished values alone, is no deeper than `MAX_DEPTH`, and no larger
    where all references to one value are counted than its `size` bytes account for: others will walk it.
    leaves: types of what else may be in there, and is not looked into."""
    pending, steps, room = [(value, 0)], 0, 4 * size + 1024
    while pending:
        node, depth = pending.pop()
        if (kind := type(node)) in LEAVES or kind in leaves:
            continue
        if kind is str or kind is bytes:
            room -= len(node)
        elif issubclass(kind, dict) or kind is list or kind is tuple:
            steps += len(node)
            depth += 1
            pending += [(child, depth) for child in (node.values() if isinstance(node, dict) else node)]
        elif isinstance(node, np.ndarray | np.generic):
            room -= node.nbytes
        else:
            raise Refused("a function, or an array, that is not finished, where a value should be")
        _require(depth <= MAX_DEPTH and steps <= MAX_STEPS and room >= 0, "values in each other without end")


def _describe_opcode(opcode: int, at: int) -> str:
    import pickletools

    known = {op.code: op for op in pickletools.opcodes}.get(chr(opcode))
    name = f"{known.name}, and only plain values and arrays are read" if known else f"{bytes([opcode])!r}"
    return (
        f"its byte {at:,} is the opcode {name}" if known else f"its byte {at:,} is {name}, which is no opcode"
    )


# ---- the opcodes


def _push(value: Any) -> Callable[[Machine], None]:
    return lambda machine: machine.stack.append(value)


def _push_new(make: Callable[[], Any]) -> Callable[[Machine], None]:
    return lambda machine: machine.stack.append(make())


def _push_number(layout: Struct) -> Callable[[Machine], None]:
    return lambda machine: machine.stack.append(machine.take_number(layout))


def _push_sized(layout: Struct, convert: Callable[[bytes], Any]) -> Callable[[Machine], None]:
    return lambda machine: machine.stack.append(convert(machine.take(machine.take_number(layout))))


def _push_last(count: int) -> Callable[[Machine], None]:
    """A tuple of the last `count` values."""

    def push(machine: Machine) -> None:
        items = tuple(machine.stack[-count:])
        _require(len(items) == count, "its opcodes do not fit")
        machine.stack[-count:] = [items]

    return push


def _push_marked(make: Callable[[list[Any]], Any]) -> Callable[[Machine], None]:
    def push(machine: Machine) -> None:
        value = make(machine.pop_to_mark())  # which also changes what the stack is
        machine.stack.append(value)

    return push


def _push_int_line(machine: Machine) -> None:
    is_bool = machine.data[machine.at : machine.at + 3] in (b"00\n", b"01\n")
    number = machine.take_decimal()
    machine.stack.append(bool(number) if is_bool else number)


def _push_float_line(machine: Machine) -> None:
    line = machine.take_line()
    try:
        machine.stack.append(float(line[:MAX_DIGITS]))
    except ValueError:
        raise Refused(f"a number {line[:20]!r}") from None


def _push_string_line(machine: Machine) -> None:
    line = machine.take_line()
    _require(len(line) >= 2 and line[:1] == line[-1:] and line[:1] in (b'"', b"'"), "a string without quotes")
    try:
        machine.stack.append(_python2_string(codecs.escape_decode(line[1:-1])[0]))
    except ValueError as e:
        raise Refused(f"a string that is none: {e}") from None


def _to_integer(data: bytes) -> int:
    _require(len(data) <= MAX_DIGITS, f"a number of {len(data):,} bytes")
    return int.from_bytes(data, "little", signed=True)


def _start(machine: Machine) -> None:
    _require(machine.take_number(UINT1) <= 5, "a protocol later than 5")


def _start_frame(machine: Machine) -> None:
    size = machine.take_number(UINT8)
    _require(size <= len(machine.data) - machine.at, f"it ends early: {size:,} bytes are to follow")


def _append_one(machine: Machine) -> None:
    value = machine.stack.pop()
    machine.append([value])


def _set_one(machine: Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.set_items([key, value])


def _name_of_stack(machine: Machine) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.name(module, name)


OPCODES: dict[int, Callable[[Machine], None]] = {
    # how it is written
    0x80: _start,
    0x95: _start_frame,
    # constants and numbers
    0x88: _push(True),
    ord("J"): _push_number(INT4),
    ord("I"): _push_int_line,
    ord("M"): _push_number(UINT2),
    ord("L"): lambda machine: machine.stack.append(machine.take_decimal(b"L")),
    0x8A: _push_sized(UINT1, _to_integer),
    0x8B: _push_sized(INT4, _to_integer),
    ord("F"): _push_float_line,
    ord("G"): _push_number(FLOAT8),
    # strings of Python 2, text, bytes
    ord("S"): _push_string_line,
    ord("T"): _push_sized(INT4, _python2_string),
    ord("U"): _push_sized(UINT1, _python2_string),
    ord("V"): lambda machine: machine.stack.append(_text(machine.take_line(), "raw-unicode-escape")),
    ord("X"): _push_sized(UINT4, _text),
    0x8D: _push_sized(UINT8, _text),
    ord("B"): _push_sized(UINT4, bytes),
    ord("C"): _push_sized(UINT1, bytes),
    0x8E: _push_sized(UINT8, bytes),
    0x96: _push_sized(UINT8, bytes),
    # tuples, lists, dicts
    ord(")"): _push(()),
    0x86: _push_last(2),
    0x87: _push_last(3),
    ord("]"): _push_new(list),
    ord("l"): _push_marked(list),
    ord("a"): _append_one,
    ord("e"): lambda machine: machine.append(machine.pop_to_mark()),
    ord("}"): _push_new(dict),
    ord("d"): _push_marked(_pairs),
    ord("s"): _set_one,
    ord("u"): lambda machine: machine.set_items(machine.pop_to_mark()),
    # values that come again
    ord("p"): lambda machine: machine.remember(machine.take_decimal()),
    ord("r"): lambda machine: machine.remember(machine.take_number(UINT4)),
    ord("g"): lambda machine: machine.recall(machine.take_decimal()),
    ord("j"): lambda machine: machine.recall(machine.take_number(UINT4)),
    # arrays
    ord("c"): lambda machine: machine.name(_text(machine.take_line()), _text(machine.take_line())),
    0x93: _name_of_stack,
    ord("R"): Machine.call,
    ord("b"): lambda machine: machine.build(),
}
