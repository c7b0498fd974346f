"""Write the miniature IGLUE: the official formats, in the folders of the IGLUE repository (`README.md` lists
them); beside them the test sets in another style, and translations with errors."""

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt

from raylib.config import Config
from raylib.display import progress
from raylib.errors import UserError
from raylib.fileio import atomic_folder, read_json
from raylib.sample import LANGUAGES as ALL_LANGUAGES
from raylib.sample import read_concept_captions
from raylib.sample.scenes import ANSWERS, DATA, LANGUAGES, read_labels
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
    pick_claimed,
    split_copies,
)
from raylib.sample.scenes.translators import Wording, from_english, in_language, to_english
from raylib.sample.scenes.tree import Writer

XGQA = ("en", "de", "bn", "id", "ko", "pt", "ru", "sw", "zh")
XVNLI = ("en", "ar", "es", "fr", "ru", "sw")
SHOTS = {
    "gqa": (1, 5, 10, 20, 25, 48),
    "nli": (1, 5, 10, 20, 25, 48),
    "flickr": (1, 5, 10, 25, 50, 100),
    "marvl": (1, 2, 4, 10),
}
RELATIONS = ("entailment", "neutral", "contradiction")
COUNTED = 0.3  # share of the scenes whose things are counted, half of them with something several times
COUNTED_PAIRS = 0.2
TRANSLATED_TRAIN = 9000  # training questions that are translated, the first ones


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
    difficulty: float = Field(0.5, ge=0, le=1)
    """How often a thing that is not there is of the category of one that is. From 0.5 to 1, rising to all of
    them: scenes of four things, and yes-no questions about the relation of two things."""

    def shot_sizes(self, task: str) -> tuple[int, ...]:
        """Numbers of images of the few-shot sets of a task."""
        return tuple(n for n in SHOTS[task] if n <= self.shots)


def write_scenes(out: Path, config: ScenesConfig) -> str:
    """Write all tasks into `out`, whole or not at all; returns a line about what is there.

    Raises:
        UserError: `out` is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: not empty; give a new folder")
    with atomic_folder(out) as partial:
        writer = Writer(partial, config.size, config.seed)
        # the order of the tasks is the order of the images in the tar
        for write_task in (_write_questions, _write_entailment, _write_captions, _write_pairs):
            write_task(writer, config)
        _write_dictionaries(writer)
        (partial / "wordnet").mkdir()
        for source in (DATA / "vectors.txt", *sorted((DATA / "wordnet").iterdir())):
            shutil.copyfile(source, partial / source.relative_to(DATA))
        writer.json("relations.json", {name: _relations(name) for name in read_labels()})
        writer.json("settings.json", config.model_dump())
        if found := read_baselines().get(json.dumps(config.model_dump(), separators=(",", ":"))):
            writer.json("baselines.json", found)
        writer.close()
    size = sum(path.lstat().st_size for path in out.rglob("*") if path.is_file())
    return f"{out}: 4 tasks of {config.train} + {config.dev} + {config.test} items, {size / 1e6:.1f} MB"


def read_baselines() -> dict[str, Any]:
    """Read {settings of a benchmark, as in its settings.json: its baselines.json}: what `benchmarks.balance`
    has measured on the tests that these settings make."""
    path = DATA / "baselines.json"
    return read_json(path) if path.exists() else {}


def _relations(name: str) -> dict[str, Any]:
    """WordNet's view of a label among the labels: its synset, others of the same synset, direct hypernyms."""
    label = read_labels()[name]
    synonyms = [o.name for o in read_labels().values() if o.synset == label.synset and o.name != name]
    return {"synset": label.synset, "synonyms": synonyms, "hypernyms": label.hypernyms}


