"""Wordings of statements: as they are in a language, and as translators word them, who get every sentence
right or some of them wrong.

A translator's error is drawn from (seed, language, direction, scene, sentence): the sentences that are wrong
where a tenth is are wrong in the same way where three tenths are.
"""

from collections.abc import Callable
from functools import cache

from raylib.sample import read_concept_captions
from raylib.sample.scenes import FOODS, read_categories, read_labels, related_labels, translate_name
from raylib.sample.scenes.statements import Dice, Statement

Wording = Callable[[Statement], str]
Translator = Callable[[str, int], Wording]  # (language, seed) -> wording

# what a wrong translation makes of a sentence besides calling a thing by the name of another: it drops the
# negation, mixes up "and" and "or", loses one of two things or pictures
CONFUSED_TEMPLATES = {
    "s_not": ("s_has",),
    "and": ("or", "verify"),
    "or": ("and", "verify"),
    "choose": ("verify",),
    "two_both": ("s_has",),
}
ORDERED_TEMPLATES = ("two_lr",)  # names in the wrong order mean something else


def in_language(language: str) -> Wording:
    """Word statements in `language`."""
    return lambda statement: statement.text(language)


def to_english(language: str, seed: int) -> Wording:
    """Word statements in English as an imperfect translator from `language` does: half of the labels that
    have a synonym always get one."""

    @cache
    def name(label: str, _: str) -> str:
        synonyms = read_labels()[label].synonyms if label in read_labels() else ()
        dice = Dice(seed, "translator", language, label)
        return dice.pick(synonyms) if synonyms and dice.uniform() < 0.5 else translate_name(label, "en")

    return lambda statement: statement.text("en", name)


def from_english(language: str, seed: int) -> Wording:
    """Word statements in `language` as an imperfect translator from English does: half of the labels get a
    keyword of CLDR's in place of the name, always the same."""

    @cache
    def name(label: str, _: str) -> str:
        usual = translate_name(label, language)
        keywords = read_concept_captions(language)[read_labels()[label].key].keywords
        others = [word for word in keywords if word != usual]
        dice = Dice(seed, "translator into", language, label)
        return dice.pick(others) if others and dice.uniform() < 0.5 else usual

    return lambda statement: statement.text(language, name)


def with_errors(translator: Translator, share: float) -> Translator:
    """The translator with so many of its sentences wrong: `mistranslate`."""

    def build(language: str, seed: int) -> Wording:
        word = translator(language, seed)

        def word_or_fail(statement: Statement) -> str:
            sentence: list[str | int] = [statement.scene, statement.template, *statement.names]
            dice = Dice(seed, "errors", translator.__name__, language, *sentence, statement.position or 0)
            return word(mistranslate(statement, dice) if dice.uniform() < share else statement)

        return word_or_fail

    return build


def mistranslate(statement: Statement, dice: Dice) -> Statement:
    """Return the statement with one error that real translations have: another thing's name of the same
    category, a negation that is dropped, "or" for "and", something left out, names or sides swapped."""
    wrong: list[Statement] = []
    for i, name in enumerate(statement.names):
        others = [other for other in _mistakable_for(name) if other not in statement.names]
        if others:
            names = (*statement.names[:i], dice.pick(others), *statement.names[i + 1 :])
            wrong.append(statement._replace(names=names))
    for template in CONFUSED_TEMPLATES.get(statement.template, ()):
        # into a sentence about one thing goes one of the two
        names = (dice.pick(statement.names),) if template in ("verify", "s_has") else statement.names
        wrong.append(statement._replace(template=template, names=names))
    if statement.template in ORDERED_TEMPLATES:
        wrong.append(statement._replace(names=statement.names[::-1]))
    if statement.position is not None:
        # the other side, or the other end
        wrong += [statement._replace(position=statement.position ^ flip) for flip in (1, 2)]
    if not wrong:  # the names are all that their category has: something of another one
        related = set(statement.names).union(*map(related_labels, statement.names))
        other = dice.pick([name for name in read_labels() if name not in related])
        wrong.append(statement._replace(names=(other, *statement.names[1:])))
    return dice.pick(wrong)


@cache
def _mistakable_for(name: str) -> list[str]:
    """Labels of the same category, none of them related; other categories."""
    if name in read_categories():
        # a fruit is food: the one for the other is no error
        same = {name, "food"} if name in FOODS else {name, *FOODS} if name == "food" else {name}
        return sorted(set(read_categories()) - same)
    category = read_labels()[name].category
    return [
        other
        for other, label in read_labels().items()
        if label.category == category and other not in related_labels(name)
    ]
