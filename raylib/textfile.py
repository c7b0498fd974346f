"""Text files from outside, as they are, out of .gz and .xz, and the one JSON file of a .zip; JSON in them is
read as a stream. What is made to fill the memory is refused.

A few kilobytes may decompress to terabytes. Sizes that a file tells of itself are not believed: what comes
out is counted, and set beside the bytes that lie on the disk. Published annotations and corpora are 3 to 30
times as large as their .gz, .zip or .xz; JSON that repeats one record comes to 100 to 200 times. DEFLATE
reaches 1,032 times, LZMA 7,000.
"""

import codecs
import gzip
import io
import lzma
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, TextIO

import ijson
import numpy as np

from raylib.errors import UserError, error_line, reading, unreadable
from raylib.file_kinds import HEAD, LFS_POINTER, WEB_PAGE
from raylib.fileio import open_plain
from raylib.strict_json import DEPTH

RATIO, FLOOR = 250, 1 << 28  # times the file's size, and bytes that are no bomb at any ratio
LINE = 1 << 26  # bytes of the longest line, and of the longest string in a stream of JSON
ITEM = 1 << 28  # bytes of the largest item of such a stream
BUFFER = 1 << 17
CHUNK = 1 << 14  # bytes of JSON read at a time: of more, the parser is a tenth slower
PACKED = {".gz": "gzip", ".xz": "xz", ".zip": "a zip of one JSON file"}
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
# of the escapes in JSON, those of half a surrogate pair are group 1
ESCAPES = re.compile(
    rb"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|u(?![dD][89a-fA-F])|[^u]|(u[dD][89a-fA-F]))", re.DOTALL
)
NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
BEGINNING = object()


@contextmanager
def open_bytes(
    path: Path, is_text: bool = False, has_lines: bool = False
) -> "Iterator[tuple[io.BufferedReader[_Counted], BinaryIO]]":
    """Yield (the content of a file, the file that lies on the disk); .gz, .xz and .zip are decompressed. Only
    seek(0) works on the content.

    Args:
        is_text: a zero byte in it is an error, as in UTF-16 and in what no download has filled.
        has_lines: a line longer than `LINE` bytes is one.
    Raises:
        UserError: found wrong with the file now or while it is read: no such file; not to be decompressed; a
            .zip that holds no JSON file, or several; a bomb.
        MachineError: its disk fails.
    """
    with ExitStack() as stack:
        try:
            # of /dev, what a shell writes: <(COMMAND), /dev/stdin
            stored = stack.enter_context(open_plain(path, may_wait=path.is_relative_to("/dev")))
            packed: IO[bytes] | gzip.GzipFile | lzma.LZMAFile = stored
            if path.suffix in PACKED:
                packed = _unpack(path, stored)
                stack.push(packed)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except ValueError as e:
            raise UserError(f"{path}: {e}; give a file") from None
        except OSError as e:
            raise error_line(e, path) or e from None
        counted = _Counted(path, packed, os.fstat(stored.fileno()).st_size, is_text, has_lines)
        content = io.BufferedReader(counted, BUFFER)
        head = content.peek(HEAD)[:HEAD]
        if head.startswith(LFS_POINTER) or WEB_PAGE.match(head):
            raise unreadable(path, "text", "download it again", ValueError("a web page"))
        yield content, stored


def _unpack(path: Path, stored: BinaryIO) -> gzip.GzipFile | lzma.LZMAFile | IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(stored)
    if path.suffix == ".xz":
        return lzma.open(stored)
    with reading(path, PACKED[".zip"]), zipfile.ZipFile(stored) as archive:
        # what macOS adds, `__MACOSX/._NAME`, is no member; nor is what would lie outside, `../NAME`
        members = [
            name
            for name in archive.namelist()
            if name.lower().endswith((".json", ".jsonl"))
            and not any(part == "__MACOSX" or part.startswith(".") for part in PurePosixPath(name).parts)
        ]
        if len(members) != 1:
            found = (
                f"{len(members)} JSON files ({', '.join(map(ascii, members[:4]))})"
                if members
                else "no JSON file"
            )
            raise UserError(f"{path}: {found} in it; one is wanted: unzip it beside, or leave one in")
        return archive.open(members[0])  # a member that is open keeps the archive open


