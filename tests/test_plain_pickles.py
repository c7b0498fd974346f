"""Pickles of others: plain values and arrays in them are read as `pickle` reads them, and nothing else is."""

import pickle
import random
import time
import tracemalloc
from struct import pack

import numpy as np
import pytest

from raylib.errors import UserError
from raylib.pickles import CALLS, load_plain
from tests.fuzz.reader import same

DTYPES = ("?", "i1", "<i2", ">i4", "<i8", "u1", ">u2", "u4", "u8", "<f2", ">f4", "f4", "f8")
CHARACTERS = "ab \n\\'\"\x00\x80\u00e9\u6f22\U0001f600"


def make_array(rng):
    dtype, shape = rng.choice(DTYPES), tuple(rng.randrange(4) for _ in range(rng.randrange(4)))
    numbers = np.random.default_rng(rng.randrange(1 << 30)).integers(0, 2 if dtype == "?" else 100, shape)
    array = numbers.astype(dtype)
    if rng.random() < 0.2 and array.size:
        return array.flat[0]
    return rng.choice(
        (array, array.T, np.asfortranarray(array), array[::-1] if array.ndim else array, array.swapaxes(0, 1)
         if array.ndim > 2 else array)
    )  # fmt: skip


def make_value(rng, depth=0):
    kind = rng.randrange(9 if depth < 4 else 6)
    bits, length = rng.choice((3, 8, 16, 31, 32, 40, 100, 300)), rng.choice((0, 1, 5, 300))
    if kind == 0:
        return rng.choice(
            (None, True, False, 0.0, -0.0, -1.5, 1e300, float("inf"), float("nan"), rng.random())
        )
    if kind == 1:
        return rng.randrange(-(1 << bits), 1 << bits)
    if kind == 2:
        return "".join(rng.choice(CHARACTERS) for _ in range(length))
    if kind == 3:
        return rng.randbytes(length)
    if kind in (4, 5):
        return make_array(rng)
    items = [make_value(rng, depth + 1) for _ in range(rng.choice((0, 1, 2, 3, 4, 7)))]
    if kind == 6:
        return items
    if kind == 7:
        return tuple(items)
    return {rng.choice((f"k{i}", f"b{i}".encode(), i - 3, 1 << 50)): item for i, item in enumerate(items)}


def in_native_order(value):
    """`pickle` turns arrays of the other byte order up to protocol 4."""
    if isinstance(value, np.ndarray):
        return value.astype(value.dtype.newbyteorder("="))
    if isinstance(value, list | tuple):
        return type(value)(map(in_native_order, value))
    return {k: in_native_order(v) for k, v in value.items()} if isinstance(value, dict) else value


def test_plain_values_of_all_protocols_are_read_as_pickle_reads_them():
    rng = random.Random(0)
    for _ in range(700):
        value = make_value(rng)
        for protocol in range(6):
            data = pickle.dumps(value, protocol)
            found = load_plain(data, "x")
            assert same(in_native_order(found), in_native_order(pickle.loads(data)))
            assert type(found) is type(pickle.loads(data))


# As Python 2.7 and NumPy 1 wrote them: strings of bytes, and another form of dtypes
PYTHON2_TEXT = b"""(dp1
S'boxes'
p2
cnumpy.core.multiarray
_reconstruct
p3
(cnumpy
ndarray
p4
(I0
tS'b'
tRp5
(I1
(I1
I2
tcnumpy
dtype
p6
(S'f4'
I0
I1
tRp7
(I3
S'<'
NNNI-1
I-1
I0
tbI00
S'\\x00\\x00\\x80?\\x00\\x00\\x00@'
tbsS'img_h'
cnumpy.core.multiarray
scalar
(g7
S'\\x00\\x00\\x40\\x40'
tRsS'name'
V\\u6f22
sS'path'
S'a\\xe9'
sS'n'
L7L
s."""
PYTHON2_BINARY = (
    b"\x80\x02}(U\x05boxescnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x01K"
    b"\x02\x86cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
    b"\x08\x00\x00\x00\x00\x00\x80?\x00\x00\x00@tbU\x01n\x8a\x01\x07u."
)


def test_pickles_of_python_2_are_read():
    boxes = np.array([[1, 2]], np.float32)
    expected = {"boxes": boxes, "img_h": np.float32(3), "name": "\u6f22", "path": b"a\xe9", "n": 7}
    assert same(load_plain(PYTHON2_TEXT, "x"), expected)
    assert same(
        load_plain(PYTHON2_TEXT, "x")["boxes"], pickle.loads(PYTHON2_TEXT, encoding="bytes")[b"boxes"]
    )
    assert same(load_plain(PYTHON2_BINARY, "x"), {"boxes": boxes, "n": 7})


