"""Write the miniature IGLUE: the official formats, in the folders of the IGLUE repository (`README.md` lists
them); beside them the test sets in another style, and translations with errors."""

import io
import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt

from raylib.config import Config
from raylib.display import progress
from raylib.errors import UserError
from raylib.fileio import atomic_folder
from raylib.sample import LANGUAGES as ALL_LANGUAGES
from raylib.sample import UNSEEN_VENDOR, decode_drawings, draw_webp, read_concept_captions
from raylib.sample.scenes import DATA, LANGUAGES, read_labels
from raylib.sample.scenes.statements import (
    QUESTIONS,
    Dice,
    Scene,
    Statement,
    ask_question,
    compare_pair,
    draw_counts,
    make_caption,
    make_claim,
    make_scene,
    pick_above_and_below,
)
from raylib.sample.scenes.translators import (
    Translator,
    Wording,
    from_english,
    in_language,
    to_english,
    with_errors,
)

XGQA = ("en", "de", "bn", "id", "ko", "pt", "ru", "sw", "zh")
XVNLI = ("en", "ar", "es", "fr", "ru", "sw")
SHOTS = {
    "gqa": (1, 5, 10, 20, 25, 48),
    "nli": (1, 5, 10, 20, 25, 48),
    "flickr": (1, 5, 10, 25, 50, 100),
    "marvl": (1, 2, 4, 10),
}
RELATIONS = ("entailment", "neutral", "contradiction")
TRANSLATED_TRAIN = 9000  # training questions that are translated, the first ones
ERRORS = {"errors10": 0.1, "errors30": 0.3}  # folders of translations: how many sentences are wrong
STYLE = "test_style"  # folder of the test sets in a style that training has not
TEST_FILES = (
    "xGQA/annotations/few_shot/*/test.json",
    "xGQA/annotations_machine-translate/few_shot/*/test.json",
    "XVNLI/annotations/*/test.jsonl",
    "XVNLI/annotations_machine-translate/*/test.jsonl",
    "xFlickrCO/annotations/*/test.jsonl",
    "xFlickrCO/annotations_machine-translate/*/test_gmt.jsonl",
    "nlvr2/annotations/test.jsonl",
    "marvl/zero_shot/annotations/*.jsonl",
    "marvl/zero_shot/annotations_machine-translate/*.jsonl",
)
# what a test needs besides its own files
SHARED_FILES = (
    "gqa/annotations/trainval_label2ans.json",
    "relations.json",
    "vectors.txt",
    "wordnet",
    "dictionaries",
)


class ScenesConfig(Config):
    """Sizes of the miniature IGLUE."""

    train: PositiveInt = 30_000
    """Training items of each task."""
    dev: PositiveInt = 1000
    """Dev items of each task and language."""
    test: PositiveInt = 2000
    """Test items of each task and language."""
    shots: int = Field(100, ge=1)
    """Images in the largest few-shot set."""
    size: int = Field(64, ge=32, le=512)
    """Side of an image in pixels."""
    seed: int = 0
    """Seed of everything that is drawn."""

    def shot_sizes(self, task: str) -> tuple[int, ...]:
        """Numbers of images of the few-shot sets of a task."""
        return tuple(n for n in SHOTS[task] if n <= self.shots)


class Images:
    """Scenes and their images: `images.tar` and `scenes.jsonl` of a folder."""

    def __init__(self, folder: Path, size: int):
        folder.mkdir(exist_ok=True)
        self.folder, self.size = folder, size
        self.tar = tarfile.open(folder / "images.tar", "w")  # noqa: SIM115
        self.scenes: list[Scene] = []

    def add(self, scene: Scene) -> None:
        """Draw the scene; its image is in the tar as ID.webp."""
        placements = [placement for _, placement in scene.objects]
        data = draw_webp(placements, decode_drawings(scene.vendor), self.size)
        info = tarfile.TarInfo(f"{scene.id}.webp")
        info.size = len(data)
        self.tar.addfile(info, io.BytesIO(data))
        self.scenes.append(scene)

    def close(self) -> None:
        """End the tar, write the ground truth."""
        self.tar.close()
        with (self.folder / "scenes.jsonl").open("w", encoding="utf-8") as file:
            for scene in self.scenes:
                objects = [
                    {"label": label} | {k: v for k, v in placement._asdict().items() if k != "key"}
                    for label, placement in scene.objects
                ]
                record = {"id": scene.id, "vendor": scene.vendor, "objects": objects}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


