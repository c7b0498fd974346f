"""Readers of the tasks' annotations: texts with answers, images with captions."""

import gzip
import importlib
import json
import math
import pickle
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from finetune.formats.answers import JA_QUESTION_WORDS
from tests.fuzz.oracles import (
    dump_lines,
    load_json,
    load_lines,
    load_pairs,
    load_records,
    load_text,
    typed,
    write_files,
    zip_of,
)
from tests.fuzz.reader import Reader

COCO = "COCO_val2014_00000000000{}.jpg"
LABELS = ("contradiction", "neutral", "entailment")
LINES = ("finetune.formats:stream_lines", "raylib.textfile:open_text", "raylib.textfile:open_bytes")
JSONL = ("finetune.formats:stream_jsonl", *LINES)
LIST = ("finetune.formats:stream_list", "raylib.textfile:stream_json", "raylib.textfile:open_bytes")


def item(id, texts, images, labels, kind="", tags=(), sources=()) -> tuple:
    """An `Example` as a plain tuple."""
    return (id, texts, images, labels, kind, tags, "", (), sources)


def caption(image, captions, source="") -> tuple:
    """A `Captioned` as a plain tuple."""
    return (image, tuple(captions), (), source)


def score(value: Any) -> float:
    assert type(value) in (int, float) and math.isfinite(value)
    return float(value)


def relation(label: str) -> dict[str, float]:
    assert label in (*LABELS, "-")
    return {} if label == "-" else {label: 1.0}


def optional(record: dict, key: str, kind: type, default: Any) -> Any:
    return default if record.get(key) is None else typed(record, key, kind)


def records_of(path: Path, name: str = "") -> list[dict]:
    """The objects of a JSON list, or of the list `name` of an object."""
    values = json.loads(load_text(path))
    values = values[name] if name else values
    assert type(values) is list and all(type(value) is dict for value in values)
    return values


def gqa(path: Path) -> list:
    if load_text(path).lstrip()[:1] == "[":
        return [
            item(
                str(typed(r, "question_id", str, int)),
                (typed(r, "sent", str),),
                (typed(r, "img_id", str),),
                {key: score(value) for key, value in optional(r, "label", dict, {}).items()},
            )
            for r in records_of(path)
        ]
    found = []
    for key, r in load_pairs(path):
        assert type(r) is dict
        kind = optional(optional(r, "types", dict, {}), "structural", str, "")
        labels = {typed(r, "answer", str): 1.0}
        found.append(item(key, (typed(r, "question", str),), (typed(r, "imageId", str),), labels, kind))
    return found


def vqa(folder: Path) -> list:
    scores = {}
    for r in records_of(folder / "a.json", "annotations"):
        counts = Counter(typed(a, "answer", str) for a in typed(r, "answers", list))
        kind = optional(r, "answer_type", str, "")
        number = typed(r, "question_id", int)
        # with a question twice, which of its annotations counts is chance
        scores.setdefault(number, ({answer: min(1.0, n / 3) for answer, n in counts.items()}, kind))
    found = []
    for r in records_of(folder / "q.json", "questions"):
        labels, kind = scores[typed(r, "question_id", int)]
        image = f"{typed(r, 'image_id', int):012d}"
        found.append(item(str(r["question_id"]), (typed(r, "question", str),), (image,), labels, kind))
    return found


def ja_vqa(path: Path) -> Iterator[tuple]:
    for r in records_of(path):
        for qa in typed(r, "qas", list):
            labels = {typed(qa, "answer", str): 1.0}
            number, text = str(typed(qa, "qa_id", int)), typed(qa, "question", str)
            kinds = tuple(kind for kind, words in JA_QUESTION_WORDS.items() if any(w in text for w in words))
            yield item(number, (text,), (str(typed(r, "id", int)),), labels, kinds)


def fm_iqa(path: Path) -> Iterator[tuple]:
    for r in records_of(path, "train"):
        number, image = str(typed(r, "question_id", int)), f"{typed(r, 'image_id', int):012d}"
        yield item(number, (typed(r, "Question", str),), (image,), {typed(r, "Answer", str): 1.0})