def _write_questions(writer: Writer, config: ScenesConfig) -> None:
    Items = dict[str, tuple[str, Statement]]  # {question id: (image, question)}

    def make(split: str, count: int) -> Items:
        items: Items = {}
        counts = draw_counts(count, config.difficulty, config.seed, "gqa", split)
        for i, things in enumerate(progress(counts, f"draw scenes of xGQA, {split}")):
            dice = Dice(config.seed, "gqa", split, i)
            part = dice.uniform()
            copies = dice.pick((2, 3)) if part < COUNTED / 2 else 0
            often = (dice.pick(list(read_labels())),) * copies
            scene = writer.scene(f"g{split}{i}", split, max(things, copies + 1), often)
            kinds = dice.order(QUESTIONS)
            if part < COUNTED:
                kinds.insert(dice.pick(range(3)), "count")
            questions = (ask_question(scene, kind, dice, config.difficulty) for kind in kinds)
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
    writer.json("gqa/annotations/trainval_label2ans.json", [*ANSWERS, *sorted(read_labels())])
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
        # a scene, a hypothesis of each kind
        counts = draw_counts(-(-count // 3), config.difficulty, config.seed, "nli", split)
        for i, things in enumerate(progress(counts, f"draw scenes of XVNLI, {split}")):
            dice = Dice(config.seed, "nli", split, i)
            claimed = pick_claimed(dice)
            required = (dice.pick(read_labels()[claimed.below].ancestors), claimed.present)
            avoid = (claimed.below, claimed.absent)
            scene = writer.scene(f"n{split}{i}", split, things, required, avoid)
            premise = make_caption(scene, dice).text("en")
            for relation in dice.order(RELATIONS):
                claim = make_claim(scene, claimed, relation, dice)
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
        counts = draw_counts(count, config.difficulty, config.seed, "flickr", split)
        num_captions = 1 if split in ("test", "shots") else 3
        items: Items = []
        for i, things in enumerate(progress(counts, f"draw scenes of xFlickrCO, {split}")):
            scene = writer.scene(f"f{split}{i}", split, things)
            dice = [Dice(config.seed, "flickr", split, i, k) for k in range(num_captions)]
            items.append((scene, [make_caption(scene, die)._replace(scene=scene.id) for die in dice]))
        return items

    def make_test(count: int) -> Items:
        """Scenes and captions that name two things which no other scene has together."""
        items: Items = []
        shown: set[frozenset[str]] = set()  # pairs of things that stand together somewhere
        named: set[frozenset[str]] = set()  # those that a caption names
        counts = draw_counts(count, config.difficulty, config.seed, "flickr", "test")
        for i, things in enumerate(progress(counts, "draw scenes of xFlickrCO, test")):
            for attempt in itertools.count():
                name = f"ftest{i}" + (f" {attempt}" if attempt else "")
                scene = make_scene(name, "test", config.size, config.seed, things)
                pairs = {frozenset(pair) for pair in itertools.combinations(scene.names, 2)}
                if pairs - shown and not pairs & named:
                    break
            scene = scene._replace(id=f"ftest{i}")
            writer.draw(scene, "test")
            dice = Dice(config.seed, "flickr", "test", i)
            caption = make_caption(scene, dice)
            while frozenset(caption.names) in shown:
                caption = make_caption(scene, dice)
            shown |= pairs
            named.add(frozenset(caption.names))
            items.append((scene, [caption._replace(scene=scene.id)]))
        return items

    def records(items: Items, wording: Wording) -> Iterator[dict[str, Any]]:
        for i, (scene, captions) in enumerate(items):
            sentences = list(dict.fromkeys(map(wording, captions)))
            yield {"sentences": sentences, "id": str(i), "img_path": f"{scene.id}.webp"}

    english = in_language("en")
    writer.lines("flickr30k/annotations/train_ann.jsonl", records(make("train", config.train), english))
    dev = make("dev", config.dev)
    writer.lines("flickr30k/annotations/valid_ann.jsonl", records(dev, english))
    test, shots = make_test(config.test), make("shots", max(config.shot_sizes("flickr")))
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
        # two images, a true statement and a false one
        counts = draw_counts(-(-count // 2), config.difficulty, config.seed, "nlvr", split)
        for i, things in enumerate(progress(counts, f"draw scenes of MaRVL, {split}")):
            dice, stem = Dice(config.seed, "nlvr", split, i), f"{split}-{i}-0"
            shared = (dice.pick(list(read_labels())),)
            counted = dice.uniform() < COUNTED_PAIRS
            copies = split_copies(dice) if counted else (1, 1)
            left, right = (shared * number for number in copies)
            left_scene = writer.scene(f"{stem}-img0", split, max(things, len(left) + 1), left)
            avoid = left_scene.names
            right_scene = writer.scene(f"{stem}-img1", split, max(things, len(right) + 1), right, avoid)
            for true in dice.order([True, False]):
                statement = compare_pair(left_scene, right_scene, counted, true, dice)
                items.append((stem, statement._replace(scene=stem)))
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
