"""Reading a source (`shards` has the format) at random, by `os.pread`.

Opening reads the manifest alone and checks the files' sizes; a shard is fetched, opened and its count checked
when its first sample is read. So a `Source` costs nothing to send to another process.

A `Sample` has, for training, evaluation and corpora alike:

Image: the member whose extension is that of an image file, KEY.jpg, or KEY.input.jpg beside a
KEY.outputs.txt. Of others, such as KEY.seg.png, none is an image unless the source's manifest lists its
extension ("images": ["noto.png", ...]); of several that it lists, each is a drawing of the same thing.

Captions, the first of these that a sample has:

    KEY.json       an object with `captions`, else `caption`, else `text`: a string, a list of them, or
                   {language: either}
    KEY.txt        a caption a line, as CLIP_benchmark writes them (img2dataset's KEY.txt repeats the one of
                   its KEY.json); or KEY.outputs.txt, KEY.output.txt

What does not say its language is in the shard's. Text is UTF-8, with or without a byte order mark. Blank
captions are left out; where nothing is left, the sample is unusable.

Facts, in KEY.json: {"facts": {"image": [FACT, ...], "captions": {CAPTION: [FACT, ...]}}}, where a fact is any
text: what is true of the image, and what a caption says of it. A caption is true of an image that has all of
its facts.
"""

import itertools
import json
import resource
import struct
from bisect import bisect_right
from codecs import BOM_UTF8
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ValidationError

from raylib.data.fetch import ShardEntry, cache_folder, fetch, fetch_manifest, is_remote
from raylib.data.images import BadImage, find_images
from raylib.data.index import (
    NPY_HEADER,
    FileBytes,
    ShardIndex,
    find_stale_member,
    is_younger,
    open_index,
    read_npy_header,
)
from raylib.data.shards import KINDS, MANIFEST, index_command
from raylib.data.tars import MAX_LISTED, MAX_MEMBER_BYTES
from raylib.errors import UserError, describe_error
from raylib.fileio import sha256_file
from raylib.provenance import DataFile
from raylib.randomness import string_key
from raylib.text import CAPTION_MEMBERS, BadCaption, clean_captions, escape, is_language_code, parse_captions

MAX_TEXT_BYTES = 1 << 24  # of a member of captions


class StoredFacts(BaseModel):
    """Facts that are true of an image, and those that each caption claims."""

    image: list[str]
    captions: dict[str, list[str]]