@contextmanager
def open_text(path: Path, has_lines: bool = False) -> Iterator[TextIO]:
    """Open a UTF-8 text file, with or without a byte order mark; what ends in .gz or .xz is decompressed, of
    a .zip its one JSON file is read as it lies.

    has_lines: a line without end is refused; JSON may be one line, however long.

    Raises:
        UserError: found wrong with the file now or while it is read: no such file, not UTF-8 (or with zero
            bytes in it), not to be decompressed, a bomb.
    """
    with open_bytes(path, is_text=True, has_lines=has_lines) as (content, _):
        try:
            yield io.TextIOWrapper(content, encoding="utf-8-sig")
        except UnicodeDecodeError as e:
            raise unreadable(path, "text", "take an undamaged copy, or convert it to UTF-8", e) from None


def stream_json(path: Path, file: BinaryIO, member: str | None = None) -> Iterator[tuple[str, Any]]:
    """Yield (key, or place in the array; value) of each member of the JSON object or array in `file`, in
    memory that does not grow with it. `member`: of the array that has this name in the object; "": of an
    array alone.

    Raises:
        UserError: neither an object nor an array, no such array, or broken JSON, too deep, or an item too
            large; names `path`, and after which member.
    """
    reader, name = _JsonBytes(path, file, member or ""), "item"
    key: Any = BEGINNING  # of the last member; not yet in words, which would take a tenth of the time
    if reader.first not in ((b"[",) if member == "" else (b"{", b"[")):
        error = ValueError("no list" if member == "" else "no object or list")
        raise unreadable(path, "JSON", "take an undamaged copy", error)
    try:
        options = {"use_float": True, "buf_size": CHUNK}
        if reader.first == b"{" and member is None:
            members, name = ijson.kvitems(reader, "", **options), "key"
        else:
            members = enumerate(ijson.items(reader, f"{member}.item" if member else "item", **options))
        for key, value in members:
            reader.size = reader.depth = 0  # count from here
            yield str(key), value
        if member and (key is BEGINNING or reader.mentions > 1):
            # no such array, or an empty one; or two, of which no two readers need take the same
            file.seek(0)
            events = ijson.parse(_JsonBytes(path, file), buf_size=CHUNK)
            found = sum((prefix, event) == (member, "start_array") for prefix, event, _ in events)
            if found != 1:
                raise UserError(f"{path}: {'two lists' if found else 'no list'} '{member}'; wanted one")
    except (ijson.JSONError, UnicodeDecodeError) as e:  # the latter of half a surrogate pair in UTF-8
        # a byte string's words, where the text is no UTF-8
        last = "the beginning" if key is BEGINNING else f"{name} {key!r:.80}"
        reason = str(e).removeprefix("b'").partition("\n")[0]
        raise UserError(f"{path}: broken JSON after {last}: {reason}; take an undamaged copy") from None


