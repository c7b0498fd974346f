"""Scenes, and what can be asked and said of them. Everything is drawn from (seed, split, kind, number). A
*statement* is a template with its names, in no language yet: the same one is written down in all of them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from raylib.randomness import Key, hash64, permutation, uniform
from raylib.sample import TRAINING_VENDORS, Placement, place_concepts
from raylib.sample.scenes import (
    fill_template,
    read_categories,
    read_labels,
    related_labels,
    translate_name,
    unrelated_to,
)

QUESTIONS = ("verify", "query", "choose", "logical", "compare")
NUMBERS = (2, 3, 4)  # of a thing in two images


class Scene(NamedTuple):
    """An image: its id, whose drawings it shows, what stands where."""

    id: str
    vendor: str
    objects: tuple[tuple[str, Placement], ...]  # (label, its place)

    @property
    def names(self) -> tuple[str, ...]:
        """Labels that are there, each once."""
        return tuple(dict.fromkeys(name for name, _ in self.objects))

    def count(self, label: str) -> int:
        """Count the label."""
        return sum(name == label for name, _ in self.objects)


class Statement(NamedTuple):
    """A template, the names that go into it, the quadrant or number that it speaks of, the answer; and the
    scene, or pair of scenes, that it is about."""

    template: str
    names: tuple[str, ...]
    answer: str
    kind: str = ""
    position: int | None = None
    number: int | None = None
    scene: str = ""

    def text(self, language: str, translate_name=translate_name) -> str:
        """The statement in `language`; `translate_name` names a label or category in it."""
        slots = dict(zip("AB", (translate_name(name, language) for name in self.names), strict=False))
        return fill_template(self.template, language, slots, self.position, self.number)


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
    """A scene of `count` things, none related to another or, but for those `required`, to any in `avoid`.
    What is required twice is there twice."""
    dice = Dice(seed, split, name)
    things = list(required)
    while len(things) < count:
        candidate = dice.pick(list(read_labels()))
        things += unrelated_to([candidate], (*things, *avoid))
    things = dice.order(things)
    placements = place_concepts([read_labels()[thing].key for thing in things], size, seed, split, name)
    return Scene(name, dice.pick(TRAINING_VENDORS), tuple(zip(things, placements, strict=True)))


def pick_absent(scene: Scene, dice: Dice, like: str, alike: float) -> str:
    """A label that is not in the scene and related to nothing in it; a share `alike` of the time of the
    category of `like`."""
    pool = unrelated_to(read_labels(), scene.names)
    if dice.uniform() < alike:
        pool = [name for name in pool if read_labels()[name].category == read_labels()[like].category] or pool
    return dice.pick(pool)


def ask_question(scene: Scene, kind: str, dice: Dice, difficulty: float = 0.5) -> Statement | None:
    """A question of one of GQA's structural types, or for a count; None where the scene allows none (nothing
    to compare, say). difficulty: `ScenesConfig`'s."""
    names = dice.order(scene.names)
    answer = "yes" if dice.uniform() < 0.5 else "no"
    # what stands in two places cannot be spoken of by its place or size
    single = [(name, p) for name, p in scene.objects if scene.count(name) == 1]
    rows = {p.quadrant: name for name, p in scene.objects}
    left = [p.quadrant for _, p in single if p.quadrant % 2 == 0 and p.quadrant + 1 in rows]
    if kind == "verify":
        pairs = [(rows[q + 1], rows[q]) for q in sorted(left) if scene.count(rows[q + 1]) == 1]
        if dice.uniform() < 2 * difficulty - 1 and pairs:
            pair = dice.pick(pairs)
            return Statement("verify_rel", pair if answer == "yes" else pair[::-1], answer, kind)
        other = pick_absent(scene, dice, names[0], difficulty)
        return Statement("verify", (names[0] if answer == "yes" else other,), answer, kind)
    if kind == "choose":
        other = pick_absent(scene, dice, names[0], difficulty)
        return Statement("choose", tuple(dice.order([names[0], other])), names[0], kind)
    if kind == "logical":
        return _logical(scene, names, answer, dice, difficulty)
    if kind == "compare":
        large, small = ([name for name, p in single if p.large == size] for size in (True, False))
        if not large or not small:
            return None
        pair = (dice.pick(large), dice.pick(small))
        return Statement("compare", tuple(dice.order(pair)), pair[0], kind)
    if kind == "count":
        # once or not at all, but for the scenes in which something stands several times
        often = [name for name in names if scene.count(name) > 1]
        present = often or (names if answer == "yes" else [pick_absent(scene, dice, names[0], difficulty)])
        return Statement("count", (present[0],), str(scene.count(present[0])), kind)
    # a place, or what stands to the right of something
    if left and dice.uniform() < 0.5:
        quadrant = dice.pick(sorted(left))
        return Statement("query_rel", (rows[quadrant],), rows[quadrant + 1], kind)
    quadrant = dice.pick(sorted(rows))
    return Statement("query_pos", (), rows[quadrant], kind, quadrant)