class Sample(NamedTuple):
    """One sample of an image_text source.

    Attributes:
        members: {extension: (offset, bytes, hash of an image or -1 if it is not known)} in its shard.
        language: of its shard; "mul" for none in particular.
        images: extensions of its images, sorted.
    """

    key: str
    members: Mapping[str, Sequence[int]]
    shard: "Shard"
    language: str
    images: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name for errors."""
        return f"{self.shard.path}: sample {escape(self.key)}"

    def read(self, extension: str) -> bytes:
        """Content of a member.

        Raises:
            BadImage: it is too large.
            UserError: an image whose bytes are not those that were indexed: another shard of the same size
                took its place.
        """
        offset, size, known = self.members[extension]
        # before it is read: what an index says of sizes need not be what memory can hold
        if size > MAX_MEMBER_BYTES:
            raise BadImage(
                f"{self.name}: its {extension} has {size:,} bytes, of which {MAX_MEMBER_BYTES:,} may be"
            )
        data = self.shard.content.read(size, offset)
        # a hash costs 4 % of decoding, so it is only asked for where times say that the shard may not be the
        # one indexed
        if self.shard.check and known >= 0 and string_key(data) != known:
            raise UserError(
                f"{self.name}: its {extension} is not what was indexed; fetch the shard anew, or index its "
                "folder anew"
            )
        return data

    @property
    def identity(self) -> int:
        """63-bit hash of its images' encoded bytes, the same wherever and under whatever key they lie; of
        several drawings, of them together. Keys are no identity: img2dataset's begin anew in each shard."""
        # an index that was made of the tar alone knows none: read, they are the same
        hashes = [self.members[name][2] for name in self.images]
        if min(hashes, default=0) < 0:
            hashes = [string_key(self.read(name)) for name in self.images]
        if len(hashes) == 1:
            return hashes[0]
        # sorted: two samples of the same drawings are one, in whatever order their extensions stand
        return string_key(struct.pack(f"<{len(hashes)}q", *sorted(hashes)))

    def record(self) -> dict:
        """Return what its KEY.json holds; {} if it has none, or another kind of value.

        Raises:
            BadCaption: not JSON, not UTF-8.
        """
        if "json" not in self.members:
            return {}
        try:
            # not `parse_json`, of which this takes a third of the time; downloaders write NaN into theirs
            record = json.loads(self._read_text("json"))
        except (ValueError, RecursionError) as error:
            raise BadCaption(f"a .json that is no UTF-8 JSON ({describe_error(error)})") from error
        return record if isinstance(record, dict) else {}

    def facts(self, caption: str) -> tuple[list[str], list[str]]:
        """Facts that are true of its image, and those that one of its captions, cleaned, claims: none of a
        caption of which nothing is said.

        Raises:
            BadCaption: it has none, or other values in their place.
        """
        try:
            facts = StoredFacts.model_validate(self.record().get("facts"), strict=True)
        except ValidationError as error:
            raise BadCaption('no "facts" in its .json, or damaged ones') from error
        claims = {
            " ".join(text.split()): of for text, of in facts.captions.items()
        }  # as captions are cleaned
        return facts.image, claims.get(caption, [])

    def _read_text(self, extension: str) -> str:
        if (size := self.members[extension][1]) > MAX_TEXT_BYTES:
            raise BadCaption(f"a .{extension} of {size:,} bytes, of which {MAX_TEXT_BYTES:,} may be")
        return self.read(extension).removeprefix(BOM_UTF8).decode()

    def captions(self) -> dict[str, Any]:
        """{language: captions}, not cleaned yet.

        Raises:
            BadCaption: no captions, captions without a language, or not UTF-8.
        """
        language = None if self.language == "mul" else self.language
        if captions := parse_captions(self.record(), language):
            return captions
        for name in CAPTION_MEMBERS:
            if name in self.members:
                try:
                    lines = self._read_text(name).split("\n")
                except UnicodeDecodeError as error:
                    raise BadCaption(f"a .{name} that is not UTF-8 ({error.reason})") from error
                return parse_captions({"captions": [line for line in lines if line.strip()]}, language)
        raise BadCaption("no captions")

    def captions_in(self, language: str) -> list[str]:
        """Captions of one language, cleaned.

        Raises:
            BadCaption: it has none.
        """
        captions = self.captions()
        if language not in captions:
            others = ", ".join(list(captions)[:MAX_LISTED])
            raise BadCaption(f"no {language!r} captions, but {escape(others[:200])}")
        return clean_captions(captions[language])

    def describe(self, fault: object) -> str:
        """One line on what is wrong with it: "SHARD: sample KEY has FAULT; its members: json, seg.png"."""
        members = ", ".join(sorted(self.members)[:MAX_LISTED])
        return f"{self.name} has {fault}; its members: {escape(members)}"


