"""Datasets of an HDF5 file, read where they hold plain arrays that the file accounts for. The library follows
links into other files, loads programs for filters that it does not know, makes room for whatever a dataset
announces, and never ends reading strings of a damaged file (`read_strings` is in its place)."""

import math
import zlib
from struct import Struct
from typing import Any

import h5py
import numpy as np

from finetune.stores.arrays import MAX_BYTES
from raylib.data.index import FileBytes

FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32, h5py.h5z.FILTER_LZF}
LAYOUTS = {h5py.h5d.COMPACT, h5py.h5d.CONTIGUOUS, h5py.h5d.CHUNKED}
MAX_CHUNK = 1 << 30  # bytes that are decompressed together
MAX_RATIO = 1100  # of what deflate makes smaller
# a string of a length of its own: its length, where the block lies that it is in, its number there
REFERENCE = np.dtype([("length", "<u4"), ("address", "<u8"), ("index", "<u4")])
BLOCK, ITEM = Struct("<4sB3xQ"), Struct("<HH4xQ")  # magic, version, size; number, -, size
NOWHERE = (1 << 64) - 1


def find_member(group: h5py.Group, name: str) -> h5py.Group | h5py.Dataset | None:
    """Find the member `name`, perhaps in groups below each other.

    Raises:
        ValueError: a link is on the way, which may lead into another file. OSError and others: of h5py.
    """
    found: Any = group
    for part in filter(None, name.split("/")):
        if part in (".", "..") or not isinstance(found, h5py.Group):
            return None
        key, links = part.encode(errors="surrogateescape"), found.id.links
        if not links.exists(key):
            return None
        if links.get_info(key).type != h5py.h5l.TYPE_HARD:
            raise ValueError(f"{part} is a link")
        found = found[key]
    return found


def read_dataset(file: h5py.File, member: object, name: str) -> Any:
    """Read a member of a file: numbers, or strings, also such as h5py makes of Python's.

    Raises:
        ValueError: it holds something else, or the file does not hold what it announces.
    """
    if isinstance(member, h5py.Dataset) and h5py.check_string_dtype(member.dtype) and member.dtype.hasobject:
        strings = read_strings(file, member, name)
        return strings if member.ndim else strings[0]
    return check_dataset(member, name)[()]


def check_dataset(member: object, name: str, row: bool = False) -> h5py.Dataset:
    """Return a member of a file that is an array of numbers, or of strings of one length, of which an image's
    part may be read: all of it, or a `row`.

    Raises:
        ValueError: it is not, or the file does not hold what it announces.
    """
    if not isinstance(member, h5py.Dataset):
        raise ValueError(f"{name} is no dataset")
    dtype, shape = member.dtype, member.shape
    if dtype.kind not in "biufS" or shape is None or len(shape) > 4:
        raise ValueError(f"{name} is an array of {dtype}")
    # what lies in one piece has an offset in this file, and the library knows the size of the piece
    if member.id.get_offset() is None:
        check_storage(member, name)
    if math.prod(shape[1:] if row else shape) * dtype.itemsize > MAX_BYTES:
        raise ValueError(f"{name} has more than {MAX_BYTES:,} bytes")
    return member


def check_storage(dataset: h5py.Dataset, name: str) -> None:
    """Raise ValueError where a dataset lies in other files, takes a filter that is a program of its own, or
    has more values than what is stored of it could hold."""
    properties = dataset.id.get_create_plist()
    if properties.get_layout() not in LAYOUTS or properties.get_external_count():
        raise ValueError(f"{name} lies in other files")
    filters = {properties.get_filter(i)[0] for i in range(properties.get_nfilters())}
    if filters - FILTERS:
        raise ValueError(f"{name} takes filters that are not read: {sorted(filters - FILTERS)}")
    size = dataset.dtype.itemsize
    if dataset.chunks and math.prod(dataset.chunks) * size > MAX_CHUNK:
        raise ValueError(f"{name} has chunks of more than {MAX_CHUNK:,} bytes")
    if (stored := dataset.id.get_storage_size()) * MAX_RATIO < math.prod(dataset.shape) * size:
        raise ValueError(f"{name} of {dataset.shape} has {stored:,} bytes stored")


def check_flat(file: h5py.File) -> tuple[str, list[str]]:
    """Look at the arrays over all images of a file of M3P's. Return (the name of its boxes, the images' ids).

    Raises:
        ValueError: one is missing, of another kind, or they do not fit each other. OSError, others: of h5py.
    """
    members = {
        name: find_member(file, name) for name in ("image_id", "features", "bbox", "boxes", "wh", "num_boxes")
    }
    boxes = "boxes" if members["bbox"] is None else "bbox"
    missing = [name for name in ("features", boxes, "wh") if members[name] is None]
    if missing:
        raise ValueError(f"no {', '.join(missing)}; it has {', '.join(sorted(file))}")
    ids = _read_ids(file, members["image_id"])
    shapes = {
        name: check_dataset(members[name], name, row=True).shape
        for name in ("features", boxes, "wh", "num_boxes")
        if members[name] is not None
    }
    if any(shape[:1] != (len(ids),) for shape in shapes.values()):
        raise ValueError(f"{len(ids)} values of image_id, but other datasets have more or fewer rows")
    regions = shapes["features"][1:2]
    if len(shapes["features"]) != 3 or (shapes[boxes][1:], shapes["wh"][1:]) != ((*regions, 4), (2,)):
        raise ValueError(f"arrays of {', '.join(f'{name} {shape}' for name, shape in shapes.items())}")
    return boxes, ids