def cvil(folder: Path) -> Iterator[tuple]:
    answers, classes = load_json(folder / "answers.json"), load_json(folder / "hindi.json")
    classes = [classes[answer] for answer in answers] if type(classes) is dict else classes
    assert len(answers) == len(classes) == len(set(answers)) and type(answers) is list
    assert all(type(word) is str for word in (*answers, *classes)) and all(map(str.split, classes))
    classes = [unicodedata.normalize("NFC", " ".join(word.split())) for word in classes]
    path = folder / "train.jsonl"
    is_array = load_text(path).lstrip()[:1] == "["
    for place, r in enumerate(records_of(path) if is_array else load_records(path)):
        labels: dict[str, float] = {}
        pairs = list(zip(optional(r, "an", list, []), optional(r, "s", list, []), strict=True))
        for n, s in pairs:
            assert type(n) is int and 0 <= n < len(answers)
            for answer in (a for a, c in zip(answers, classes, strict=True) if c == classes[n]):
                labels[answer] = min(1.0, labels.get(answer, 0.0) + score(s))
        best = answers[max(pairs, key=lambda pair: pair[1])[0]] if pairs else ""
        is_number = re.fullmatch(r"[-+]?[\d.,:/]*\d%?", best)
        kind = best and ("yes/no" if best in ("yes", "no") else "number" if is_number else "other")
        tags = tuple(filter(None, map(str.strip, typed(r, "o", str).split(";")))) if "o" in r else ()
        number = place if r.get("q_id") is None else typed(r, "q_id", int, str)
        image = str(typed(r, "img_id", int, str))
        yield item(str(number), (typed(r, "hi", str),), (image,), labels, kind if pairs else "", tags=tags)


def xvnli(path: Path) -> Iterator[tuple]:
    for r in load_records(path):
        texts, images = (typed(r, "sentence2", str),), (typed(r, "Flikr30kID", str),)
        yield item(typed(r, "pairID", str), texts, images, relation(typed(r, "gold_label", str)))


def snli(path: Path) -> Iterator[tuple]:
    for r in load_records(path):
        texts = typed(r, "sentence1", str), typed(r, "sentence2", str)
        yield item(str(typed(r, "pairID", str, int)), texts, (), relation(typed(r, "gold_label", str)))


def table(path: Path) -> list[dict[str, str]]:
    head, *rows = [line.split("\t") for line in load_lines(path)] or [[]]
    assert len(set(head)) == len(head)
    return [dict(zip(head, row, strict=True)) for row in rows]


def xnli(path: Path) -> list:
    rows = [row for row in table(path) if row["language"] == "de"]
    assert rows
    return [
        item(row["pairID"], (row["sentence1"], row["sentence2"]), (), relation(row["gold_label"]))
        for row in rows
    ]


def multinli(path: Path) -> list:
    return [
        item(
            str(number),
            (row["premise"], row["hypo"]),
            (),
            relation(row["label"].replace("contradictory", "contradiction")),
        )
        for number, row in enumerate(table(path))
    ]


def truth(value: Any) -> dict[str, float]:
    name = str(value).capitalize()
    assert name in ("True", "False")
    return {name: 1.0}


def nlvr2(path: Path) -> Iterator[tuple]:
    for r in load_records(path):
        identifier = typed(r, "identifier", str)
        split, part, pair, _ = identifier.split("-")
        images = tuple(f"{split}-{part}-{pair}-img{side}" for side in (0, 1))
        urls = tuple(optional(r, f"{side}_url", str, "") for side in ("left", "right"))
        label = truth(typed(r, "label", str, bool))
        yield item(identifier, (typed(r, "sentence", str),), images, label, sources=urls * all(urls))


def marvl(path: Path) -> Iterator[tuple]:
    for r in load_records(path):
        images = tuple(f"id/{typed(r, f'{side}_img', str)}" for side in ("left", "right"))
        label, kind = truth(typed(r, "label", str, bool)), optional(r, "chapter", str, "")
        yield item(str(typed(r, "id", str, int)), (typed(r, "caption", str),), images, label, kind)


def answers(path: Path) -> list:
    return answers_of(load_json(path))


def pickled_answers(path: Path) -> list:
    """By the standard library's unpickler, which finds no class."""

    class Plain(pickle.Unpickler):
        def find_class(self, module, name):
            raise pickle.UnpicklingError(f"{module}.{name}")

    with open(path, "rb") as file:
        values = Plain(file).load()
        assert not file.read(1), "something behind the pickle"
    return answers_of(values)


def answers_of(values: Any) -> list:
    if type(values) is dict:
        assert sorted(values.values()) == list(range(len(values)))
        values = sorted(values, key=lambda answer: values[answer])
    assert type(values) is list and all(type(v) is str for v in values) and len(set(values)) == len(values)
    return values


def label_of(value: Any) -> dict[str, float]:
    if type(value) is dict:
        return {answer: score(number) for answer, number in value.items()}
    values = value if type(value) is list else [value]
    assert all(type(v) in (str, int, bool) for v in values)
    return {str(v): 1.0 for v in values}


