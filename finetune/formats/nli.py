"""Entailment between a premise, a picture or a sentence, and a hypothesis."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from finetune.examples import Example
from finetune.formats.stream import field, read_jsonl, read_lines
from raylib.errors import UserError

LABELS = ("contradiction", "neutral", "entailment")
UNLABELLED = "-"  # annotators did not agree


def read_xvnli(path: Path) -> Iterator[Example]:
    """JSON lines {gold_label, sentence2, pairID, Flikr30kID [sic]}: the picture is the premise."""
    for where, record in read_jsonl(path):
        image = field(record, "Flikr30kID", str, where)
        hypothesis, number = field(record, "sentence2", str, where), field(record, "pairID", str, where)
        yield Example(number, (hypothesis,), (image,), _label(field(record, "gold_label", str, where), where))


def read_snli(path: Path) -> Iterator[Example]:
    """JSON lines {gold_label, sentence1, sentence2, pairID}: SNLI and MultiNLI."""
    for where, record in read_jsonl(path):
        texts = field(record, "sentence1", str, where), field(record, "sentence2", str, where)
        label = _label(field(record, "gold_label", str, where), where)
        yield Example(str(field(record, "pairID", (str, int), where)), texts, (), label)


def read_xnli(path: Path, language: str) -> Iterator[Example]:
    """The rows of one language of XNLI's tab-separated file: language, gold_label, sentence1, sentence2,
    pairID."""
    found = False
    for where, row in _table(path):
        if field(row, "language", str, where) == language:
            found = True
            texts = field(row, "sentence1", str, where), field(row, "sentence2", str, where)
            label = _label(field(row, "gold_label", str, where), where)
            yield Example(field(row, "pairID", str, where), texts, (), label)
    if not found:
        raise UserError(f"{path}: no row in language '{language}'")


def read_multinli(path: Path) -> Iterator[Example]:
    """XNLI's training file: a header, then premise, hypo, label; "contradictory" is a contradiction."""
    for number, (where, row) in enumerate(_table(path)):
        texts = field(row, "premise", str, where), field(row, "hypo", str, where)
        label = field(row, "label", str, where).replace("contradictory", "contradiction")
        yield Example(str(number), texts, (), _label(label, where))


def check_labels(ours: Sequence[str], theirs: Sequence[str], where: str) -> None:
    """Classes are compared by name: public code numbers entailment 1 or 2.

    Raises:
        UserError: other labels, or another order; both are named.
    """
    if tuple(ours) != tuple(theirs):
        what = "the same labels in another order" if sorted(ours) == sorted(theirs) else "other labels"
        raise UserError(f"{where}: {what}: [{_some(theirs)}] there, [{_some(ours)}] in this task")


def _some(labels: Sequence[str]) -> str:
    return ", ".join(labels) if len(labels) <= 6 else f"{', '.join(labels[:5])}, ... ({len(labels)})"


def _label(label: str, where: str) -> dict[str, float]:
    if label == UNLABELLED:
        return {}
    if label not in LABELS:
        raise UserError(f"{where}: unknown label '{label}'; there are: {', '.join(LABELS)}, and '-' for none")
    return {label: 1.0}


def _table(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of a tab-separated file by the names in its first line."""
    names: list[str] = []
    for where, line in read_lines(path):
        cells = line.split("\t")
        if not names:
            names = cells
        elif len(cells) != len(names):
            raise UserError(f"{where}: {len(cells)} cells under a header of {len(names)}")
        else:
            yield where, dict(zip(names, cells, strict=True))
