"""Write the miniature IGLUE: the official formats, in the folders of the IGLUE repository (`README.md` lists
them)."""

import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from pydantic import Field, PositiveInt

from raylib.config import Config
from raylib.errors import UserError
from raylib.fileio import atomic_folder
from raylib.sample.canvas import decode_drawings, draw_webp
from raylib.sample.concepts import LANGUAGES as ALL_LANGUAGES
from raylib.sample.concepts import read_captions
from raylib.sample.scenes.labels import DATA, LANGUAGES, hyponyms, labels, related, say
from raylib.sample.scenes.world import (
    QUESTIONS,
    Dice,
    Scene,
    Statement,
    ask,
    claim,
    compare_pair,
    describe,
    make_scene,
    numbers,
)

XGQA = ("en", "de", "bn", "id", "ko", "pt", "ru", "zh")
XVNLI = ("en", "ar", "es", "fr", "ru")
SHOTS = {
    "gqa": (1, 5, 10, 20, 25, 48),
    "nli": (1, 5, 10, 20, 25, 48),
    "flickr": (1, 5, 10, 25, 50, 100),
    "marvl": (1, 2, 4, 10),
}
RELATIONS = ("entailment", "neutral", "contradiction")


class ScenesConfig(Config):
    """Items of each task, and the side of a picture in pixels."""

    train: PositiveInt = 3000
    dev: PositiveInt = 300
    test: PositiveInt = 1000
    shots: int = Field(100, ge=1)  # pictures in the largest few-shot set
    size: int = Field(64, ge=32, le=512)
    seed: int = 0

    def shot_sizes(self, task: str) -> tuple[int, ...]:
        """How many pictures each few-shot set of a task has."""
        return tuple(n for n in SHOTS[task] if n <= self.shots)


class Writer:
    """Files under `out`: JSON, JSON lines, and every scene that is asked for, once, into `images.tar`."""

    def __init__(self, out: Path, config: ScenesConfig):
        self.out, self.config = out, config
        self.tar = tarfile.open(out / "images.tar", "w")  # noqa: SIM115
        self.truth: list[Scene] = []

    def scene(self, name: str, split: str, count: int, *wanted: tuple[str, ...]) -> Scene:
        """A new scene; its picture is in the tar as `name`.webp. `wanted`: as in `make_scene`, and what to
        avoid."""
        scene = make_scene(name, split, self.config.size, self.config.seed, count, *wanted)
        placements = [placement for _, placement in scene.objects]
        data = draw_webp(placements, decode_drawings(scene.vendor), self.config.size)
        info = tarfile.TarInfo(f"{name}.webp")
        info.size = len(data)
        self.tar.addfile(info, io.BytesIO(data))
        self.truth.append(scene)
        return scene

    def json(self, path: str, value) -> None:
        self._write(path, json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n")

    def lines(self, path: str, records: Iterable[dict]) -> None:
        self._write(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))

    def _write(self, path: str, text: str) -> None:
        """As a file, or as the one member of a .zip, where IGLUE has one."""
        full = self._path(path)
        if full.suffix != ".zip":
            full.write_text(text, encoding="utf-8")
            return
        with zipfile.ZipFile(full, "w") as archive:
            archive.writestr(
                zipfile.ZipInfo(full.stem), text, zipfile.ZIP_DEFLATED
            )  # of 1980: the same bytes each time

    def close(self) -> None:
        """End the tar, write the ground truth."""
        self.tar.close()
        self.lines(
            "scenes.jsonl",
            (
                {
                    "id": s.id,
                    "vendor": s.vendor,
                    "objects": [
                        {
                            "label": name,
                            "left": p.left,
                            "top": p.top,
                            "size": p.size,
                            "quadrant": p.quadrant,
                            "large": p.large,
                        }
                        for name, p in s.objects
                    ],
                }
                for s in self.truth
            ),
        )

    def _path(self, path: str) -> Path:
        full = self.out / path
        full.parent.mkdir(parents=True, exist_ok=True)
        return full


