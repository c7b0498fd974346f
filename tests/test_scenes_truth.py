"""Every sentence of the emoji scenes in every language, read again word by word and compared with what the
scenes show: independent of the code that made it, but for names and templates.

A word is true of a thing by its name, by what stands above it in WordNet, and by its category.
"""

import json
import re
import zipfile
from functools import cache

import pytest

from raylib.sample.scenes import LANGUAGES, read_categories, read_labels, read_templates, translate_name

QUESTIONS = ("verify", "query_pos", "query_rel", "choose", "and", "or", "compare", "count", "verify_rel")
YES = {True: "yes", False: "no"}
PARTICLES = {"i": "이가", "n": "은는", "wa": "과와"}


@cache
def true_words(label, language):
    """Words of a language that are true of a thing."""
    labels = read_labels()
    above = {labels[name].synset for name in (label, *labels[label].ancestors)}
    names = [other.name for other in labels.values() if other.synset in above]
    return {translate_name(name, language) for name in (*names, *labels[label].categories)}


@cache
def words_below(label, language):
    """Names of what stands below a thing in WordNet: it may be that."""
    return {translate_name(o.name, language) for o in read_labels().values() if label in o.ancestors}


@cache
def patterns(template, language):
    """Regular expression of a template, whose names are words of the language."""
    words = {translate_name(name, language) for name in (*read_labels(), *read_categories())}
    word = "|".join(sorted(map(re.escape, words), key=len, reverse=True))
    text, found, end = read_templates()["templates"][template][language], "", 0
    for slot in re.finditer(r"{(\w+)}", text):
        found += re.escape(text[end : slot.start()])
        name, particle, end = slot[1][0], slot[1][1:], slot.end()
        if name == "P":
            found += f"(?P<P>{'|'.join(map(re.escape, read_templates()['positions'][language]))})"
        elif name == "N":
            found += r"(?P<N>\d)"
        else:
            found += "[ou]" if name == "o" else f"(?P<{name}>{word})"
            found += "이?나" if particle == "na" else f"[{PARTICLES[particle]}]" if particle else ""
    return re.compile(found + re.escape(text[end:]))


def parse(text, language, templates):
    """(template, its slots): the one reading of a sentence."""
    matches = [(name, patterns(name, language).fullmatch(text)) for name in templates]
    ((name, match),) = [(name, match) for name, match in matches if match]
    return name, match.groupdict()


def those(objects, word, language):
    return [o for o in objects if word in true_words(o["label"], language)]


def answers(text, language, objects):
    """The right answers to a question."""
    template, slots = parse(text, language, QUESTIONS)
    first, second = (those(objects, slots[s], language) if slots.get(s) else [] for s in "AB")
    if template in ("verify", "and", "or"):
        there = {"verify": bool(first), "and": first and second, "or": first or second}[template]
        return {YES[bool(there)]}
    if template == "count":
        return {str(len(first))}
    if template == "choose":
        assert bool(first) != bool(second)
        return {o["label"] for o in first or second}
    quadrants = {o["quadrant"]: o["label"] for o in objects}
    if template == "query_pos":
        return {quadrants[read_templates()["positions"][language].index(slots["P"])]}
    ((a), *_), unique = first, len(first) == 1 and len(second) <= 1
    assert unique, "what is spoken of by its place or size is there once"
    if template == "query_rel":
        assert a["quadrant"] % 2 == 0
        return {quadrants[a["quadrant"] + 1]}
    (b,) = second
    if template == "compare":
        assert a["large"] != b["large"] and a["size"] != b["size"]
        return {(a if a["size"] > b["size"] else b)["label"]}
    assert a["quadrant"] // 2 == b["quadrant"] // 2
    return {YES[a["quadrant"] > b["quadrant"]]}


def relation(text, language, objects):
    """How a scene relates to a hypothesis."""
    template, slots = parse(text, language, ("s_has", "s_not", "s_neutral"))
    there = bool(those(objects, slots["A"], language))
    below = any(slots["A"] in words_below(o["label"], language) for o in objects)
    if template == "s_neutral" or (below and not there):
        return "neutral"
    return "entailment" if there == (template == "s_has") else "contradiction"


def is_true_of_pair(text, language, left, right):
    template, slots = parse(text, language, ("two_both", "two_lr", "two_count"))
    first = [those(side, slots["A"], language) for side in (left, right)]
    if template == "two_count":
        return sum(map(len, first)) == int(slots["N"])
    return bool(first[0] and (those(right, slots["B"], language) if template == "two_lr" else first[1]))


def read_lines(path):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            return [json.loads(line) for line in archive.read(path.stem).decode().splitlines()]
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def shown(scenes):
    """{scene: its objects}."""
    return {scene["id"]: scene["objects"] for scene in read_lines(scenes / "scenes.jsonl")}


@pytest.mark.parametrize("language", LANGUAGES)
def test_scenes_sentences_of_every_language_follow_from_the_scenes(scenes, shown, language):
    counts = dict.fromkeys(("questions", "hypotheses", "statements", "captions"), 0)
    for path in scenes.glob(f"xGQA/annotations/*/*{language}.json"):
        for item in json.loads(path.read_text(encoding="utf-8")).values():
            counts["questions"] += 1
            assert item["answer"] in answers(item["question"], language, shown[item["imageId"]])
    folder = scenes / "XVNLI/annotations"
    dev = "dev" if language == "en" else f"dev-{language}_gmt"
    for path in (*folder.glob(f"{language}/t*"), *folder.glob(f"en/{dev}.jsonl")):
        for item in read_lines(path):
            counts["hypotheses"] += 1
            objects = shown[item["Flikr30kID"]]
            assert item["gold_label"] == relation(item["sentence2"], language, objects)
            _, slots = parse(item["sentence1"], "en", ("cap2",))
            assert all(those(objects, slots[slot], "en") for slot in "AB")
    english = scenes.glob("nlvr2/annotations/[!d]*.jsonl") if language == "en" else ()
    for path in (*english, *scenes.glob(f"nlvr2/annotations/{dev}.jsonl")):
        for item in read_lines(path):
            counts["statements"] += 1
            stem = item["identifier"].rpartition("-")[0]
            pair = [shown[f"{stem}-img{side}"] for side in range(2)]
            assert item["label"] == str(is_true_of_pair(item["sentence"], language, *pair))
    for path in scenes.glob(f"marvl/*/annotations/marvl-{language}*.jsonl"):
        for item in read_lines(path):
            counts["statements"] += 1
            pair = [shown[item[f"{side}_img"].removesuffix(".webp")] for side in ("left", "right")]
            assert item["label"] == is_true_of_pair(item["caption"], language, *pair)
    for path in scenes.glob(f"xFlickrCO/annotations/{language}/*.jsonl"):
        for item in read_lines(path):
            counts["captions"] += 1
            _, slots = parse(item["sentences"][0], language, ("cap2",))
            objects = shown[item["img_path"].removesuffix(".webp")]
            assert all(those(objects, slots[slot], language) for slot in "AB")
    assert counts["statements"] >= 72 and counts["captions"] >= 60
    assert counts["questions"] >= 80 or not list(scenes.glob(f"xGQA/annotations/few_shot/{language}"))
    assert counts["hypotheses"] >= 75 or not list(folder.glob(language))
