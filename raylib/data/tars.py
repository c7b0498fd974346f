"""Content of tars: the members of every sample with their offsets, and a summary of everything else.

Tars come from many writers: WebDataset's and img2dataset's, `tar cf`, macOS. Members of a sample are joined
by their key, wherever they lie; a link stands for what it points to; tars joined end to end are read to the
last one. Whatever is left out is counted by its reason, and what cannot be read at an offset (sparse files,
links that lead out of the tar, a member that occurs twice) is an error. `tarfile`, and WebDataset with it,
ends quietly at a damaged header: so whatever follows the last member must be zeros, another tar, or the end
of the file.
"""

import hashlib
import os
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from raylib.data.images import is_image, is_plain_image
from raylib.display import file_progress
from raylib.errors import UserError, describe_error
from raylib.file_kinds import recognize
from raylib.fileio import nfc
from raylib.randomness import string_key
from raylib.text import escape, has_captions

BLOCK, CHUNK = 512, 1 << 20
MAX_LISTED = 8  # extensions that a line names
MAX_HEADERS, MAX_HEADER_BYTES = 16, 1 << 18  # of one member, before its own; of one of them
MAX_MEMBER_BYTES = 1 << 28  # of an image or a text
PAX_HEADERS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
EXTENDED_HEADERS = (*PAX_HEADERS, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
SPARSE_NAME = re.compile(rb"GNU\.sparse\.name=([^\n]*)\n")
# what `tarfile` raises at a damaged header, beside its own
TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError, LookupError, EOFError, RecursionError)
META = re.compile(r"__[^/]*__($|/)")
MemberPlace = list[int]  # [offset, bytes], and of an image the hash of its bytes
SCATTERED = "samples whose members lie apart, joined by their key"
WITHOUT_END = "tars without end blocks"