def write_scenes(out: Path, config: ScenesConfig) -> str:
    """Write all tasks into `out`, whole or not at all; returns a line about what is there.

    Raises:
        UserError: `out` is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: not empty; give a new folder")
    with atomic_folder(out) as partial:
        _write_tasks(partial, config)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return f"{out}: 4 tasks of {config.train} + {config.dev} + {config.test} items, {size / 1e6:.1f} MB"


def _write_tasks(out: Path, config: ScenesConfig) -> None:
    writer = Writer(out, config)
    for task in (_questions, _entailment, _captions, _pairs):
        task(writer, config)
    _dictionaries(writer)
    for source in ("vectors.txt", *(f"wordnet/{path.name}" for path in sorted((DATA / "wordnet").iterdir()))):
        writer._path(source).write_bytes((DATA / source).read_bytes())
    writer.json("relations.json", {name: _relations(name) for name in labels()})
    writer.close()


def _relations(name: str) -> dict:
    """WordNet's view of a label among the labels: its synset, others of the same synset, direct hypernyms."""
    label = labels()[name]
    same = [other.name for other in labels().values() if other.synset == label.synset and other.name != name]
    return {"synset": label.synset, "synonyms": same, "hypernyms": label.hypernyms}


def translator(language: str, seed: int) -> Callable[[str, str], str]:
    """How an imperfect translator from `language` names things in English: half of the labels that have a
    synonym always get one. What it makes of a sentence depends on the sentence alone."""

    def name(label: str, _: str) -> str:
        known = labels()[label].synonyms if label in labels() else ()
        dice = Dice(seed, "translator", language, label)
        return dice.pick(known) if known and dice.uniform() < 0.5 else say(label, "en")

    return name


def translator_into(language: str, seed: int) -> Callable[[str, str], str]:
    """How an imperfect translator from English names things in `language`: half of the labels get a keyword
    of CLDR's in place of the name, always the same."""

    def name(label: str, _: str) -> str:
        said = say(label, language)
        others = [word for word in read_captions(language)[labels()[label].key].keywords if word != said]
        dice = Dice(seed, "translator into", language, label)
        return dice.pick(others) if others and dice.uniform() < 0.5 else said

    return name


def _questions(writer: Writer, config: ScenesConfig) -> None:
    def make(split: str, count: int) -> dict[str, tuple[str, Statement]]:
        items, things = {}, numbers(count, config.seed, "gqa", split)
        for i in range(count):
            scene = writer.scene(f"g{split}{i}", split, int(things[i]))
            dice = Dice(config.seed, "gqa", split, i)
            asked = [q for kind in dice.order(QUESTIONS) if (q := ask(scene, kind, dice))][:3]
            for question in asked:
                items[f"{split}{len(items):06d}"] = (scene.id, question)
                if len(items) == count:
                    return items
        return items

    def records(items: dict, text: Callable[[Statement], str]) -> dict[str, dict]:
        return {
            qid: {
                "question": text(q),
                "answer": q.answer,
                "imageId": image,
                "isBalanced": True,
                "types": {"structural": q.kind, "semantic": "obj", "detailed": q.template},
            }
            for qid, (image, q) in items.items()
        }

    def listed(items: dict) -> list[dict]:
        """LXMERT's form, in English."""
        return [
            {"img_id": image, "label": {q.answer: 1.0}, "question_id": qid, "sent": q.text("en")}
            for qid, (image, q) in items.items()
        ]

    train = make("train", config.train)
    writer.json("gqa/annotations/train.json.zip", listed(train))
    writer.json("gqa/annotations/valid.json", listed(make("dev", config.dev)))
    writer.json("gqa/annotations/trainval_label2ans.json", ["no", "yes", *sorted(labels())])
    test, shots = make("test", config.test), make("shots", 4 * max(config.shot_sizes("gqa")))
    images = list(dict.fromkeys(image for image, _ in shots.values()))
    unseen = images[max(config.shot_sizes("gqa")) :]
    testdev = test | shots  # as in xGQA: few-shot files and their test are parts of it
    for language in XGQA:

        def text(q: Statement, language=language) -> str:
            return q.text(language)

        writer.json(
            f"xGQA/annotations/zero_shot/testdev_balanced_questions_{language}.json", records(testdev, text)
        )
        writer.json(f"xGQA/annotations/few_shot/{language}/test.json", records(test, text))
        for n in config.shot_sizes("gqa"):
            chosen = {qid: item for qid, item in shots.items() if item[0] in images[:n]}
            writer.json(f"xGQA/annotations/few_shot/{language}/train_{n}.json", records(chosen, text))
        writer.json(
            f"xGQA/annotations/few_shot/{language}/dev.json",
            records({q: item for q, item in shots.items() if item[0] in unseen}, text),
        )
        if language != "en":
            name = translator(language, config.seed)
            into_english = f"few_shot/{language}/test", f"zero_shot/testdev_balanced_questions_{language}"
            for items, path in zip((test, testdev), into_english, strict=True):
                translated = records(items, lambda q, name=name: q.text("en", name))
                writer.json(f"xGQA/annotations_machine-translate/{path}.json", translated)
            into = translator_into(language, config.seed)
            translated = records(train, lambda q, language=language, into=into: q.text(language, into))
            writer.json(
                f"xGQA/annotations_translate-train/{language}/train_balanced_questions.json", translated
            )