def examples(path: Path) -> Iterator[tuple]:
    for r in load_records(path):
        names = r["image"] if type(r["image"]) is list else [r["image"]]
        assert all(type(name) in (str, int) for name in names)
        labels = label_of(r["label"]) if "label" in r else {}
        id, kind = str(typed(r, "id", str, int)), str(typed(r, "kind", str, int))
        yield item(id, (typed(r, "text", str),), tuple(map(str, names)), labels, kind)


def captions(path: Path) -> Iterator[tuple]:
    for r in load_records(path):
        texts = typed(r, "caption", str, list)
        texts = [texts] if type(texts) is str else texts
        assert texts and all(type(text) is str and text.strip() for text in texts)
        yield caption(str(typed(r, "image", str, int)), texts)


def flickr(path: Path) -> Iterator[tuple]:
    for r in load_records(path):
        texts = typed(r, "sentences", list)
        assert texts and all(type(text) is str and text.strip() for text in texts)
        yield caption(typed(r, "img_path", str), texts)


def wit(path: Path) -> Iterator[tuple]:
    for r in load_records(path):
        text = typed(r, "caption_reference_description", str)
        yield caption(str(typed(r, "wit_ix", str, int)), [text], optional(r, "image_url", str, ""))


def multi30k(folder: Path) -> list:
    names = load_lines(folder / "val.txt")
    columns = [load_lines(folder / f"val.{part}.de.gz") for part in (1, 2)]
    return [caption(name, texts) for name, *texts in zip(names, *columns, strict=True)]


def xtd(folder: Path) -> list:
    import torch

    rows = list(zip(load_lines(folder / "names.txt"), load_lines(folder / "de.txt"), strict=True))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(42)).tolist()
    return [caption(rows[i][0], rows[i][1:]) for i in order[:50]]


def karpathy(folder: Path) -> Iterator[tuple]:
    excluded = {Path(line).name for line in load_lines(folder / "without.txt")}
    for r in records_of(folder / "dataset_coco.json", "images"):
        part, name = typed(r, "split", str).replace("restval", "train"), typed(r, "filename", str)
        if part == "test" and name not in excluded:
            yield caption(name, [typed(s, "raw", str) for s in typed(r, "sentences", list)])


def stair(folder: Path) -> list:
    split = {
        Path(typed(r, "filename", str)).stem
        for r in records_of(folder / "dataset_coco.json", "images")
        if typed(r, "split", str).replace("restval", "train") == "test"
        and all(type(typed(s, "raw", str)) is str for s in typed(r, "sentences", list))
    }
    names = {typed(r, "id", int): typed(r, "file_name", str) for r in records_of(folder / "s.json", "images")}
    found: dict[str, list[str]] = {}
    for r in records_of(folder / "s.json", "annotations"):
        name = names[typed(r, "image_id", int)]
        if Path(name).stem in split:
            found.setdefault(name, []).append(typed(r, "caption", str))
    return [caption(name, texts) for name, texts in found.items()]


def coco_cn(folder: Path) -> list:
    names, found = set(load_lines(folder / "test.txt")), {}
    for line in load_lines(folder / "cn.txt"):
        key, text = line.split("\t", 1)
        assert text.strip()
        if key.split("#")[0] in names:
            found.setdefault(key.split("#")[0], []).append(text)
    return [caption(name, texts) for name, texts in found.items()]


GQA_DICT = {
    f"0{n}": {
        "question": f"Is it {n}?",
        "answer": "yes",
        "imageId": f"n{n}",
        "types": {"structural": "verify"},
    }
    for n in range(3)
}
GQA_LIST = [
    {"img_id": "n1", "label": {"cat": 1, "dog": 0.3}, "question_id": 5, "sent": "What?"},
    {"img_id": "n2", "question_id": "6", "sent": "Who?"},
]
VQA = {
    "q.json": {"questions": [{"question_id": n, "image_id": n, "question": f"Q {n}?"} for n in (10, 11)]},
    "a.json": {
        "annotations": [
            {
                "question_id": n,
                "answers": [{"answer": "cat"}] * 3 + [{"answer": "dog"}],
                "answer_type": "other",
            }
            for n in (10, 11)
        ]
    },
}
CVIL = {
    "train.jsonl": dump_lines(
        *({"hi": f"H{n}", "an": [1, 0], "s": [0.9, 0.3], "img_id": n, "q_id": n, "o": "a;b"} for n in (4, 5))
    ),
    "answers.json": '["yes", "cat", "dog"]',
    "hindi.json": '["ha", "billi", "billi"]',
}
NLI = [
    {"gold_label": label, "sentence1": "A", "sentence2": f"B {label}", "pairID": label} for label in LABELS
]
XNLI = "language\tgold_label\tsentence1\tsentence2\tpairID\n" + "".join(
    f"{code}\tneutral\tA {code}\tB\t{n}\n" for n, code in enumerate(("ar", "de", "de"))
)
IMAGES = [
    {"filename": COCO.format(n), "split": split, "sentences": [{"raw": f"a {n}"}, {"raw": f"b {n}"}]}
    for n, split in enumerate(("test", "restval", "test"))
]
STAIR = {
    "images": [{"id": n, "file_name": COCO.format(n)} for n in range(3)],
    "annotations": [{"image_id": n % 3, "caption": f"x {n}"} for n in range(5)],
}
KARPATHY = json.dumps({"images": IMAGES, "dataset": "coco"})
MARVL = {
    "caption": "Dua.",
    "left_img": "1-5.jpg",
    "right_img": "1-6.jpg",
    "chapter": "Animal",
    "label": False,
}