class TarScan:
    """Everything in the tar `path`, read once, front to back.

    Args:
        hashes: also hash the file and every image in it; else only headers are read.

    Attributes:
        samples: {key: {extension: place}} in the order in which keys first occur. As in WebDataset, the key
            is what stands before the first dot of a file's name, folders included, the extension (lower case)
            what follows.
        files: {name: place} of every file, also of those that belong to no sample, and of links.
        skipped, notes: how many members were left out, and what else is worth telling; by plural nouns.
        bytes, sha256: of the file; without `hashes`, the second is "".

    Raises:
        UserError: no file; no uncompressed tar; truncated; damaged; a member that cannot be indexed, or
            occurs twice.
    """

    def __init__(self, path: Path | str, hashes: bool = True):
        self.path, self.hashes = Path(path), hashes
        if not self.path.is_file():
            raise UserError(
                f"{path}: no file, but a folder, or a link to nothing; take it away or give its files"
            )
        self.bytes = self.path.stat().st_size
        self.samples: dict[str, dict[str, MemberPlace]] = {}
        self.skipped: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.files: dict[str, MemberPlace] = {}
        self._symlinks: dict[str, str] = {}
        # symbolic ones that stand for a member: name, key, extension
        self._links: list[tuple[str, str, str]] = []
        self._key: str | None = None
        self._scattered: set[str] = set()
        self._sha256, self._hashed = hashlib.sha256(), 0
        self._end = self._global_bytes = 0
        with open(path, "rb") as self._file:
            start, tars = 0, 0
            # `cat a.tar b.tar` is one file of two tars, of which `tarfile` would read the first
            while start < self.bytes or not tars:
                end = self._read_tar(start)
                start, tars = self._skip_zeros(end), tars + 1
            self._hash_until(self.bytes)
        self._follow_symlinks()
        self.sha256 = self._sha256.hexdigest() if hashes else ""
        self.notes.update(
            {"tars in one file, end to end": tars if tars > 1 else 0, SCATTERED: len(self._scattered)}
        )
        self.skipped, self.notes = +self.skipped, +self.notes

    def _read_tar(self, start: int) -> int:
        """Add the members of the tar that begins at `start`; return where its end blocks do."""
        self._end = start
        self._check_headers(start)
        self._file.seek(start)
        with self._named_damage():
            tar = tarfile.open(fileobj=self._file, mode="r:")  # noqa: SIM115  it opens nothing
        for member in file_progress(self._file, self._members(tar), f"read {self.path.name}"):
            self._add_member(member, self._end)
        return tar.offset

    def _members(self, tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
        """Yield the members one at a time: `_end` then says where the next header lies."""
        while True:
            with self._named_damage():
                member = tar.next()
            if member is None:
                return
            # a size below zero, as a PAX header may have it, would lead back, and round for ever
            if member.size < 0 or tar.offset <= self._end:
                raise UserError(
                    f"{self.path}: damaged, a member of {member.size} bytes at byte {self._end}; fetch or "
                    "write it anew"
                )
            self._end = tar.offset
            yield member
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
            self._check_headers(self._end)

    @contextmanager
    def _named_damage(self) -> Iterator[None]:
        try:
            yield
        except TAR_ERRORS as error:
            reason = describe_error(error)
            if self.samples or self._end:
                raise UserError(
                    f"{self.path}: damaged or truncated after byte {self._end} ({reason}); fetch or write it "
                    "anew"
                ) from error
            seen, remedy = recognize(self.path, "a tar")
            raise UserError(
                f"{self.path}: no uncompressed tar ({seen or reason}); "
                f"{remedy or 'random access needs a plain .tar'}"
            ) from error

    def _check_headers(self, at: int) -> None:
        """Raise UserError where the headers of the member at byte `at` are none that `tarfile` may read: it
        reads names and PAX records of any size into memory, a header in a header as deep as they go."""
        first = at
        for _ in range(MAX_HEADERS):
            block = os.pread(self._file.fileno(), BLOCK, at)
            kind = block[156:157]
            if kind == tarfile.GNUTYPE_SPARSE:
                raise self._sparse_error(block[:100].partition(b"\0")[0])
            if kind not in EXTENDED_HEADERS:
                return
            with self._named_damage():
                size = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size
            if not 0 <= size <= MAX_HEADER_BYTES:
                raise UserError(
                    f"{self.path}: damaged, a header of {size:,} bytes at byte {at}, of which "
                    f"{MAX_HEADER_BYTES:,} may be; fetch or write it anew"
                )
            # tarfile reads the map of a sparse file number by number, as long as the file goes on
            records = os.pread(self._file.fileno(), size, at + BLOCK)
            if kind in PAX_HEADERS and b"GNU.sparse." in records:
                name = SPARSE_NAME.search(records)
                raise self._sparse_error(name[1] if name else b"")
            if kind == tarfile.XGLTYPE:  # which tarfile keeps, and copies for each member
                self._global_bytes += size
            if self._global_bytes > MAX_HEADER_BYTES:
                raise UserError(
                    f"{self.path}: its global headers have more than {MAX_HEADER_BYTES:,} bytes; write the "
                    "tar anew"
                )
            at += BLOCK + (size + BLOCK - 1) // BLOCK * BLOCK
        raise UserError(
            f"{self.path}: damaged, more than {MAX_HEADERS} headers one after another at byte {first}; fetch "
            "or write it anew"
        )

    def _sparse_error(self, name: bytes) -> UserError:
        return UserError(
            f"{self.path}: member {_printable(name.decode('utf-8', 'surrogateescape'))!r} is a sparse file, "
            "whose bytes do not lie together; write the tar anew without --sparse"
        )

    def _skip_zeros(self, end: int) -> int:
        """Return where the next tar begins after the end blocks at `end`: the size of the file, if there is
        none."""
        if end >= self.bytes:
            self.notes[WITHOUT_END] += 1
            return self.bytes
        at = end
        self._file.seek(at)
        while chunk := self._file.read(CHUNK):
            if rest := chunk.lstrip(b"\0"):
                at += len(chunk) - len(rest)
                break
            at += len(chunk)
        else:
            return self.bytes
        # what follows a block of zeros is another tar, which begins at a block; fewer zeros are no end, but
        # the padding before a damaged header
        if at - end >= BLOCK:
            return end + (at - end) // BLOCK * BLOCK
        if self.bytes - end < BLOCK:
            raise UserError(f"{self.path}: truncated in the header at byte {end}; fetch or write it anew")
        raise UserError(
            f"{self.path}: damaged, byte {end} begins neither a member nor the end; fetch or write it anew"
        )

    def _add_member(self, member: tarfile.TarInfo, end: int) -> None:
        name = _printable(member.name)
        if end > self.bytes:
            raise UserError(
                f"{self.path}: truncated at byte {self.bytes}, its last member ends at {end}; "
                "fetch or write it anew"
            )
        key, extension = split_member_name(name)
        place = self._locate(member, extension) if member.isreg() else None
        # `tar cf` stores a file that has two names once, and a link for the second
        if member.islnk() and key:
            target = _printable(member.linkname)
            if target not in self.files:
                raise UserError(
                    f"{self.path}: member {name!r} is a link to {target!r}, which does not lie before it; "
                    "write the tar anew with --hard-dereference"
                )
            place = self.files[target]
            self.notes["hard links, which stand for their files"] += 1
        if place:
            self.files[name] = place
        if member.issym():
            target = posixpath.join(posixpath.dirname(name), _printable(member.linkname))
            self._symlinks[name] = posixpath.normpath(target)
        if member.isdir():
            self.skipped["directories"] += 1
        elif not key:
            self.skipped[extension] += 1
        elif member.issym():
            self._open_sample(key, name)
            self._links.append((name, key, extension))
        elif place:
            self._open_sample(key, name)
            self._add_to_sample(name, key, extension, place)
        else:
            self.skipped["special files"] += 1

    def _open_sample(self, key: str, name: str) -> None:
        """Begin the sample of a member, or go on with it."""
        # WebDataset would make two samples of these; `tar cf` of an unsorted folder lays them apart
        if key != self._key and key in self.samples:
            self._scattered.add(key)
        self._key = key
        self.samples.setdefault(key, {})

    def _add_to_sample(self, name: str, key: str, extension: str, place: MemberPlace) -> None:
        members = self.samples[key]
        if extension in members:
            raise UserError(
                f"{self.path}: member {name!r} occurs twice, at bytes {members[extension][0]} and "
                f"{place[0]}; each sample needs a key of its own, write the tar anew"
            )
        members[extension] = place
        if not place[1]:
            self.notes["members of zero bytes"] += 1

    def _locate(self, member: tarfile.TarInfo, extension: str) -> MemberPlace:
        place = [member.offset_data, member.size]
        # the file's hash goes on over the same bytes, so that an image is read once for both
        if self.hashes and is_image(extension) and member.size > MAX_MEMBER_BYTES:
            self.notes[f"images of more than {MAX_MEMBER_BYTES:,} bytes, which are not read"] += 1
        elif self.hashes and is_image(extension):
            self._hash_until(member.offset_data)
            place.append(string_key(self._hash_next(member.size)))
        return place

    def _hash_until(self, stop: int) -> None:
        """Go on with the hash of the file, up to byte `stop`."""
        while self.hashes and self._hashed < stop:
            self._hash_next(min(CHUNK, stop - self._hashed))

    def _hash_next(self, size: int) -> bytes:
        """Go on with the hash over the next `size` bytes of the file, and return these."""
        # by `pread`, which does not move the position that `tarfile` reads at
        data = os.pread(self._file.fileno(), size, self._hashed)
        if len(data) != size:
            raise UserError(f"{self.path}: it changed, or ended, while it was read; index it again")
        self._sha256.update(data)
        self._hashed += size
        return data

    def _follow_symlinks(self) -> None:
        for name, key, extension in self._links:
            # a link may point to a link; a circle of them ends after as many steps as Linux takes
            target, steps = self._symlinks[name], 0
            while target in self._symlinks and steps < 40:  # as many as Linux follows
                target, steps = self._symlinks[target], steps + 1
            if target not in self.files:
                raise UserError(
                    f"{self.path}: member {name!r} is a symbolic link to {target!r}, which is no file of "
                    "this tar; write it anew with --dereference"
                )
            self.files[name] = self.files[target]
            self._add_to_sample(name, key, extension, self.files[name])
            self.notes["symbolic links, which stand for their files"] += 1


def split_member_name(name: str) -> tuple[str, str]:
    """(key, extension) of a member's name; ("", why it belongs to no sample, a plural noun) if none."""
    folder, base = posixpath.split(name)
    stem, _, extension = base.partition(".")
    if META.match(name):
        return "", "__meta__ members"
    if base.startswith("."):  # also what macOS writes beside each file: "._000.jpg" beside "000.jpg"
        return "", "hidden files"
    if not extension:
        return "", "files without an extension"
    return nfc(posixpath.join(folder, stem)), extension.lower()


def _printable(name: str) -> str:
    """A member's name without "./" before it; what is not UTF-8 in it, and control characters, escaped."""
    text = name.removeprefix("./").encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return escape(text)


class FolderSummary:
    """Counts over all tars of a folder.

    Args:
        listed: extensions of the images that the user asks for; None takes the plain ones ("jpg",
            "input.jpg"), of which a sample may have one.
    """

    def __init__(self, listed: Sequence[str] | None = None):
        self.listed = sorted({extension.lower().lstrip(".") for extension in listed}) if listed else None
        self.extension_sets: Counter[frozenset[str]] = Counter()  # samples by the extensions that they have
        self.skipped: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()

    def add(self, scan: TarScan) -> None:
        """Count a tar.

        Raises:
            UserError: a sample has several plain images, and nothing says which is meant.
        """
        self.skipped += scan.skipped
        self.notes += scan.notes
        for key, members in scan.samples.items():
            # of a jpg and a png that nobody listed, one may be a mask of the other: not ours to guess
            images = sorted(filter(is_plain_image, members))
            if len(images) > 1 and not self.listed:
                raise UserError(
                    f"{scan.path}: sample {key} has several images, {', '.join(images)}; say which is meant, "
                    f"such as --images {images[0]}, or list all of them where they are drawings of one thing"
                )
            self.extension_sets[frozenset(members)] += 1

    def merge(self, other: "FolderSummary") -> None:
        """Count what another summary has counted."""
        self.extension_sets += other.extension_sets
        self.skipped += other.skipped
        self.notes += other.notes

    def count(self, extensions: Iterable[str]) -> dict[str, int]:
        """Count the samples that have a member of each extension."""
        return {
            name: n
            for name in extensions
            if (n := sum(c for kind, c in self.extension_sets.items() if name in kind))
        }

    def select_images(self, folder: Path) -> list[str]:
        """Extensions of the members that are images, sorted; errors name `folder`.

        Raises:
            UserError: none of what is listed is there; nothing is listed and several could be meant.
        """
        all_extensions = sorted(set().union(*self.extension_sets))
        if self.listed:
            if missing := [name for name in self.listed if name not in all_extensions]:
                raise UserError(
                    f"{folder}: no member ends in .{missing[0]}; there are: {_list(all_extensions)}"
                )
            return self.listed
        plain, others = list(filter(is_plain_image, all_extensions)), list(filter(is_image, all_extensions))
        if not plain and len(others) > 1:
            raise UserError(
                f"{folder}: no member is plainly the image; say which are, of: --images {_list(others, ' ')} "
                "(a key ends at the first dot of a name; where keys have dots, write the tars anew)"
            )
        return plain or others

    def describe(self, images: Sequence[str] | None) -> list[str]:
        """Return what to print of it; `images` as chosen, None for packed text."""
        all_extensions, notes = sorted(set().union(*self.extension_sets)), Counter(self.notes)
        if images is not None:
            without_image = sum(n for kind, n in self.extension_sets.items() if not kind & set(images))
            without_captions = sum(n for kind, n in self.extension_sets.items() if not has_captions(kind))
            notes |= +Counter(
                {"samples without an image": without_image, "samples without captions": without_captions}
            )
        others = self.count(name for name in all_extensions if name not in (images or ()))
        parts = {
            "images": self.count(images or ()),
            "other members": others,
            "skipped": self.skipped,
            "note": notes,
        }
        return [
            f"{name}: {_list([f'{n} {noun}' for noun, n in counts.items()])}"
            for name, counts in parts.items()
            if counts
        ]


def _list(names: Sequence[str], comma: str = ", ") -> str:
    return comma.join(names[:MAX_LISTED]) + (f"{comma}... ({len(names)})" if len(names) > MAX_LISTED else "")