class Shard:
    """One open shard; `sha256`: of its content; `images`: extensions that are images; `check`: compare each
    image that is read with the hash in the index."""

    def __init__(
        self,
        path: Path,
        index: ShardIndex,
        packed: bool,
        sha256: str,
        images: tuple[str, ...] | None,
        check: bool,
    ):
        self.path, self.index, self.sha256, self.images, self.check = path, index, sha256, images, check
        self.content = FileBytes(path)
        if packed:
            self.starts = index.first_rows().tolist()
            self.blocks: dict[int, tuple[int, np.dtype, np.ndarray]] = {}

    def require_same(self) -> None:
        """Raise UserError where the shard was written to since it was opened, and is not what its manifest
        says. Of a shorter one, reading says more."""
        if self.content.find_stamp() != self.content.stamp:
            self._require_same_content()

    def _require_same_content(self) -> None:
        now, before = self.content.find_stamp(), self.content.stamp
        if now[0] == before[0]:
            if sha256_file(self.path) != self.sha256:
                raise UserError(
                    f"{self.path}: written to since it was opened, and its SHA-256 is not its manifest's any "
                    "more; restore it, and start again"
                )
            self.content.stamp = now

    def sample(self, row: int, language: str) -> Sample:
        """Return a sample; `require_same` comes before."""
        key, members, _ = self.index.read(row)
        return Sample(key, members, self, language, find_images(tuple(members), self.images))

    def rows(self, rows: Sequence[int], sides: int) -> list[list[np.ndarray]]:
        """Return rows of packed ids, one array a side each: one look at the shard for all of them."""
        self.require_same()
        # of one block at a time, since each has a type and ends of its own
        places_in: dict[int, list[int]] = {}  # block -> places in `rows`
        for place, row in enumerate(rows):
            places_in.setdefault(bisect_right(self.starts, row) - 1, []).append(place)
        found: list[list[np.ndarray]] = [[]] * len(rows)
        for block, places in places_in.items():
            offset, dtype, ends = self.blocks.get(block) or self._read_block(block, sides)
            # `ends` begins with 0, so that row 0 is cut like any other
            firsts = (np.array([rows[place] for place in places]) - self.starts[block]) * sides
            cuts = ends[firsts[:, None] + np.arange(sides + 1)].astype(np.int64)  # (rows, sides + 1)
            sizes, offsets = (cuts[:, -1] - cuts[:, 0]) * dtype.itemsize, offset + cuts[:, 0] * dtype.itemsize
            # the sides of a row lie end to end; joined, all rows are one array, whose slices cost little
            data = self.content.read_each(zip(sizes.tolist(), offsets.tolist(), strict=True))
            ids = np.frombuffer(b"".join(data), dtype)
            # where the cuts lie in what was joined: a row's end is the sum of the rows up to it
            moved = cuts + (np.cumsum(sizes) // dtype.itemsize - cuts[:, -1])[:, None]
            for place, row_cuts in zip(places, moved.tolist(), strict=True):
                found[place] = [ids[low:high] for low, high in itertools.pairwise(row_cuts)]
        return found

    def _read_block(self, block: int, sides: int) -> tuple[int, np.dtype, np.ndarray]:
        """(offset of the ids of a block in the file, their type, where each side of each row ends)."""
        members, num_rows = self.index.read(block).members, self.starts[block + 1] - self.starts[block]
        try:
            (ids, num_ids, dtype), (offset, num_ends, end_dtype) = (
                self._find_array(*members[name][:2]) for name in ("ids.npy", "ends.npy")
            )
            if num_ends != (num_rows, sides):
                raise ValueError(f"ends of {num_ends}, wanted {(num_rows, sides)}")
            ends = np.frombuffer(self.content.read(num_rows * sides * end_dtype.itemsize, offset), end_dtype)
            # checked once a block: an end that does not rise would give one sentence another's ids
            cuts = np.concatenate([np.zeros(1, end_dtype), ends])
            if num_ids != (cuts[-1],) or (cuts[1:] <= cuts[:-1]).any():
                raise ValueError("its ends do not fit its ids")
        except (ValueError, KeyError) as error:
            raise UserError(
                f"{self.path}: block {block} is damaged, {describe_error(error)}; pack it anew"
            ) from error
        self.blocks[block] = ids, dtype, cuts
        return self.blocks[block]

    def _find_array(self, offset: int, size: int) -> tuple[int, tuple[int, ...], np.dtype]:
        """(offset of its elements in the file, shape, dtype) of an .npy member."""
        start, shape, dtype = read_npy_header(self.content.read(min(size, NPY_HEADER), offset), size)
        return offset + start, shape, dtype


class Source:
    """A folder of shards as one sequence of samples per language.

    Args:
        base: local folder; a text may be a URL or a `pipe:` command too (see `fetch`), a `Path` may not.
        kind: the kind it must be; None takes any.
        tokenizer: SHA-256 of the tokenizer whose ids it must hold; None does not ask.
        cache: where shards of a remote base are kept.

    Raises UserError: no manifest, missing shard, shard of another size (truncated), another count of samples,
    another kind or tokenizer, no samples in a language, a language that is no code.
    """

    def __init__(self, base: Path | str, kind: str | None = None, tokenizer: str | None = None, cache=None):
        self.base, self.cache = base, cache
        # the manifest alone, even of a thousand shards: opening must cost nothing
        manifest = fetch_manifest(self.base, self.cache, kind)
        self.kind, self.shards, self.images = manifest.kind, manifest.shards, manifest.images
        if kind and kind != self.kind:
            raise UserError(f"{base}: shards of kind {self.kind!r} where {kind!r} is needed")
        if tokenizer and self.kind != "image_text" and manifest.tokenizer != tokenizer:
            raise UserError(f"{base}: its ids come from another tokenizer; pack the text anew with this one")
        self.sides = KINDS[self.kind]
        self.groups: dict[str, list[ShardEntry]] = {}
        for shard in self.shards:
            self.groups.setdefault(shard.language, []).append(shard)
        if unknown := [language for language in self.groups if not is_language_code(language)]:
            raise UserError(
                f"{base}: its manifest takes {', '.join(map(repr, unknown[:3]))} for languages, which are "
                f"no language codes; make it anew: {index_command(base, self.kind)} --language CODE"
            )
        for language, shards in self.groups.items():
            if not sum(shard.samples for shard in shards):
                raise UserError(f"{base}: language {language!r} has no samples")
        self.starts = {
            lang: list(itertools.accumulate((s.samples for s in group), initial=0))
            for lang, group in self.groups.items()
        }
        self._opened: OrderedDict[str, Shard] = OrderedDict()
        # remote ones are checked as they are fetched, each when its first sample is read
        if fault := self.find_changed_shard():
            raise UserError(f"{fault}; fetch it anew")

    def find_changed_shard(self) -> str | None:
        """Say which shard, if they are here and not fetched, is missing or of another size than the manifest
        says; None: none."""
        for shard in [] if is_remote(self.base) else self.shards:
            path = Path(self.base) / shard.name
            if not path.is_file():
                return f"{path}: this shard is in the manifest but not here"
            if path.stat().st_size != shard.bytes:
                return f"{path}: {path.stat().st_size} bytes, the manifest says {shard.bytes}"
        return None

    def files(self) -> list[DataFile]:
        """Return the files that are part of a run's identity: the manifest, and the shards, if they are here
        and not fetched."""
        manifest = DataFile(fetch(self.base, MANIFEST, self.cache))
        # sizes are those of the manifest, whose hash stands for the shards
        if is_remote(self.base):  # a shard is compared with the manifest when it is fetched
            return [manifest._replace(address=f"{str(self.base).rstrip('/')}/{MANIFEST}")]
        return [manifest, *(DataFile(Path(self.base) / s.name, s.sha256, large=True) for s in self.shards)]

    def __len__(self) -> int:
        return sum(self.size(language) for language in self.groups)

    def size(self, language: str) -> int:
        """Samples (rows) of a language."""
        return self.starts[language][-1]

    def sizes(self) -> dict[str, list[int]]:
        """Samples of every shard, by language: what `Lanes` is made from."""
        return {language: [shard.samples for shard in group] for language, group in self.groups.items()}

    def sample(self, language: str, number: int) -> Sample:
        """Sample `number` of a language of an image_text source."""
        return self.samples([(language, number)])[0]

    def samples(self, numbers: Iterable[tuple[str, int]]) -> list[Sample]:
        """Samples of an image_text source, (language, number) each."""
        samples, same = [], set()
        for language, number in numbers:
            starts = self.starts[language]
            place = bisect_right(starts, number) - 1
            shard = self._shard(language, place)
            if shard not in same:  # asked once for all of them
                shard.require_same()
                same.add(shard)
            samples.append(shard.sample(number - starts[place], language))
        return samples

    def row(self, language: str, number: int) -> list[np.ndarray]:
        """Row `number` of a packed source: one array of ids (uint16 or uint32) per side."""
        return self.rows([(language, number)])[0]

    def rows(self, numbers: Iterable[tuple[str, int]]) -> list[list[np.ndarray]]:
        """Rows of a packed source, (language, number) each, as `row` has them."""
        # by shard: so each is asked once whether it has changed, which takes longer than reading a row
        rows_of: dict[tuple[str, int], list[tuple[int, int]]] = {}  # shard -> (place here, row)
        place = -1
        for place, (language, number) in enumerate(numbers):
            starts = self.starts[language]
            shard = bisect_right(starts, number) - 1
            rows_of.setdefault((language, shard), []).append((place, number - starts[shard]))
        found: list[list[np.ndarray]] = [[]] * (place + 1)
        for (language, shard), rows in rows_of.items():
            places, numbers_there = zip(*rows, strict=True)
            read = self._shard(language, shard).rows(numbers_there, self.sides)
            for place, row in zip(places, read, strict=True):
                found[place] = row
        return found

    def _shard(self, language: str, place: int) -> Shard:
        """Return a shard of a language, open."""
        entry = self.groups[language][place]
        shard = self._opened.get(entry.name) or self._open(entry)
        self._opened.move_to_end(entry.name)
        return shard

    def _open(self, entry: ShardEntry) -> Shard:
        path = fetch(self.base, entry.name, self.cache, entry.bytes, entry.sha256)
        index = open_index(path, cache_folder(str(path.parent.absolute()), self.cache))
        if index.shard_bytes != entry.bytes or index.rows != entry.samples:
            raise UserError(
                f"{path}: {index.rows} samples, the manifest says {entry.samples}; index the folder anew"
            )
        if path.stat().st_size != entry.bytes:  # it was right when the source was opened
            raise UserError(
                f"{path}: {path.stat().st_size:,} bytes now, the manifest says {entry.bytes:,}; restore it, "
                "and start again"
            )
        packed, check = self.kind != "image_text", is_younger(path, index)
        shard = Shard(path, index, packed, entry.sha256, self.images, check)
        if member := find_stale_member(index, shard.content):
            raise UserError(
                f"{path}: its member {escape(member)} does not lie where its index says, which may be of "
                f"another tar; index the folder anew: {index_command(path.parent, self.kind)}"
            )
        self._opened[entry.name] = shard
        # each holds a file open; the least recently used one goes where there are many
        if len(self._opened) > max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4):
            self._opened.popitem(last=False)
        return shard

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_opened": OrderedDict()}
