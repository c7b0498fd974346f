"""Questions with free answers: VQA v2, Japanese VQA on Visual Genome, FM-IQA, and cViL's parallel lines."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from finetune.examples import Example
from finetune.formats.gqa import read_answers
from finetune.formats.stream import field, read_items, read_jsonl, read_listed, score_of
from raylib.errors import UserError
from raylib.fileio import read_json


def read_vqa_v2(path: Path, annotations: str) -> Iterator[Example]:
    """VQA v2's questions {questions: [{question_id, image_id, question}]} with `annotations`, a path from
    their folder.

    An answer that n of ten people gave scores min(1, n / 3): the common form of VQA's measure, without its
    average over the ten subsets of nine.
    """
    given, waiting = read_listed(path.parent / annotations, "annotations"), {}
    for where, record in read_listed(path, "questions"):
        number, image = field(record, "question_id", int, where), field(record, "image_id", int, where)
        while number not in waiting:  # both files are in the same order as they come: nothing waits long
            there, found = next(given, (where, None))
            if found is None:
                raise UserError(
                    f"{where}: question {number} has no annotation in {path.parent / annotations}"
                )
            waiting[field(found, "question_id", int, there)] = (
                _scores(found, there),
                found.get("answer_type", ""),
            )
        scores, kind = waiting.pop(number)
        yield Example(str(number), (field(record, "question", str, where),), (f"{image:012d}",), scores, kind)


def _scores(annotation: dict, where: str) -> dict[str, float]:
    counts = Counter(field(a, "answer", str, where) for a in field(annotation, "answers", list, where))
    return {answer: min(1.0, n / 3) for answer, n in counts.items()}


def read_ja_vqa(path: Path) -> Iterator[Example]:
    """[{id: image, qas: [{qa_id, question, answer}]}]: Japanese VQA on Visual Genome, and Visual Genome
    itself."""
    for key, record in read_items(path):
        where = f"{path}, item {key}"
        image = str(field(record, "id", int, where))
        for qa in field(record, "qas", list, where):
            answer = field(qa, "answer", str, where)
            number = str(field(qa, "qa_id", int, where))
            yield Example(number, (field(qa, "question", str, where),), (image,), {answer: 1.0})


def read_fm_iqa(path: Path, split: str) -> Iterator[Example]:
    """{split: [{question_id, image_id, Question, Answer}]}."""
    for where, record in read_listed(path, split):
        image, number = field(record, "image_id", int, where), field(record, "question_id", int, where)
        answer = field(record, "Answer", str, where)
        yield Example(
            str(number), (field(record, "Question", str, where),), (f"{image:012d}",), {answer: 1.0}
        )


def read_cvil(path: Path, language: str, answers: str, translations: str = "") -> Iterator[Example]:
    """JSON lines {en, hi, ja, an: answer numbers, s: scores, img_id, q_id, o: tags of the picture, joined by
    ";"}; the numbers are places in `answers`.

    translations: a JSON list, what each of these is in the language of the classes. Answers with one
        translation are one class then (cViL's Hindi: 2,912 of 3,129), which scores what they score together,
        1 at most.
    """
    names = read_answers(path.parent / answers)
    classes = _translated(path.parent / translations, names) if translations else names
    for where, record in read_jsonl(path):
        numbers, scores = field(record, "an", list, where), field(record, "s", list, where)
        if len(numbers) != len(scores) or any(not 0 <= n < len(names) for n in numbers):
            raise UserError(
                f"{where}: answers {numbers} with scores {scores} do not fit the {len(names)} answers"
            )
        labels: dict[str, float] = {}
        for n, s in zip(numbers, scores, strict=True):
            labels[classes[n]] = min(1.0, labels.get(classes[n], 0.0) + score_of(s, where))
        number, image = field(record, "q_id", (int, str), where), field(record, "img_id", (int, str), where)
        tags = (
            tuple(filter(None, map(str.strip, field(record, "o", str, where).split(";"))))
            if "o" in record
            else ()
        )
        yield Example(str(number), (field(record, language, str, where),), (str(image),), labels, tags=tags)


def _translated(path: Path, names: tuple[str, ...]) -> list[str]:
    """What each of `names` is called in `path`."""
    try:
        values = read_json(path)
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: not to be read as JSON ({e})") from None
    if (
        not isinstance(values, list)
        or len(values) != len(names)
        or not all(isinstance(v, str) for v in values)
    ):
        raise UserError(f"{path}: wanted a list of {len(names)} translations, one for each answer")
    return values