class Writer:
    """Files under `out`: JSON, JSON lines, and every scene that is asked for, once, into `images.tar`; the
    tests' in the unseen style too."""

    def __init__(self, out: Path, config: ScenesConfig):
        self.out, self.config = out, config
        self.images, self.style = Images(out, config.size), Images(out / STYLE, config.size)

    def scene(
        self, name: str, split: str, count: int, required: Sequence[str] = (), avoid: Sequence[str] = ()
    ) -> Scene:
        """Make a scene as `make_scene` does, and draw it."""
        scene = make_scene(name, split, self.config.size, self.config.seed, count, required, avoid)
        self.images.add(scene)
        if split == "test":
            self.style.add(scene._replace(vendor=UNSEEN_VENDOR))
        return scene

    def translations(self, translator: Translator, language: str) -> Iterator[tuple[str, Wording]]:
        """(beginning of the path, wording) of each variant of the translations: without errors, and with."""
        yield "", translator(language, self.config.seed)
        for folder, share in ERRORS.items():
            yield f"{folder}/", with_errors(translator, share)(language, self.config.seed)

    def json(self, path: str, value: Any) -> None:
        """Write a JSON file."""
        self.text(path, json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n")

    def lines(self, path: str, records: Iterable[dict[str, Any]]) -> None:
        """Write a file of JSON lines."""
        self.text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))

    def text(self, path: str, text: str) -> None:
        """Write a file, or the one member of a .zip, where IGLUE has one."""
        file = self.out / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix != ".zip":
            file.write_text(text, encoding="utf-8")
            return
        with zipfile.ZipFile(file, "w") as archive:
            # a ZipInfo is of 1980: the same bytes each time
            archive.writestr(zipfile.ZipInfo(file.stem), text, zipfile.ZIP_DEFLATED)

    def close(self) -> None:
        """End the tars; complete the other trees by links to the files here."""
        self.images.close()
        self.style.close()
        for pattern in (*TEST_FILES, *SHARED_FILES):
            for source in sorted(self.out.glob(pattern)):
                _link(source, self.out / STYLE / source.relative_to(self.out))
        for folder in ERRORS:
            self._complete(self.out / folder, self.out)

    def _complete(self, tree: Path, source: Path) -> None:
        """Link to all in `source` that `tree` has not."""
        for entry in sorted(source.iterdir()):
            if entry.name in (*ERRORS, STYLE):
                continue
            if not (tree / entry.name).exists():
                _link(entry, tree / entry.name)
            elif entry.is_dir():
                self._complete(tree / entry.name, entry)


