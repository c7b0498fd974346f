"""Signs that a model does not read a language: nearly all items get one answer, or what asks for yes or no is
answered with something else. A run that shows one is marked in every table, with a footnote.

A mark says that a score needs no other explanation, so thresholds are wide: whatever answers at all passes.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from raylib.display import percent

YES_NO = frozenset(
    {"yes", "no"}
)  # the answers of what GQA calls verify and logical, in all languages of xGQA
MIN_ITEMS = 20  # fewer say nothing: nine in ten of them are soon one answer by chance
ONE_ANSWER = 0.9  # of predictions being one answer, above which a language is marked ...
COMMON = 0.7  # ... unless more of the truth than that is one answer too: classes are uneven in some data sets
YES_NO_ANSWERED = 0.1  # of yes-no questions answered with yes or no, below which a language is marked
MARKS = {
    "†": "nearly all items, or yes-no questions, get one answer",
    "‡": "yes-no questions get other answers",
}
Answers = Mapping[str, Any]  # `AnswerCounts.figures` of a language


class AnswerCounts:
    """Counts predicted and right answers, of all items and of yes-no questions."""

    def __init__(self) -> None:
        self.predicted: Counter[str] = Counter()
        self.right: Counter[str] = Counter()
        self.yes_no_predicted: Counter[str] = Counter()

    def add(self, labels: Mapping[str, float], prediction: str) -> None:
        """Count an item; of its `labels` the one with the highest score is what is right."""
        right = max(labels, key=labels.__getitem__)
        self.predicted[prediction] += 1
        self.right[right] += 1
        if right in YES_NO:
            self.yes_no_predicted[prediction] += 1

    def figures(self) -> dict[str, Any]:
        """{"n": items, "answer": the most frequent prediction, "share" of the predictions that are it,
        "right_share": of the items for which the most frequent right answer is right; and where there are any
        "yes_no": the same of yes-no questions, with "answered": the share of these that got yes or no}; {}
        of no items."""
        if not self.predicted:
            return {}
        found = _most_frequent(self.predicted, self.right)
        if self.yes_no_predicted:
            right = Counter({answer: self.right[answer] for answer in YES_NO})
            n = self.yes_no_predicted.total()
            answered = sum(self.yes_no_predicted[answer] for answer in YES_NO) / n
            found["yes_no"] = {**_most_frequent(self.yes_no_predicted, right), "answered": answered}
        return found


def _most_frequent(predicted: Counter[str], right: Counter[str]) -> dict[str, Any]:
    n = predicted.total()
    answer = min(predicted, key=lambda each: (-predicted[each], each))  # of equal ones the first by alphabet
    shares = {"share": predicted[answer] / n, "right_share": max(right.values()) / n}
    return {"n": n, "answer": answer, **shares}


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
    """A line for each mark that the languages of a table have; answers: by what tells the language."""
    signs = [(mark, f"{name}: {text}") for name, of in answers.items() for mark, text in _signs(of)]
    return [
        f"{mark} note: " + "; ".join(text for other, text in signs if other == mark)
        for mark in MARKS
        if mark in dict(signs)
    ]