def _entailment(writer: Writer, config: ScenesConfig) -> None:
    def make(split: str, count: int) -> list[tuple[Scene, str, Statement]]:
        items, things = [], numbers(count, config.seed, "nli", split)
        for i in range(-(-count // 3)):  # a scene, a hypothesis of each kind
            dice = Dice(config.seed, "nli", split, i)
            wanted = _above_and_below(dice) if dice.uniform() < 0.9 else ()
            scene = writer.scene(f"n{split}{i}", split, int(things[i]), wanted)
            premise = describe(scene, dice).text("en")
            items += [(scene, premise, claim(scene, relation, dice)) for relation in dice.order(RELATIONS)]
        return items[:count]

    def records(items: list, text: Callable[[Statement], str]) -> Iterator[dict]:
        for k, (scene, premise, s) in enumerate(items):
            yield {
                "gold_label": s.answer,
                "sentence1": premise,
                "sentence2": text(s),
                "captionID": f"{scene.id}.jpg#0",
                "pairID": f"{scene.id}.jpg#0r{k}",
                "Flikr30kID": scene.id,
            }

    writer.lines(
        "XVNLI/annotations/en/train.jsonl.zip", records(make("train", config.train), lambda s: s.text("en"))
    )
    dev = make("dev", config.dev)
    test, shots = make("test", config.test), make("shots", 3 * max(config.shot_sizes("nli")))
    for language in XVNLI:

        def text(s: Statement, language=language) -> str:
            return s.text(language)

        writer.lines(
            f"XVNLI/annotations/en/dev{'' if language == 'en' else f'-{language}_gmt'}.jsonl",
            records(dev, text),
        )
        writer.lines(f"XVNLI/annotations/{language}/test.jsonl", records(test, text))
        for n in config.shot_sizes("nli"):
            writer.lines(f"XVNLI/annotations/{language}/train_{n}.jsonl", records(shots[: 3 * n], text))
        if language != "en":
            name = translator(language, config.seed)
            translated = records(test, lambda s, name=name: s.text("en", name))
            writer.lines(f"XVNLI/annotations_machine-translate/{language}/test.jsonl", translated)


def _above_and_below(dice: Dice) -> tuple[str, str]:
    """A label that has others below it, and an unrelated one that is below another."""
    above = dice.pick([name for name in labels() if hyponyms(name)])
    return above, dice.pick(
        [name for name in labels() if labels()[name].ancestors and name not in related(above)]
    )


def _captions(writer: Writer, config: ScenesConfig) -> None:
    def make(split: str, count: int) -> list[tuple[Scene, list[Statement]]]:
        things = numbers(count, config.seed, "flickr", split)
        scenes = [writer.scene(f"f{split}{i}", split, int(things[i])) for i in range(count)]
        each = 1 if split in ("test", "shots") else 3
        return [
            (scene, [describe(scene, Dice(config.seed, "flickr", split, i, k)) for k in range(each)])
            for i, scene in enumerate(scenes)
        ]

    def records(items: list, text: Callable[[Statement], str]) -> Iterator[dict]:
        for i, (scene, captions) in enumerate(items):
            yield {
                "sentences": list(dict.fromkeys(map(text, captions))),
                "id": str(i),
                "img_path": f"{scene.id}.webp",
            }

    writer.lines(
        "flickr30k/annotations/train_ann.jsonl", records(make("train", config.train), lambda s: s.text("en"))
    )
    dev = make("dev", config.dev)
    writer.lines("flickr30k/annotations/valid_ann.jsonl", records(dev, lambda s: s.text("en")))
    test, shots = make("test", config.test), make("shots", max(config.shot_sizes("flickr")))
    for language in LANGUAGES:

        def text(s: Statement, language=language) -> str:
            return s.text(language)

        writer.lines(f"xFlickrCO/annotations/{language}/test.jsonl", records(test, text))
        if language != "en":
            name = translator(language, config.seed)
            translated = records(test, lambda s, name=name: s.text("en", name))
            writer.lines(f"xFlickrCO/annotations_machine-translate/{language}/test_gmt.jsonl", translated)
            into = translator_into(language, config.seed)
            writer.lines(f"xFlickrCO/annotations/{language}/dev.jsonl", records(dev, text))
            writer.lines(
                f"xFlickrCO/annotations_machine-translate/{language}/dev_gmt.jsonl",
                records(dev, lambda s, name=name: s.text("en", name)),
            )
            made = {
                "gmt": lambda s, name=name: s.text("en", name),
                "from_en": lambda s, language=language, into=into: s.text(language, into),
            }
            for n in config.shot_sizes("flickr"):
                for kind, translate in made.items():
                    path = f"xFlickrCO/annotations_machine-translate/{language}/train_{n}_{kind}.jsonl"
                    writer.lines(path, records(shots[:n], translate))
        for n in config.shot_sizes("flickr"):
            writer.lines(f"xFlickrCO/annotations/{language}/train_{n}.jsonl", records(shots[:n], text))


def _pairs(writer: Writer, config: ScenesConfig) -> None:
    def make(split: str, count: int) -> list[tuple[str, Statement]]:
        items, things = [], numbers(count, config.seed, "nlvr", split)
        for i in range(-(-count // 2)):  # two pictures, a true statement and a false one
            dice, stem = Dice(config.seed, "nlvr", split, i), f"{split}-{i}-0"
            shared = (dice.pick(list(labels())),)
            left = writer.scene(f"{stem}-img0", split, int(things[i]), shared)
            right = writer.scene(f"{stem}-img1", split, int(things[i]), shared, left.names)
            items += [(stem, compare_pair(left, right, true, dice)) for true in dice.order([True, False])]
        return items[:count]

    def stated(items: list, language: str = "en") -> Iterator[dict]:
        for k, (stem, s) in enumerate(items):
            yield {"sentence": s.text(language), "identifier": f"{stem}-{k % 2}", "label": s.answer}

    def foreign(items: list, language: str, text: Callable[[Statement], str]) -> Iterator[dict]:
        for k, (stem, s) in enumerate(items):
            concept = s.names[0]
            yield {
                "concept": concept,
                "language": language,
                "caption": text(s),
                "left_img": f"{stem}-img0.webp",
                "right_img": f"{stem}-img1.webp",
                "chapter": labels()[concept].category,
                "id": f"{language}-{k}",
                "label": s.answer == "True",
            }

    writer.lines("nlvr2/annotations/train.jsonl", stated(make("train", config.train)))
    dev = make("dev", config.dev)
    writer.lines("nlvr2/annotations/dev.jsonl", stated(dev))
    test, shots = make("test", config.test), make("shots", 2 * max(config.shot_sizes("marvl")))
    writer.lines("nlvr2/annotations/test.jsonl", stated(test))
    for language in LANGUAGES[1:]:

        def text(s: Statement, language=language) -> str:
            return s.text(language)

        writer.lines(f"nlvr2/annotations/dev-{language}_gmt.jsonl", stated(dev, language))
        name = translator(language, config.seed)
        stem = f"marvl-{language}"
        writer.lines(f"marvl/zero_shot/annotations/{stem}.jsonl", foreign(test, language, text))
        writer.lines(
            f"marvl/zero_shot/annotations_machine-translate/{stem}_gmt.jsonl",
            foreign(test, language, lambda s, name=name: s.text("en", name)),
        )
        for n in config.shot_sizes("marvl"):
            writer.lines(
                f"marvl/few_shot/annotations/{stem}_train{n}.jsonl", foreign(shots[: 2 * n], language, text)
            )


def _dictionaries(writer: Writer) -> None:
    """MUSE's format: an English word, a tab, its translation; the names of all concepts of the sample, and
    synonyms of the labels."""
    synonyms = {label.key: label.synonyms for label in labels().values()}
    for language in ALL_LANGUAGES:
        if language == "en":
            continue
        foreign, rows = read_captions(language), []
        for key, caption in read_captions("en").items():
            for word in (caption.name, *synonyms.get(key, ())):
                rows.append(f"{word}\t{foreign[key].name}\n")
        writer._path(f"dictionaries/{language}2.txt").write_text(
            "".join(dict.fromkeys(rows)), encoding="utf-8"
        )
