"""Values of an LMDB by their keys, read page by page. The library maps the file and believes what it finds:
in one that is damaged or cut off it ends the process (SIGBUS, SIGSEGV, an assertion), or does not end at all.

A data.mdb is a row of pages of one size, of the machine that wrote it: here little endian, with 64-bit
numbers. Pages 0 and 1 are its heads, of which the one of the later transaction counts. It names the root of a
tree: branch pages with keys and the pages below them, leaf pages with keys and values, in the order of keys.
Values larger than half a page lie in pages of their own.
"""

from bisect import bisect_right
from pathlib import Path
from struct import Struct
from struct import error as StructError
from typing import NamedTuple

from raylib.data.images import BadImage
from raylib.data.index import FileBytes
from raylib.errors import UserError, reading

PAGE = Struct("<QHHHH")  # number, -, kind, end of its nodes' places, -
BRANCH, LEAF, OVERFLOW, META = 1, 2, 4, 8  # kinds of pages
PAGES = Struct("<12xI")  # of an overflow page: how many it and those behind it are
# A head: its kind; magic number, version; of the tree of free pages the size of pages, of the other its flags
# and root; the last page, the transaction
HEAD = Struct("<10xH4x II16x I44x 4xH34xQ QQ")
MAGIC, VERSION = 0xBEEFC0DE, 1
NODE = Struct(
    "<HHHH"
)  # size of its value, or page below, in two parts; flags, or a third part; size of its key
PLACE, NUMBER = Struct("<H"), Struct("<Q")
IN_PAGES = 1  # flag of a value in pages of its own; others are of values that are trees
NO_ROOT = (1 << 64) - 1
MAX_DEPTH = 32


class Head(NamedTuple):
    """The content of page 0 or 1, about the file."""

    kind: int
    magic: int
    version: int
    page_size: int
    flags: int
    root: int
    last_page: int
    transaction: int


class LmdbPages:
    """The values in a data.mdb, for any thread and any forked process.

    Raises:
        UserError: no LMDB, one of another kind, or cut off.
    """

    def __init__(self, path: Path):
        self.path = path
        with reading(path, "an LMDB (data.mdb)", "copy it anew"):
            self.file = FileBytes(path)
            first = self._read_head(0)
            head = max(first, self._read_head(first.page_size), key=lambda head: head.transaction)
            self.page_size, self.root, self.num_pages = head.page_size, head.root, head.last_page + 1
            if head.flags:
                raise ValueError(f"its keys or values are of another kind (flags {head.flags:#x})")
            if head.page_size != first.page_size:
                raise ValueError("its heads differ in the size of pages")
        if (size := len(self.file)) < (whole := self.num_pages * self.page_size):
            raise UserError(f"{path}: {size:,} of {whole:,} bytes: it is cut off; copy it anew")

    def _read_head(self, offset: int) -> Head:
        head = Head(*HEAD.unpack(self.file[offset : offset + HEAD.size]))
        is_size = 256 <= head.page_size <= 1 << 16 and not head.page_size & (head.page_size - 1)
        if not head.kind & META or head.magic != MAGIC or not is_size:
            raise ValueError(f"no head at byte {offset:,}")
        if head.version != VERSION:
            raise ValueError(f"version {head.version} of the format, and {VERSION} is read")
        return head

    def find(self, key: bytes) -> tuple[int, int] | None:
        """Return (size, offset) of the value of `key` in the file; None: there is none.

        Raises:
            BadImage: a page on the way to it is damaged. UserError: the file has become shorter.
        """
        number = self.root
        try:
            for _ in range(MAX_DEPTH):
                if number == NO_ROOT:
                    return None
                page, kind, count = self._read_page(number)
                node, is_key = _find_node(page, count, key, kind)
                low, middle, high, key_size = NODE.unpack_from(page, node)
                if kind == LEAF:
                    behind = node + NODE.size + key_size
                    return (
                        self._find_value(number, page, behind, low | middle << 16, high) if is_key else None
                    )
                number = low | middle << 16 | high << 32
            raise ValueError("pages below each other without end")
        except (ValueError, StructError) as e:
            reason = "a node outside its page" if isinstance(e, StructError) else str(e)
            raise BadImage(f"{self.path}: damaged at page {number:,} ({reason}); copy it anew") from None

    def read(self, place: tuple[int, int]) -> bytes:
        """Read the value at a place that `find` returned."""
        return self.file.read(*place)

    def _read_page(self, number: int) -> tuple[bytes, int, int]:
        """Read a page of nodes: (its bytes, LEAF or BRANCH, how many nodes there are)."""
        if number >= self.num_pages:
            raise ValueError(f"the file has {self.num_pages:,}")
        page = self.file.read(self.page_size, number * self.page_size)
        stored, _, kind, end, _ = PAGE.unpack_from(page)
        if stored != number or kind not in (BRANCH, LEAF) or not PAGE.size < end <= self.page_size:
            raise ValueError("no page of keys")
        return page, kind, (end - PAGE.size) // PLACE.size

    def _find_value(self, number: int, page: bytes, start: int, size: int, flags: int) -> tuple[int, int]:
        """Return (size, offset) of a value of a leaf, of which `start` is the place behind the key."""
        if flags & ~IN_PAGES:
            raise ValueError("a value that is a tree")
        if not flags:
            if start + size > self.page_size:
                raise ValueError("a value outside its page")
            return size, number * self.page_size + start
        (first,) = NUMBER.unpack_from(page, start)
        if first >= self.num_pages:
            raise ValueError("a value outside the file")
        head = self.file.read(PAGE.size, first * self.page_size)
        stored, _, kind, _, _ = PAGE.unpack(head)
        (pages,) = PAGES.unpack(head)
        room = min(pages, self.num_pages - first) * self.page_size - PAGE.size
        if stored != first or kind != OVERFLOW or size > room:
            raise ValueError(f"a value of {size:,} bytes at page {first:,}, where none of this size is")
        return size, first * self.page_size + PAGE.size


def _find_node(page: bytes, count: int, key: bytes, kind: int) -> tuple[int, bool]:
    """Return (where the node begins that has `key`, or the one before where it would be, or the first;
    whether it has it)."""

    def key_of(index: int) -> bytes:
        (node,) = PLACE.unpack_from(page, PAGE.size + PLACE.size * index)
        start = node + NODE.size
        size = NODE.unpack_from(page, node)[3]
        if start + size > len(page):
            raise ValueError("a key outside its page")
        return page[start : start + size]

    # the first key of a branch stands for whatever is smaller than the second
    first = 1 if kind == BRANCH else 0
    index = max(0, first + bisect_right(range(first, count), key, key=key_of) - 1)
    (node,) = PLACE.unpack_from(page, PAGE.size + PLACE.size * index)
    return node, kind == LEAF and key_of(index) == key
