"""Files that `torch.save` wrote, read without PyTorch's unpickler, which allocates whatever a pickle says.

    zip      NAME/data.pkl, the pickled object, whose tensors name their storages; NAME/data/KEY, these
    legacy   (before PyTorch 1.6) five pickles: a number that all such files have, a version, facts of the
             machine, the object, the storages' keys; then the storages, each after its number of elements

1. `raylib.pickles` interprets the pickles. A tensor becomes a `TensorRecord`, which names a part of a
   storage; what else a pickle names is refused.
2. The caller chooses what it wants of the object: a checkpoint may hold an optimizer's state too.
3. The storages of what was chosen must lie in the file, and its tensors in them. Only then is memory
   allocated: no more than these storages take in the file.
"""

import math
import os
import re
import zipfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from struct import Struct
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from raylib.fileio import open_plain
from raylib.pickles import CALLS as PLAIN_CALLS
from raylib.pickles import OPCODES, Machine, Name, Refused, make_bytes, refuse_call, require_plain

MAX_PICKLE = 1 << 26  # bytes of a pickle: a tensor takes about 300, an optimizer's state of it as many
FIRST_READ = 1 << 20  # bytes
MAX_DIMENSIONS = 32
MAX_VIEWS = 8  # elements of all tensors together, for each element of their storages; a few are free
FREE_ELEMENTS = 1 << 22
MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001  # of the legacy format
LOCAL_HEADER = Struct(
    "<4s22xHH"
)  # of a member of a zip: signature, lengths of the name and of the extra field
NUMBERS = ("version", ".data/version", ".format_version", ".storage_alignment")  # members of the zip
NUMBER = re.compile(rb"\d{1,4}\n?")
END = Struct("<4sHHHHLLH")  # of a zip: where its list of members lies
LONG_END = Struct("<4sQHHLLQQQQ4sLQL22x")  # the same in more bits, where that lies, and `END`
COUNT = Struct("<q")
NEWOBJ, BINPERSID = 0x81, ord("Q")  # opcodes: an object of a class, something outside of the pickle
EMPTY_SET, ADD_ITEMS, FROZEN_SET = 0x8F, 0x90, 0x91
STORAGES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
}
# what a name in a pickle stands for: an element type, as of a storage or by itself
DTYPES = {f"torch.{name}Storage": dtype for name, dtype in STORAGES.items()} | {
    str(dtype): dtype
    for dtype in (
        *STORAGES.values(),
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    )
}
DTYPES["torch.storage.UntypedStorage"] = torch.uint8


class Storage(NamedTuple):
    """Elements of the file under a key. num_bytes: as many as the pickle says."""

    key: str
    dtype: torch.dtype
    num_bytes: int


class TensorRecord(NamedTuple):
    """A tensor before it is read; offset and stride count elements."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.size)


class Record(dict[str, Any]):
    """The fields of an object of a class that the caller knows, and no methods. "values": what its class was
    called with."""


def read_torch(
    path: Path, choose: Callable[[Any], Any] = lambda value: value, classes: Collection[str] = ()
) -> Any:
    """Read the object in a file of PyTorch's, or what `choose` returns of it, with its tensors on the CPU.

    Args:
        choose: gets the object with a `TensorRecord` in the place of each tensor.
        classes: names of others that may be in there, as `Record`s.
    Raises:
        ValueError: a damaged file, or one with more than tensors and plain values.
        OSError: no file.
    """
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        is_zip = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        value, find = (_read_zip if is_zip else _read_legacy)(file, size, classes)
        value = choose(value)
        records = list(dict.fromkeys(_records(value)))
        _require_room(records, size)
        tensors = _read_tensors(file, records, find)
    return _with_tensors(value, tensors)


class _TorchMachine(Machine):
    """Knows what PyTorch's pickles name."""

    def __init__(self, data: bytes, classes: Collection[str] = ()):
        super().__init__(data)
        self.calls = {**PLAIN_CALLS, **CALLS, **dict.fromkeys(classes, _make_record)}
        self.opcodes = {
            **OPCODES,
            NEWOBJ: Machine.call,
            BINPERSID: lambda _: self.push_storage(),
            EMPTY_SET: OPCODES[ord("]")],
            ADD_ITEMS: OPCODES[ord("e")],
            FROZEN_SET: OPCODES[ord("l")],
        }
        self.storages: list[Storage] = []

    def find(self, name: str) -> Any:
        if name not in DTYPES and name not in self.calls:
            raise Refused(f"it wants {name[:100]}, and only tensors and plain values are read")
        return DTYPES[name] if name in DTYPES else Name(name)

    def push_storage(self) -> None:
        identity = self.stack.pop()
        if not (
            isinstance(identity, tuple) and len(identity) >= 5 and identity[0] in ("storage", b"storage")
        ):
            raise Refused("it names something that is no storage")
        _, dtype, key, _, count, *view = identity
        if not isinstance(dtype, torch.dtype) or type(count) is not int or count < 0:
            raise Refused("a storage without a type or a size")
        if any(part is not None for part in view):
            raise Refused("a storage that is part of another")
        self.storages.append(Storage(str(key), dtype, count * dtype.itemsize))
        self.stack.append(self.storages[-1])

    def build(self) -> None:
        state, target = self.stack[-1], self.stack[-2]
        if not isinstance(target, dict):  # a dtype, or an array
            super().build()
            return
        self.stack.pop()
        # a state dict carries versions of its modules, which nothing here asks for
        if isinstance(target, Record) and type(state) is dict:
            target.update(state)

    def set_items(self, items: list[Any]) -> None:
        # settings beside a state may have keys of other kinds
        items[::2] = [_make_key(key) for key in items[::2]]
        super().set_items(items)


