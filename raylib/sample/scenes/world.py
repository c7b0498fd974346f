"""Make scenes and what can be asked and said of them. Everything is drawn from (seed, split, kind, number).

A *statement* is a template with its names, in no language yet: the same one is written down in all of them.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from raylib.randomness import Key, hash64, permutation, uniform
from raylib.sample.canvas import Placement, place_concepts
from raylib.sample.concepts import read_concept_captions
from raylib.sample.scenes.labels import (
    fill_template,
    hyponyms,
    read_categories,
    read_labels,
    related_labels,
    translate_name,
)

VENDORS = {
    "train": ("noto", "twemoji"),
    "dev": ("noto", "twemoji"),
    "shots": ("noto", "twemoji"),
    "test": ("fluent",),
}
QUESTIONS = ("verify", "query", "choose", "logical", "compare")


class Scene(NamedTuple):
    """An image: its id, whose drawings it shows, what stands where."""

    id: str
    vendor: str
    objects: tuple[tuple[str, Placement], ...]  # (label, its place)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.objects)


class Statement(NamedTuple):
    """A template, the names that go into it, the quadrant that it speaks of, and the answer."""

    template: str
    names: tuple[str, ...]
    answer: str
    kind: str = ""
    position: int | None = None

    def text(self, language: str, translate_name=translate_name) -> str:
        """The statement in `language`; `translate_name` names a label or category in it."""
        slots = dict(zip("AB", (translate_name(name, language) for name in self.names), strict=False))
        return fill_template(self.template, language, slots, self.position)


Wording = Callable[[Statement], str]


class Dice:
    """A sequence of draws from its keys."""

    def __init__(self, *keys: Key):
        self.keys, self.count = keys, 0

    def uniform(self) -> float:
        self.count += 1
        return float(uniform(*self.keys, self.count))

    def pick(self, items: Sequence):
        """One of `items`."""
        return items[int(self.uniform() * len(items))]

    def order(self, items: Sequence) -> list:
        """`items` in another order."""
        self.count += 1
        return [items[i] for i in permutation(len(items), *self.keys, self.count)]


def make_scene(
    name: str,
    split: str,
    size: int,
    seed: int,
    count: int,
    required: Sequence[str] = (),
    avoid: Sequence[str] = (),
) -> Scene:
    """A scene of `count` things, none related to another or, but for those `required`, to any in `avoid`."""
    dice = Dice(seed, split, name)
    things = list(required)
    while len(things) < count:
        candidate = dice.pick(list(read_labels()))
        if not any(candidate in related_labels(other) for other in (*things, *avoid)):
            things.append(candidate)
    things = dice.order(things)
    placements = place_concepts([read_labels()[thing].key for thing in things], size, seed, split, name)
    return Scene(name, dice.pick(VENDORS[split]), tuple(zip(things, placements, strict=True)))


def pick_absent(scene: Scene, dice: Dice, like: str | None = None) -> str:
    """A label that is not in the scene and related to nothing in it; half of the time of the category of
    `like`."""
    pool = [name for name in read_labels() if not any(name in related_labels(other) for other in scene.names)]
    if like and dice.uniform() < 0.5:
        pool = [name for name in pool if read_labels()[name].category == read_labels()[like].category] or pool
    return dice.pick(pool)


def ask_question(scene: Scene, kind: str, dice: Dice) -> Statement | None:
    """A question of one of GQA's structural types; None where the scene allows none (nothing to compare,
    say)."""
    names = dice.order(scene.names)
    yes = dice.uniform() < 0.5
    other = pick_absent(scene, dice, names[0])
    if kind == "verify":
        return Statement("verify", (names[0] if yes else other,), "yes" if yes else "no", kind)
    if kind == "choose":
        return Statement("choose", tuple(dice.order([names[0], other])), names[0], kind)
    if kind == "logical":
        return _logical(scene, names, other, yes, dice)
    if kind == "compare":
        large = [name for name, p in scene.objects if p.large]
        small = [name for name, p in scene.objects if not p.large]
        if not large or not small:
            return None
        pair = [dice.pick(large), dice.pick(small)]
        return Statement("compare", tuple(dice.order(pair)), pair[0], kind)
    # a place, or what stands to the right of something
    rows = {p.quadrant: name for name, p in scene.objects}
    left = [q for q in (0, 2) if q in rows and q + 1 in rows]
    if left and dice.uniform() < 0.5:
        quadrant = dice.pick(left)
        return Statement("query_rel", (rows[quadrant],), rows[quadrant + 1], kind)
    quadrant = dice.pick(sorted(rows))
    return Statement("query_pos", (), rows[quadrant], kind, quadrant)


def _logical(scene: Scene, names: list[str], other: str, yes: bool, dice: Dice) -> Statement:
    answer = "yes" if yes else "no"
    if dice.uniform() < 0.5:
        pair = [names[0], names[1] if yes else other]
        return Statement("and", tuple(dice.order(pair)), answer, "logical")
    if yes:
        return Statement("or", tuple(dice.order([names[0], other])), answer, "logical")
    # two absent things, not one of them twice by another name
    another = other
    while another in related_labels(other):
        another = pick_absent(scene, dice)
    return Statement("or", tuple(dice.order([other, another])), answer, "logical")


def make_claim(scene: Scene, relation: str, dice: Dice) -> Statement:
    """A hypothesis about the scene: "entailment", "contradiction" or "neutral".

    True and false claims are made of affirmations and negations evenly, some of them of categories. A neutral
    one speaks of something below a label that is there (a poodle, where a dog is), if there is such a label
    and the dice agree; so most of the others speak of labels that are below another one too, lest the name
    tell the relation.
    """
    names = dice.order(scene.names)
    positive = dice.uniform() < 0.5
    if relation == "neutral":
        above = [name for name in names if hyponyms(name)]
        if above and dice.uniform() < 0.85:
            return Statement(
                "s_has" if positive else "s_not", (dice.pick(hyponyms(dice.pick(above))),), relation
            )
        return Statement("s_neutral", (names[0],), relation)
    present = (relation == "entailment") == positive
    if dice.uniform() < 0.1:
        scene_categories = {c for name in scene.names for c in read_labels()[name].categories}
        pool = sorted(scene_categories) if present else sorted(set(read_categories()) - scene_categories)
        if pool:
            return Statement("s_has" if positive else "s_not", (dice.pick(pool),), relation)
    pool = (
        names
        if present
        else [n for n in read_labels() if not any(n in related_labels(other) for other in scene.names)]
    )
    # most claims name something below another label, as neutral ones do: the name must not tell the relation
    low = [name for name in pool if read_labels()[name].ancestors]
    name = dice.pick(low if low and dice.uniform() < 0.9 else pool)
    return Statement("s_has" if positive else "s_not", (name,), relation)


def compare_pair(left: Scene, right: Scene, true: bool, dice: Dice) -> Statement:
    """A statement about two images that share something; a false one is nearly true."""
    answer = str(true)
    shared = [name for name in left.names if name in right.names]
    only_left = [
        name for name in left.names if not any(name in related_labels(other) for other in right.names)
    ]
    only_right = [
        name for name in right.names if not any(name in related_labels(other) for other in left.names)
    ]
    if dice.uniform() < 0.5:
        return Statement(
            "two_both", (dice.pick(shared) if true else dice.pick(only_left + only_right),), answer
        )
    pair = (dice.pick(only_left), dice.pick(only_right))
    return Statement("two_lr", pair if true else pair[::-1], answer)


def make_caption(scene: Scene, dice: Dice) -> Statement:
    """A caption: two of the things."""
    return Statement("cap2", tuple(dice.order(scene.names)[:2]), "")


def draw_counts(num_scenes: int, *keys: Key) -> list[int]:
    """Draw the number of things in each scene: 2, 3 or 4."""
    return (2 + hash64(*keys, np.arange(num_scenes)) % np.uint64(3)).astype(int).tolist()


def pick_above_and_below(dice: Dice) -> tuple[str, str]:
    """Pick a label that has others below it, and an unrelated one that is below another."""
    above = dice.pick([name for name in read_labels() if hyponyms(name)])
    below = [name for name, label in read_labels().items() if label.ancestors]
    return above, dice.pick([name for name in below if name not in related_labels(above)])


def in_language(language: str) -> Wording:
    """Word statements in `language`."""
    return lambda statement: statement.text(language)


def to_english(language: str, seed: int) -> Wording:
    """Word statements in English as an imperfect translator from `language` does: half of the labels that
    have a synonym always get one. What it makes of a sentence depends on the sentence alone."""

    def name(label: str, _: str) -> str:
        synonyms = read_labels()[label].synonyms if label in read_labels() else ()
        dice = Dice(seed, "translator", language, label)
        return dice.pick(synonyms) if synonyms and dice.uniform() < 0.5 else translate_name(label, "en")

    return lambda statement: statement.text("en", name)


def from_english(language: str, seed: int) -> Wording:
    """Word statements in `language` as an imperfect translator from English does: half of the labels get a
    keyword of CLDR's in place of the name, always the same."""

    def name(label: str, _: str) -> str:
        usual = translate_name(label, language)
        keywords = read_concept_captions(language)[read_labels()[label].key].keywords
        others = [word for word in keywords if word != usual]
        dice = Dice(seed, "translator into", language, label)
        return dice.pick(others) if others and dice.uniform() < 0.5 else usual

    return lambda statement: statement.text(language, name)