class _JsonBytes:
    """JSON for the parser, whose memory grows with the square of the depth, and with the longest string."""

    def __init__(self, path: Path, file: BinaryIO, member: str = ""):
        self.path, self.file = path, file
        self.largest = None if member else ITEM  # of an item: before the list, anything may stand
        self.key, self.mentions, self.tail = f'"{member}"'.encode(), 0, b""
        self.size = self.unquoted = self.depth = 0  # since the last item; without a quotation mark; now
        self.in_string = False
        self.head = file.read(CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()
        while not self.head and (data := file.read(CHUNK)):
            self.head = data.lstrip()
        self.first = self.head[:1]

    def read(self, size: int) -> bytes:
        if not size:  # ijson asks so for bytes or text
            return b""
        data, self.head = self.head or self.file.read(size), b""
        while b"\\" in data[-12:] and (more := self.file.read(12)):  # no escape is cut in two
            data += more
        self._check_size(data)
        has_quotes, has_surrogates = _find_escapes(data)
        self._check_depth(data.replace(rb"\\", b"").replace(rb"\"", b"") if has_quotes else data)
        # the parser would make a "?" of it
        if has_surrogates and any(found[1] for found in ESCAPES.finditer(data)):
            raise UserError(f"{self.path}: half a surrogate pair (\\ud800 to \\udfff) in its JSON; mend it")
        if self.largest is None:
            self.mentions += (self.tail + data).count(self.key)
            self.tail = data[-len(self.key) + 1 :]
        return data

    def _check_size(self, data: bytes) -> None:
        self.size += len(data)
        self.unquoted = 0 if b'"' in data else self.unquoted + len(data)
        if self.unquoted > LINE or (self.largest and self.size > self.largest):
            raise UserError(
                f"{self.path}: JSON with a string or an item of more than {LINE >> 20} or {ITEM >> 20} MiB; "
                "wanted a list, or an object, of many small ones"
            )

    def _check_depth(self, data: bytes) -> None:
        """Follow the brackets. `data` has no quotation marks within strings."""
        brackets, rounds = _unmatched(data.translate(None, NO_BRACKETS))
        if max(self.depth + len(brackets.lstrip(b"]}")), rounds) > DEPTH:
            # brackets in strings do not count: what is between every second pair of quotation marks
            outside = (b'"' if self.in_string else b"") + data
            brackets, rounds = _unmatched(b"".join(outside.split(b'"')[::2]).translate(None, NO_BRACKETS))
        opened = len(brackets.lstrip(b"]}"))
        # as long as it was small, brackets in strings that have no partner may have counted
        if max(self.depth + opened, rounds) > 2 * DEPTH:
            raise UserError(
                f"{self.path}: JSON of more than {DEPTH} arrays and objects in one another; wanted a "
                "list, or an object, of records"
            )
        self.depth = max(0, self.depth - len(brackets) + opened) + opened
        self.in_string ^= np.count_nonzero(np.frombuffer(data, np.uint8) == ord('"')) % 2 == 1


def _find_escapes(data: bytes) -> tuple[bool, bool]:
    """(whether there may be an escaped quotation mark or backslash, whether there may be half a surrogate
    pair). By array: a file in ASCII is full of other escapes, at each of which an expression would stop."""
    if b"\\" not in data:
        return False, False
    codes = np.frombuffer(data + b"   ", np.uint8)  # the last escape may be cut off
    places = np.flatnonzero(codes == ord("\\"))
    is_unicode = codes[places + 1] == ord("u")
    digits = places[is_unicode & (codes[places + 2] | 32 == ord("d"))] + 3
    return not is_unicode.all(), bool((codes[digits] >= ord("8")).any())


def _unmatched(brackets: bytes) -> tuple[bytes, int]:
    """(the brackets without those that close one another: closing ones, then opening ones; how deep those
    were)."""
    rounds, before = 0, -1
    while len(brackets) != before and rounds <= 2 * DEPTH:
        before, rounds = len(brackets), rounds + 1
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
    return brackets, rounds


class _Counted(io.RawIOBase):
    """The content of a file as it is read, counted."""

    def __init__(self, path: Path, file: Any, size: int, is_text: bool, has_lines: bool):
        self.path, self.file, self.is_text, self.has_lines = path, file, is_text, has_lines
        self.is_packed = path.suffix in PACKED
        self.most = max(FLOOR, RATIO * size)
        self.total = self.line = 0  # bytes so far, and since the last newline

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.total

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if (offset, whence) == (0, os.SEEK_CUR):
            return self.total
        if (offset, whence) != (0, os.SEEK_SET):
            raise io.UnsupportedOperation("only to the beginning")
        self.file.seek(0)
        self.total = self.line = 0
        return 0

    def readinto(self, buffer) -> int:  # type: ignore[override]
        if self.is_packed:
            with reading(self.path, PACKED[self.path.suffix]):
                count = self.file.readinto(buffer)
        else:
            try:
                count = self.file.readinto(buffer)
            except OSError as e:
                raise error_line(e, self.path) or e from None
        if self.is_packed and self.total + count > self.most:
            raise UserError(
                f"{self.path}: more than {RATIO} times its size comes out of it, {self.total / 1e6:,.0f} MB "
                "so far: a decompression bomb; if it is none, decompress it beside"
            )
        data = bytes(memoryview(buffer)[:count])
        if self.is_text and (zero := data.find(0)) >= 0:
            self._refuse_zero(data, zero)
        if self.has_lines:
            newline = data.rfind(b"\n")
            self.line = count - newline - 1 if newline >= 0 else self.line + count
            if self.line > LINE:
                raise UserError(
                    f"{self.path}: a line of more than {LINE >> 20} MiB before byte {self.total + count:,}; "
                    "wanted a record a line"
                )
        self.total += count
        return count

    def _refuse_zero(self, data: bytes, zero: int) -> None:
        if not self.total and data.startswith(UTF_16):
            raise UserError(
                f"{self.path}: not to be read as text (UTF-16); convert it: iconv -f UTF-16 -t UTF-8 FILE"
            )
        with reading(self.path, "text"):
            raise ValueError(f"byte {self.total + zero:,} is zero")
