"""Tasks as records: which files under the data folder, which reader, which classes. A new task is one more record.

Paths follow the IGLUE repository's `datasets/` folder; {language} and {shots} are filled in. A split named
"test.en" is read in place of "test" in that language. "target_dev" is a development set in a target language where the
papers have none: for searches that may look at one; emoji scenes come with it.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from finetune.examples import Captioned, Example
from finetune.formats import captions, gqa, nli, pairs, vqa
from raylib.errors import UserError


class Split(NamedTuple):
    """A file and its reader; `options` are the reader's, filled in like the path."""

    path: str
    read: Callable[..., Iterator]
    options: Mapping[str, str] = {}


class Task(NamedTuple):
    """One task.

    kind: "answers" (an open set of answers), "labels" (a closed one, in IGLUE's order) or "retrieval".
    pictures: how many ground a text; 1 for a premise.
    languages: those of the test files, English first.
    answers: where the answer set lies, if it comes as a file (the first that is there is read).
    bleu: also BLEU, for answers that are sentences; "ja" cuts Japanese into words first.
    """

    summary: str
    kind: Literal["answers", "labels", "retrieval"]
    languages: tuple[str, ...]
    splits: Mapping[str, Split]
    labels: tuple[str, ...] = ()
    pictures: int = 1
    answers: tuple[str, ...] = ()
    bleu: str | None = None

    def split(self, name: str, language: str) -> Split:
        """The split `name` in `language`.

        Raises:
            UserError: the task has no such split (those it has are named).
        """
        found = self.splits.get(f"{name}.{language}") or self.splits.get(name)
        if found is None:
            raise UserError(f"this task has no split '{name}'; it has {', '.join(sorted(self.splits))}")
        return found

    def path(self, folder: Path, name: str, language: str, shots: int | str = "") -> Path:
        """Where the split lies under the data folder."""
        return folder / self.split(name, language).path.format(language=language, shots=shots)

    def source(self, name: str, language: str) -> tuple[str, ...]:
        """What tells the items of a split in one language from those in another: its file, and what its reader is told."""
        split = self.split(name, language)
        return split.path.replace("{language}", language), *(v.format(language=language) for v in split.options.values())

    def read(self, path: Path, name: str, language: str) -> Iterator[Example] | Iterator[Captioned]:
        """The items of the split `name` in `language`, from `path`.

        Raises:
            UserError: no such file; what the reader finds wrong.
        """
        if not path.exists():
            there = sorted(p.name for p in path.parent.iterdir())[:8] if path.parent.is_dir() else []
            beside = f"; beside it are {', '.join(there)}" if there else ""
            raise UserError(f"{path}: no such file ({name} in '{language}'); check data=, languages=, shots={beside}")
        split = self.split(name, language)
        return split.read(path, **{k: v.format(language=language) for k, v in split.options.items()})


XGQA_LANGUAGES = ("en", "bn", "de", "id", "ko", "pt", "ru", "zh")
GQA_ANSWERS = ("gqa/annotations/trainval_label2ans.json", "gqa/annotations/trainval_ans2label.pkl",
               "gqa/annotations/trainval_label2ans.pkl", "gqa/cache/trainval_ans2label.pkl")  # fmt: skip
OWN = {"language": "{language}"}  # for a reader that wants to know
NLI_LANGUAGES = ("en", "ar", "es", "fr", "ru")
NLI_LABELS = ("contradiction", "neutral", "entailment")  # IGLUE's order; CCLM's public code has another


def _xvnli(train: Mapping[str, Split]) -> dict[str, Split]:
    shared = {
        "dev": Split("XVNLI/annotations/en/dev.jsonl", nli.read_xvnli),
        "test": Split("XVNLI/annotations/{language}/test.jsonl", nli.read_xvnli),
        "shots": Split("XVNLI/annotations/{language}/train_{shots}.jsonl", nli.read_xvnli),
        "target_dev": Split("XVNLI/annotations/{language}/dev.jsonl", nli.read_xvnli),
        "translated": Split("XVNLI/annotations_machine-translate/{language}/test.jsonl", nli.read_xvnli),
    }
    return {**shared, **train}