def _link(source: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(os.path.relpath(source, path.parent))


def write_scenes(out: Path, config: ScenesConfig) -> str:
    """Write all tasks into `out`, whole or not at all; returns a line about what is there.

    Raises:
        UserError: `out` is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: not empty; give a new folder")
    with atomic_folder(out) as partial:
        writer = Writer(partial, config)
        # the order of the tasks is the order of the images in the tar
        for write_task in (_write_questions, _write_entailment, _write_captions, _write_pairs):
            write_task(writer, config)
        _write_dictionaries(writer)
        (partial / "wordnet").mkdir()
        for source in (DATA / "vectors.txt", *sorted((DATA / "wordnet").iterdir())):
            shutil.copyfile(source, partial / source.relative_to(DATA))
        writer.json("relations.json", {name: _relations(name) for name in read_labels()})
        writer.close()
    size = sum(path.lstat().st_size for path in out.rglob("*") if path.is_file())
    return f"{out}: 4 tasks of {config.train} + {config.dev} + {config.test} items, {size / 1e6:.1f} MB"


def _relations(name: str) -> dict[str, Any]:
    """WordNet's view of a label among the labels: its synset, others of the same synset, direct hypernyms."""
    label = read_labels()[name]
    synonyms = [o.name for o in read_labels().values() if o.synset == label.synset and o.name != name]
    return {"synset": label.synset, "synonyms": synonyms, "hypernyms": label.hypernyms}


def _write_questions(writer: Writer, config: ScenesConfig) -> None:
    Items = dict[str, tuple[str, Statement]]  # {question id: (image, question)}

    def make(split: str, count: int) -> Items:
        items: Items = {}
        counts = progress(draw_counts(count, config.seed, "gqa", split), f"draw scenes of xGQA, {split}")
        for i, things in enumerate(counts):
            scene = writer.scene(f"g{split}{i}", split, things)
            dice = Dice(config.seed, "gqa", split, i)
            questions = (ask_question(scene, kind, dice) for kind in dice.order(QUESTIONS))
            for question in [q for q in questions if q][:3]:
                items[f"{split}{len(items):06d}"] = (scene.id, question._replace(scene=scene.id))
                if len(items) == count:
                    return items
        return items

    def records(items: Items, wording: Wording) -> dict[str, dict[str, Any]]:
        return {
            key: {
                "question": wording(q),
                "answer": q.answer,
                "imageId": image,
                "isBalanced": True,
                "types": {"structural": q.kind, "semantic": "obj", "detailed": q.template},
            }
            for key, (image, q) in items.items()
        }

    def lxmert_records(items: Items) -> list[dict[str, Any]]:
        return [
            {"img_id": image, "label": {q.answer: 1.0}, "question_id": key, "sent": q.text("en")}
            for key, (image, q) in items.items()
        ]

    sizes = config.shot_sizes("gqa")
    train = make("train", config.train)
    writer.json("gqa/annotations/train.json.zip", lxmert_records(train))
    writer.json("gqa/annotations/valid.json", lxmert_records(make("dev", config.dev)))
    writer.json("gqa/annotations/trainval_label2ans.json", ["no", "yes", *sorted(read_labels())])
    test, shots = make("test", config.test), make("shots", 4 * max(sizes))
    # few-shot sets are of the first images; the development set of those that the largest has not
    images = list(dict.fromkeys(image for image, _ in shots.values()))
    subsets = {f"train_{n}": images[:n] for n in sizes} | {"dev": images[max(sizes) :]}
    testdev = test | shots  # as in xGQA: few-shot files and their test are parts of it
    translated_train = dict(list(train.items())[:TRANSLATED_TRAIN])
    for language in XGQA:
        folder, wording = f"xGQA/annotations/few_shot/{language}", in_language(language)
        zero_shot = f"zero_shot/testdev_balanced_questions_{language}.json"
        writer.json(f"xGQA/annotations/{zero_shot}", records(testdev, wording))
        writer.json(f"{folder}/test.json", records(test, wording))
        for name, subset in subsets.items():
            items = {key: item for key, item in shots.items() if item[0] in subset}
            writer.json(f"{folder}/{name}.json", records(items, wording))
        if language != "en":
            for tree, wording in writer.translations(to_english, language):
                folder = f"{tree}xGQA/annotations_machine-translate"
                writer.json(f"{folder}/few_shot/{language}/test.json", records(test, wording))
                writer.json(f"{folder}/{zero_shot}", records(testdev, wording))
            for tree, wording in writer.translations(from_english, language):
                path = f"{tree}xGQA/annotations_translate-train/{language}/train_balanced_questions.json"
                writer.json(path, records(translated_train, wording))


def _write_entailment(writer: Writer, config: ScenesConfig) -> None:
    Items = list[tuple[Scene, str, Statement]]  # (scene, premise, hypothesis)

    def make(split: str, count: int) -> Items:
        items: Items = []
        counts = draw_counts(count, config.seed, "nli", split)
        for i in progress(
            range(-(-count // 3)), f"draw scenes of XVNLI, {split}"
        ):  # a scene, a hypothesis of each kind
            dice = Dice(config.seed, "nli", split, i)
            required = pick_above_and_below(dice) if dice.uniform() < 0.9 else ()
            scene = writer.scene(f"n{split}{i}", split, counts[i], required)
            premise = make_caption(scene, dice).text("en")
            for relation in dice.order(RELATIONS):
                claim = make_claim(scene, relation, dice)
                items.append((scene, premise, claim._replace(scene=scene.id)))
        return items[:count]

    def records(items: Items, wording: Wording) -> Iterator[dict[str, Any]]:
        for k, (scene, premise, hypothesis) in enumerate(items):
            yield {
                "gold_label": hypothesis.answer,
                "sentence1": premise,
                "sentence2": wording(hypothesis),
                "captionID": f"{scene.id}.jpg#0",
                "pairID": f"{scene.id}.jpg#0r{k}",
                "Flikr30kID": scene.id,
            }

    train = make("train", config.train)
    writer.lines("XVNLI/annotations/en/train.jsonl.zip", records(train, in_language("en")))
    dev = make("dev", config.dev)
    test, shots = make("test", config.test), make("shots", 3 * max(config.shot_sizes("nli")))
    for language in XVNLI:
        wording, suffix = in_language(language), "" if language == "en" else f"-{language}_gmt"
        writer.lines(f"XVNLI/annotations/en/dev{suffix}.jsonl", records(dev, wording))
        writer.lines(f"XVNLI/annotations/{language}/test.jsonl", records(test, wording))
        for n in config.shot_sizes("nli"):
            writer.lines(f"XVNLI/annotations/{language}/train_{n}.jsonl", records(shots[: 3 * n], wording))
        if language != "en":
            for tree, wording in writer.translations(to_english, language):
                path = f"{tree}XVNLI/annotations_machine-translate/{language}/test.jsonl"
                writer.lines(path, records(test, wording))


def _write_captions(writer: Writer, config: ScenesConfig) -> None:
    Items = list[tuple[Scene, list[Statement]]]

    def make(split: str, count: int) -> Items:
        counts = draw_counts(count, config.seed, "flickr", split)
        num_captions = 1 if split in ("test", "shots") else 3
        items: Items = []
        for i in progress(range(count), f"draw scenes of xFlickrCO, {split}"):
            scene = writer.scene(f"f{split}{i}", split, counts[i])
            dice = [Dice(config.seed, "flickr", split, i, k) for k in range(num_captions)]
            items.append((scene, [make_caption(scene, die)._replace(scene=scene.id) for die in dice]))
        return items

    def records(items: Items, wording: Wording) -> Iterator[dict[str, Any]]:
        for i, (scene, captions) in enumerate(items):
            sentences = list(dict.fromkeys(map(wording, captions)))
            yield {"sentences": sentences, "id": str(i), "img_path": f"{scene.id}.webp"}

    english = in_language("en")
    writer.lines("flickr30k/annotations/train_ann.jsonl", records(make("train", config.train), english))
    dev = make("dev", config.dev)
    writer.lines("flickr30k/annotations/valid_ann.jsonl", records(dev, english))
    test, shots = make("test", config.test), make("shots", max(config.shot_sizes("flickr")))
    for language in LANGUAGES:
        folder, wording = f"xFlickrCO/annotations/{language}", in_language(language)
        writer.lines(f"{folder}/test.jsonl", records(test, wording))
        for n in config.shot_sizes("flickr"):
            writer.lines(f"{folder}/train_{n}.jsonl", records(shots[:n], wording))
        if language != "en":
            writer.lines(f"{folder}/dev.jsonl", records(dev, wording))
            folder = f"xFlickrCO/annotations_machine-translate/{language}"
            for tree, wording in writer.translations(to_english, language):
                writer.lines(f"{tree}{folder}/test_gmt.jsonl", records(test, wording))
                writer.lines(f"{tree}{folder}/dev_gmt.jsonl", records(dev, wording))
                for n in config.shot_sizes("flickr"):
                    writer.lines(f"{tree}{folder}/train_{n}_gmt.jsonl", records(shots[:n], wording))
            for tree, wording in writer.translations(from_english, language):
                for n in config.shot_sizes("flickr"):
                    writer.lines(f"{tree}{folder}/train_{n}_from_en.jsonl", records(shots[:n], wording))


def _write_pairs(writer: Writer, config: ScenesConfig) -> None:
    Items = list[tuple[str, Statement]]  # (stem of the two images' names, statement)

    def make(split: str, count: int) -> Items:
        items: Items = []
        counts = draw_counts(count, config.seed, "nlvr", split)
        for i in progress(
            range(-(-count // 2)), f"draw scenes of MaRVL, {split}"
        ):  # two images, a true statement and a false one
            dice, stem = Dice(config.seed, "nlvr", split, i), f"{split}-{i}-0"
            shared = (dice.pick(list(read_labels())),)
            left = writer.scene(f"{stem}-img0", split, counts[i], shared)
            right = writer.scene(f"{stem}-img1", split, counts[i], shared, left.names)
            for true in dice.order([True, False]):
                items.append((stem, compare_pair(left, right, true, dice)._replace(scene=stem)))
        return items[:count]

    def nlvr2_records(items: Items, language: str = "en") -> Iterator[dict[str, Any]]:
        for k, (stem, s) in enumerate(items):
            yield {"sentence": s.text(language), "identifier": f"{stem}-{k % 2}", "label": s.answer}

    def marvl_records(items: Items, language: str, wording: Wording) -> Iterator[dict[str, Any]]:
        for k, (stem, s) in enumerate(items):
            yield {
                "concept": s.names[0],
                "language": language,
                "caption": wording(s),
                "left_img": f"{stem}-img0.webp",
                "right_img": f"{stem}-img1.webp",
                "chapter": read_labels()[s.names[0]].category,
                "id": f"{language}-{k}",
                "label": s.answer == "True",
            }

    writer.lines("nlvr2/annotations/train.jsonl", nlvr2_records(make("train", config.train)))
    dev = make("dev", config.dev)
    writer.lines("nlvr2/annotations/dev.jsonl", nlvr2_records(dev))
    test, shots = make("test", config.test), make("shots", 2 * max(config.shot_sizes("marvl")))
    writer.lines("nlvr2/annotations/test.jsonl", nlvr2_records(test))
    for language in LANGUAGES[1:]:
        wording, stem = in_language(language), f"marvl-{language}"
        writer.lines(f"nlvr2/annotations/dev-{language}_gmt.jsonl", nlvr2_records(dev, language))
        writer.lines(f"marvl/zero_shot/annotations/{stem}.jsonl", marvl_records(test, language, wording))
        for tree, wording_to_english in writer.translations(to_english, language):
            path = f"{tree}marvl/zero_shot/annotations_machine-translate/{stem}_gmt.jsonl"
            writer.lines(path, marvl_records(test, language, wording_to_english))
        for n in config.shot_sizes("marvl"):
            items = marvl_records(shots[: 2 * n], language, wording)
            writer.lines(f"marvl/few_shot/annotations/{stem}_train{n}.jsonl", items)


def _write_dictionaries(writer: Writer) -> None:
    """MUSE's format: an English word, a tab, its translation; the names of all concepts of the sample, and
    synonyms of the labels."""
    synonyms = {label.key: label.synonyms for label in read_labels().values()}
    for language in ALL_LANGUAGES[1:]:
        foreign = read_concept_captions(language)
        rows = [
            f"{word}\t{foreign[key].name}\n"
            for key, caption in read_concept_captions("en").items()
            for word in (caption.name, *synonyms.get(key, ()))
        ]
        writer.text(f"dictionaries/{language}2.txt", "".join(dict.fromkeys(rows)))
