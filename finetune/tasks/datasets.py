"""Tasks as records: which files under the data folder, which reader, which classes. A new task is one more
record.

Paths are those of the IGLUE repository's `datasets/` folder where it has the task (a test holds them against
its listing), else those of the task's own publication; {language} and {shots} are filled in. A split named
"test.en" is read in place of "test" in that language. "target_dev" is a development set in a target language,
for searches that may look at one: IGLUE's English ones, machine-translated; emoji scenes have them written.
Splits `*_to_en` and `*_from_en` are made by `finetune.translation`.
"""

from collections.abc import Mapping

from finetune.formats import (
    XTD_PARTS,
    answers,
    read_coco,
    read_coco_cn,
    read_flickr,
    read_karpathy,
    read_multi30k,
    read_wit,
    read_xtd,
)
from finetune.tasks.base import Overlap, Split, Task
from finetune.tasks.classification import Classification
from finetune.tasks.retrieval import Retrieval

XGQA_LANGUAGES = ("en", "bn", "de", "id", "ko", "pt", "ru", "zh")
GQA_ANSWERS = (
    "gqa/annotations/trainval_label2ans.json",
    "gqa/annotations/trainval_ans2label.pkl",
    "gqa/annotations/trainval_label2ans.pkl",
    "gqa/cache/trainval_ans2label.pkl",
)
TRANSLATED = {"empty": "keep"}  # a translation may have come out empty; it keeps its place
LANGUAGE_OPTION = {"language": "{language}"}  # for a reader that wants to know
GQA_TRAIN = Split(
    "gqa/annotations/train.json.zip",
    answers.read_gqa,
    others=(Split("gqa/annotations/train_balanced_questions.json", answers.read_gqa),),
)  # LXMERT's form; GQA's own
XGQA_TEST = Split("xGQA/annotations/few_shot/{language}/test.json", answers.read_gqa)
NLVR2_TEST = Split(
    "nlvr2/annotations/test.jsonl",
    answers.read_nlvr2,
    others=(Split("nlvr2/annotations/test1.jsonl", answers.read_nlvr2),),
)  # as NLVR2's authors call it
NLI_LANGUAGES = ("en", "ar", "es", "fr", "ru")
NLI_LABELS = ("contradiction", "neutral", "entailment")  # IGLUE's order; CCLM's public code has another


def _xvnli(train: Mapping[str, Split]) -> dict[str, Split]:
    shared = {
        "dev": Split("XVNLI/annotations/en/dev.jsonl", answers.read_xvnli),
        "test": Split("XVNLI/annotations/{language}/test.jsonl", answers.read_xvnli),
        "shots": Split("XVNLI/annotations/{language}/train_{shots}.jsonl", answers.read_xvnli),
        "target_dev": Split(
            "XVNLI/annotations/en/dev-{language}_gmt.jsonl",
            answers.read_xvnli,
            others=(Split("XVNLI/annotations/{language}/dev.jsonl", answers.read_xvnli),),
        ),
        "translated": Split("XVNLI/annotations_machine-translate/{language}/test.jsonl", answers.read_xvnli),
    }
    return {**shared, **train}


XTD_IMAGES = "test_image_names.txt"
XTD_EXCLUDED = f"../xtd/{XTD_IMAGES}|../xtd/XTD10/{XTD_IMAGES}"


def _xtd(read, **options) -> Split:
    """Captions of XTD's test set in one folder, or in the folders of its three sources."""
    folders = ("xtd/XTD10", "xtd/MIC", "xtd/STAIR")
    names = {"images": f"{XTD_IMAGES}|../XTD10/{XTD_IMAGES}", **options}
    others = tuple(Split(f"{folder}/test_1kcaptions_{{language}}.txt", read, names) for folder in folders)
    return Split("xtd/test_1kcaptions_{language}.txt", read, names, others)


def _xtd_parts() -> dict[str, Split]:
    """Captions of XTD's test set by paper 4's parts, and translations of them in files alike."""

    def translated(name: str, way: str) -> Split:
        images = f"../{XTD_IMAGES}|../XTD10/{XTD_IMAGES}"
        options = {"images": images, "part": name, **TRANSLATED}
        return Split(f"xtd/translated_{way}_en/{{language}}.txt", read_xtd, options)

    return {
        **{name: _xtd(read_xtd, part=name) for name in XTD_PARTS},
        "train_to_en": translated("train", "to"),
        "dev_to_en": translated("dev", "to"),
        **{f"{name}_from_en": translated(name, "from") for name in XTD_PARTS},
        "translated": translated("test", "to"),
    }


def _ja_vqa(part: str) -> Split:
    """A part of Japanese VQA in a file of its own, or of the one file that is published."""
    whole = Split("ja_vqa/question_answers.json.zip", answers.read_ja_vqa, {"part": part})
    return Split(f"ja_vqa/{part}.json", answers.read_ja_vqa, others=(whole,))


