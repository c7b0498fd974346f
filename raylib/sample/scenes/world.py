"""Scenes and what can be asked and said of them. Everything is drawn from (seed, split, kind, number).

A *statement* is a template with its names, in no language yet: the same one is written down in all of them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from raylib.randomness import Key, hash64, permutation, uniform
from raylib.sample.canvas import Placement, place_concepts
from raylib.sample.scenes.labels import categories, hyponyms, labels, related, say, sentence

VENDORS = {
    "train": ("noto", "twemoji"),
    "dev": ("noto", "twemoji"),
    "shots": ("noto", "twemoji"),
    "test": ("fluent",),
}
QUESTIONS = ("verify", "query", "choose", "logical", "compare")


class Scene(NamedTuple):
    """A picture: its id, whose drawings it shows, what stands where."""

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

    def text(self, language: str, say=say) -> str:
        """The statement in `language`; `say` names a label or category in it."""
        slots = dict(zip("AB", (say(name, language) for name in self.names), strict=False))
        return sentence(self.template, language, slots, self.position)


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
    wanted: Sequence[str] = (),
    avoid: Sequence[str] = (),
) -> Scene:
    """A scene of `count` things, none related to another or, but for those `wanted`, to any in `avoid`."""
    dice = Dice(seed, split, name)
    chosen = list(wanted)
    while len(chosen) < count:
        candidate = dice.pick(list(labels()))
        if not any(candidate in related(other) for other in (*chosen, *avoid)):
            chosen.append(candidate)
    chosen = dice.order(chosen)
    placements = place_concepts([labels()[c].key for c in chosen], size, seed, split, name)
    return Scene(name, dice.pick(VENDORS[split]), tuple(zip(chosen, placements, strict=True)))


def absent(scene: Scene, dice: Dice, like: str | None = None) -> str:
    """A label that is not in the scene and related to nothing in it; half of the time of the category of
    `like`."""
    pool = [name for name in labels() if not any(name in related(other) for other in scene.names)]
    if like and dice.uniform() < 0.5:
        pool = [name for name in pool if labels()[name].category == labels()[like].category] or pool
    return dice.pick(pool)


def ask(scene: Scene, kind: str, dice: Dice) -> Statement | None:
    """A question of one of GQA's structural types; None where the scene allows none (nothing to compare,
    say)."""
    names = dice.order(scene.names)
    yes = dice.uniform() < 0.5
    other = absent(scene, dice, names[0])
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
    another = other
    while another in related(other):
        another = absent(scene, dice)
    return Statement("or", tuple(dice.order([other, another])), answer, "logical")


def claim(scene: Scene, relation: str, dice: Dice) -> Statement:
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
        there = {c for name in scene.names for c in labels()[name].categories}
        pool = sorted(there) if present else sorted(set(categories()) - there)
        if pool:
            return Statement("s_has" if positive else "s_not", (dice.pick(pool),), relation)
    pool = (
        names if present else [n for n in labels() if not any(n in related(other) for other in scene.names)]
    )
    low = [name for name in pool if labels()[name].ancestors]
    name = dice.pick(low if low and dice.uniform() < 0.9 else pool)
    return Statement("s_has" if positive else "s_not", (name,), relation)


def compare_pair(left: Scene, right: Scene, true: bool, dice: Dice) -> Statement:
    """A statement about two pictures that share something; a false one is nearly true."""
    answer = str(true)
    shared = [name for name in left.names if name in right.names]
    only_left = [name for name in left.names if not any(name in related(other) for other in right.names)]
    only_right = [name for name in right.names if not any(name in related(other) for other in left.names)]
    if dice.uniform() < 0.5:
        return Statement(
            "two_both", (dice.pick(shared) if true else dice.pick(only_left + only_right),), answer
        )
    pair = (dice.pick(only_left), dice.pick(only_right))
    return Statement("two_lr", pair if true else pair[::-1], answer)


def describe(scene: Scene, dice: Dice) -> Statement:
    """A caption: two of the things."""
    return Statement("cap2", tuple(dice.order(scene.names)[:2]), "")


def numbers(count: int, *keys: Key) -> np.ndarray:
    """`count` draws in {2, 3, 4}: how many things a scene has."""
    return 2 + (hash64(*keys, np.arange(count)) % np.uint64(3)).astype(int)
