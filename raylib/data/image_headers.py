"""Images before they are decoded: of which kind the bytes are, how many pixels they announce, whether their
structure is whole, and which way is up. A decoder believes them: it makes room for all pixels that are
announced, runs through a hundred thousand scans of a JPEG, and makes gray pixels where one breaks off."""

import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from struct import Struct
from struct import error as StructError
from zlib import crc32

import numpy as np

from raylib.file_kinds import LFS_POINTER, WEB_PAGE
from raylib.settings import MAX_PIXELS

MAX_BYTES = 1 << 28  # of an image's file
MAX_CHUNKS = 100_000  # of a PNG; writers make them of 8 KB and more
MAX_SCANS = 100  # of a progressive JPEG, which have ten
MARKER = re.compile(rb"\xff+[^\x00\xff]")
# without a length of their own: restarts, the image's beginning and end
BARE = frozenset(range(0xD0, 0xDA))
FRAMES, SEQUENTIAL = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}), frozenset((0xC0, 0xC1))
# what may stand between a JPEG's scans: tables, restart intervals, numbers of lines, comments
BETWEEN = frozenset((0xC4, 0xCC, 0xDA, 0xDB, 0xDC, 0xDD, 0xFE, *range(0xE0, 0xF0), *range(0xD0, 0xD8)))
SOS, EOI = 0xDA, 0xD9
UINT16, UINT32, FRAME = Struct(">H"), Struct(">I"), Struct(">HHB")
BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)  # bytes


def check_image(data: bytes, max_pixels: int = MAX_PIXELS) -> None:
    """Raise ValueError, which says why, where `data` are no whole image of a kind that is read, or one of
    more than `max_pixels`."""
    for magic, offset, size_of in IMAGE_KINDS:
        if data.startswith(magic, offset):
            try:
                width, height = size_of(data)
            except (StructError, IndexError):
                raise ValueError(f"{len(data)} bytes: it is cut off") from None
            if width * height > max_pixels:
                raise ValueError(f"{width} x {height} pixels, of which {max_pixels:,} may be (max_pixels)")
            return
    if not data:
        raise ValueError("an empty file")
    if data.startswith(LFS_POINTER):
        raise ValueError("a git-lfs pointer, not the image itself: git lfs pull")
    if WEB_PAGE.match(data[:4096]):
        raise ValueError("a web page, such as a server sends in place of a file")
    if data[:4] in (b"II*\0", b"MM\0*"):
        raise ValueError("a TIFF, of which nobody sees that it is damaged: make it a PNG")
    raise ValueError(f"{len(data)} bytes that are no JPEG, PNG, WebP, GIF, BMP or AVIF")


def _size_of_jpeg(data: bytes) -> tuple[int, int]:
    place, size, channels = 2, (0, 0), 0
    while (marker := data[place + 1]) != SOS:
        if data[place] != 0xFF:
            raise ValueError(f"a JPEG without a marker at byte {place:,}")
        if marker == 0xFF:  # fills up
            place += 1
            continue
        if marker == EOI:
            raise ValueError("a JPEG without pixels")
        if marker in FRAMES:
            height, width, channels = FRAME.unpack_from(data, place + 5)
            size, channels = (width, height), channels if marker in SEQUENTIAL else 0
        place += 2 if marker in BARE else 2 + UINT16.unpack_from(data, place + 2)[0]
    # in the pixels' data a byte 0xff is followed by a zero, but for markers: most images have the end's alone
    codes = np.frombuffer(data, np.uint8, offset=place + 2)
    if np.count_nonzero(codes[np.flatnonzero(codes[:-1] == 0xFF) + 1]) != 1 or data[-2:] != b"\xff\xd9":
        _check_scans(data, place, channels)
    return size