def test_array_of_one_dict_is_that_dict():
    """As `numpy.save` writes it, behind a header."""
    array = np.array({"bbox": np.ones((2, 4)), "num_boxes": 2})
    for protocol in (2, 3, 4, 5):
        assert same(load_plain(pickle.dumps(array, protocol), "x"), array.item())
    refuse(pickle.dumps(np.array([{}, {}])), "an array of objects")


def refuse(data, words, memory=1 << 20, seconds=4.0):
    """`data` is refused with `words`, in little memory and time."""
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises(UserError, match=rf"^/r.lmdb, 7: not to be read as a pickle .*{words}") as error:
            load_plain(data, "/r.lmdb, 7")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert peak < memory + 100 * len(data) and time.process_time() - began < seconds


class Calls:
    """Pickled as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Plain:
    pass


def test_what_a_pickle_may_call_is_ours():
    assert all(call.__module__ == "raylib.pickles" for call in CALLS.values())


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (Calls(exec, "1"), "it wants .*exec, and only plain values"),
        (Calls(np.load, "x"), "it wants numpy.*load"),
        (Plain(), "it wants .*(Plain|_reconstructor)"),
        (Plain, "it wants tests.test_plain_pickles.Plain"),
        ({1, 2}, "."),
        (frozenset([1]), "."),
        (1j, "it wants .*complex"),
        (np.zeros(2, "c8"), "a dtype <c8, and only numbers are read"),
        (np.array(["a"]), "a dtype <U1, and only numbers"),
        (np.zeros(2, [("a", "f4")]), "."),
        (np.zeros(2, "M8[s]"), "."),
        (np.array([Plain()]), "it wants"),
        ({(1, 2): 3}, "a key of a dict that is tuple"),
        ({1.5: 3}, "a key of a dict that is float"),
        (np.dtype("f4"), "not finished"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_everything_else_is_refused_by_name(value, words, protocol):
    refuse(pickle.dumps(value, protocol), words)


def test_opcodes_that_are_not_read_are_named():
    for data, name in (
        (b"\x80\x02]P1\n.", "PERSID"),
        (b"\x80\x02N\x82\x01.", "EXT1"),
        (b"(ios\nsystem\n.", "INST"),
        (b"\x80\x02)\x81.", "NEWOBJ"),
        (b"\x80\x05\x97.", "NEXT_BUFFER"),
        (b"N2.", "DUP"),
        (b"\x80\x04\x8f.", "EMPTY_SET"),
    ):
        refuse(data, f"opcode {name}, and only plain values")
    refuse(b"version https://git-lfs", r"byte 0 is b'v', which is no opcode")


def test_sizes_that_are_announced_are_compared_with_the_data_first():
    for data in (
        b"\x80\x04\x8e" + pack("<Q", 1 << 30),  # bytes
        b"\x80\x04\x8d" + pack("<Q", 1 << 62) + b".",
        b"\x80\x05\x96" + pack("<Q", 1 << 40) + b".",
        b"\x80\x02T\xff\xff\xff\x7f.",
        b"\x80\x02T\xff\xff\xff\xff.",
        b"\x80\x02X\xff\xff\xff\xff.",
        b"\x80\x02B\x00\x00\x00\x40.",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"\x80\x04\x95" + pack("<Q", 1 << 60) + b".",
    ):
        refuse(data, "it ends early: [-0-9,]+ bytes are to follow")
    # a memo of 2^31 places takes no more than one of 1
    assert load_plain(b"]r\xff\xff\xff\x7f.", "x") == []
    assert load_plain(b"]p2147483647\n.", "x") == []
    whole = pickle.dumps({"features": np.ones((2, 3), np.float32), "n": [1, 2.5, "a"]}, 4)
    for end in range(len(whole)):
        refuse(whole[:end], "it ends early")
    refuse(whole + b"x", "1 bytes after its end")


def pickled_array(dtype="f4", shape=b"K\x02\x85", data=bytes(8), more=b""):
    """An array as of protocol 2, with `more` before the end; its dtype is remembered as 1."""
    dtype = b"cnumpy\ndtype\nU" + bytes([len(dtype)]) + dtype.encode() + b"K\x00K\x01\x87Rq\x01"
    state = b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87Rq\x00"
    return (
        b"\x80\x02"
        + made
        + b"(K\x01"
        + shape
        + dtype
        + state
        + b"\x89C"
        + bytes([len(data)])
        + data
        + b"tb"
        + more
        + b"."
    )


def test_arrays_fill_their_bytes():
    assert same(load_plain(pickled_array(), "x"), np.zeros(2, np.float32))
    for shape in (
        b"K\x03\x85",
        b"J\xff\xff\xff\xff\x85",
        b"J\xfe\xff\xff\xffJ\xff\xff\xff\xff\x86",
        b"\x8a\x09" + b"\1" * 9 + b"\x85",
    ):
        refuse(pickled_array(shape=shape), "8 bytes for an array of float32")
    refuse(
        pickled_array(shape=b"K\x00\x8a\x08" + b"\x7f" * 8 + b"\x86", data=b""),
        "an array of no numbers that is too long",
    )
    refuse(pickled_array(shape=b"G" + bytes(8) + b"\x85"), "8 bytes for an array")
    for dtype in ("O", "V8", "S4", "f16", "c8", "f4,f4", "M8", "", "int8", "(2,)f4"):
        refuse(pickled_array(dtype=dtype), ".")


def test_a_dtype_is_not_changed_after_its_array_was_made():
    """Which gives memory of others with NumPy's own."""
    larger = b"h\x01(K\x03U\x01>NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb0h\x00"
    refuse(pickled_array(more=larger), "a dtype's state")
    fields = b"h\x01(K\x03U\x01|NU\x01a\x85}U\x01ah\x01K\x7f\x86sK\x7fK\x01K\x00tb0h\x00"
    refuse(pickled_array(more=fields), "a dtype's state")
    refuse(pickled_array(more=b"(K\x01K\x7f\x85h\x01\x89C\x00tb"), "a state of something else")


