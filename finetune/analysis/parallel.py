"""Test items that are translations of each other, the words in them, and the objects that these name.

1. `read_parallel`: the items with the same id and images in every language.
2. `find_word`, `find_tokens`: a word's letters in a text, and the tokens that it is cut into; both kinds of
   tokenizer files tell which letters a token stands for.
3. `find_named`: what an item names in every language, where nothing is asked for.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from finetune.build import read_split, test_split
from finetune.config import FinetuneConfig
from finetune.formats import Captioned, Example, get_field, get_objects, stream_jsonl
from finetune.stores import stem
from raylib.display import save_figure
from raylib.errors import UserError
from raylib.fileio import write_json
from raylib.finite import require_finite_values
from raylib.randomness import string_key
from raylib.sample.scenes import read_labels, translate_name
from raylib.text import Tokenizer, load_sentencepiece, load_tokenizer_json
from raylib.words import NORMALIZATIONS


class Inapplicable(Exception):
    """A figure cannot be made of this run, for the reason in the message; the others still are."""


def write_figure(figure: Any, values: dict[str, Any], path: Path) -> None:
    """Write the figure as `path`.png, the numbers behind it as `path`.json.

    Raises:
        NotFinite: one of them is not finite; neither is written.
    """
    require_finite_values(f"{path}.json", values)
    save_figure(figure, path.with_suffix(".png"), dpi=130)
    write_json(path.with_suffix(".json"), values)


class Parallel(NamedTuple):
    """Items that are in every one of `languages`.

    items: a few of them. num_common: how many there are. num_missing: of each language, the number of items
    that are not in all.
    """

    languages: tuple[str, ...]
    items: list[tuple[Example, ...]]
    num_common: int
    num_missing: dict[str, int]


class SceneObject(NamedTuple):
    """Something in an image of the emoji scenes: its English name, its quadrant (0 top left ... 3 bottom
    right), its box in pixels. Of a region that a detector names, the name alone."""

    label: str
    quadrant: int = 0
    left: int = 0
    top: int = 0
    size: int = 0


class Mention(NamedTuple):
    """A word of an item in each language, the image that it is sought in and, where it is known, the object
    that it names there and the quadrants of the image's other objects."""

    item: tuple[Example, ...]
    image: str
    words: Mapping[str, str]
    object: SceneObject | None = None
    other_quadrants: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        """English name of the object; "" where it is not known."""
        return self.object.label if self.object else ""


def read_parallel(
    config: FinetuneConfig, languages: Sequence[str], limit: int, item_id: str | None = None
) -> Parallel:
    """Read up to `limit` of the test items that are in all `languages`, drawn by a hash of their ids: the
    same each time.

    Of retrieval, an item is an image with its first caption in each language, and its id is the image's.
    `item_id`: the id of the only item that counts. Memory grows with `limit`, and by an integer an item.
    """
    # two passes: the first keeps a hash an item, the second the few items that are compared
    counts: dict[str, int] = {}
    common: set[int] | None = None
    for code in languages:
        keys = {_key(example) for example in _read(config, code) if item_id in (None, example.id)}
        counts[code] = len(keys)
        common = keys if common is None else common & keys
    places = {key: i for i, key in enumerate(sorted(common or ())[:limit])}
    rows: list[dict[str, Example]] = [{} for _ in places]
    for code in languages:
        for example in _read(config, code):
            if (place := places.get(_key(example))) is not None:
                rows[place].setdefault(code, example)
    items = [tuple(row[code] for code in languages) for row in rows]
    num_common = len(common or ())
    num_missing = {code: n - num_common for code, n in counts.items()}
    return Parallel(tuple(languages), items, num_common, num_missing)


def _read(config: FinetuneConfig, language: str) -> Iterator[Example]:
    # as the model reads them: words are looked for, and their tokens, in one text
    normalize = NORMALIZATIONS.get(config.text_normalization, str)
    for item in read_split(config, test_split(config, language), language, config.test_limit):
        item = item.map_texts(lambda text, _: normalize(text))
        if isinstance(item, Captioned):
            yield Example(item.image, (item.captions[0],), (item.image,), {})
        else:
            yield item


def _key(example: Example) -> int:
    return string_key("\t".join((example.id, *example.images)))


def letter_spans(tokenizer: Tokenizer, text: str) -> list[tuple[int, int]]:
    """Return (first letter, behind the last) of each token of `tokenizer.encode`, positions in `text`."""
    model = _load(tokenizer.path)
    if tokenizer.path.suffix == ".json":
        return model.encode(text, add_special_tokens=False).offsets
    pieces = model.encode(text, return_type="proto").pieces
    # SentencePiece counts bytes: the letter that each byte belongs to
    place = [0]
    for i, letter in enumerate(text):
        place += [i] * (len(letter.encode()) - 1) + [i + 1]
    return [(place[piece.begin], place[piece.end]) for piece in pieces]


@cache
def _load(path: Path):
    return load_tokenizer_json(path) if path.suffix == ".json" else load_sentencepiece(path)