def _check_scans(data: bytes, place: int, channels: int) -> None:
    """Raise ValueError where a JPEG's end does not follow on its scans, of which the first begins at `place`.
    channels: of the image, each of which is in one scan; 0: of a progressive one, where it is in many."""
    left = channels or MAX_SCANS
    while found := MARKER.search(data, place):
        marker, place = data[found.end() - 1], found.end()
        if marker == EOI:
            return
        if marker not in BETWEEN:
            raise ValueError(f"a JPEG with a marker {marker:#x} in its pixels")
        if marker == SOS:
            left -= data[place + 2] if channels else 1
            if left < 0:
                raise ValueError("a JPEG of more scans than it may have")
        if marker not in BARE:
            place += UINT16.unpack_from(data, place)[0]
    raise ValueError("a JPEG without its end: it is cut off")


def _size_of_png(data: bytes) -> tuple[int, int]:
    """Follow its chunks to the end: where one breaks off or is damaged, libpng would print lines of its
    own."""
    place, view = 8, memoryview(data)
    for _ in range(MAX_CHUNKS):
        end = place + 12 + UINT32.unpack_from(data, place)[0]
        kind = data[place + 4 : place + 8]
        if end > len(data):
            raise ValueError(f"{len(data)} bytes: it is cut off")
        # those without which there is no image begin with a capital letter
        if kind[:1].isupper() and crc32(view[place + 4 : end - 4]) != UINT32.unpack_from(data, end - 4)[0]:
            raise ValueError(
                f"a PNG whose part {kind!a:.20} at byte {place:,} is damaged: its checksum differs"
            )
        if kind == b"IEND":
            return UINT32.unpack_from(data, 16)[0], UINT32.unpack_from(data, 20)[0]
        place = end
    raise ValueError(f"a PNG of more than {MAX_CHUNKS:,} parts")


def _size_of_webp(data: bytes) -> tuple[int, int]:
    if data[8:12] != b"WEBP":
        raise ValueError("a RIFF file that is no WebP")
    size = int.from_bytes(data[4:8], "little") + 8
    if len(data) < size:  # what some servers and editors append is not looked at, as no decoder does
        raise ValueError(f"a WebP of {size:,} bytes in {len(data):,}: it is cut off")
    if data[12:16] == b"VP8X":
        width, height = (int.from_bytes(data[place : place + 3], "little") + 1 for place in (24, 27))
    elif data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (int.from_bytes(data[place : place + 2], "little") & 0x3FFF for place in (26, 28))
    return width, height


def _size_of_gif(data: bytes) -> tuple[int, int]:
    return int.from_bytes(data[6:8], "little"), int.from_bytes(data[8:10], "little")


def _size_of_bmp(data: bytes) -> tuple[int, int]:
    if (header := int.from_bytes(data[14:18], "little")) not in BMP_HEADERS:
        raise ValueError(f"a BMP with a header of {header:,} bytes")
    if header == 12:  # OS/2's
        return int.from_bytes(data[18:20], "little"), int.from_bytes(data[20:22], "little")
    # a negative height: from top to bottom
    width, height = (int.from_bytes(data[place : place + 4], "little", signed=True) for place in (18, 22))
    return width, abs(height)


def _size_of_avif(data: bytes) -> tuple[int, int]:
    """The largest of those that it announces, for parts of the image."""
    if data[8:12] not in (b"avif", b"avis", b"mif1"):
        raise ValueError("a file of ISO's media that is no AVIF")
    sizes = [(0, 0)]
    place = data.find(b"ispe")
    while 0 <= place < len(data) - 15:
        sizes.append((UINT32.unpack_from(data, place + 8)[0], UINT32.unpack_from(data, place + 12)[0]))
        place = data.find(b"ispe", place + 4)
    return max(sizes, key=lambda size: size[0] * size[1])


