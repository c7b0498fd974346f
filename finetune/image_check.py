"""The images, or region features, of all sets of a run: looked for before anything trains, by their names;
with `verify` each is read, too. What cannot be used is counted by set: a few (`bad_limit`) are told, more are
an error. In training another example takes the place of one (`finetune.batches`); a test item counts as
wrong."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from finetune.stores.images import ImageStore, VisualSource
from raylib.cache import cached, get_cache
from raylib.data.images import BadImage
from raylib.data.loading import batched
from raylib.display import progress
from raylib.errors import UserError
from raylib.runtime import available_cpus

if TYPE_CHECKING:
    from finetune.build import UsedSet

MAX_NAMES = 3  # in a line
BLOCK = 1024  # images that are read between two looks at the progress
LEFT_OUT, WRONG = "others take their place in training", "they count as wrong"


class ImageFaults:
    """Counts the items of the set `where` that have an image which cannot be used; `limit`: the share of them
    that is still normal."""

    def __init__(self, where: str, limit: float):
        self.where, self.limit = where, limit
        self.items = self.bad = 0
        self.names: list[str] = []

    def add(self, faults: list[str]) -> None:
        """Count an item with its images that cannot be used."""
        self.items += 1
        self.bad += bool(faults)
        for name in faults:
            if len(self.names) < MAX_NAMES and name not in self.names:
                self.names.append(name)

    def judge(self, what: str, consequence: str, advice: str) -> str | None:
        """Return the line that tells of them, None where there are none. what: what they have, or lack.

        Raises:
            UserError: they are too many.
        """
        if not self.bad:
            return None
        such = ", ".join(f"'{name}'" for name in self.names)
        line = f"{self.bad:,} of {self.items:,} items of {self.where} have {what}: {such}"
        line += " and others" if self.bad > MAX_NAMES else ""
        if self.bad > self.limit * self.items:
            raise UserError(f"{line} (bad_limit={self.limit:g} of them may); {advice}")
        return f"note: {line}; {consequence}"


def check_sets(visual: VisualSource, sets: Sequence["UsedSet"], limit: float, verify: bool) -> Iterator[str]:
    """Look for the images, or the region features, of `sets`, and with `verify` read them; yields what is to
    be told.

    Raises:
        UserError: too many of a set are missing, or cannot be read.
    """
    for used in sets:
        consequence = LEFT_OUT if used.role == "train" else WRONG
        if line := find_missing(visual, _items(used), _describe(used), limit, consequence):
            yield line
    if verify:
        yield from _verify(visual, sets, limit)


def find_missing(
    visual: VisualSource | None, items: Iterable[Any], where: str, limit: float, consequence: str = LEFT_OUT
) -> str | None:
    """Look for the images, or the region features, of all `items`, which come from `where`; return what is to
    be told.

    Raises:
        UserError: too many are missing.
    """
    if visual is None:
        return None
    store, faults = visual.store, ImageFaults(where, limit)
    # the same images come in every language; more would not fit the memory
    has = lru_cache(1 << 16)(store.has)
    for item in items:
        faults.add([name for name in item.images if not has(name)])
    kind, setting = ("image", "images") if isinstance(store, ImageStore) else ("regions", "regions")
    return faults.judge(f"no {kind} in {store.path}", consequence, f"check {setting}=")


def require_few_faults(figures: Mapping[str, Mapping[str, Any]], what: str, limit: float) -> None:
    """Raise UserError where too many items of an evaluation have an image that could not be read. figures: of
    each language, as a task's `evaluate` returns them. what: dev or test."""
    for code, values in figures.items():
        count, items = values.get("bad_images", 0), values["n"]
        if count > limit * items:
            raise UserError(
                f"{count:,} of {items:,} items of the {what} set in '{code}' have an image that cannot be "
                f"read (bad_limit={limit:g} of them may), such as {values['bad_image']}; what is trained "
                "stays: mend them and evaluate the run, or go on with a higher bad_limit="
            )


def _items(used: "UsedSet") -> Iterable[Any]:
    """The items of a set: in a search, parsed once for all trials."""
    return used.reading.load() if get_cache() else used.reading


def _describe(used: "UsedSet") -> str:
    return f"{used.reading.path} ({used.role}, '{used.reading.language}')"


def _verify(visual: VisualSource, sets: Sequence["UsedSet"], limit: float) -> Iterator[str]:
    """Read every image of the sets, once."""
    named = dict.fromkeys(name for used in sets for item in _items(used) for name in item.images)
    names = list(filter(visual.store.has, named))  # of the others the check of names has told
    limits = (visual.store.max_pixels,) if isinstance(visual.store, ImageStore) else ()
    found = cached("verified", (str(visual.store.path), names, *limits), lambda: _read_all(visual, names))
    for used in sets:
        faults = ImageFaults(_describe(used), limit)
        for item in _items(used):
            faults.add([name for name in item.images if name in found])
        first = next(iter(faults.names), "")
        consequence = LEFT_OUT if used.role == "train" else WRONG
        if line := faults.judge(
            f"an image that cannot be read ({found.get(first)})", consequence, "mend or remove them"
        ):
            yield line


def _read_all(visual: VisualSource, names: list[str]) -> dict[str, str]:
    """{name of an image that cannot be used: why}."""

    def read(name: str) -> str | None:
        try:
            visual.store.read(name)
        except BadImage as error:
            return str(error)
        return None

    faults: dict[str, str] = {}
    # decoding holds no lock of Python's
    with ThreadPoolExecutor(available_cpus()) as threads:
        blocks = progress(batched(names, BLOCK), "verify images", len(names), "images", len)
        for block in blocks:
            found = zip(block, threads.map(read, block), strict=True)
            faults |= {name: fault for name, fault in found if fault}
    return faults
