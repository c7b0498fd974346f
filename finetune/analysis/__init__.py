"""Figures of a finished run, each a PNG with the numbers behind it as JSON: `python -m finetune analyse RUN`.

1. `languages`: similarity of CLS states of parallel items, language by language (paper 1, figure 4); accuracy
   after each epoch, by language and by question type (paper 1, figures 2 and 3); accuracy with synonyms
   counted right, the most confused labels (paper 0, tables 2 and 3).
2. `attention`: where in the image a word looks, in each language (paper 2, figure 3).
3. `tsne`: states of words and of the regions that they name, in one plane (paper 3's t-SNE figure).

`analyse` makes them all, and writes them into RUN/analysis with a summary in Markdown; a figure that cannot
be made of this run is a line that says why. `parallel` has the items, their words, and what the figures
share.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from finetune.analysis import attention, languages, tsne
from finetune.analysis.parallel import (
    Inapplicable,
    Parallel,
    find_given_words,
    find_scene_mentions,
    read_parallel,
)
from finetune.build import (
    build_pipeline,
    build_strategies,
    find_task,
    languages_of,
    open_tokenizer,
    open_visual_for,
    tokenizer_of,
)
from finetune.config import FinetuneConfig
from finetune.lineage import load_run_config
from finetune.one_answer import footnotes
from finetune.report import answers_of, marked, read_result, scores_of
from finetune.stores.images import ImageSource, RegionFeatures
from finetune.worker import trained_config
from raylib import checkpoint
from raylib.display import markdown_table, percent, progress
from raylib.errors import UserError
from raylib.fileio import write_atomically
from raylib.models.base import FusionBackbone, RetrievalBackbone, load_weights
from raylib.models.finetuned import FinetuneModel
from raylib.models.unified import UnifiedModel
from raylib.precision import autocast
from raylib.text import Tokenizer

ONE_EACH = ("few_shot", "single_language")  # settings with a model for each language


class Options(NamedTuple):
    """limit: parallel items that are compared. images: how many are drawn. layer: "last", "mean" or a
    number. words, item: whose attention is drawn; by default what emoji scenes name."""

    limit: int = 200
    images: int = 3
    layer: str = "last"
    words: Mapping[str, str] = {}
    item: str | None = None


class FinishedRun(NamedTuple):
    """A run's folder, config and result, and what it evaluates with; `model` is None if each language has its
    own."""

    folder: Path
    config: FinetuneConfig
    result: dict[str, Any]
    model: FinetuneModel | RetrievalBackbone | None
    tokenizer: Tokenizer
    bf16: bool
    options: Options

    @property
    def out(self) -> Path:
        """Folder of the figures."""
        return self.folder / "analysis"

    @property
    def folders(self) -> dict[str, Path]:
        """{language: the folder of the training that its results come from}."""
        one_each = self.config.setting in ONE_EACH
        return {code: self.folder / code if one_each else self.folder for code in scores_of(self.result)}

    @property
    def measure(self) -> str:
        """Name of the scores."""
        return "mean recall" if "retrieval" in self.result else "accuracy"

    @property
    def title(self) -> str:
        """Name of the run and its task."""
        return f"{self.config.name}, {self.config.task}"

    def autocast(self) -> torch.autocast:
        """Return the context in which the model computes, as in the run's evaluation."""
        return autocast(next(self.shared_model().parameters()).device, self.bf16)

    def shared_model(self) -> FinetuneModel | RetrievalBackbone:
        """Return the model of all languages.

        Raises:
            Inapplicable: each has its own.
        """
        if self.model is None:
            raise Inapplicable(
                f"compares languages within one model; setting={self.config.setting} trains one for each"
            )
        return self.model

    def read_parallel(self, languages: Sequence[str], limit: int, item: str | None = None) -> Parallel:
        """Read test items that are in all `languages`.

        Raises:
            Inapplicable: there are none. UserError: `item` is not among them.
        """
        parallel = read_parallel(self.config, languages, limit, item)
        codes = ", ".join(languages)
        if not parallel.items and item:
            raise UserError(f"--item {item}: no test item of this id in all of {codes}; see RUN/predictions")
        if not parallel.items:
            raise Inapplicable(f"no test item is in all of {codes}: they are not translations of each other")
        return parallel


def analyse(folder: Path, options: Options) -> str:
    """Make every figure; returns the summary, which is in RUN/analysis/summary.md too.

    Raises:
        UserError: not a finished run; options that do not fit it.
    """
    run = load_finished_run(folder, options)
    run.out.mkdir(exist_ok=True)
    sections: dict[str, Callable[[FinishedRun], list[str]]] = {
        "Similarity": _similarity,
        "Learning curves": _curves,
        "Confusions": _confusions,
        "Attention": _attention,
        "Words and regions": words_and_regions,
    }
    lines = [f"# Analysis of {run.title}"]
    lines += [line for note in footnotes(answers_of(run.result)) for line in ("", note)]
    for title, section in progress(sections.items(), "analyse", unit="figures"):
        try:
            paragraphs = section(run)
        except Inapplicable as e:
            paragraphs = [f"Not made: {e}."]
        lines += ["", f"## {title}", "", *paragraphs]
    summary = "\n".join(lines)
    write_atomically(run.out / "summary.md", summary + "\n")
    return f"{summary}\n\nfigures, and the numbers behind them: {run.out}"