IMAGE_KINDS: tuple[tuple[bytes, int, Callable[[bytes], tuple[int, int]]], ...] = (
    (b"\xff\xd8\xff", 0, _size_of_jpeg),
    (b"\x89PNG\r\n\x1a\n", 0, _size_of_png),
    (b"RIFF", 0, _size_of_webp),
    (b"GIF87a", 0, _size_of_gif),
    (b"GIF89a", 0, _size_of_gif),
    (b"BM", 0, _size_of_bmp),
    (b"ftyp", 4, _size_of_avif),
)


# ---- which way is up

ORIENTATION = 0x112  # EXIF's tag, from 1 (upright) to 8
# types of EXIF's values that are whole numbers; bytes without a sign are text to Pillow
INTEGERS = {3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}
XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=[\"']|>)([1-8])")
RAW_PROFILE, PNG_XMP = b"Raw profile type exif", b"XML:com.adobe.xmp"
JPEG_XMP = b"http://ns.adobe.com/xap/1.0/\0"
MAX_METADATA = 1 << 20  # bytes of a compressed text
# an AVIF's quarter turns to the left, and how it is mirrored then: not, top to bottom, left to right
AVIF_ORIENTATIONS = ((1, 4, 2), (8, 5, 7), (3, 2, 4), (6, 7, 5))


def read_orientation(data: bytes) -> int:
    """EXIF's orientation of an image that `check_image` lets pass: 1 (upright) to 8, as Pillow's
    `ImageOps.exif_transpose` finds it: EXIF first, then XMP; an AVIF's is the turn and mirror of its own
    boxes. What is damaged, or missing, is 1."""
    with suppress(StructError, IndexError, ValueError, zlib.error):
        if data.startswith(b"ftyp", 4):
            return _orientation_of_avif(data)
        exif, xmp = b"", b""
        for is_exif, value in _metadata(data):
            if is_exif:
                exif = exif or value
            else:
                xmp = xmp or value
        with suppress(StructError):
            if found := _exif_orientation(exif):
                return found
        if match := XMP_ORIENTATION.search(xmp):
            return int(match[1])
    return 1


def _metadata(data: bytes) -> Iterator[tuple[bool, bytes]]:
    """(is it EXIF and not XMP, the value) of an image's metadata."""
    if data.startswith(b"\xff\xd8"):
        yield from _metadata_of_jpeg(data)
    elif data.startswith(b"\x89PNG"):
        # to look through thousands of chunks costs more than to search them
        if any(name in data for name in (b"eXIf", RAW_PROFILE, PNG_XMP)):
            yield from _metadata_of_png(data)
    elif data.startswith(b"RIFF") and data[12:16] == b"VP8X":
        place, end = 12, 8 + int.from_bytes(data[4:8], "little")
        while place < end - 8:
            kind, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
            if kind in (b"EXIF", b"XMP "):
                yield kind == b"EXIF", data[place + 8 : place + 8 + size]
            place += 8 + size + size % 2


def _metadata_of_jpeg(data: bytes) -> Iterator[tuple[bool, bytes]]:
    place = 2
    while (marker := data[place + 1]) != SOS:
        if marker == 0xFF:
            place += 1
            continue
        size = 0 if marker in BARE else UINT16.unpack_from(data, place + 2)[0]
        if marker == 0xE1:
            content = data[place + 4 : place + 2 + size]
            if content.startswith(b"Exif\0\0"):
                yield True, content
            elif content.startswith(JPEG_XMP):
                yield False, content
        place += 2 + size


def _metadata_of_png(data: bytes) -> Iterator[tuple[bool, bytes]]:
    place, profile = 8, b""
    while (kind := data[place + 4 : place + 8]) != b"IEND":
        size = UINT32.unpack_from(data, place)[0]
        content = data[place + 8 : place + 8 + size]
        if kind == b"eXIf":
            yield True, content
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            keyword, _, text = content.partition(b"\0")
            if kind == b"iTXt":  # two flags, then a language and a translated keyword
                is_compressed, text = text[:1] == b"\1", text[2:].split(b"\0", 2)[2]
            else:
                is_compressed, text = kind == b"zTXt", text[kind == b"zTXt" :]
            if is_compressed and keyword in (RAW_PROFILE, PNG_XMP):
                text = zlib.decompressobj().decompress(text, MAX_METADATA)
            if keyword == PNG_XMP:
                yield False, text
            elif keyword == RAW_PROFILE:  # ImageMagick's: a name and a length, then numbers in hex
                profile = bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode())
        place += 12 + size
    yield True, profile  # an eXIf comes before it


