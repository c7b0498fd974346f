"""Overlap of the sets of a run: nothing, or what the task's record declares (`finetune.tasks.base.Overlap`).

Before a run starts, its tests are compared with what it trains on and what chooses its checkpoint, and its
dev sets with what it trains on, by image and by item:

    image   its address, where the annotations have one, or its name, however it is written (`image_name`)
    item    a text about its images, or the same number about the same images, which one question has in all
            languages. Of NLVR2 the text alone (`Task.item`), where the file has addresses, as its own has:
            emoji scenes repeat their templates. Of SNLI and XVNLI the number counts whatever the images are:
            a pair of sentences keeps it where an image takes the place of the first

Of a declared overlap that nobody has counted, one record (a number) in both sets is an error still: no
publication trains on its test set.

Tests and dev sets are held in memory; what is trained on streams by, once. What was found is kept in
RUNS/cache where that took longer than a second: by name, size and time of change of the files.
"""

import hashlib
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from finetune.build import UsedSet, find_task, used_sets
from finetune.config import FinetuneConfig
from finetune.formats import Captioned, Example
from finetune.stores import MARVL, folders_of, stem
from finetune.tasks.base import Overlap, Task
from raylib.cache import file_fingerprint
from raylib.display import progress
from raylib.errors import UserError
from raylib.fileio import MAX_JSON, nfc, read_json, write_json

RULE_VERSION = 2  # of what counts as the same: another number makes nothing of what is kept
COMPARED = (("test", "train"), ("test", "dev"), ("dev", "train"))
USES = {"test": "tested on", "dev": "chosen by", "train": "trained on"}


class FoundOverlap(TypedDict):
    """Two sets, by their number, and what they share; an example of it, or ""."""

    first: int
    second: int
    images: int
    items: int
    records: int
    image: str
    such_as: str


def check_overlap(config: FinetuneConfig, parts: Mapping[str | None, FinetuneConfig]) -> list[dict[str, Any]]:
    """Find what the sets of a run share although they are published like that.

    Args:
        parts: the config of each training, by the language that it has of its own.
    Returns:
        [{"first", "second": {"split", "language", "file"}, "images", "items": how many of the first's are in
        the second, "declared": why}].
    Raises:
        UserError: sets share more than the task's record declares.
    """
    sets, task = used_sets(parts), find_task(config)
    found = _cached_overlaps(Path(config.runs).absolute() / "cache", task, sets)
    declared = []
    for one in found:
        first, second = sets[one["first"]], sets[one["second"]]
        why = _declared_reason(task, first, second, one)
        if why is None:
            raise UserError(_overlap_message(first, second, one))
        sides = {name: _describe_set(config, used) for name, used in (("first", first), ("second", second))}
        declared.append({**sides, "images": one["images"], "items": one["items"], "declared": why})
    return declared


def find_overlaps(task: Task, sets: list[UsedSet]) -> list[dict[str, Any]]:
    """[{"first", "second": places in `sets`, "images", "items": how many different ones of the first are in
    the second, "records": of these items, how many have the same number, "such_as" and "image": one of each}]
    of all that are compared and share any."""
    images: dict[str, list[tuple[int, str]]] = defaultdict(list)  # a name, an address -> (set, the image)
    items: dict[tuple, list[tuple[int, tuple]]] = defaultdict(list)
    for number, used in enumerate(sets):
        if used.role != "train":
            for item in used.reading:
                for image, names in _images(item, task.mscoco):
                    for name in names:
                        images[name].append((number, image))
                for key, others, _ in _items(item, task):
                    for each in (key, *others):
                        items[each].append((number, key))
    # tests and dev sets are in memory by now; what is trained on, which is large, streams by once
    shared: dict[tuple[int, int], tuple[dict, dict, set]] = defaultdict(lambda: ({}, {}, set()))
    for second, used in enumerate(sets):
        firsts = {
            n
            for n, other in enumerate(sets)
            if (other.role, used.role) in COMPARED and other.parts & used.parts
        }
        if not firsts:
            continue
        # images that are in no set before: most of what is trained on, met again and again
        new: set[tuple] = set()
        waited = progress(used.reading, f"compare {used.reading.path.name} with the test sets")
        for item in waited:
            addresses, known = _names_and_addresses(item), []
            if not new.issuperset(addresses):
                known = [n for _, names in _images(item, task.mscoco) for n in names if n in images]
            if not known:
                new.update(addresses)
                if addresses and task.item == "grounded":
                    continue  # what is said of another image is another item
            for name in known:
                for first, image in images[name]:
                    if first in firsts:
                        shared[first, second][0].setdefault(image, name)
            for key, others, label in _items(item, task):
                for each in (key, *others):
                    for first, item_key in items.get(each, ()):
                        if first in firsts:
                            shared[first, second][1].setdefault(item_key, label)
                            if each in others:
                                shared[first, second][2].add(item_key)
    return [
        {
            "first": first,
            "second": second,
            "images": len(images),
            "items": len(found),
            "records": len(records),
            "image": next(iter(images.values()), ""),
            "such_as": next(iter(found.values()), ""),
        }
        for (first, second), (images, found, records) in sorted(shared.items(), key=lambda entry: entry[0])
    ]