def _make_record(*values: Any) -> Record:
    return Record(values=values)


def _make_key(key: Any) -> Any:
    """A key of a dict, as text where many of its kind may have one hash, which takes forever to compare."""
    plain = (type(None), bool, float, str, int)
    parts = key if type(key) is tuple and len(key) <= MAX_DIMENSIONS else (key,)
    is_plain = type(key) in (str, bytes) or (type(key) is int and abs(key) < 1 << 60)
    return key if is_plain or any(type(part) not in plain for part in parts) else repr(key)


def _rebuild(
    storage: Any, offset: Any, size: Any, stride: Any, *rest: Any, dtype: Any = None
) -> TensorRecord:
    if len(rest) > 2 and rest[2]:
        raise Refused("a tensor with a conjugate or negative view")
    counts = (offset, *size, *stride) if type(size) is tuple and type(stride) is tuple else (None,)
    is_sized = all(type(n) is int and 0 <= n < 1 << 62 for n in counts)
    if (
        not isinstance(storage, Storage)
        or not is_sized
        or len(size) != len(stride)
        or len(size) > MAX_DIMENSIONS
    ):
        raise Refused("a tensor without storage, size and stride")
    return TensorRecord(storage, dtype or storage.dtype, offset, size, stride)


def _rebuild_with_dtype(storage: Any, *rest: Any) -> TensorRecord:
    *others, dtype = rest[:6]
    if not isinstance(dtype, torch.dtype):
        raise Refused("a tensor without a type")
    return _rebuild(storage, *others, dtype=dtype)


def _rebuild_parameter(data: Any, *_: Any) -> object:
    if not isinstance(data, TensorRecord):
        raise Refused("a parameter without a tensor")
    return data


def _rebuild_subclass(function: Any, *rest: Any) -> object:
    """A tensor with attributes, which nothing here asks for."""
    arguments = rest[1] if len(rest) > 1 else None
    if not isinstance(function, Name) or function.name not in CALLS or type(arguments) is not tuple:
        raise Refused("a tensor of another type")
    return CALLS[function.name](*arguments)


def _make_dict(pairs: Any = ()) -> dict:
    is_pairs = type(pairs) in (list, tuple) and all(
        type(pair) in (list, tuple) and len(pair) == 2 and type(pair[0]) in (str, int) for pair in pairs
    )
    if type(pairs) is not dict and not is_pairs:
        raise Refused("a dict of no pairs")
    return dict(pairs)


def _make_list(items: Any = ()) -> list:
    if type(items) not in (list, tuple):
        raise Refused("a set, or a size, of no items")
    return list(items)


def _make_complex(*parts: Any) -> str:
    return repr(parts)


def _make_size(items: Any = ()) -> tuple:
    return tuple(_make_list(items))


def _make_default_dict(*_: Any) -> dict:
    return {}


def _make_byte_array(data: Any = b"", encoding: Any = "latin-1") -> bytes:
    return data if type(data) is bytes else make_bytes(data, encoding)


def _join(separator: str) -> Callable[..., str]:
    return lambda *parts: separator.join(map(str, parts))


CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _rebuild,
    "torch._utils._rebuild_tensor_v2": _rebuild,
    "torch._utils._rebuild_tensor_v3": _rebuild_with_dtype,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": _rebuild_subclass,
    "torch.Tensor": refuse_call,
    "torch.nn.parameter.Parameter": refuse_call,
    "collections.OrderedDict": _make_dict,
    "collections.Counter": _make_dict,
    "torch.Size": _make_size,
    "torch.device": _join(":"),
    # beside a model's state: settings, results, what a training was at
    "argparse.Namespace": _make_record,
    "collections.defaultdict": _make_default_dict,
    **{
        f"pathlib.{module}{kind}Path": _join("/")
        for module in ("", "_local.")
        for kind in ("Posix", "Windows")
    },
}
for builtins in ("builtins", "__builtin__"):
    CALLS[f"{builtins}.set"] = CALLS[f"{builtins}.frozenset"] = _make_list
    CALLS[f"{builtins}.bytearray"] = _make_byte_array
    CALLS[f"{builtins}.complex"] = _make_complex
    # what a defaultdict would fill in
    CALLS |= {
        f"{builtins}.{name}": refuse_call for name in ("list", "dict", "int", "long", "float", "str", "bool")
    }


def _read_zip(file: BinaryIO, size: int, classes: Collection[str]) -> tuple[Any, "Find"]:
    members: dict[str, zipfile.ZipInfo] = {}
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile:  # its list of members is at its end
        raise Refused("it is cut off, as after an unfinished download") from None
    with archive:
        _require_end(file, size, len(archive.infolist()))
        for member in archive.infolist():
            if member.filename in members:
                raise Refused(f"two members of one name, {member.filename}")
            members[member.filename] = member

    def find(name: str) -> tuple[int, int]:
        if name not in members:
            raise Refused(f"no member {name} in it")
        member = members[name]
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise Refused(f"its member {name} is compressed or encrypted")
        file.seek(member.header_offset)
        header = file.read(LOCAL_HEADER.size)
        if len(header) < LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
            raise Refused(f"its member {name} is damaged")
        _, *lengths = LOCAL_HEADER.unpack(header)
        return member.header_offset + LOCAL_HEADER.size + sum(lengths), member.file_size

    def read(name: str) -> bytes:
        start, length = find(name)
        if length > MAX_PICKLE or start + length > size:
            raise Refused(f"its member {name} of {length:,} bytes is too long")
        file.seek(start)
        return file.read(length)

    pickles = [name for name in members if name.rpartition("/")[2] == "data.pkl" and name.count("/") == 1]
    if len(pickles) != 1:
        raise Refused("a zip archive without data.pkl, so none of PyTorch's")
    root = pickles[0].removesuffix("data.pkl")
    if others := [name for name in members if not name.startswith(root)]:
        raise Refused(f"a member {others[0]!r:.60} in it, beside {root}")
    identity = f"{root}.data/serialization_id"
    if identity in members and not read(identity).isascii():
        raise Refused("an id that PyTorch never wrote")
    numbers = [f"{root}{name}" for name in NUMBERS if f"{root}{name}" in members]
    if not numbers or not all(NUMBER.fullmatch(read(name)) for name in numbers):
        raise Refused("a version that PyTorch never had")
    if f"{root}byteorder" in members and read(f"{root}byteorder") != b"little":
        raise Refused("written on a machine of another byte order")
    machine = _TorchMachine(read(pickles[0]), classes=classes)
    value = machine.run()
    require_plain(value, len(machine.data), LEAVES)
    return value, lambda key: find(f"{root}data/{key}")


def _require_end(file: BinaryIO, size: int, members: int) -> None:
    """Raise Refused unless a zip ends where its list of members does, in one record that says where that is,
    or, as PyTorch writes them, in two that say the same: other readers look for another of them."""
    file.seek(max(0, size - LONG_END.size))
    tail = file.read(LONG_END.size)
    if len(tail) < END.size:
        raise Refused("it is cut off, as after an unfinished download")
    signature, *_, here, count, length, start, comment = END.unpack(tail[-END.size :])
    place = size - END.size
    if tail[-END.size - 20 :][:4] == b"PK\6\7" and len(tail) == LONG_END.size:
        first, *_, long_here, long_count, long_length, long_start, _, _, place, _ = LONG_END.unpack(tail)
        longs = (long_here, long_count, long_length, long_start)
        limits = (0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1)
        if first != b"PK\6\6" or (here, count, length, start) != tuple(map(min, longs, limits)):
            raise Refused("its end is damaged")
        here, count, length, start = longs
        if place != size - LONG_END.size:
            raise Refused("its end is damaged")
    if signature != b"PK\5\6" or comment or start + length != place or not here == count == members:
        raise Refused("its end is damaged, or something follows it")


def _read_legacy(file: BinaryIO, size: int, classes: Collection[str]) -> tuple[Any, "Find"]:
    # what is pickled is small beside the storages behind it, which are not to be read twice
    for length in (FIRST_READ, MAX_PICKLE):
        file.seek(0)
        try:
            return _parse_legacy(file, _TorchMachine(file.read(length), classes=classes))
        except Refused:
            if size <= length or length == MAX_PICKLE:
                raise
    raise Refused("no file of PyTorch's")


