"""Tiny data sets in the official formats of tasks that the emoji scenes do not stand for: one function a
task, which writes annotation files and images below a folder. What they say is nonsense; how it is written
is not."""

import gzip
import json
from pathlib import Path

import cv2
import numpy as np

from raylib.sample import read_concept_captions, read_images

SPLITS = {"train": 16, "dev": 6, "test": 6}  # images, or questions
KEYS = tuple(read_images("fluent"))
COCO = "COCO_val2014_{:012d}"


def say(language: str, number: int) -> str:
    """Something in this language: what CLDR calls a concept."""
    return read_concept_captions(language)[KEYS[number]].name


def write_images(folder: Path, names: list[str]) -> None:
    """JPEG files of drawings."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in zip(names, read_images("fluent").values(), strict=False):
        cv2.imwrite(str(folder / name), cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR))


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def write_lines(path: Path, lines) -> None:
    """A line each; records as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(
        (line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)) + "\n" for line in lines
    )
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def numbers(split: str) -> range:
    """Numbers of a split's images or questions: no two splits share one."""
    first = sum(size for name, size in SPLITS.items() if list(SPLITS).index(name) < list(SPLITS).index(split))
    return range(first, first + SPLITS[split])


EVERY = range(sum(SPLITS.values()))


def multi30k(data: Path) -> None:
    for split, part in (("train", "train"), ("dev", "val"), ("test", "test_2016_flickr")):
        write_lines(
            data / f"multi30k/data/task1/image_splits/{part}.txt", [f"{1000 + i}.jpg" for i in numbers(split)]
        )
        for language in ("en", "de", "fr", "cs"):
            write_lines(
                data / f"multi30k/data/task1/raw/{part}.{language}.gz",
                [say(language, i) for i in numbers(split)],
            )
    write_images(data / "images", [f"{1000 + i}.jpg" for i in EVERY])


def _karpathy(data: Path) -> None:
    parts = {
        i: part
        for split, part in (("train", "restval"), ("dev", "val"), ("test", "test"))
        for i in numbers(split)
    }
    parts[0] = "train"
    images = [
        {
            "filepath": "val2014",
            "filename": COCO.format(i) + ".jpg",
            "imgid": i,
            "split": part,
            "cocoid": i,
            "sentences": [{"raw": say("en", i), "imgid": i}, {"raw": f"a {say('en', i)}", "imgid": i}],
        }
        for i, part in parts.items()
    ]
    write_json(data / "coco/dataset_coco.json", {"images": images, "dataset": "coco"})
    write_images(data / "images/val2014", [COCO.format(i) + ".jpg" for i in EVERY])


def coco(data: Path) -> None:
    _karpathy(data)
    for part, chosen in (("train", [0]), ("val", EVERY[1:])):
        stair = {
            "images": [{"id": i, "file_name": COCO.format(i) + ".jpg", "coco_url": ""} for i in chosen],
            "annotations": [{"id": i, "image_id": i, "caption": say("ja", i)} for i in chosen],
        }
        write_json(data / f"coco/stair_captions_v1.2_{part}.json", stair)
    write_lines(
        data / "coco-cn/imageid.human-written-caption.txt",
        [f"{COCO.format(i)}#0\t{say('zh', i)}" for i in EVERY],
    )
    for split, part in (("train", "train"), ("dev", "val"), ("test", "test")):
        write_lines(data / f"coco-cn/coco-cn_{part}.txt", [COCO.format(i) for i in numbers(split)])


def xtd(data: Path) -> None:
    _karpathy(data)
    write_lines(data / "xtd/test_image_names.txt", [COCO.format(i) + ".jpg" for i in numbers("test")])
    for language in ("en", "de", "es", "fr", "it", "jp", "ko", "pl", "ru", "tr", "zh"):
        known = {"jp": "ja", "it": "es", "pl": "cs"}.get(language, language)
        write_lines(data / f"xtd/test_1kcaptions_{language}.txt", [say(known, i) for i in numbers("test")])


def wit(data: Path) -> None:
    for part, split in (("train", "train"), ("val", "dev"), ("test", "test")):
        for language in (
            ("en", "ar", "bg", "da", "el", "et", "id", "ja", "ko", "tr", "vi") if part == "test" else ("en",)
        ):
            write_lines(
                data / f"wit/annotations/{part}_{language}.jsonl",
                (
                    {
                        "wit_ix": i,
                        "caption_reference_description": say(language, i),
                        "image_url": "",
                        "page_url": "",
                        "language": language,
                        "image_idx": i,
                    }
                    for i in numbers(split)
                ),
            )
    write_images(data / "images", [f"{i}.jpg" for i in EVERY])