def _read_ids(file: h5py.File, dataset: h5py.Dataset) -> list[str]:
    if dataset.dtype.hasobject:
        return [name.decode() for name in read_strings(file, dataset, "image_id")]
    if dataset.dtype.kind not in "Siu" or dataset.ndim != 1:
        raise ValueError(f"image_id is an array of {dataset.dtype} {dataset.shape}")
    check_storage(dataset, "image_id")
    return [name.decode() if isinstance(name, bytes) else str(name) for name in dataset[()].tolist()]


def read_strings(file: h5py.File, dataset: h5py.Dataset, name: str) -> list[bytes]:
    """Read strings that have lengths of their own.

    Raises:
        ValueError: they are none, or lie in the file in another way than h5py writes them.
    """
    check_storage(dataset, name)
    properties = file.id.get_create_plist()
    if dataset.ndim > 1 or properties.get_sizes() != (8, 8) or properties.get_userblock():
        raise ValueError(f"{name} is stored in another way than h5py does")
    content, count = FileBytes(file.filename), dataset.size
    references = np.frombuffer(b"".join(_read_references(dataset, content, name)), REFERENCE)[:count]
    if len(references) < count:
        raise ValueError(f"{name} is not stored whole")
    blocks: dict[int, dict[int, bytes]] = {}
    room, strings = len(content), []
    for length, address, index in references.tolist():
        if not length or address in (0, NOWHERE):
            strings.append(b"")
            continue
        if address not in blocks:
            blocks[address], size = _read_block(content, address)
            room -= size
            if room < 0:
                raise ValueError("blocks of strings in each other")
        item = blocks[address].get(index)
        if item is None or len(item) < length:
            raise ValueError(f"a string of {length:,} bytes that is not in its block")
        strings.append(item[:length])
    return strings


def _read_references(dataset: h5py.Dataset, content: FileBytes, name: str) -> list[bytes]:
    """The bytes of a dataset as they are stored."""
    if dataset.chunks is None:
        offset = dataset.id.get_offset()
        places = [] if offset is None else [(offset, dataset.size * REFERENCE.itemsize, 0)]
    else:
        chunks: list[Any] = []
        dataset.id.chunk_iter(chunks.append)
        chunks.sort(key=lambda chunk: chunk.chunk_offset)
        starts = range(0, len(dataset), dataset.chunks[0])
        if len(chunks) != len(starts) or any(
            chunk.chunk_offset != (start,) for chunk, start in zip(chunks, starts, strict=True)
        ):
            raise ValueError(f"{name} is not stored whole")
        places = [(chunk.byte_offset, chunk.size, chunk.filter_mask) for chunk in chunks]
    if any(offset + size > len(content) for offset, size, _ in places):
        raise ValueError(f"{name} lies beyond the file's end")
    return [_undo_filters(dataset, content.read(size, offset), mask) for offset, size, mask in places]


def _undo_filters(dataset: h5py.Dataset, data: bytes, mask: int) -> bytes:
    """A chunk out of what is stored of it. mask: a bit for each filter that it did not go through, as one
    that would not become smaller."""
    properties = dataset.id.get_create_plist()
    for i in reversed(range(properties.get_nfilters())):
        if mask >> i & 1:
            continue
        kind = properties.get_filter(i)[0]
        if kind == h5py.h5z.FILTER_DEFLATE:
            data = zlib.decompressobj().decompress(data, dataset.chunks[0] * REFERENCE.itemsize)
        elif kind == h5py.h5z.FILTER_SHUFFLE:
            data = np.frombuffer(data, np.uint8).reshape(REFERENCE.itemsize, -1).T.tobytes()
        else:
            raise ValueError("strings that are compressed in another way than gzip's")
    return data


def _read_block(content: FileBytes, address: int) -> tuple[dict[int, bytes], int]:
    """Return ({number: string} of a block of strings, the block's bytes)."""
    magic, version, size = BLOCK.unpack(content[address : address + BLOCK.size].ljust(BLOCK.size))
    if magic != b"GCOL" or version != 1 or not BLOCK.size <= size <= len(content) - address:
        raise ValueError(f"no block of strings at byte {address:,}")
    data, place, items = content.read(size, address), BLOCK.size, dict[int, bytes]()
    while place + ITEM.size <= size:
        index, _, length = ITEM.unpack_from(data, place)
        if not index:  # the room behind the last
            break
        place += ITEM.size
        items[index] = data[place : place + length]
        place += -(-length // 8) * 8
    return items, size
