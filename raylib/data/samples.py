"""One reader of a sample's image and captions: for training, evaluation and corpora alike.

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
"""

import functools
import json
import re
import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from raylib.errors import UserError
from raylib.randomness import string_key

if TYPE_CHECKING:
    from raylib.data.sources import Shard

IMAGE_EXTENSIONS = frozenset(
    ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "avif")
)
TEXT_MEMBERS = ("txt", "outputs.txt", "output.txt")
FIELDS = ("captions", "caption", "text")
SURROGATE = re.compile("[\ud800-\udfff]")


class BadCaption(Exception):
    """A sample, or one of its languages, has no usable caption; the message, a noun, says what it has
    instead."""


class EmptyCaption(BadCaption):
    """There are captions, but nothing in them."""


def is_image(extension: str) -> bool:
    """True if a member of this extension ("jpg", "seg.png") is an image file."""
    return extension.rpartition(".")[2] in IMAGE_EXTENSIONS


def is_plain_image(extension: str) -> bool:
    """True if it is one that nobody has to ask for: "jpg", "input.jpg"."""
    return extension.removeprefix("input.") in IMAGE_EXTENSIONS


@functools.lru_cache(1024)  # the same few kinds of samples, millions of times
def find_images(extensions: tuple[str, ...], listed: tuple[str, ...] | None) -> tuple[str, ...]:
    """Extensions of a sample's images, sorted: those of `listed`. A manifest of before there was such a list
    (None) stands for the plain ones, or, where a sample has none, for whatever is an image file."""
    if listed is not None:
        return tuple(sorted(extension for extension in extensions if extension in listed))
    images = tuple(sorted(filter(is_image, extensions)))
    return tuple(filter(is_plain_image, images)) or images


def has_captions(extensions: Iterable[str]) -> bool:
    """True if there is a member that may hold captions."""
    return any(extension in ("json", *TEXT_MEMBERS) for extension in extensions)


def parse_captions(record: Any, language: str | None) -> dict[str, Any]:
    """{language: string or list} of a JSON record, not cleaned yet; {} if it has no captions. `language`
    (None: unknown) is that of captions which do not say theirs. A language whose captions are null has
    none."""
    value = (
        next((v for v in map(record.get, FIELDS) if v is not None), None)
        if isinstance(record, dict)
        else None
    )
    if isinstance(value, dict) or value is None:
        return {code: captions for code, captions in (value or {}).items() if captions is not None}
    if language is None:
        raise BadCaption("captions that do not say their language")
    return {language: value}


def clean_captions(captions: Any) -> list[str]:
    """Captions of one language, a string or a list of them, without blank ones and surplus white space.

    Raises:
        EmptyCaption: nothing but blanks.
        BadCaption: not text, or half a surrogate pair, which is not UTF-8.
    """
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise BadCaption("captions that are no text")
    if any(map(SURROGATE.search, captions)):
        raise BadCaption("captions that are not UTF-8")
    if cleaned := [text for text in (" ".join(caption.split()) for caption in captions) if text]:
        return cleaned
    raise EmptyCaption("empty captions")


class Sample(NamedTuple):
    """One sample of an image_text source.

    Attributes:
        members: {extension: (offset, bytes, hash of an image or -1 if it is not known)} in its shard.
        language: of its shard; "mul" for none in particular.
    """

    key: str
    members: dict[str, tuple[int, int, int]]
    shard: "Shard"
    language: str

    @property
    def name(self) -> str:
        """Name for errors."""
        return f"{self.shard.path}: sample {self.key}"

    def read(self, extension: str) -> bytes:
        """Content of a member.

        Raises:
            UserError: an image whose bytes are not those that were indexed: another shard of the same size
                took its place.
        """
        offset, size, known = self.members[extension]
        data = self.shard.pread(offset, size)
        # a hash costs 4 % of decoding, so it is only asked for where times say that the shard may not be the
        # one indexed
        if self.shard.check and known >= 0 and string_key(data) != known:
            raise UserError(
                f"{self.name}: its {extension} is not what was indexed; fetch the shard anew, or index its "
                "folder anew"
            )
        return data

    @property
    def images(self) -> tuple[str, ...]:
        """Extensions of its images, sorted."""
        return find_images(tuple(self.members), self.shard.images)

    @property
    def identity(self) -> int:
        """63-bit hash of its images' encoded bytes, the same wherever and under whatever key they lie; of
        several drawings, of them together. Keys are no identity: img2dataset's begin anew in each shard."""
        hashes = sorted(map(self._hash, self.images))
        return hashes[0] if len(hashes) == 1 else string_key(struct.pack(f"<{len(hashes)}q", *hashes))

    def _hash(self, extension: str) -> int:
        known = self.members[extension][2]
        return string_key(self.read(extension)) if known < 0 else known

    def record(self) -> dict:
        """Return what its KEY.json holds; {} if it has none, or another kind of value.

        Raises:
            BadCaption: not JSON, not UTF-8.
        """
        if "json" not in self.members:
            return {}
        try:
            record = json.loads(self.read("json").decode("utf-8-sig"))
        except ValueError as error:
            raise BadCaption(f"a .json that is no UTF-8 JSON ({str(error).splitlines()[0]})") from error
        return record if isinstance(record, dict) else {}

    def captions(self) -> dict[str, Any]:
        """{language: captions}, not cleaned yet.

        Raises:
            BadCaption: no captions, captions without a language, or not UTF-8.
        """
        language = None if self.language == "mul" else self.language
        if captions := parse_captions(self.record(), language):
            return captions
        for name in TEXT_MEMBERS:
            if name in self.members:
                try:
                    lines = self.read(name).decode("utf-8-sig").split("\n")
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
            raise BadCaption(f"no {language!r} captions, but {', '.join(captions)}")
        return clean_captions(captions[language])

    def describe(self, fault: object) -> str:
        """One line on what is wrong with it: "SHARD: sample KEY has FAULT; its members: json, seg.png"."""
        return f"{self.name} has {fault}; its members: {', '.join(sorted(self.members))}"