def vqa_v2(data: Path) -> None:
    for part, split in (("train2014", "train"), ("val2014", "test")):
        head = {"info": {}, "data_type": "mscoco", "data_subtype": part}
        questions = [{"question_id": 10 * i, "image_id": i, "question": say("en", i)} for i in numbers(split)]
        write_json(data / f"vqa/v2_OpenEnded_mscoco_{part}_questions.json", {**head, "questions": questions})
        people = [{"answer": "yes", "answer_confidence": "yes", "answer_id": n} for n in range(7)] + [
            {"answer": "no"}
        ] * 3
        annotations = [
            {
                "question_id": 10 * i,
                "image_id": i,
                "answers": people,
                "answer_type": "yes/no",
                "multiple_choice_answer": "yes",
            }
            for i in numbers(split)
        ]
        write_json(data / f"vqa/v2_mscoco_{part}_annotations.json", {**head, "annotations": annotations})
        write_images(data / f"images/{part}", [f"COCO_{part}_{i:012d}.jpg" for i in numbers(split)])


def cvil_vqa(data: Path) -> None:
    write_json(data / "cvil/answers.json", ["yes", "no", "cat"])
    write_json(data / "cvil/answers_hi.json", ["हाँ", "नहीं", "बिल्ली"])
    for split in SPLITS:
        write_lines(
            data / f"cvil/{split}.jsonl",
            (
                {
                    "en": say("en", i),
                    "hi": say("hi", i),
                    "ja": say("ja", i),
                    "hi-en": "",
                    "ja-en": "",
                    "o": "cat;dog",
                    "an": [i % 3],
                    "s": [0.9],
                    "img_id": f"COCO_val2014_{i:012d}",
                    "q_id": i,
                }
                for i in numbers(split)
            ),
        )
    write_images(data / "images", [COCO.format(i) + ".jpg" for i in EVERY])


def ja_vqa(data: Path) -> None:
    for split in SPLITS:
        write_json(
            data / f"ja_vqa/{split}.json",
            [
                {"id": i, "qas": [{"qa_id": i, "question": say("ja", i), "answer": "窓の外を見ている猫"}]}
                for i in numbers(split)
            ],
        )
    write_images(data / "images/VG_100K", [f"{i}.jpg" for i in EVERY])


def fm_iqa(data: Path) -> None:
    write_json(
        data / "fm_iqa/FM-IQA.json",
        {
            part: [
                {"question_id": i, "image_id": i, "Question": say("zh", i), "Answer": "猫在看窗外"}
                for i in numbers(split)
            ]
            for part, split in (("train", "train"), ("val", "test"))
        },
    )
    write_images(data / "images", [COCO.format(i) + ".jpg" for i in EVERY])


LABELS = ("contradiction", "neutral", "entailment")


def xnli(data: Path) -> None:
    rows = [
        f"{say('en', i)}\t{say('en', i + 1)}\t{LABELS[i % 3].replace('tion', 'tory')}"
        for i in numbers("train")
    ]
    write_lines(data / "XNLI-MT-1.0/multinli/multinli.train.en.tsv", ["premise\thypo\tlabel", *rows])
    for split in ("dev", "test"):
        rows = [
            f"{language}\t{LABELS[i % 3]}\t{say(language, i)}\t{say(language, i + 1)}\t{i}"
            for language in ("en", "ar", "es", "fr", "ru")
            for i in numbers(split)
        ]
        write_lines(
            data / f"XNLI-1.0/xnli.{split}.tsv", ["language\tgold_label\tsentence1\tsentence2\tpairID", *rows]
        )


def snli_xvnli(data: Path) -> None:
    def record(i: int, language: str, **more) -> dict:
        return {
            "gold_label": LABELS[i % 3],
            "sentence1": say("en", i),
            "sentence2": say(language, i + 1),
            "pairID": f"{i}.jpg#0r1n",
            "captionID": f"{i}.jpg#0",
            **more,
        }

    for split in ("train", "dev"):
        write_lines(data / f"snli_1.0/snli_1.0_{split}.jsonl", (record(i, "en") for i in numbers(split)))
    write_lines(
        data / "XVNLI/annotations/en/dev.jsonl", (record(i, "en", Flikr30kID=str(i)) for i in numbers("dev"))
    )
    for language in ("en", "ar", "es", "fr", "ru"):
        write_lines(
            data / f"XVNLI/annotations/{language}/test.jsonl",
            (record(i, language, Flikr30kID=str(i)) for i in numbers("test")),
        )
    write_images(data / "images", [f"{i}.jpg" for i in EVERY])