def find_tokens(tokenizer: Tokenizer, text: str, span: tuple[int, int], length: int) -> list[int]:
    """Find the tokens, counted with <s> as `add_specials` puts it and a prompt before the text, that stand
    for any letter of text[span]; those cut off by `length` are not among them."""
    start, end = span
    plain = tokenizer.without_prompt
    prompt = len(tokenizer.encode([text])[0]) - len(plain.encode([text])[0])
    tokens = [prompt + i for i, (a, b) in enumerate(letter_spans(tokenizer, text)) if a < end and b > start]
    return [i + 1 for i in tokens if i < length - 2]


def find_word(word: str, text: str) -> tuple[int, int] | None:
    """Find where the word first is in the text, in any case: as a word of its own, or else as part of one
    (Korean's particles)."""
    bounds = (rf"(?<!\w){re.escape(word)}(?!\w)", re.escape(word))
    return next((found.span() for bound in bounds if (found := re.search(bound, text, re.IGNORECASE))), None)


def read_scenes(path: Path, images: set[str]) -> dict[str, list[SceneObject]]:
    """{image: what stands in it} of `images`, from the scenes.jsonl of emoji scenes.

    Raises:
        Inapplicable: no such file.
        UserError: a line that is not as `raylib.sample.scenes` writes it.
    """
    if not path.is_file():
        raise Inapplicable(
            f"nothing says where in an image an object stands: {path} is not there, as with emoji scenes"
        )
    scenes: dict[str, list[SceneObject]] = {}
    for where, record in stream_jsonl(path):
        if (image := get_field(record, "id", str, where)) in images:
            objects = get_objects(record, "objects", where)
            scenes[image] = [
                SceneObject(
                    get_field(each, "label", str, place),
                    *(get_field(each, name, int, place) for name in SceneObject._fields[1:]),
                )
                for place, each in objects
            ]
    return scenes


def find_named(
    row: Sequence[Example], languages: Sequence[str], objects: Sequence[SceneObject]
) -> tuple[SceneObject, dict[str, str]] | None:
    """Find (the first of `objects` that the item names in every language, its name in each); None if there is
    none.

    A name must come once: what is cut out of another name (Chinese has the cat in the panda) does not count.
    """
    english = row[languages.index("en")].texts[-1] if "en" in languages else None
    for candidate in objects:
        words = {code: translate_name(candidate.label, code) for code in languages}
        once = all(
            e.texts[-1].casefold().count(words[code].casefold()) == 1
            for code, e in zip(languages, row, strict=True)
        )
        if once and (english is None or _is_whole(candidate.label, english)):
            return candidate, words
    return None


def _is_whole(label: str, text: str) -> bool:
    """Tell whether the English text means the label itself, and not a longer one that holds its name (a hot
    dog is no dog)."""
    longer = (other for other in read_labels() if label in other and other != label)
    whole = rf"(?<!\w){re.escape(label)}(?!\w)"
    return bool(re.search(whole, text, re.IGNORECASE)) and not any(other in text for other in longer)


def find_given_words(parallel: Parallel, words: Mapping[str, str]) -> list[Mention]:
    """Find the items whose texts have the given words.

    Raises:
        UserError: none has them all.
    """
    mentions = [
        Mention(row, row[0].images[0], words)
        for row in parallel.items
        if all(find_word(words[code], e.texts[-1]) for code, e in zip(parallel.languages, row, strict=True))
    ]
    if not mentions:
        given = " ".join(f"{code}={word}" for code, word in words.items())
        raise UserError(
            f"--words {given}: in none of {len(parallel.items)} parallel items; give one that has them with "
            "--item"
        )
    return mentions


def find_scene_mentions(parallel: Parallel, path: Path) -> list[Mention]:
    """Find the items of emoji scenes that name something in their image, in every language. path: of
    scenes.jsonl.

    Raises:
        Inapplicable: there are none; no ground truth.
    """
    if not path.is_file():
        raise Inapplicable(
            "give a word in several languages with --words en=dog de=Hund, and maybe the item with --item ID"
        )
    scenes = read_scenes(path, {stem(name) for row in parallel.items for name in row[0].images})
    mentions = []
    for row in parallel.items:
        for image in row[0].images:
            objects = scenes.get(stem(image), [])
            if named := find_named(row, parallel.languages, objects):
                others = tuple(o.quadrant for o in objects if o != named[0])
                mentions.append(Mention(row, image, named[1], named[0], others))
                break
    if not mentions:
        raise Inapplicable(
            f"none of {len(parallel.items)} parallel items names a thing of its image in every language"
        )
    return mentions


def parse_words(pairs: Sequence[str]) -> Mapping[str, str]:
    """{language: word} of "en=dog" "de=Hund".

    Raises:
        UserError: not of this form.
    """
    words = dict(item.partition("=")[::2] for item in pairs)
    if len(words) < len(pairs) or not all(code and word for code, word in words.items()):
        raise UserError(
            f"--words {' '.join(pairs)}: give each language once with its word, as in --words en=dog de=Hund"
        )
    return words
