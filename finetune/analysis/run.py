"""`analyse`: every figure of a finished run, into RUN/analysis, and a summary in Markdown. A figure that
cannot be made of this run is a line that says why."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from finetune.analysis import confused, curves, maps, objects, similarity, tsne
from finetune.analysis.figures import Inapplicable
from finetune.analysis.parallel import read_parallel
from finetune.build import (
    build_pipeline,
    build_strategies,
    find_task,
    languages_of,
    open_visual_for,
    tokenizer_of,
)
from finetune.config import FinetuneConfig
from finetune.evaluate import find_trained
from finetune.model import FinetuneModel, load_weights
from finetune.report import read_result, scores_of
from finetune.stores.images import ImageSource
from raylib import checkpoint
from raylib.config import load_config
from raylib.errors import UserError
from raylib.fileio import write_atomically
from raylib.models.base import FusionBackbone
from raylib.models.unified import UnifiedModel
from raylib.tables import markdown_table, percent
from raylib.text import Tokenizer

ONE_EACH = ("few_shot", "single_language")  # settings with a model for each language


class Options(NamedTuple):
    """limit: parallel items that are compared. pictures: how many are drawn. layer: "last", "mean" or a
    number. words, item: what attention is drawn of; by default what emoji scenes name."""

    limit: int = 200
    pictures: int = 3
    layer: str = "last"
    words: Mapping[str, str] = {}
    item: str | None = None


class Opened(NamedTuple):
    """A finished run: its folder, config and result, and what it evaluates with; `model` is None if each
    language has its own."""

    folder: Path
    config: FinetuneConfig
    result: dict[str, Any]
    model: FinetuneModel | UnifiedModel | None
    tokenizer: Tokenizer
    bf16: bool
    options: Options

    @property
    def out(self) -> Path:
        return self.folder / "analysis"

    @property
    def parts(self) -> dict[str, Path]:
        """{language: the folder of the training that its results come from}."""
        own = self.config.setting in ONE_EACH
        return {code: self.folder / code if own else self.folder for code in scores_of(self.result)}

    @property
    def measure(self) -> str:
        return "mean recall" if "retrieval" in self.result else "accuracy"

    @property
    def called(self) -> str:
        return f"{self.config.name}, {self.config.task}"

    def one_model(self) -> FinetuneModel | UnifiedModel:
        if self.model is None:
            raise Inapplicable(
                f"compares languages within one model; setting={self.config.setting} trains one for each"
            )
        return self.model


def analyse(folder: Path, options: Options) -> str:
    """Make every figure; returns the summary, which is in RUN/analysis/summary.md too.

    Raises:
        UserError: not a finished run; options that do not fit it.
    """
    opened = _open(folder, options)
    opened.out.mkdir(exist_ok=True)
    sections: dict[str, Callable[[Opened], list[str]]] = {
        "Similarity": _similarity,
        "Learning curves": _curves,
        "Confusions": _confusions,
        "Attention": _attention,
        "Words and regions": _words_and_regions,
    }
    lines = [f"# Analysis of {opened.called}"]
    for title, section in sections.items():
        try:
            found = section(opened)
        except Inapplicable as e:
            found = [f"Not made: {e}."]
        lines += ["", f"## {title}", "", *found]
    summary = "\n".join(lines)
    write_atomically(opened.out / "summary.md", summary + "\n")
    return f"{summary}\n\nfigures, and the numbers behind them: {opened.out}"


def _open(folder: Path, options: Options) -> Opened:
    result = read_result(folder)
    config = load_config(FinetuneConfig, folder / "config.json")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = None, Tokenizer.load(tokenizer_of(config))
    if config.setting not in ONE_EACH:
        _, model, tokenizer, _ = build_pipeline(config, build_strategies(config))
        if config.trains:
            load_weights(model, find_trained(config, folder, checkpoint.find_newest(folder)))
        model = model.to(device).eval()
    bf16 = config.fit.uses_bf16(device)
    return Opened(folder, config, result, model, tokenizer, bf16, options)


def _similarity(opened: Opened) -> list[str]:
    config, model = opened.config, opened.one_model()
    codes = languages_of(config)
    if len(codes) < 2:
        raise Inapplicable("there is one language")
    parallel = read_parallel(config, codes, opened.options.limit)
    if not parallel.items:
        raise Inapplicable(
            f"no test item is in all of {', '.join(codes)}: they are not translations of each other"
        )
    pictures = open_visual_for(config, model) if isinstance(model, FinetuneModel) else None
    states = similarity.parallel_states(
        model, parallel, pictures, opened.tokenizer, config.length, opened.bf16
    )
    values = similarity.describe(parallel, states, scores_of(opened.result))
    what = "CLS" if isinstance(model, FinetuneModel) else "caption"
    similarity.draw(values, opened.called, opened.measure, what, opened.out / "similarity")
    left = ", ".join(f"{code} {n}" for code, n in parallel.left_out.items() if n)
    rows = [["language", "similarity to English", opened.measure]]
    rows += [
        [code, percent(near), percent(values["score"][code])] for code, near in values["to_english"].items()
    ]
    unpaired = "" if values["unpaired"] is None else f", of unpaired ones {100 * values['unpaired']:.1f}"
    pearson = (
        ""
        if values["pearson"] is None
        else f"; Pearson's r with {opened.measure} over languages {values['pearson']:.2f}"
    )
    return [
        f"Mean cosine × 100 of parallel items ({what} states) in two languages "
        f"{100 * values['mean']:.1f}{unpaired}{pearson}. {values['items']} of the {parallel.found} items "
        f"that are in all languages; items that are not: {left or 'none'}.",
        *(["", markdown_table(rows)] if values["to_english"] else []),
    ]


def _curves(opened: Opened) -> list[str]:
    values = curves.read_curves(list(dict.fromkeys(opened.parts.values())))
    curves.draw(values, opened.called, opened.measure, opened.out / "curves")
    return [curves.summary(values)]


def _confusions(opened: Opened) -> list[str]:
    if not find_task(opened.config).open_answers:
        raise Inapplicable(f"the answers of {opened.config.task} are no open set")
    files = {code: folder / "predictions" / f"{code}.jsonl" for code, folder in opened.parts.items()}
    values = confused.count(files, opened.config.wordnet_folder)
    confused.draw(values, opened.called, opened.out / "confusions")
    return [confused.summary(values)]


def _attention(opened: Opened) -> list[str]:
    config, options, model = opened.config, opened.options, opened.one_model()
    backbone = model.backbone
    if not backbone.has_cross_attention:
        raise Inapplicable(f"backbone '{backbone.kind}' has no cross-attention to pictures")
    pictures = open_visual_for(config, model)
    if not isinstance(pictures, ImageSource):
        raise Inapplicable("texts are grounded in no pictures, whose patches could be drawn")
    codes = tuple(options.words) or languages_of(config)
    parallel = read_parallel(config, codes, options.limit, options.item)
    if not parallel.items:
        if options.item:
            raise UserError(
                f"--item {options.item}: no test item of this id in all of {', '.join(codes)}; see "
                "RUN/predictions"
            )
        raise Inapplicable(
            f"no test item is in all of {', '.join(codes)}: they are not translations of each other"
        )
    looks = (
        maps.looks_of_words(parallel, options.words)
        if options.words
        else maps.looks_of_scenes(parallel, Path(config.data) / "scenes.jsonl")
    )
    values = maps.measure(
        backbone, looks, codes, pictures, opened.tokenizer, config.length, options.layer, options.pictures
    )
    hidden = maps.draw(values, pictures, opened.called, opened.out / "attention")
    lines = [
        f"Where a word looks, unified layer: {options.layer}; mean over its tokens and heads, over "
        f"{values['items']} items."
    ]
    if hidden:
        lines[0] += (
            f" Captions in {', '.join(sorted(hidden))} are the code alone: no font here draws them (Noto's "
            "would)."
        )
    if "own_quadrant" in values:
        lines += [
            "",
            maps.summary(values),
            "",
            "A quadrant's share of the attention on patches by chance: 25 %.",
        ]
    return lines


def _words_and_regions(opened: Opened) -> list[str]:
    config, model, codes = opened.config, opened.one_model(), languages_of(opened.config)
    backbone, pictures = model.backbone, open_visual_for(config, model)
    if pictures is None or not isinstance(backbone, FusionBackbone):
        raise Inapplicable(
            f"backbone '{backbone.kind}' reads no text of {config.task} together with a picture"
        )
    parallel = read_parallel(config, codes, objects.POOL * opened.options.limit)
    if not parallel.items:
        raise Inapplicable(
            f"no test item is in all of {', '.join(codes)}: they are not translations of each other"
        )
    if isinstance(pictures, ImageSource):
        where = objects.find_boxes(parallel, Path(config.data) / "scenes.jsonl", pictures, backbone)
    else:
        where = objects.find_regions(parallel, pictures)
    chosen = objects.choose(parallel, where, opened.options.limit)
    points, states = tsne.collect(model, chosen, where, codes, pictures, opened.tokenizer, config.length)
    return tsne.summary(tsne.draw(points, states, opened.called, opened.out / "tsne"), backbone)