@lru_cache(1 << 18)
def image_name(name: str, mscoco: bool = False) -> str:
    """An image's name without folder, ending, case and form of Unicode: "COCO_val2014_000000391895.jpg" is
    "000000391895", and so is "391895" among images of MSCOCO. MaRVL's keep their language, in whose folder
    other ones have the same names."""
    base = stem(name).casefold()
    if mscoco and base.isdecimal():
        base = base.zfill(12)
    return "/".join((*sorted(folders_of(name) & MARVL), base))


def _names_and_addresses(item: Example | Captioned) -> list[tuple[str, str]]:
    """(name, address or "") of each image."""
    return list(zip(item.images, item.sources or ("",) * len(item.images), strict=True))


def _images(item: Example | Captioned, mscoco: bool) -> list[tuple[str, tuple[str, ...]]]:
    """(what tells the image from others, all that it may be known by) of each image."""
    return [
        (source or image_name(name, mscoco), tuple(filter(None, (image_name(name, mscoco), source))))
        for name, source in _names_and_addresses(item)
    ]


def _items(item: Example | Captioned, task: Task) -> Iterator[tuple[tuple, tuple[tuple, ...], str]]:
    """(what tells an item from others, what else it may be known by, what people may find it by); of an image
    with captions each is one."""
    about = tuple(image for image, _ in _images(item, task.mscoco))
    alone = task.item == "text" and item.sources
    # items of two languages have other texts, but one number; texts alone tell NLVR2's statements apart only
    # where addresses tell images apart
    for texts, number in item.readings():
        record = (None, number, () if task.item == "number" else about)
        numbered = number and (about or task.item == "number")  # XNLI's two files both count from 1
        key = (*map(nfc, texts), () if alone else about)
        yield key, (record,) if numbered else (), number or texts[0]


def _declared_reason(task: Task, first: UsedSet, second: UsedSet, found: dict) -> str | None:
    """Return the declared reason for what the sets share; None: they may not share it."""

    def fits(o: Overlap) -> bool:
        languages = all(
            code in (None, used.reading.language) for code, used in ((o.language, first), (o.other, second))
        )
        counts = all(
            most is None or found[name] <= most for name, most in (("images", o.images), ("items", o.items))
        )
        uncounted = o.items is None and found["records"]
        return (o.first, o.second) == (first.role, second.role) and languages and counts and not uncounted

    return next((overlap.why for overlap in task.overlaps if fits(overlap)), None)


def _overlap_message(first: UsedSet, second: UsedSet, found: dict) -> str:
    what = [f"{found['images']} images"] if found["images"] else []
    what += [f"{found['items']} items"] if found["items"] else []
    example = f"item {found['such_as']!r}" if found["items"] else f"image {found['image']!r}"
    names = [f"{used.reading.path} ({USES[used.role]})" for used in (first, second)]
    return (
        f"{' and '.join(names)} share {' and '.join(what)}, such as {example}; what is {USES[first.role]} "
        "must be new: check data=, split=, shots="
    )


def _describe_set(config: FinetuneConfig, used: UsedSet) -> dict[str, str]:
    data, path = Path(config.data), used.reading.path
    return {
        "split": used.reading.split,
        "language": used.reading.language,
        "file": str(path.relative_to(data) if path.is_relative_to(data) else path),
    }


def _cached_overlaps(cache: Path, task: Task, sets: list[UsedSet]) -> list[dict[str, Any]]:
    """`find_overlaps`, or what it found before in the same files."""
    facts: list[Any] = [RULE_VERSION, task.item, task.mscoco]
    for used in sets:
        reading = used.reading
        split = reading.task.split(reading.split, reading.language)
        beside = [reading.path.parent / name for value in split.options.values() for name in value.split("|")]
        facts.append(
            (
                used.role,
                sorted(map(str, used.parts)),
                reading.split,
                reading.language,
                reading.limit,
                file_fingerprint(reading.path),
                *(file_fingerprint(path) for path in beside if path.is_file()),
            )
        )
    file = cache / f"overlap-{hashlib.sha256(repr(facts).encode()).hexdigest()[:24]}.json"
    if os.path.lexists(file):
        what, advice = "overlaps that were found", "remove it, and they are found anew"
        return read_json(file, what, advice, shape=list[FoundOverlap], most=MAX_JSON)
    began = time.perf_counter()
    found = find_overlaps(task, sets)
    if time.perf_counter() - began > 1:
        cache.mkdir(parents=True, exist_ok=True)
        write_json(file, found)
    return found
