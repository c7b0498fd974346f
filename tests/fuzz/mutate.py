"""Damage to a file: what disks, downloads, other programs and ill will make of it. All chance is drawn from
(seed, reader, number)."""

import os
import random
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.fuzz import bombs
from tests.fuzz.archives import repack
from tests.fuzz.reader import Reader
from tests.fuzz.structures import STRUCTURES, boundaries

Random = random.Random
SIZES = (0, 1, -1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, -(2**63))
FLOATS = (float("nan"), float("inf"), float("-inf"), 1e38, -1e38, 1e-40, 0.0, -1.0)


class Case(NamedTuple):
    """A damaged example.

    path: what is read. target: the file that is damaged. mutation: the kind of damage, in a word.
    """

    path: Path
    target: Path
    mutation: str


def flip_bits(data: bytes, rng: Random, others: Sequence[bytes]) -> bytes | None:
    if not data:
        return None
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        damaged[_place(rng, len(data))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def overwrite_bytes(data: bytes, rng: Random, others: Sequence[bytes]) -> bytes | None:
    if not data:
        return None
    start, size = _place(rng, len(data)), rng.choice((1, 2, 4, 16, 300))
    letters = rng.choice((rng.randbytes(size), bytes(size), b"\xff" * size, b"9" * size, b" " * size))
    return data[:start] + letters + data[start + size :]


def truncate(data: bytes, rng: Random, others: Sequence[bytes]) -> bytes | None:
    return data[: rng.randrange(len(data))] if data else None


def truncate_at_boundary(data: bytes, rng: Random, others: Sequence[bytes]) -> bytes | None:
    places = [place for place in boundaries(data) if 0 <= place < len(data)]
    return data[: max(0, rng.choice(places) + rng.choice((0, 0, 0, -1, 1)))] if places else None


def insert_block(data: bytes, rng: Random, others: Sequence[bytes]) -> bytes:
    start, size = rng.randrange(len(data) + 1), rng.choice((1, 1, 4, 100, 512))
    return data[:start] + rng.choice((rng.randbytes(size), bytes(size), data[:size])) + data[start:]


def remove_block(data: bytes, rng: Random, others: Sequence[bytes]) -> bytes | None:
    start = _place(rng, len(data)) if data else 0
    return data[:start] + data[start + rng.choice((1, 1, 4, 100, 512)) :] if data else None


def repeat_block(data: bytes, rng: Random, others: Sequence[bytes]) -> bytes | None:
    if not data:
        return None
    start, end = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    return data[:end] + data[start:end] * rng.choice((1, 1, 2, 50 if end - start < 2000 else 1)) + data[end:]


def swap_blocks(data: bytes, rng: Random, others: Sequence[bytes]) -> bytes | None:
    if len(data) < 4:
        return None
    one, two, three = sorted(rng.sample(range(len(data)), 3))
    return data[:one] + data[two:three] + data[one:two] + data[three:]


def append_other(data: bytes, rng: Random, others: Sequence[bytes]) -> bytes:
    return data + rng.choice((data, rng.choice(others), b"\n", bytes(512), rng.randbytes(20)))


def splice(data: bytes, rng: Random, others: Sequence[bytes]) -> bytes:
    other = rng.choice(others)
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def other_example(data: bytes, rng: Random, others: Sequence[bytes]) -> bytes:
    return rng.choice(others)


def size_field(data: bytes, rng: Random, others: Sequence[bytes]) -> bytes | None:
    width = rng.choice((2, 4, 4, 8, 8))
    if len(data) < width:
        return None
    start = _place(rng, len(data) - width + 1)
    if rng.random() < 0.7:
        start -= start % min(width, 4)
    size = rng.choice((*SIZES, len(data), len(data) - 1, len(data) + 1)) & ((1 << 8 * width) - 1)
    return data[:start] + size.to_bytes(width, rng.choice(("little", "big"))) + data[start + width :]


def number_field(data: bytes, rng: Random, others: Sequence[bytes]) -> bytes | None:
    code = rng.choice(("<e", "<f", "<f", "<d", ">f"))
    width = struct.calcsize(code)
    if len(data) < width:
        return None
    number = rng.choice(FLOATS[:3] if width == 2 else FLOATS)
    start = rng.randrange(len(data) - width + 1)
    start -= start % width if rng.random() < 0.8 else 0
    return data[:start] + struct.pack(code, number) + data[start + width :]


def zeros_at_end(data: bytes, rng: Random, others: Sequence[bytes]) -> bytes | None:
    """A download that reserved the file's size, and broke off; or a crash, after which blocks are zeros."""
    if not data:
        return None
    start = rng.randrange(len(data))
    end = len(data) if rng.random() < 0.7 else min(len(data), start + 512)
    return data[:start] + bytes(end - start) + data[end:]


def other_encoding(data: bytes, rng: Random, others: Sequence[bytes]) -> bytes | None:
    if rng.random() < 0.3:
        return rng.choice((b"\xef\xbb\xbf", b"\xef\xbb\xbf" * 2, b"\xff\xfe", b"\0")) + data
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return b"\xef\xbb\xbf" + data
    codec = rng.choice(("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "latin-1", "utf-7"))
    return text.encode(codec, "replace")


def other_newlines(data: bytes, rng: Random, others: Sequence[bytes]) -> bytes | None:
    if b"\n" not in data:
        return None
    new = rng.choice((b"\r\n", b"\r", b"\n\n", b"", b"\0", b"\x0b", "\u2028".encode(), b"\t\n"))
    return data.replace(b"\n", new) if rng.random() < 0.6 else data.replace(b"\n", new, 1)


BYTES: dict[str, Callable[[bytes, Random, Sequence[bytes]], bytes | None]] = {
    function.__name__: function
    for function in (
        flip_bits,
        overwrite_bytes,
        truncate,
        truncate_at_boundary,
        insert_block,
        remove_block,
        repeat_block,
        swap_blocks,
        append_other,
        splice,
        other_example,
        size_field,
        number_field,
        zeros_at_end,
        other_encoding,
        other_newlines,
    )
}


def _place(rng: Random, size: int) -> int:
    """A place in a file: where headers are, more often."""
    return rng.randrange(min(size, rng.choice((16, 128, 1024, size, size))))


def mutate_bytes(data: bytes, rng: Random, others: Sequence[bytes], depth: int = 0) -> tuple[bytes, str]:
    """(a file's damaged bytes, in what way); what it is packed in stays whole at times."""
    while True:
        name = rng.choice((*BYTES, *STRUCTURES, *STRUCTURES, *bombs.foreign_files()) if depth else (*BYTES,))
        if (damaged := apply(name, data, rng, others, depth)) is not None:
            return damaged, name


def apply(name: str, data: bytes, rng: Random, others: Sequence[bytes], depth: int = 0) -> bytes | None:
    """The bytes with one kind of damage; None: it is not for a file of this kind."""
    if name == "inside":
        within = lambda inner: mutate_bytes(inner, rng, others, depth + 1)[0]  # noqa: E731
        return repack(data, rng, within) if depth < 2 else None
    if name in STRUCTURES:
        return STRUCTURES[name](data, rng)
    if name in BYTES:
        return BYTES[name](data, rng, others)
    return rng.choice(bombs.foreign_files()[name])


def replace_by_folder(path: Path, rng: Random) -> None:
    path.unlink()
    path.mkdir()
    if rng.random() < 0.5:
        (path / path.name).write_bytes(b"{}")


def replace_by_link(path: Path, rng: Random) -> None:
    """To nothing, to itself, to what never ends."""
    path.unlink()
    path.symlink_to(rng.choice(("nothing", path.name, "/dev/zero", ".", "/dev/full")))


def replace_by_fifo(path: Path, rng: Random) -> None:
    path.unlink()
    os.mkfifo(path)


PLACES: dict[str, Callable[[Path, Random], None]] = {
    function.__name__: function for function in (replace_by_folder, replace_by_link, replace_by_fifo)
}
# the more often a kind stands here, the more of a reader's files have it
KINDS = (*BYTES, *BYTES, *STRUCTURES, *STRUCTURES, *("inside",) * 10, *bombs.foreign_files(), *PLACES)


def make_case(
    reader: Reader, example: Path, inside: Path, seed: int, number: int, others: Sequence[bytes], folder: Path
) -> Case:
    """Write damaged example `number` of a reader into `folder`, which must not be there; 0 is the undamaged
    one.

    example: the folder of the undamaged one. inside: what is read, relative to it.
    """
    shutil.copytree(example, folder, symlinks=True)
    path = folder / inside
    if path.is_dir():
        found = {file for pattern in reader.targets for file in path.glob(pattern) if file.is_file()}
        targets = sorted(file for file in found if not file.is_symlink())
    else:
        targets = [path]
    if number == 0:
        return Case(path, targets[0], "none")
    # each kind comes once before one comes again
    turn, place = divmod(number - 1, len(KINDS))
    order = Random(f"{seed} {reader.name} {turn}").sample(KINDS, len(KINDS))
    rng = Random(f"{seed} {reader.name} {number}")
    target = rng.choice(targets)
    for name in (order[place], *rng.sample(order, len(order))):
        if name in PLACES:
            PLACES[name](target, rng)
            return Case(path, target, name)
        data = target.read_bytes()
        damaged = apply(name, data, rng, others)
        if damaged is not None and damaged != data:
            target.write_bytes(damaged)
            return Case(path, target, name)
    raise AssertionError("no kind of damage fits")