def load_finished_run(folder: Path, options: Options) -> FinishedRun:
    """Open a finished run, its model on the GPU if there is one.

    Raises:
        UserError: not a finished run.
    """
    result = read_result(folder)
    config = load_run_config(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = None
    if config.setting in ONE_EACH:
        tokenizer = open_tokenizer(config, tokenizer_of(config))
    else:
        trained = trained_config(config, folder) if config.trains else config
        _, model, tokenizer, _ = build_pipeline(trained, build_strategies(trained))
        if config.trains:
            load_weights(model, checkpoint.find_trained(folder, config.select))
        model = model.to(device).eval()
    return FinishedRun(folder, config, result, model, tokenizer, config.fit.uses_bf16(device), options)


def _similarity(run: FinishedRun) -> list[str]:
    config, model = run.config, run.shared_model()
    codes = languages_of(config)
    if len(codes) < 2:
        raise Inapplicable("there is one language")
    parallel = run.read_parallel(codes, run.options.limit)
    is_tuned = isinstance(model, FinetuneModel)
    source, kind = (open_visual_for(config, model), "CLS") if is_tuned else (None, "caption")
    states = languages.parallel_states(model, parallel, source, run.tokenizer, config.length, run.bf16)
    values = languages.measure_similarity(parallel, states, scores_of(run.result))
    languages.draw_similarity(values, run.title, run.measure, kind, run.out / "similarity")
    num_missing = ", ".join(f"{code} {n}" for code, n in parallel.num_missing.items() if n)
    rows, answers = [["language", "similarity to English", run.measure]], answers_of(run.result)
    for code, cosine in values["to_english"].items():
        rows.append([code, percent(cosine), marked(values["score"][code], answers.get(code))])
    unpaired, pearson = values["unpaired"], values["pearson"]
    control = "" if unpaired is None else f", of unpaired ones {100 * unpaired:.1f}"
    correlation = "" if pearson is None else f"; Pearson's r with {run.measure} over languages {pearson:.2f}"
    return [
        f"Mean cosine × 100 of parallel items ({kind} states) in two languages "
        f"{100 * values['mean']:.1f}{control}{correlation}. {values['items']} of the {parallel.num_common} "
        f"items that are in all languages; items that are not: {num_missing or 'none'}.",
        *(["", markdown_table(rows)] if values["to_english"] else []),
    ]


def _curves(run: FinishedRun) -> list[str]:
    values = languages.read_curves(list(dict.fromkeys(run.folders.values())))
    languages.draw_curves(values, run.title, run.measure, run.out / "curves")
    return [languages.curve_table(values)]


def _confusions(run: FinishedRun) -> list[str]:
    if not find_task(run.config).open_answers:
        raise Inapplicable(f"the answers of {run.config.task} are no open set")
    files = {code: folder / "predictions" / f"{code}.jsonl" for code, folder in run.folders.items()}
    values = languages.count_confusions(files, run.config.wordnet_folder)
    languages.draw_confusions(values, run.title, run.out / "confusions")
    return [languages.confusion_table(values, answers_of(run.result))]


def _attention(run: FinishedRun) -> list[str]:
    config, options, model = run.config, run.options, run.shared_model()
    backbone = model.backbone
    if not (isinstance(backbone, UnifiedModel) and backbone.has_cross_attention):
        raise Inapplicable(f"backbone '{backbone.kind}' has no cross-attention to images")
    source = open_visual_for(config, model)
    if not isinstance(source, ImageSource):
        raise Inapplicable("texts are about no images, whose patches could be drawn")
    codes = tuple(options.words) or languages_of(config)
    parallel = run.read_parallel(codes, options.limit, options.item)
    if options.words:
        mentions = find_given_words(parallel, options.words)
    else:
        mentions = find_scene_mentions(parallel, Path(config.data) / "scenes.jsonl")
    with run.autocast():
        values = attention.measure_attention(
            backbone,
            mentions,
            codes,
            source,
            run.tokenizer,
            config.length,
            options.layer,
            options.images,
        )
    unprintable = attention.draw_attention(values, source, run.title, run.out / "attention")
    lines = [
        f"Where a word looks, unified layer: {options.layer}; mean over its tokens and heads, over "
        f"{values['items']} items."
    ]
    if unprintable:
        lines[0] += (
            f" Captions in {', '.join(sorted(unprintable))} are the code alone: no font here draws them "
            "(Noto's would)."
        )
    if "own_quadrant" in values:
        chance = "A quadrant's share of the attention on patches by chance: 25 %."
        lines += ["", attention.attention_table(values), "", chance]
    return lines


def words_and_regions(run: FinishedRun) -> list[str]:
    """Draw states of words and of the regions that they name; returns a summary."""
    config, model, codes = run.config, run.shared_model(), languages_of(run.config)
    backbone, source = model.backbone, open_visual_for(config, model)
    if not isinstance(source, ImageSource | RegionFeatures) or not isinstance(backbone, FusionBackbone):
        raise Inapplicable(
            f"backbone '{backbone.kind}' reads no text of {config.task} together with an image"
        )
    parallel = run.read_parallel(codes, tsne.POOL * run.options.limit)
    if isinstance(source, ImageSource):
        weights = tsne.find_boxes(parallel, Path(config.data) / "scenes.jsonl", source, backbone)
    else:
        weights = tsne.find_regions(parallel, source)
    mentions = tsne.select_mentions(parallel, weights, run.options.limit)
    with run.autocast():
        points, states = tsne.collect_states(
            model, mentions, weights, codes, source, run.tokenizer, config.length
        )
    return tsne.tsne_summary(tsne.draw_tsne(points, states, run.title, run.out / "tsne"), backbone)
