"""Read texts with an answer: questions about images, statements about one image, two or a sentence.

1. Questions: GQA and xGQA, in the official form and in LXMERT's, which VQA v2 uses too; VQA v2, Japanese
   VQA on Visual Genome, FM-IQA, and cViL's parallel lines.
2. Entailment: XVNLI, SNLI, MultiNLI, XNLI. Two images: NLVR2, MaRVL.
3. The answer set, and whether two agree.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from finetune.formats import (
    Example,
    first_character,
    get_field,
    get_objects,
    get_optional,
    parse_number,
    shorten,
    stream_jsonl,
    stream_lines,
    stream_list,
    stream_members,
)
from raylib.errors import UserError
from raylib.fileio import read_json
from raylib.pickles import load_plain
from raylib.textfile import open_bytes

LABELS = ("contradiction", "neutral", "entailment")
UNLABELLED = "-"  # annotators did not agree


def read_gqa(path: Path) -> Iterator[Example]:
    """{question id: {question, answer, imageId, types: {structural}}}, or [{question_id, sent, img_id, label:
    {answer: score}}]."""
    if first_character(path) == "[":
        for where, record in stream_list(path):
            labels = get_optional(record, "label", dict, where, {})
            text, image = get_field(record, "sent", str, where), get_field(record, "img_id", str, where)
            number = get_field(record, "question_id", (str, int), where)
            yield Example(
                str(number), (text,), (image,), {k: parse_number(v, where) for k, v in labels.items()}
            )
        return
    for where, key, record in stream_members(path):
        text, image = get_field(record, "question", str, where), get_field(record, "imageId", str, where)
        answer = get_field(record, "answer", str, where)
        types = get_optional(record, "types", dict, where, {})
        kind = get_optional(types, "structural", str, where, "")
        yield Example(key, (text,), (image,), {answer: 1.0}, kind)


def read_vqa_v2(path: Path, annotations: str) -> Iterator[Example]:
    """VQA v2's questions {questions: [{question_id, image_id, question}]} with `annotations`, a path from
    their folder.

    An answer that n of ten people gave scores min(1, n / 3): the common form of VQA's measure, without its
    average over the ten subsets of nine.
    """
    pending: dict[int, tuple[dict[str, float], str]] = {}  # annotations read ahead, by question
    annotation_stream = stream_list(path.parent / annotations, "annotations")
    for where, record in stream_list(path, "questions"):
        number, image = (
            get_field(record, "question_id", int, where),
            get_field(record, "image_id", int, where),
        )
        # both files are in the same order as they come: nothing is pending long
        while number not in pending:
            source, annotation = next(annotation_stream, (where, None))
            if annotation is None:
                raise UserError(
                    f"{where}: question {number} has no annotation in {path.parent / annotations}"
                )
            scores = _scores(annotation, source)
            kind = get_optional(annotation, "answer_type", str, source, "")
            pending[get_field(annotation, "question_id", int, source)] = (scores, kind)
        scores, kind = pending.pop(number)
        yield Example(
            str(number), (get_field(record, "question", str, where),), (f"{image:012d}",), scores, kind
        )
    for _ in annotation_stream:  # a file that is cut off says so at its end
        pass


def _scores(annotation: dict, where: str) -> dict[str, float]:
    answers = get_objects(annotation, "answers", where)
    counts = Counter(get_field(answer, "answer", str, place) for place, answer in answers)
    return {answer: min(1.0, n / 3) for answer, n in counts.items()}


def read_ja_vqa(path: Path) -> Iterator[Example]:
    """[{id: image, qas: [{qa_id, question, answer}]}]: Japanese VQA on Visual Genome, and Visual Genome
    itself."""
    for where, record in stream_list(path):
        image = str(get_field(record, "id", int, where))
        for place, qa in get_objects(record, "qas", where):
            answer = get_field(qa, "answer", str, place)
            number = str(get_field(qa, "qa_id", int, place))
            yield Example(number, (get_field(qa, "question", str, place),), (image,), {answer: 1.0})


def read_fm_iqa(path: Path, split: str) -> Iterator[Example]:
    """{split: [{question_id, image_id, Question, Answer}]}."""
    for where, record in stream_list(path, split):
        image, number = (
            get_field(record, "image_id", int, where),
            get_field(record, "question_id", int, where),
        )
        answer = get_field(record, "Answer", str, where)
        yield Example(
            str(number), (get_field(record, "Question", str, where),), (f"{image:012d}",), {answer: 1.0}
        )


def read_cvil(path: Path, language: str, answers: str, translations: str = "") -> Iterator[Example]:
    """JSON lines {en, hi, ja, an: answer numbers, s: scores, img_id, q_id, o: tags of the image, joined by
    ";"}; the numbers are places in `answers`.

    translations: a JSON list, what each of these is in the language of the classes. Answers with one
        translation are one class then (cViL's Hindi: 2,912 of 3,129), which scores what they score together,
        1 at most.
    """
    # several answers with one translation become one class
    names = read_answers(path.parent / answers)
    classes = _translations(path.parent / translations, names) if translations else names
    for where, record in stream_jsonl(path):
        numbers, scores = get_field(record, "an", list, where), get_field(record, "s", list, where)
        is_place = (type(n) is int and 0 <= n < len(names) for n in numbers)
        if len(numbers) != len(scores) or not all(is_place):
            raise UserError(
                f"{where}: answers {shorten(numbers)} with scores {shorten(scores)} do not fit "
                f"the {len(names)} answers"
            )
        labels: dict[str, float] = {}
        for n, s in zip(numbers, scores, strict=True):
            labels[classes[n]] = min(1.0, labels.get(classes[n], 0.0) + parse_number(s, where))
        number, image = (
            get_field(record, "q_id", (int, str), where),
            get_field(record, "img_id", (int, str), where),
        )
        tags = (
            tuple(filter(None, map(str.strip, get_field(record, "o", str, where).split(";"))))
            if "o" in record
            else ()
        )
        yield Example(
            str(number), (get_field(record, language, str, where),), (str(image),), labels, tags=tags
        )


def _translations(path: Path, names: tuple[str, ...]) -> list[str]:
    """Read the translations of `names`."""
    values = read_json(path, "JSON: a list of translations", "translate the answers anew")
    if (
        not isinstance(values, list)
        or len(values) != len(names)
        or not all(isinstance(v, str) for v in values)
    ):
        raise UserError(f"{path}: wanted a list of {len(names)} translations, one for each answer")
    return values


def read_xvnli(path: Path) -> Iterator[Example]:
    """JSON lines {gold_label, sentence2, pairID, Flikr30kID [sic]}: the image is the premise."""
    for where, record in stream_jsonl(path):
        image = get_field(record, "Flikr30kID", str, where)
        hypothesis, number = (
            get_field(record, "sentence2", str, where),
            get_field(record, "pairID", str, where),
        )
        yield Example(
            number, (hypothesis,), (image,), _relation(get_field(record, "gold_label", str, where), where)
        )


def read_snli(path: Path) -> Iterator[Example]:
    """JSON lines {gold_label, sentence1, sentence2, pairID}: SNLI and MultiNLI."""
    for where, record in stream_jsonl(path):
        texts = get_field(record, "sentence1", str, where), get_field(record, "sentence2", str, where)
        label = _relation(get_field(record, "gold_label", str, where), where)
        yield Example(str(get_field(record, "pairID", (str, int), where)), texts, (), label)


def read_xnli(path: Path, language: str) -> Iterator[Example]:
    """The rows of one language of XNLI's tab-separated file: language, gold_label, sentence1, sentence2,
    pairID."""
    found = False
    for where, row in _table(path):
        if get_field(row, "language", str, where) == language:
            found = True
            texts = get_field(row, "sentence1", str, where), get_field(row, "sentence2", str, where)
            label = _relation(get_field(row, "gold_label", str, where), where)
            yield Example(get_field(row, "pairID", str, where), texts, (), label)
    if not found:
        raise UserError(f"{path}: no row in language '{language}'")


def read_multinli(path: Path) -> Iterator[Example]:
    """XNLI's training file: a header, then premise, hypo, label; "contradictory" is a contradiction."""
    for number, (where, row) in enumerate(_table(path)):
        texts = get_field(row, "premise", str, where), get_field(row, "hypo", str, where)
        label = get_field(row, "label", str, where).replace("contradictory", "contradiction")
        yield Example(str(number), texts, (), _relation(label, where))


def _relation(label: str, where: str) -> dict[str, float]:
    if label == UNLABELLED:
        return {}
    if label not in LABELS:
        raise UserError(
            f"{where}: unknown label {label!a:.60}; there are: {', '.join(LABELS)}, and '-' for none"
        )
    return {label: 1.0}


def _table(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of a tab-separated file by the names in its first line."""
    names: list[str] = []
    for where, line in stream_lines(path):
        cells = line.split("\t")
        if not names:
            if len(set(names := cells)) < len(names):
                raise UserError(f"{where}: the header names a column twice")
        elif len(cells) != len(names):
            raise UserError(f"{where}: {len(cells)} cells under a header of {len(names)}")
        else:
            yield where, dict(zip(names, cells, strict=True))


def read_nlvr2(path: Path) -> Iterator[Example]:
    """JSON lines {sentence, identifier, label, left_url, right_url}; identifier "dev-12-0-1" has the images
    dev-12-0-img0 and -img1. The addresses tell which of these are one image, and may be missing."""
    for where, record in stream_jsonl(path):
        sentence, identifier = (
            get_field(record, "sentence", str, where),
            get_field(record, "identifier", str, where),
        )
        if identifier.count("-") != 3:
            raise UserError(f"{where}: identifier {identifier!a:.60} is not split-set-pair-sentence")
        stem = identifier.rsplit("-", 1)[0]
        label = _truth(get_field(record, "label", (str, bool), where), where)
        urls = [get_optional(record, side, str, where, "") for side in ("left_url", "right_url")]
        yield Example(
            identifier,
            (sentence,),
            (f"{stem}-img0", f"{stem}-img1"),
            label,
            sources=tuple(urls) if all(urls) else (),
        )


def read_marvl(path: Path, language: str = "") -> Iterator[Example]:
    """JSON lines {caption, left_img, right_img, id, chapter, label}; broken down by chapter. Images of
    several languages have the same names: with `language`, each is looked for in the folder of this
    language."""
    for where, record in stream_jsonl(path):
        names = (get_field(record, side, str, where) for side in ("left_img", "right_img"))
        images = tuple(f"{language}/{name}" if language else name for name in names)
        caption, number = get_field(record, "caption", str, where), get_field(record, "id", (str, int), where)
        label = _truth(get_field(record, "label", (str, bool), where), where)
        chapter = get_optional(record, "chapter", str, where, "")
        yield Example(str(number), (caption,), images, label, chapter)


def _truth(label: str | bool, where: str) -> dict[str, float]:
    name = str(label).capitalize()
    if name not in ("True", "False"):
        raise UserError(f"{where}: label {label!a:.60} is neither True nor False")
    return {name: 1.0}


def read_answers(path: Path) -> tuple[str, ...]:
    """The answer set in its order, from a JSON list, a JSON object {answer: number}, or the official pickles
    of either.

    Raises:
        UserError: none of these; numbers that are not 0 ... n - 1; a pickle that holds more than plain
            values.
    """
    if path.suffix == ".pkl":
        with open_bytes(path) as (file, _):
            values = load_plain(file.read(), str(path))
    else:
        values = read_json(path, "answers")
    if isinstance(values, dict):
        numbers = [number for number in values.values() if type(number) is int]
        if len(numbers) < len(values) or sorted(numbers) != list(range(len(values))):
            raise UserError(f"{path}: the answers' numbers are not 0 ... {len(values) - 1}")
        values = sorted(values, key=lambda answer: values[answer])
    if (
        not isinstance(values, list)
        or not all(isinstance(v, str) for v in values)
        or len(set(values)) < len(values)
    ):
        raise UserError(f"{path}: wanted a list of different answers, or an object of answers and numbers")
    return tuple(values)


def check_labels(task_labels: Sequence[str], stored: Sequence[str], where: str) -> None:
    """Classes are compared by name: public code numbers entailment 1 or 2.

    Raises:
        UserError: other labels, or another order; both are named.
    """
    if tuple(task_labels) != tuple(stored):
        same = sorted(task_labels) == sorted(stored)
        difference = "the same labels in another order" if same else "other labels"
        raise UserError(
            f"{where}: {difference}: [{shorten_labels(stored)}] there, [{shorten_labels(task_labels)}] in "
            "this task"
        )


def shorten_labels(labels: Sequence[str]) -> str:
    """The first few labels, and how many there are."""
    return ", ".join(labels) if len(labels) <= 6 else f"{', '.join(labels[:5])}, ... ({len(labels)})"