def _xtd_few() -> dict[str, Split]:
    """Captions of XTD's test set by paper 4's parts, and translations of them in files alike."""

    def part(name: str, file: str, up: str = "../") -> Split:
        return Split(f"xtd/{file}", captions.read_xtd, {"images": f"{up}test_image_names.txt", "part": name})

    return {
        **{name: part(name, "test_1kcaptions_{language}.txt", up="") for name in captions.XTD_PARTS},
        "train_to_en": part("train", "translated_to_en/{language}.txt"),
        "dev_to_en": part("dev", "translated_to_en/{language}.txt"),
        "train_from_en": part("train", "translated_from_en/{language}.txt"),
        "translated": part("test", "translated_to_en/{language}.txt"),
    }


TASKS: dict[str, Task] = {
    "xgqa": Task(
        summary="questions about pictures; GQA in English, xGQA in 7 more languages",
        kind="answers",
        languages=XGQA_LANGUAGES,
        answers=GQA_ANSWERS,
        splits={
            "train": Split("gqa/annotations/train_balanced_questions.json", gqa.read_gqa),
            "dev": Split("gqa/annotations/val_balanced_questions.json", gqa.read_gqa),
            "test": Split("xGQA/annotations/zero_shot/testdev_balanced_questions_{language}.json", gqa.read_gqa),
            "few_shot_test": Split("xGQA/annotations/few_shot/{language}/test.json", gqa.read_gqa),
            "shots": Split("xGQA/annotations/few_shot/{language}/train_{shots}.json", gqa.read_gqa),
            "shots_dev": Split("xGQA/annotations/few_shot/{language}/dev.json", gqa.read_gqa),
            "translated": Split("xGQA/annotations_machine-translate/{language}/testdev_balanced_questions.json", gqa.read_gqa),
        },
    ),
    "xgqa_translated": Task(
        summary="xGQA, its training questions GQA's, translated into each language (translate-train)",
        kind="answers",
        languages=XGQA_LANGUAGES,
        answers=GQA_ANSWERS,
        splits={
            "train": Split("xGQA/annotations_translate-train/{language}/train_balanced_questions.json", gqa.read_gqa),
            "train.en": Split("gqa/annotations/train_balanced_questions.json", gqa.read_gqa),
            "dev": Split("xGQA/annotations/few_shot/{language}/dev.json", gqa.read_gqa),
            "test": Split("xGQA/annotations/zero_shot/testdev_balanced_questions_{language}.json", gqa.read_gqa),
        },
    ),
    "xvnli": Task(
        summary="does the picture entail, contradict or leave open the sentence",
        kind="labels",
        labels=NLI_LABELS,
        languages=NLI_LANGUAGES,
        splits=_xvnli({"train": Split("XVNLI/annotations/en/train.jsonl", nli.read_xvnli)}),
    ),
    "xnli": Task(
        summary="entailment between sentences: MultiNLI in English, XNLI in the languages of XVNLI",
        kind="labels",
        labels=NLI_LABELS,
        languages=NLI_LANGUAGES,
        splits={
            "train": Split("XNLI/multinli.train.en.tsv", nli.read_multinli),
            "dev": Split("XNLI/xnli.dev.tsv", nli.read_xnli, OWN),
            "test": Split("XNLI/xnli.test.tsv", nli.read_xnli, OWN),
        },
    ),
    "snli_xvnli": Task(
        summary="trained on SNLI's sentence pairs, tested on XVNLI's pictures: transfer across languages and modes",
        kind="labels",
        labels=NLI_LABELS,
        languages=NLI_LANGUAGES,
        splits=_xvnli({
            "train": Split("SNLI/snli_1.0_train.jsonl", nli.read_snli),
            "dev": Split("SNLI/snli_1.0_dev.jsonl", nli.read_snli),
        }),
    ),
    "marvl": Task(
        summary="is the statement true of two pictures; NLVR2 in English, MaRVL in 5 more languages",
        kind="labels",
        labels=("False", "True"),
        pictures=2,
        languages=("en", "id", "sw", "ta", "tr", "zh"),
        splits={
            "train": Split("nlvr2/annotations/train.jsonl", pairs.read_nlvr2),
            "dev": Split("nlvr2/annotations/dev.jsonl", pairs.read_nlvr2),
            "test": Split("marvl/zero_shot/annotations/marvl-{language}.jsonl", pairs.read_marvl, OWN),
            "test.en": Split("nlvr2/annotations/test1.jsonl", pairs.read_nlvr2),
            "shots": Split("marvl/few_shot/annotations/marvl-{language}_train{shots}.jsonl", pairs.read_marvl, OWN),
            "translated": Split("marvl/zero_shot/annotations_machine-translate/marvl-{language}_gmt.jsonl", pairs.read_marvl,
                                OWN),
            "translated.en": Split("nlvr2/annotations/test1.jsonl", pairs.read_nlvr2),
        },
    ),
    "xflickrco": Task(
        summary="image-text retrieval; Flickr30K in English, xFlickr&CO in 7 more languages",
        kind="retrieval",
        languages=("en", "de", "es", "id", "ja", "ru", "tr", "zh"),
        splits={
            "train": Split("flickr30k/annotations/train_ann.jsonl", captions.read_flickr),
            "dev": Split("flickr30k/annotations/valid_ann.jsonl", captions.read_flickr),
            "test": Split("xFlickrCO/annotations/{language}/test.jsonl", captions.read_flickr),
            "shots": Split("xFlickrCO/annotations/{language}/train_{shots}.jsonl", captions.read_flickr),
            "target_dev": Split("xFlickrCO/annotations/{language}/dev.jsonl", captions.read_flickr),
            "target_dev_to_en": Split("xFlickrCO/annotations_machine-translate/{language}/dev_gmt.jsonl", captions.read_flickr),
            "translated": Split("xFlickrCO/annotations_machine-translate/{language}/test_gmt.jsonl", captions.read_flickr),
            "shots_to_en": Split("xFlickrCO/annotations_machine-translate/{language}/train_{shots}_gmt.jsonl",
                                 captions.read_flickr),
            "shots_from_en": Split("xFlickrCO/annotations_machine-translate/{language}/train_{shots}_from_en.jsonl",
                                   captions.read_flickr),
        },
    ),
    "wit": Task(
        summary="image-text retrieval on Wikipedia's pictures, 11 languages",
        kind="retrieval",
        languages=("en", "ar", "bg", "da", "el", "et", "id", "ja", "ko", "tr", "vi"),
        splits={
            "train": Split("wit/annotations/train_en.jsonl", captions.read_wit),
            "dev": Split("wit/annotations/valid_en.jsonl", captions.read_wit),
            "test": Split("wit/annotations/test_{language}.jsonl", captions.read_wit),
            "translated": Split("wit/annotations_machine-translate/test_{language}_gmt.jsonl", captions.read_wit),
        },
    ),
    "multi30k": Task(
        summary="image-text retrieval on Flickr30K's pictures; captions written in English, translated into three languages",
        kind="retrieval",
        languages=("en", "de", "fr", "cs"),
        splits={
            split: Split(f"multi30k/data/task1/raw/{part}.{{language}}.gz", captions.read_multi30k,
                         {"images": f"../image_splits/{part}.txt"})
            for split, part in (("train", "train"), ("dev", "val"), ("test", "test_2016_flickr"))
        } | {
            split: Split(f"multi30k/translated_{way}_en/{part}.{{language}}", captions.read_multi30k,
                         {"images": f"../data/task1/image_splits/{part}.txt"})
            for split, way, part in (("train_to_en", "to", "train"), ("train_from_en", "from", "train"),
                                     ("dev_to_en", "to", "val"), ("translated", "to", "test_2016_flickr"))
        },
    ),
    "coco": Task(
        summary="image-text retrieval on MSCOCO: English, Japanese (STAIR), Chinese (COCO-CN)",
        kind="retrieval",
        languages=("en", "ja", "zh"),
        splits={name: split for part, other in (("train", "train"), ("dev", "val"), ("test", "test")) for name, split in {
            f"{part}.en": Split("coco/dataset_coco.json", captions.read_karpathy, {"split": other}),
            f"{part}.ja": Split(f"coco/stair_captions_v1.2_{'train' if part == 'train' else 'val'}.json", captions.read_coco,
                                {"images": "dataset_coco.json", "split": other,
                                 "more": "stair_captions_v1.2_val.json" if part == "train" else ""}),
            f"{part}.zh": Split("coco-cn/imageid.human-written-caption.txt", captions.read_coco_cn,
                                {"images": f"coco-cn_{other}.txt"}),
        }.items()},
    ),
    "xtd": Task(
        summary="image-text retrieval on 1,000 of MSCOCO's pictures in 11 languages; trained on MSCOCO in English",
        kind="retrieval",
        languages=("en", "de", "es", "fr", "it", "jp", "ko", "pl", "ru", "tr", "zh"),
        splits={
            "train": Split("coco/dataset_coco.json", captions.read_karpathy, {"split": "train"}),
            "dev": Split("coco/dataset_coco.json", captions.read_karpathy, {"split": "val"}),
            "test": Split("xtd/test_1kcaptions_{language}.txt", captions.read_multi30k, {"images": "test_image_names.txt"}),
        },
    ),
    "xtd_few": Task(
        summary="image-text retrieval on XTD: 50 of its pictures to train on, 50 to choose by, 900 to test (paper 4)",
        kind="retrieval",
        languages=("en", "de", "es", "fr", "it", "jp", "ko", "pl", "ru", "tr", "zh"),
        splits=_xtd_few(),
    ),
    "ja_vqa": Task(
        summary="questions about Visual Genome's pictures in Japanese, free answers",
        kind="answers",
        languages=("ja",),
        bleu="ja",
        splits={part: Split(f"ja_vqa/{part}.json", vqa.read_ja_vqa) for part in ("train", "dev", "test")},
    ),
    "fm_iqa": Task(
        summary="questions about MSCOCO's pictures in Chinese, free answers",
        kind="answers",
        languages=("zh",),
        bleu="zh",
        splits={
            "train": Split("fm_iqa/FM-IQA.json", vqa.read_fm_iqa, {"split": "train"}),
            "test": Split("fm_iqa/FM-IQA.json", vqa.read_fm_iqa, {"split": "val"}),
        },
    ),
    "vqa_v2": Task(
        summary="VQA v2, English, soft scores",
        kind="answers",
        languages=("en",),
        splits={
            "train": Split("vqa/v2_OpenEnded_mscoco_train2014_questions.json", vqa.read_vqa_v2,
                           {"annotations": "v2_mscoco_train2014_annotations.json"}),
            "test": Split("vqa/v2_OpenEnded_mscoco_val2014_questions.json", vqa.read_vqa_v2,
                          {"annotations": "v2_mscoco_val2014_annotations.json"}),
        },
    ),
    "cvil_vqa": Task(
        summary="VQA v2's questions in English, Hindi and Japanese, as cViL has them",
        kind="answers",
        languages=("en", "hi", "ja"),
        answers=("cvil/answers.json",),
        splits={
            part: Split(f"cvil/{part}.jsonl", vqa.read_cvil, {"language": "{language}", "answers": "answers.json"})
            for part in ("train", "dev", "test")
        },
    ),
}  # fmt: skip
