"""Scenes, and what can be asked and said of them. Everything is drawn from (seed, split, kind, number). A
*statement* is a template with its names, in no language yet: the same one is written down in all of them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from raylib.randomness import Key, hash64, permutation, uniform
from raylib.sample import TRAINING_VENDORS, Placement, place_concepts
from raylib.sample.scenes import (
    fill_template,
    hyponyms,
    read_categories,
    read_labels,
    related_labels,
    translate_name,
    unrelated_to,
)

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
    """A template, the names that go into it, the quadrant that it speaks of, the answer; and the scene, or
    pair of scenes, that it is about."""

    template: str
    names: tuple[str, ...]
    answer: str
    kind: str = ""
    position: int | None = None
    scene: str = ""

    def text(self, language: str, translate_name=translate_name) -> str:
        """The statement in `language`; `translate_name` names a label or category in it."""
        slots = dict(zip("AB", (translate_name(name, language) for name in self.names), strict=False))
        return fill_template(self.template, language, slots, self.position)


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
        things += unrelated_to([candidate], (*things, *avoid))
    things = dice.order(things)
    placements = place_concepts([read_labels()[thing].key for thing in things], size, seed, split, name)
    return Scene(name, dice.pick(TRAINING_VENDORS), tuple(zip(things, placements, strict=True)))


def pick_absent(scene: Scene, dice: Dice, like: str | None = None) -> str:
    """A label that is not in the scene and related to nothing in it; half of the time of the category of
    `like`."""
    pool = unrelated_to(read_labels(), scene.names)
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
    template = "s_has" if positive else "s_not"
    if relation == "neutral":
        above = [name for name in names if hyponyms(name)]
        if above and dice.uniform() < 0.85:
            return Statement(template, (dice.pick(hyponyms(dice.pick(above))),), relation)
        return Statement("s_neutral", (names[0],), relation)
    present = (relation == "entailment") == positive
    if dice.uniform() < 0.1:
        scene_categories = {c for name in scene.names for c in read_labels()[name].categories}
        pool = sorted(scene_categories) if present else sorted(set(read_categories()) - scene_categories)
        if pool:
            return Statement(template, (dice.pick(pool),), relation)
    pool = names if present else unrelated_to(read_labels(), scene.names)
    # most claims name something below another label, as neutral ones do: the name must not tell the relation
    low = [name for name in pool if read_labels()[name].ancestors]
    name = dice.pick(low if low and dice.uniform() < 0.9 else pool)
    return Statement(template, (name,), relation)


def compare_pair(left: Scene, right: Scene, true: bool, dice: Dice) -> Statement:
    """A statement about two images that share something; a false one is nearly true."""
    answer = str(true)
    shared = [name for name in left.names if name in right.names]
    only_left, only_right = unrelated_to(left.names, right.names), unrelated_to(right.names, left.names)
    if dice.uniform() < 0.5:
        return Statement("two_both", (dice.pick(shared if true else only_left + only_right),), answer)
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