def test_values_that_hold_each_other_are_refused():
    many = []
    for _ in range(40):
        many = [many, many]
    refuse(pickle.dumps(many), "values in each other without end")
    itself = []
    itself.append(itself)
    refuse(pickle.dumps(itself), "values in each other without end")
    refuse(b"]" * 100_000 + b"a" * 99_999 + b".", "values in each other without end")
    refuse(b"\x80\x02" + b"N\x85" * 1 + b"\x85" * 100_000 + b".", "values in each other without end")
    # a large one that comes many times
    large = "x" * 100_000
    refuse(pickle.dumps([large] * 1000), "values in each other without end")
    assert load_plain(pickle.dumps([large] * 3), "x") == [large] * 3
    refuse(pickle.dumps(np.zeros(2))[:-1] + b"0" + b".", "opcode POP")


def test_a_pickle_ends_after_so_many_steps():
    with pytest.raises(UserError, match="more than 2,000,000 opcodes"):
        load_plain(b"N" * 2_000_001 + b".", "x")
    # numbers of one hash make a dict that takes hours
    step = (1 << 61) - 1
    refuse(pickle.dumps({number * step: 0 for number in range(1, 9)}), "a key of a dict that is int")
    refuse(b"I" + b"9" * 5000 + b"\n.", "a number b'9999")
    refuse(b"\x80\x02\x8b" + pack("<i", 5000) + b"9" * 5000 + b".", "a number of 5,000 bytes")


@pytest.mark.filterwarnings("ignore:invalid escape:DeprecationWarning")
def test_damaged_pickles_are_one_line():
    """Flips, cuts and splices of valid ones: read as plain values, or refused in one line."""
    rng, lines = random.Random(1), set()
    examples = [pickle.dumps(make_value(rng), rng.randrange(6)) for _ in range(40)] + [
        PYTHON2_TEXT,
        PYTHON2_BINARY,
    ]
    for _ in range(6000):
        data = bytearray(rng.choice(examples))
        for _ in range(rng.choice((1, 1, 2, 5))):
            place = rng.randrange(len(data))
            kind = rng.randrange(4)
            if kind == 0:
                data[place] = rng.randrange(256)
            elif kind == 1:
                del data[place : place + rng.randrange(1, 9)]
            elif kind == 2:
                data[place:place] = rng.randbytes(3)
            else:
                other = rng.choice(examples)
                data[place:] = other[rng.randrange(len(other)) :]
            data = data or bytearray(b".")
        try:
            load_plain(bytes(data), "x")
        except UserError as error:
            lines.add(str(error))
    assert len(lines) > 100
    assert all(line.startswith("x: not to be read as a pickle of plain values (") for line in lines)
    assert not any("\n" in line for line in lines)