def _logical(scene: Scene, names: list[str], answer: str, dice: Dice, difficulty: float) -> Statement:
    """A question of two things: whether both are there, or at least one.

    An absent thing takes the place of one of the two and is like that one, never like the other: two of one
    category would tell the answer.
    """
    absent = [pick_absent(scene, dice, name, difficulty) for name in names[:2]]
    while absent[1] in related_labels(absent[0]):  # not one thing twice by another name
        absent[1] = pick_absent(scene, dice, names[1], difficulty)
    template = "and" if dice.uniform() < 0.5 else "or"
    if template == "and":
        pair = [names[0], names[1] if answer == "yes" else absent[1]]
    else:
        pair = [names[0] if answer == "yes" else absent[0], absent[1]]
    return Statement(template, tuple(dice.order(pair)), answer, "logical")


class Claimed(NamedTuple):
    """Labels that claims about a scene name, each below another label: what is below one that is there, what
    is there, what is not."""

    below: str
    present: str
    absent: str


def pick_claimed(dice: Dice) -> Claimed:
    """Pick three labels that are below others, none related to another: any of them has any part evenly, so
    that the name does not tell the relation."""
    picks: list[str] = []
    while len(picks) < 3:
        candidate = dice.pick([name for name, label in read_labels().items() if label.ancestors])
        families = {label for pick in picks for label in (pick, *read_labels()[pick].ancestors)}
        if not families & related_labels(candidate):
            picks.append(candidate)
    return Claimed(*dice.order(picks))


def make_claim(scene: Scene, claimed: Claimed, relation: str, dice: Dice) -> Statement:
    """A hypothesis about the scene: "entailment", "contradiction" or "neutral".

    True and false claims are affirmations and negations evenly, a few of them of categories or of any label.
    A neutral one speaks of something below a label that is there (a poodle, where a dog is), few of what no
    image shows ("is a gift").
    """
    template = "s_has" if dice.uniform() < 0.5 else "s_not"
    rare = dice.uniform()
    if relation == "neutral":
        if rare < 0.1:
            return Statement("s_neutral", (dice.pick(scene.names),), relation)
        return Statement(template, (claimed.below,), relation)
    present = (relation == "entailment") == (template == "s_has")
    name = claimed.present if present else claimed.absent
    if rare < 0.1:
        categories = {c for name in scene.names for c in read_labels()[name].categories}
        pool = sorted(categories) if present else sorted(set(read_categories()) - categories)
        name = dice.pick(pool) if pool else name
    elif rare < 0.2:
        name = dice.pick(scene.names if present else unrelated_to(read_labels(), scene.names))
    return Statement(template, (name,), relation)


def split_copies(dice: Dice) -> tuple[int, int]:
    """Split 2, 3 or 4 copies of a thing between two images, at least one in each."""
    total = dice.pick(NUMBERS)
    left = 1 + int(dice.uniform() * (total - 1))
    return left, total - left


def compare_pair(left: Scene, right: Scene, counted: bool, true: bool, dice: Dice) -> Statement:
    """A statement about two images that share one thing, and about its number where it is `counted`; a false
    one is nearly true."""
    answer = str(true)
    shared = [name for name in left.names if name in right.names]
    if counted:
        total = left.count(shared[0]) + right.count(shared[0])
        wrong = [number for number in NUMBERS if number != total]
        return Statement("two_count", (shared[0],), answer, number=total if true else dice.pick(wrong))
    only_left, only_right = unrelated_to(left.names, right.names), unrelated_to(right.names, left.names)
    if dice.uniform() < 0.5:
        return Statement("two_both", (dice.pick(shared if true else only_left + only_right),), answer)
    pair = (dice.pick(only_left), dice.pick(only_right))
    return Statement("two_lr", pair if true else pair[::-1], answer)


def make_caption(scene: Scene, dice: Dice) -> Statement:
    """A caption: two of the things."""
    return Statement("cap2", tuple(dice.order(scene.names)[:2]), "")


def draw_counts(num_scenes: int, difficulty: float, *keys: Key) -> list[int]:
    """Draw the number of things in each scene: 2, 3 or 4; beyond the middle of the difficulty, 4 more
    often."""
    counts = (2 + hash64(*keys, np.arange(num_scenes)) % np.uint64(3)).astype(int)
    counts[uniform(*keys, "more", np.arange(num_scenes)) < 2 * difficulty - 1] = 4
    return counts.tolist()
