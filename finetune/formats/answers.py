"""Read texts with an answer: questions about images, statements about one image, two or a sentence.

1. Questions: GQA and xGQA, in the official form and in LXMERT's, which VQA v2 uses too; VQA v2, Japanese
   VQA on Visual Genome, FM-IQA, and cViL's parallel lines.
2. Entailment: XVNLI, SNLI, MultiNLI, XNLI. Two images: NLVR2, MaRVL.
3. The answer set, and whether two agree.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune.formats import (
    Example,
    beside,
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
from raylib.cache import file_fingerprint
from raylib.errors import UserError
from raylib.fileio import nfc, read_json
from raylib.pickles import load_plain
from raylib.randomness import string_key
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


# images of the parts of Japanese VQA, of its 99,208 (paper 3, section V-A, after UC2)
JA_VQA_IMAGES = {"train": 59_550, "dev": 1_984, "test": 37_674}
# kinds of Japanese questions: those that hold a word (paper 3, table I b)
JA_QUESTION_WORDS = {
    "nani (what)": ("何", "なに"),
    "dare (who)": ("誰", "だれ"),
    "doko (where)": ("どこ",),
    "donna (what kind)": ("どんな",),
    "dorekurai (how much)": ("どれくらい", "どれぐらい", "どのくらい", "どのぐらい"),
    "dou (how)": ("どう",),
    "itsu (when)": ("いつ",),
    "ikutsu (how many)": ("いくつ",),
    "naze (why)": ("なぜ", "何故"),
}


def read_ja_vqa(path: Path, part: str = "") -> Iterator[Example]:
    """[{id: image, qas: [{qa_id, question, answer}]}]: Japanese VQA on Visual Genome, and Visual Genome
    itself.

    part: of a file that has all images (the published question_answers.json), those of "train", "dev" or
        "test": as many as paper 3 has of each. Which these are, nobody has published: images are dealt by a
        hash of their ids.
    """
    images = _images_of_part(path, file_fingerprint(path), part) if part else None
    for where, record in stream_list(path):
        image = str(get_field(record, "id", int, where))
        if images is not None and image not in images:
            continue
        for place, qa in get_objects(record, "qas", where):
            answer = get_field(qa, "answer", str, place)
            number, text = str(get_field(qa, "qa_id", int, place)), get_field(qa, "question", str, place)
            yield Example(number, (text,), (image,), {answer: 1.0}, question_words(text))


def question_words(text: str) -> tuple[str, ...]:
    """Return the kinds of a Japanese question: of each question word that it holds."""
    return tuple(kind for kind, words in JA_QUESTION_WORDS.items() if any(word in text for word in words))


@functools.lru_cache(maxsize=8)
def _images_of_part(path: Path, fingerprint: Any, part: str) -> frozenset[str]:
    """The images of a part of the file, which is this version of itself."""
    names = {str(get_field(record, "id", int, where)) for where, record in stream_list(path)}
    dealt = sorted(names, key=lambda name: (string_key(name), name))
    parts, whole = list(JA_VQA_IMAGES), sum(JA_VQA_IMAGES.values())
    before = sum(JA_VQA_IMAGES[name] for name in parts[: parts.index(part)])
    first, end = (round(len(dealt) * n / whole) for n in (before, before + JA_VQA_IMAGES[part]))
    return frozenset(dealt[first:end])


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
    """{en, hi, ja, an: answer numbers, s: scores, img_id, q_id, o: tags of the image, joined by ";"}, a line
    each or in one array; the numbers are places in `answers`, a path from their folder ("A|B": B where A is
    not there). A test set may lack answers, a training set numbers of questions.

    The kind of a question is what kind of answer it has, as VQA has it: yes/no, number, other.

    translations: what these answers are in `language` (`read_translations`). Those with one translation are
        one class (`merge_answers`): each scores what they score together, 1 at most.
    """
    names = read_answers(beside(path, answers))
    groups = _groups(names, read_translations(path.parent / translations, names) if translations else names)
    is_array = first_character(path) == "["
    for place, (where, record) in enumerate(stream_list(path) if is_array else stream_jsonl(path)):
        numbers = get_optional(record, "an", list, where, [])
        scores = get_optional(record, "s", list, where, [])
        is_place = (type(n) is int and 0 <= n < len(names) for n in numbers)
        if len(numbers) != len(scores) or not all(is_place):
            raise UserError(
                f"{where}: answers {shorten(numbers)} with scores {shorten(scores)} do not fit "
                f"the {len(names)} answers"
            )
        labels: dict[str, float] = {}
        for n, s in zip(numbers, scores, strict=True):
            for name in groups[n]:
                labels[name] = min(1.0, labels.get(name, 0.0) + parse_number(s, where))
        # the kind goes by what most people answered, in English
        best = max(range(len(numbers)), key=scores.__getitem__, default=None)
        kind = "" if best is None else answer_type(names[numbers[best]])
        number = get_optional(record, "q_id", (int, str), where, place)
        image = get_field(record, "img_id", (int, str), where)
        tags = (
            tuple(filter(None, map(str.strip, get_field(record, "o", str, where).split(";"))))
            if "o" in record
            else ()
        )
        text = get_field(record, language, str, where)
        yield Example(str(number), (text,), (str(image),), labels, kind, tags=tags)


NUMBER = re.compile(r"[-+]?[\d.,:/]*\d%?")


def answer_type(answer: str) -> str:
    """Return the kind of an answer, as VQA's annotations call it."""
    return "yes/no" if answer in ("yes", "no") else "number" if NUMBER.fullmatch(answer) else "other"


def read_translations(path: Path, names: Sequence[str]) -> list[str]:
    """The translations of `names`: a JSON list in their order, or a JSON object {name: translation}.

    Raises:
        UserError: neither, or one is missing.
    """
    what = "a JSON list of the answers' translations in their order, or {answer: translation}"
    if not path.is_file():
        raise UserError(f"{path}: no such file; answers with one translation are one class here: give {what}")
    values = read_json(path, what, "translate the answers anew")
    if isinstance(values, dict) and not (missing := [name for name in names if name not in values]):
        values = [values[name] for name in names]
    elif isinstance(values, dict):
        raise UserError(f"{path}: no translation of {missing[0]!r}, one of {len(missing)} that are missing")
    if (
        not isinstance(values, list)
        or len(values) != len(names)
        or not all(isinstance(v, str) and v.strip() for v in values)
    ):
        raise UserError(f"{path}: wanted {len(names)} translations, one for each answer, and no empty one")
    return [nfc(" ".join(value.split())) for value in values]


def merge_answers(names: Sequence[str], translations: Sequence[str]) -> tuple[str, ...]:
    """Return the classes of answers of which some have one translation (cViL's Hindi: 2,912 of 3,129), each
    called by the first of its answers."""
    return tuple(dict.fromkeys(group[0] for group in _groups(names, translations)))


def _groups(names: Sequence[str], translations: Sequence[str]) -> list[tuple[str, ...]]:
    """Of each answer, all that have its translation, in their order."""
    found: dict[str, list[str]] = {}
    for name, translation in zip(names, translations, strict=True):
        found.setdefault(translation, []).append(name)
    groups = {translation: tuple(group) for translation, group in found.items()}
    return [groups[translation] for translation in translations]


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