def _parse_legacy(file: BinaryIO, machine: _TorchMachine) -> tuple[Any, "Find"]:
    if machine.data[:1] != b"\x80" or machine.run() != MAGIC or machine.run() != VERSION:
        raise Refused("no file of PyTorch's")
    facts = machine.run()
    if type(facts) is not dict or facts.get("little_endian") is not True:
        raise Refused("written on a machine of another byte order")
    start = machine.at
    value = machine.run()
    require_plain(value, machine.at - start, LEAVES)
    keys = machine.run()
    sizes = {storage.key: storage for storage in machine.storages}
    if any(sizes[storage.key].num_bytes != storage.num_bytes for storage in machine.storages):
        raise Refused("a storage of two sizes")
    if type(keys) is not list or {*map(str, keys)} != sizes.keys() or len(keys) != len(sizes):
        raise Refused("its list of storages is another than that of its tensors")
    places, place = {}, machine.at
    for key in map(str, keys):
        file.seek(place)
        count, storage = file.read(COUNT.size), sizes[key]
        if len(count) < COUNT.size or COUNT.unpack(count)[0] * storage.dtype.itemsize != storage.num_bytes:
            raise Refused(f"it ends early, or its storage {key} is of another size")
        places[key] = place + COUNT.size, storage.num_bytes
        place += COUNT.size + storage.num_bytes
    return value, places.__getitem__


def _records(value: Any) -> Iterator[TensorRecord]:
    if isinstance(value, TensorRecord):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _records(item)
    elif isinstance(value, list | tuple) and not isinstance(value, Storage):
        for item in value:
            yield from _records(item)


def _with_tensors(value: Any, tensors: dict[TensorRecord, Tensor]) -> Any:
    """`value` with a tensor in the place of each record."""
    if isinstance(value, TensorRecord):
        return tensors[value]
    if isinstance(value, dict):
        return {name: _with_tensors(item, tensors) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_with_tensors(item, tensors) for item in value)
    return value


def _require_room(records: list[TensorRecord], size: int) -> None:
    """Raise Refused unless the tensors lie in their storages, these fit into a file of `size` bytes, and all
    of it is no larger once it is read: many tensors may be of one storage, and a stride of 0 repeats it."""
    storages = {record.storage.key: record.storage for record in records}
    num_bytes = sum(storage.num_bytes for storage in storages.values())
    if num_bytes > size:
        raise Refused(f"it ends early: its tensors take {num_bytes:,} bytes, the file has {size:,}")
    elements = 0
    for record in records:
        elements += record.num_elements
        last = record.offset + sum((n - 1) * step for n, step in zip(record.size, record.stride, strict=True))
        storage = storages[record.storage.key]
        is_same = storage.num_bytes == record.storage.num_bytes
        if not is_same or (record.num_elements and (last + 1) * record.dtype.itemsize > storage.num_bytes):
            raise Refused(f"a tensor of shape {record.size} that is not within its storage")
    if elements > MAX_VIEWS * num_bytes + FREE_ELEMENTS:
        raise Refused(f"its tensors have {elements:,} elements, in {num_bytes:,} bytes")


def _read_tensors(file: BinaryIO, records: list[TensorRecord], find: "Find") -> dict[TensorRecord, Tensor]:
    """Read each storage once, in the order of the file."""
    places = {record.storage.key: find(record.storage.key) for record in records}
    size = os.fstat(file.fileno()).st_size
    storages = {}
    for record in records:
        start, num_bytes = places[record.storage.key]
        if num_bytes != record.storage.num_bytes or start + num_bytes > size:
            raise Refused(f"it ends early, or its storage {record.storage.key} is of another size")
    for key, (start, num_bytes) in sorted(places.items(), key=lambda item: item[1]):
        content = torch.empty(num_bytes, dtype=torch.uint8)
        file.seek(start)
        _read_into(file, content.numpy().data)
        storages[key] = content.untyped_storage()
    return {
        record: torch.empty(0, dtype=record.dtype).set_(
            storages[record.storage.key], record.offset, record.size, record.stride
        )
        for record in records
    }


def _read_into(file: Any, buffer: memoryview) -> None:
    while buffer:  # the system reads 2 GB at once
        count = file.readinto(buffer)
        if not count:
            raise Refused("it ends early")
        buffer = buffer[count:]


Find = Callable[[str], tuple[int, int]]  # a storage's key -> its first byte in the file, its bytes
LEAVES = (TensorRecord, torch.dtype)  # what may stand in a value besides plain ones