def reader(
    name: str,
    files: dict[str, str | bytes],
    module: str,
    function: str,
    oracle: Callable,
    covers: tuple[str, ...],
    first: str = "",
    **options: str,
) -> Reader:
    """A record of the reader `module.function(path, **options)`, as a task reads its splits; `path` is the
    first file, or `first`."""

    def read(path: Path) -> Any:
        from finetune.tasks.base import _read

        path = path / (first or next(iter(files))) if len(files) > 1 else path
        return list(_read(getattr(importlib.import_module(module), function), path, options))

    def load(path: Path) -> Any:
        found = list(oracle(path))
        assert found, "nothing in it"
        return found

    covers = ("finetune.tasks.base:_read", f"{module}:{function}", *covers)
    return Reader(name, write_files(files), read, load, covers)


def read_answers(path: Path) -> Any:
    from finetune.formats.answers import read_answers

    return read_answers(path)


ANSWERS, FORMATS = "finetune.formats.answers", "finetune.formats"
READERS = [
    reader(
        "gqa",
        {"train.json": json.dumps(GQA_DICT)},
        ANSWERS,
        "read_gqa",
        gqa,
        (
            "finetune.formats:stream_members",
            "finetune.formats:first_character",
            "raylib.textfile:stream_json",
        ),
    ),
    reader("gqa_list", {"train.json": json.dumps(GQA_LIST)}, ANSWERS, "read_gqa", gqa, LIST),
    reader(
        "vqa_v2",
        {k: json.dumps(v) for k, v in VQA.items()},
        ANSWERS,
        "read_vqa_v2",
        vqa,
        LIST,
        annotations="a.json",
    ),
    reader(
        "ja_vqa",
        {
            "train.json": json.dumps(
                [{"id": 5, "qas": [{"qa_id": n, "question": "何?", "answer": "猫"} for n in (7, 8)]}]
            )
        },
        ANSWERS,
        "read_ja_vqa",
        ja_vqa,
        LIST,
    ),
    reader(
        "fm_iqa",
        {
            "FM-IQA.json": json.dumps(
                {
                    "train": [{"question_id": 3, "image_id": 4, "Question": "什么?", "Answer": "猫"}] * 2,
                    "val": [],
                }
            )
        },
        ANSWERS,
        "read_fm_iqa",
        fm_iqa,
        LIST,
        split="train",
    ),
    reader(
        "cvil",
        CVIL,
        ANSWERS,
        "read_cvil",
        cvil,
        (*JSONL, "finetune.formats.answers:read_answers", "finetune.formats.answers:read_translations"),
        language="hi",
        answers="answers.json",
        translations="hindi.json",
    ),
    reader(
        "xvnli",
        {"test.jsonl": dump_lines(*({**r, "Flikr30kID": str(n)} for n, r in enumerate(NLI)))},
        ANSWERS,
        "read_xvnli",
        xvnli,
        JSONL,
    ),
    reader(
        "xvnli_zip",
        {"train.jsonl.zip": zip_of("train.jsonl", dump_lines(*({**r, "Flikr30kID": "1"} for r in NLI)))},
        ANSWERS,
        "read_xvnli",
        xvnli,
        (*JSONL, "raylib.textfile:_unpack"),
    ),
    reader("snli", {"snli_1.0_dev.jsonl": dump_lines(*NLI)}, ANSWERS, "read_snli", snli, JSONL),
    reader("xnli", {"xnli.dev.tsv": XNLI}, ANSWERS, "read_xnli", xnli, LINES, language="de"),
    reader(
        "multinli",
        {"multinli.train.en.tsv": "premise\thypo\tlabel\nA\tB\tcontradictory\nC\tD\tneutral\n"},
        ANSWERS,
        "read_multinli",
        multinli,
        (*LINES, f"{ANSWERS}:_table"),
    ),
    reader(
        "nlvr2",
        {
            "dev.jsonl": dump_lines(
                *(
                    {
                        "sentence": f"Two {n}.",
                        "identifier": f"dev-850-0-{n}",
                        "label": "True",
                        "left_url": "u",
                    }
                    for n in (1, 2)
                )
            )
        },
        ANSWERS,
        "read_nlvr2",
        nlvr2,
        JSONL,
    ),
    reader(
        "marvl",
        {"marvl-id.jsonl": dump_lines(*({**MARVL, "id": f"id-{n}"} for n in range(3)))},
        ANSWERS,
        "read_marvl",
        marvl,
        JSONL,
        language="id",
    ),
    Reader(
        "answers_json",
        write_files({"answers.json": json.dumps({"yes": 0, "no": 1, "cat": 2})}),
        read_answers,
        answers,
        ("finetune.formats.answers:read_answers", "raylib.fileio:read_json"),
    ),
    Reader(
        "answers_pickle",
        write_files({"answers.pkl": pickle.dumps({"yes": 0, "no": 1, "cat": 2}, 2)}),
        read_answers,
        pickled_answers,
        ("finetune.formats.answers:read_answers",),
    ),
    reader(
        "examples",
        {
            "shapes.jsonl": dump_lines(
                {"text": "A?", "label": "yes", "image": "a.png", "id": 1, "kind": "x"},
                {"text": "B?", "label": ["no", "none"], "image": ["a.png", 2], "id": "2", "kind": 1},
                {"text": "C?", "label": {"no": 0.5}, "image": 7, "id": 3, "kind": "x"},
            )
        },
        FORMATS,
        "read_examples",
        examples,
        JSONL,
        image="image",
        id="id",
        kind="kind",
    ),
    reader(
        "captions",
        {"captions.jsonl": dump_lines({"image": 1, "caption": "a"}, {"image": "2", "caption": ["b", "c"]})},
        FORMATS,
        "read_captions",
        captions,
        JSONL,
    ),
    reader(
        "flickr",
        {"test.jsonl": dump_lines(*({"sentences": ["a", f"b{n}"], "img_path": f"{n}.jpg"} for n in (1, 2)))},
        FORMATS,
        "read_flickr",
        flickr,
        JSONL,
    ),
    reader(
        "wit",
        {
            "test.jsonl": dump_lines(
                *(
                    {"wit_ix": n, "caption_reference_description": "A church", "image_url": "u"}
                    for n in (1, 2)
                )
            )
        },
        FORMATS,
        "read_wit",
        wit,
        JSONL,
    ),
    reader(
        "multi30k",
        {
            "val.1.de.gz": gzip.compress(b"eins\nzwei\n", mtime=0),
            "val.2.de.gz": gzip.compress(b"one\ntwo\n", mtime=0),
            "val.txt": "1.jpg\n2.jpg\n",
        },
        FORMATS,
        "read_multi30k",
        multi30k,
        (*LINES, "raylib.textfile:_unpack"),
        images="val.txt",
        first="val.?.de.gz",
    ),
    reader(
        "xtd",
        {
            "de.txt": "".join(f"Satz {n}\n" for n in range(60)),
            "names.txt": "".join(f"{n}.jpg\n" for n in range(60)),
        },
        FORMATS,
        "read_xtd",
        xtd,
        LINES,
        images="names.txt",
        part="train",
    ),
    reader(
        "karpathy",
        {"dataset_coco.json": KARPATHY, "without.txt": f"{COCO.format(2)}\n"},
        FORMATS,
        "read_karpathy",
        karpathy,
        LIST,
        split="test",
        without="without.txt",
    ),
    reader(
        "stair",
        {"s.json": json.dumps(STAIR), "dataset_coco.json": KARPATHY},
        FORMATS,
        "read_coco",
        stair,
        LIST,
        images="dataset_coco.json",
        split="test",
    ),
    reader(
        "coco_cn",
        {"cn.txt": "COCO_1#0\tA\nCOCO_2#0\tB\nCOCO_1#1\tC\n", "test.txt": "COCO_1\n"},
        FORMATS,
        "read_coco_cn",
        coco_cn,
        LINES,
        images="test.txt",
    ),
]