def _exif_orientation(exif: bytes) -> int | None:
    """Orientation of a block of EXIF, None where it has none, or none that there is."""
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    if not exif:
        return None
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return None
    (place,) = Struct(f"{order}I").unpack_from(exif, 4)
    (count,) = Struct(f"{order}H").unpack_from(exif, place)
    for entry in range(place + 2, place + 2 + 12 * count, 12):
        tag, kind, number = Struct(f"{order}HHI").unpack_from(exif, entry)
        if tag == ORIENTATION and kind in INTEGERS and number:
            (value,) = Struct(order + INTEGERS[kind]).unpack_from(exif, entry + 8)
            return value if 1 <= value <= 8 else 1
    return None


def _boxes(data: bytes, place: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(kind, first byte of the content, end) of the boxes of an AVIF between two places."""
    while place < end - 8:
        size, start = UINT32.unpack_from(data, place)[0], place + 8
        if size == 1:
            size, start = int.from_bytes(data[place + 8 : place + 16], "big"), place + 16
        stop = min(place + size, end) if size else end
        if stop < start:
            raise ValueError(f"a box of {size} bytes at byte {place:,}")
        yield data[place + 4 : place + 8], start, stop
        place = stop


def _orientation_of_avif(data: bytes) -> int:
    """Follow the main image's boxes `irot` and `imir`."""
    meta = next(((start, end) for kind, start, end in _boxes(data, 0, len(data)) if kind == b"meta"), None)
    if meta is None:
        return 1
    inside = {kind: (start, end) for kind, start, end in _boxes(data, meta[0] + 4, meta[1])}
    main, _ = inside.get(b"pitm", (0, 0))
    if not main or b"iprp" not in inside:
        return 1
    item = int.from_bytes(data[main + 4 : main + (8 if data[main] else 6)], "big")
    found = {kind: (start, end) for kind, start, end in _boxes(data, *inside[b"iprp"])}
    properties = [(kind, data[start]) for kind, start, _ in _boxes(data, *found[b"ipco"])]
    turns, mirror = 0, 0
    for number in _avif_properties(data, found[b"ipma"][0], item):
        kind, value = properties[number - 1] if number else (b"", 0)
        if kind == b"irot":
            turns = value & 3
        elif kind == b"imir":
            mirror = 1 + (value & 1)
    return AVIF_ORIENTATIONS[turns][mirror]


def _avif_properties(data: bytes, place: int, item: int) -> list[int]:
    """Numbers, from 1, of the properties that the box `ipma` at `place` gives an item."""
    id_size, size = (4 if data[place] else 2), (2 if data[place + 3] & 1 else 1)
    (count,), place = UINT32.unpack_from(data, place + 4), place + 8
    for _ in range(count):
        number, many = int.from_bytes(data[place : place + id_size], "big"), data[place + id_size]
        place += id_size + 1
        if number == item:
            ends = range(place, place + many * size, size)
            # the highest bit says that a reader must know the property
            return [int.from_bytes(data[i : i + size], "big") & (0x7FFF if size == 2 else 0x7F) for i in ends]
        place += many * size
    return []


def read_avif_depth(data: bytes) -> int:
    """Bits of a colour of an AVIF, 8, 10 or 12."""
    place = data.find(b"av1C")
    bits = data[place + 6] if 0 <= place < len(data) - 6 else 0
    return (12 if bits & 0x20 else 10) if bits & 0x40 else 8
