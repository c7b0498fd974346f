"""Images before they are decoded: of which kind the bytes are, how many pixels they announce, and whether
their structure is whole. A decoder believes them: it makes room for all pixels that are announced, runs
through a hundred thousand scans of a JPEG, and makes gray pixels where one breaks off."""

import re
from collections.abc import Callable
from struct import Struct
from struct import error as StructError
from zlib import crc32

import numpy as np

from raylib.file_kinds import LFS_POINTER, WEB_PAGE

# As Pillow, which warns there: a quarter of a GiB as RGB
MAX_PIXELS = 89_478_485
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


def check_image(data: bytes) -> None:
    """Raise ValueError, which says why, where `data` are no whole image of a kind that is read, or one of too
    many pixels."""
    for magic, offset, size_of in IMAGE_KINDS:
        if data.startswith(magic, offset):
            try:
                width, height = size_of(data)
            except (StructError, IndexError):
                raise ValueError(f"{len(data)} bytes: it is cut off") from None
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width} x {height} pixels, of which {MAX_PIXELS:,} may be")
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
