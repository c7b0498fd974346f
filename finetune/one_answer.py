"""Signs that a model does not read a language: nearly all items get one answer, or what asks for yes or no is
answered with something else. A run that shows one is marked in every table, with a footnote.

A mark says that a score needs no other explanation, so thresholds are wide: whatever answers at all passes.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from raylib.display import percent

MIN_ITEMS = 20  # fewer say nothing: nine in ten of them are soon one answer by chance
ONE_ANSWER = 0.9  # of predictions being one answer, above which a language is marked ...
COMMON = 0.7  # ... unless more of the truth than that is one answer too: classes are uneven in some data sets
YES_NO_ANSWERED = 0.1  # of yes-no questions answered with yes or no, below which a language is marked
MARKS = {
    "†": "nearly all items, or yes-no questions, get one answer",
    "‡": "yes-no questions get other answers",
}
Answers = Mapping[str, Any]  # `finetune.predict.AnswerCounts.figures` of a language


def marks_of(answers: Answers) -> str:
    """Return the marks of a language, "" for none; `answers`: as `AnswerCounts.figures`, {} where nobody has
    counted them."""
    return "".join(dict(_signs(answers)))


def _signs(answers: Answers) -> Iterator[tuple[str, str]]:
    """(mark, what it stands for), each mark once."""
    yes_no = answers.get("yes_no") or {}
    for kind, of in (("predictions", answers), ("answers to yes-no questions", yes_no)):
        if of.get("n", 0) >= MIN_ITEMS and of["share"] > ONE_ANSWER and of["right_share"] <= COMMON:
            right = f"the commonest right one: {percent(of['right_share'])} %"
            yield "†", f"{percent(of['share'])} % of the {kind} are {of['answer']!r} ({right})"
            break
    if yes_no.get("n", 0) >= MIN_ITEMS and yes_no["answered"] < YES_NO_ANSWERED:
        yield "‡", f"{percent(1 - yes_no['answered'])} % of the yes-no questions get neither yes nor no"


def footnotes(answers: Mapping[str, Answers]) -> list[str]:
    """A line for each mark that the languages of a table have, with those together of which the same is to
    be told; answers: by what tells the language."""
    found: dict[str, dict[str, list[str]]] = {mark: {} for mark in MARKS}
    for name, of in answers.items():
        for mark, text in _signs(of):
            found[mark].setdefault(text, []).append(name)
    return [
        f"{mark} note: " + "; ".join(f"{', '.join(names)}: {text}" for text, names in texts.items())
        for mark, texts in found.items()
        if texts
    ]