CVIL_ANSWERS = ("answers.json", "trainval_ans2label.pkl")
CVIL_FILES = {"train": "train2014", "dev": "val2014", "test": "test-dev2015"}  # as cViL's code calls them
HINDI_ANSWERS = "answers_hi.json"


def _cvil(part: str, translations: str) -> Split:
    options = {"language": "{language}", "answers": "|".join(CVIL_ANSWERS), "translations": translations}
    other = Split(f"cvil/{CVIL_FILES[part]}_qla_mrcnn.json", answers.read_cvil, options)
    return Split(f"cvil/{part}.jsonl", answers.read_cvil, options, (other,))


TASKS: dict[str, Task] = {
    "xgqa": Classification(
        summary="questions about images; GQA in English, xGQA in 7 more languages",
        languages=XGQA_LANGUAGES,
        answers=GQA_ANSWERS,
        split_names={"test": "few_shot_test"},
        splits={
            "train": GQA_TRAIN,
            "dev": Split(
                "gqa/annotations/valid.json",
                answers.read_gqa,
                others=(Split("gqa/annotations/val_balanced_questions.json", answers.read_gqa),),
            ),
            # IGLUE, paper 0 and CCLM test on these 9,666 questions, zero-shot too; the testdev's other 2,912
            # are shots and dev
            "test": XGQA_TEST,
            "few_shot_test": XGQA_TEST,
            "testdev": Split(
                "xGQA/annotations/zero_shot/testdev_balanced_questions_{language}.json", answers.read_gqa
            ),
            "shots": Split("xGQA/annotations/few_shot/{language}/train_{shots}.json", answers.read_gqa),
            "shots_dev": Split("xGQA/annotations/few_shot/{language}/dev.json", answers.read_gqa),
            "translated": Split(
                "xGQA/annotations_machine-translate/few_shot/{language}/test.json", answers.read_gqa
            ),
            "translated_testdev": Split(
                "xGQA/annotations_machine-translate/zero_shot/testdev_balanced_questions_{language}.json",
                answers.read_gqa,
            ),
        },
    ),
    "xgqa_translated": Classification(
        summary="xGQA, its training questions GQA's, translated into each language (translate-train)",
        languages=XGQA_LANGUAGES,
        answers=GQA_ANSWERS,
        split_names={"test": "few_shot_test"},
        splits={
            "train": Split(
                "xGQA/annotations_translate-train/{language}/train_balanced_questions.json",
                answers.read_gqa,
            ),
            "train.en": GQA_TRAIN,
            "dev": Split("xGQA/annotations/few_shot/{language}/dev.json", answers.read_gqa),
            "test": XGQA_TEST,
            "few_shot_test": XGQA_TEST,
        },
    ),
    "xvnli": Classification(
        summary="does the image entail, contradict or leave open the sentence",
        labels=NLI_LABELS,
        languages=NLI_LANGUAGES,
        splits=_xvnli({"train": Split("XVNLI/annotations/en/train.jsonl.zip", answers.read_xvnli)}),
    ),
    "xnli": Classification(
        summary="entailment between sentences: MultiNLI in English, XNLI in the languages of XVNLI",
        labels=NLI_LABELS,
        languages=NLI_LANGUAGES,
        splits={
            "train": Split(
                "XNLI-MT-1.0/multinli/multinli.train.en.tsv",
                answers.read_multinli,
                others=(Split("XNLI/multinli.train.en.tsv", answers.read_multinli),),
            ),
            **{
                part: Split(
                    f"XNLI-1.0/xnli.{part}.tsv",
                    answers.read_xnli,
                    LANGUAGE_OPTION,
                    others=(Split(f"XNLI/xnli.{part}.tsv", answers.read_xnli, LANGUAGE_OPTION),),
                )
                for part in ("dev", "test")
            },
        },
    ),
    "snli_xvnli": Classification(
        summary="trained on SNLI's sentence pairs, tested on XVNLI's images: transfer across languages and "
        "modes",
        labels=NLI_LABELS,
        languages=NLI_LANGUAGES,
        item="number",  # XVNLI's pairs are SNLI's, whose premise an image stands for
        overlaps=(
            Overlap(
                "dev", "train", None, None, "SNLI keeps captions apart, of which some may have the same words"
            ),
        ),
        splits=_xvnli(
            {
                part: Split(
                    f"snli_1.0/snli_1.0_{part}.jsonl",
                    answers.read_snli,
                    others=(Split(f"SNLI/snli_1.0_{part}.jsonl", answers.read_snli),),
                )
                for part in ("train", "dev")
            }
        ),
    ),
    "marvl": Classification(
        summary="is the statement true of two images; NLVR2 in English, MaRVL in 5 more languages",
        labels=("False", "True"),
        num_images=2,
        languages=("en", "id", "sw", "ta", "tr", "zh"),
        item="text",
        overlaps=(
            Overlap(
                "test",
                "dev",
                45,
                25,
                "NLVR2's test and dev, counted in IGLUE's files: image addresses, statements",
                "en",
            ),
            *(
                Overlap(
                    first,
                    "train",
                    None,
                    None,
                    "NLVR2's authors keep sets of images apart, not images or statements",
                    code,
                    "en",
                )
                for first, code in (("test", "en"), ("dev", None))
            ),
            Overlap(
                "test",
                "train",
                7,
                0,
                "MaRVL's Chinese shots (5 images of 10, 7 of 10x2), counted in IGLUE's files",
                "zh",
                "zh",
            ),
        ),
        splits={
            "train": Split("nlvr2/annotations/train.jsonl", answers.read_nlvr2),
            "dev": Split("nlvr2/annotations/dev.jsonl", answers.read_nlvr2),
            "target_dev": Split("nlvr2/annotations/dev-{language}_gmt.jsonl", answers.read_nlvr2),
            "test": Split(
                "marvl/zero_shot/annotations/marvl-{language}.jsonl", answers.read_marvl, LANGUAGE_OPTION
            ),
            "test.en": NLVR2_TEST,
            "shots": Split(
                "marvl/few_shot/annotations/marvl-{language}_train{shots}.jsonl",
                answers.read_marvl,
                LANGUAGE_OPTION,
            ),
            "translated": Split(
                "marvl/zero_shot/annotations_machine-translate/marvl-{language}_gmt.jsonl",
                answers.read_marvl,
                LANGUAGE_OPTION,
            ),
            "translated.en": NLVR2_TEST,
        },
    ),
    "xflickrco": Retrieval(
        summary="image-text retrieval; Flickr30K in English, xFlickr&CO in 7 more languages",
        languages=("en", "de", "es", "id", "ja", "ru", "tr", "zh"),
        splits={
            "train": Split("flickr30k/annotations/train_ann.jsonl", read_flickr),
            "dev": Split("flickr30k/annotations/valid_ann.jsonl", read_flickr),
            "test": Split("xFlickrCO/annotations/{language}/test.jsonl", read_flickr, {"empty": "keep"}),
            "shots": Split("xFlickrCO/annotations/{language}/train_{shots}.jsonl", read_flickr),
            "target_dev": Split(
                "flickr30k/annotations_machine-translate/valid-{language}_gmt.jsonl",
                read_flickr,
                {"sentences": "first"},  # IGLUE translated the first of five, and left the others in English
                others=(Split("xFlickrCO/annotations/{language}/dev.jsonl", read_flickr),),
            ),
            "target_dev_to_en": Split(
                "xFlickrCO/annotations_machine-translate/{language}/dev_gmt.jsonl", read_flickr, TRANSLATED
            ),
            "translated": Split(
                "xFlickrCO/annotations_machine-translate/{language}/test_gmt.jsonl",
                read_flickr,
                {"empty": "keep"},
            ),
            "shots_to_en": Split(
                "xFlickrCO/annotations_machine-translate/{language}/train_{shots}_gmt.jsonl",
                read_flickr,
                TRANSLATED,
            ),
            "shots_from_en": Split(
                "xFlickrCO/annotations_machine-translate/{language}/train_{shots}_from_en.jsonl",
                read_flickr,
                TRANSLATED,
            ),
        },
    ),
    "wit": Retrieval(
        summary="image-text retrieval on Wikipedia's images, 11 languages",
        languages=("en", "ar", "bg", "da", "el", "et", "id", "ja", "ko", "tr", "vi"),
        splits={
            "train": Split("wit/annotations/train_en.jsonl.zip", read_wit),
            "dev": Split(
                "wit/annotations/val_en.jsonl",
                read_wit,
                others=(Split("wit/annotations/valid_en.jsonl", read_wit),),
            ),
            "test": Split("wit/annotations/test_{language}.jsonl", read_wit),
            "translated": Split("wit/annotations_machine-translate/test_{language}_gmt.jsonl", read_wit),
        },
    ),
    "multi30k": Retrieval(
        summary="image-text retrieval on Flickr30K's images; captions written in English, translated into "
        "three languages",
        languages=("en", "de", "fr", "cs"),
        splits={
            split: Split(
                f"multi30k/data/task1/raw/{part}.{{language}}.gz",
                read_multi30k,
                {"images": f"../image_splits/{part}.txt"},
            )
            for split, part in (("train", "train"), ("dev", "val"), ("test", "test_2016_flickr"))
        }
        | {
            split: Split(
                f"multi30k/translated_{way}_en/{part}.{{language}}",
                read_multi30k,
                {"images": f"../data/task1/image_splits/{part}.txt", **TRANSLATED},
            )
            for split, way, part in (
                ("train_to_en", "to", "train"),
                ("train_from_en", "from", "train"),
                ("dev_to_en", "to", "val"),
                ("dev_from_en", "from", "val"),
                ("translated", "to", "test_2016_flickr"),
                ("test_from_en", "from", "test_2016_flickr"),
            )
        },
    ),
    "coco": Retrieval(
        summary="image-text retrieval on MSCOCO: English, Japanese (STAIR), Chinese (COCO-CN)",
        languages=("en", "ja", "zh"),
        mscoco=True,
        overlaps=tuple(
            Overlap(
                first,
                second,
                None,
                0,
                "COCO-CN draws its splits from all of MSCOCO, not as Karpathy does",
                *languages,
            )
            for first, second in (("test", "train"), ("test", "dev"), ("dev", "train"))
            for languages in (("zh", "en"), ("zh", "ja"), ("en", "zh"), ("ja", "zh"))
        ),
        splits={
            name: split
            for part, other in (("train", "train"), ("dev", "val"), ("test", "test"))
            for name, split in {
                f"{part}.en": Split("coco/dataset_coco.json", read_karpathy, {"split": other}),
                f"{part}.ja": Split(
                    f"coco/stair_captions_v1.2_{'train' if part == 'train' else 'val'}.json",
                    read_coco,
                    {
                        "images": "dataset_coco.json",
                        "split": other,
                        "more": "stair_captions_v1.2_val.json" if part == "train" else "",
                    },
                ),
                f"{part}.zh": Split(
                    "coco-cn/imageid.human-written-caption.txt",
                    read_coco_cn,
                    {"images": f"coco-cn_{other}.txt"},
                ),
            }.items()
        },
    ),
    "xtd": Retrieval(
        summary="image-text retrieval on 1,000 of MSCOCO's images in 11 languages; trained on MSCOCO in "
        "English",
        languages=("en", "de", "es", "fr", "it", "jp", "ko", "pl", "ru", "tr", "zh"),
        mscoco=True,
        splits={
            # 946 of XTD's images are among those that Karpathy trains on, 26 in his dev set: they are left
            # out of both
            "train": Split(
                "coco/dataset_coco.json", read_karpathy, {"split": "train", "without": XTD_EXCLUDED}
            ),
            "dev": Split("coco/dataset_coco.json", read_karpathy, {"split": "val", "without": XTD_EXCLUDED}),
            "test": _xtd(read_multi30k),
        },
    ),
    "xtd_few": Retrieval(
        summary="image-text retrieval on XTD: 50 of its images to train on, 50 to choose by, 900 to test "
        "(paper 4)",
        languages=("en", "de", "es", "fr", "it", "jp", "ko", "pl", "ru", "tr", "zh"),
        mscoco=True,
        splits=_xtd_parts(),
    ),
    "ja_vqa": Classification(
        summary="questions about Visual Genome's images in Japanese, free answers",
        languages=("ja",),
        bleu="ja",
        splits={part: _ja_vqa(part) for part in ("train", "dev", "test")},
    ),
    "fm_iqa": Classification(
        summary="questions about MSCOCO's images in Chinese, free answers",
        languages=("zh",),
        bleu="zh",
        mscoco=True,
        splits={
            "train": Split("fm_iqa/FM-IQA.json", answers.read_fm_iqa, {"split": "train"}),
            "test": Split("fm_iqa/FM-IQA.json", answers.read_fm_iqa, {"split": "val"}),
        },
    ),
    "vqa_v2": Classification(
        summary="VQA v2, English, soft scores",
        languages=("en",),
        mscoco=True,
        splits={
            "train": Split(
                "vqa/v2_OpenEnded_mscoco_train2014_questions.json",
                answers.read_vqa_v2,
                {"annotations": "v2_mscoco_train2014_annotations.json"},
            ),
            "test": Split(
                "vqa/v2_OpenEnded_mscoco_val2014_questions.json",
                answers.read_vqa_v2,
                {"annotations": "v2_mscoco_val2014_annotations.json"},
            ),
        },
    ),
    "cvil_vqa": Classification(
        summary="VQA v2's questions in English, Hindi and Japanese, as cViL has them",
        languages=("en", "hi", "ja"),
        answers=tuple(f"cvil/{name}" for name in CVIL_ANSWERS),
        merged_answers={"hi": f"cvil/{HINDI_ANSWERS}"},
        mscoco=True,
        splits={
            f"{part}{suffix}": _cvil(part, translations)
            for part in ("train", "dev", "test")
            for suffix, translations in (("", ""), (".hi", HINDI_ANSWERS))
        },
    ),
}
