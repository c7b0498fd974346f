"""Zero-shot image-text retrieval with the unimodal encoders, per language: set, scores, table."""

import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pretrain.embeddings import FrozenStates
from raylib.data.images import decode_image, preprocess_image, read_image_file
from raylib.data.shards import index_command
from raylib.data.sources import Source
from raylib.display import markdown_table, progress
from raylib.distributed import gather_objects, raise_on_all_workers, rank, world_size
from raylib.errors import UserError
from raylib.fileio import MAX_JSON, find_file, read_json, write_json
from raylib.finite import is_finite, require_finite, require_finite_values
from raylib.metrics import mean_or_zero, mean_recall_at_1, recall_figures, recall_hits, recall_interval
from raylib.models import find_model, find_tokenizer
from raylib.models.finetuned import find_fit, hold_model
from raylib.models.unified import UnifiedModel
from raylib.packed import Ragged
from raylib.provenance import DataFile, combined_hash, fingerprint_files, hash_path, provenance
from raylib.runtime import MemoryAdvice, advise_on_memory, local_device, peak_memory
from raylib.settings import MAX_PIXELS, SQUEEZED, FitConfig, PreprocessConfig
from raylib.text import (
    BadCaption,
    EmptyCaption,
    Tokenizer,
    add_specials,
    clean_captions,
    is_language_code,
    parse_captions,
)

GROUPS = {
    "en_r1": "English",
    "others_r1": "mean of the others",
    "heldout_language_r1": "language in no training text",
}
COLUMNS = ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10")


class RetrievalItem(NamedTuple):
    """An image (of several drawings the first, by extension): its name, its bytes, {language: captions},
    whether its concept was held out of training, and the languages that no training text is in."""

    name: str
    image: bytes
    captions: dict[str, list[str]]
    heldout: bool
    heldout_languages: tuple[str, ...] = ()


def read_retrieval_set(folder: Path | str) -> Iterator[RetrievalItem]:
    """Every image of a retrieval set, in order.

    Raises:
        UserError: neither shards nor `captions.json`; a record without image or captions (it is named).
    """
    folder = Path(folder)
    if (folder / "captions.json").is_file():
        return _from_folder(folder)
    if (folder / "manifest.json").is_file():
        return _from_shards(folder)
    raise UserError(
        f"{folder}: no retrieval set; give a folder with captions.json, or shards with manifest.json "
        f"(`{index_command(folder, 'image_text')}` makes one for tars)"
    )


def _from_folder(folder: Path) -> Iterator[RetrievalItem]:
    what, advice = "JSON: a list of images and captions", "take an undamaged copy"
    records = read_json(folder / "captions.json", what, advice, most=MAX_JSON)
    if not isinstance(records, list) or not records:
        raise UserError(f"{folder}/captions.json: no {what.removeprefix('JSON: a ')}; {advice}")
    for i, record in enumerate(records):
        where = f"{folder}/captions.json, record {i}"
        if not isinstance(record, dict) or not isinstance(record.get("image"), str):
            raise UserError(f'{where}: wanted {{"image": PATH, "captions": {{LANGUAGE: TEXT}}}}')
        path = find_file(folder, record["image"])
        if path is None:
            raise UserError(
                f"{where}: no image {record['image']!a:.200} in that folder; a link in it may lead elsewhere"
            )
        try:
            captions = parse_captions(record, None)
        except BadCaption as error:
            raise UserError(f"{where}: {error}") from error
        if not captions:
            raise UserError(f"{where}: no captions")
        yield RetrievalItem(
            record["image"], read_image_file(path), _clean(captions, where), *_held_out(record, where)
        )


def _from_shards(folder: Path) -> Iterator[RetrievalItem]:
    source = Source(folder, kind="image_text")
    for language in source.groups:
        for number in range(source.size(language)):
            sample = source.sample(language, number)
            if not sample.images:
                raise UserError(sample.describe("no image"))
            try:
                captions = _clean(sample.captions(), sample.name)
                held_out = _held_out(sample.record(), sample.name)
            except BadCaption as error:
                raise UserError(sample.describe(error)) from error
            yield RetrievalItem(sample.key, sample.read(sample.images[0]), captions, *held_out)


def _held_out(record: dict[str, Any], where: str) -> tuple[bool, tuple[str, ...]]:
    """A record's "heldout" and "heldout_languages"."""
    languages = record.get("heldout_languages", [])
    if not isinstance(languages, list) or not all(
        isinstance(code, str) and is_language_code(code) for code in languages
    ):
        raise UserError(f'{where}: "heldout_languages" is no list of language codes such as ["sw"]')
    return bool(record.get("heldout")), tuple(languages)


def _clean(captions: dict[str, Any], where: str) -> dict[str, list[str]]:
    """Captions of an item in every language; no blank is left out here, since each caption is a query."""
    out = {}
    for language, texts in captions.items():
        if not is_language_code(language):
            raise UserError(
                f"{where}: captions in {language!r:.40}, which is no language code such as 'de' or 'zh-Hans'"
            )
        try:
            out[language] = clean_captions(texts)
            if not isinstance(texts, str) and len(out[language]) < len(texts):
                raise EmptyCaption
        except EmptyCaption:
            raise UserError(
                f"{where}: an empty caption in {language!r}; leave the language out instead"
            ) from None
        except BadCaption as error:
            raise UserError(f"{where}: {error} in {language!r}") from error
    return out


class ZeroShotRetrieval:
    """A retrieval set ready to score models: captions tokenised, and this worker's share of the images
    resized, once.

    Attributes:
        images: uint8 (n, size, size, 3), every world-th from this worker's rank on, in a temporary file that
            is mapped: their pages come and go with the system's cache.
        ids, owners: of each language, the captions as ids with specials, and the images that they are of.

    Args:
        folder: shards, or images with `captions.json` (`read_retrieval_set`).
        size: pixels a side.
        length: longest sentence in tokens, specials included.
        max_pixels: of an image. preprocess: how images are prepared.
    """

    def __init__(
        self,
        folder: Path | str,
        tokenizer: Tokenizer,
        size: int,
        length: int,
        max_pixels: int = MAX_PIXELS,
        preprocess: PreprocessConfig = SQUEEZED,
    ):
        self.tokenizer, self.length = tokenizer, length
        heldout: list[bool] = []
        self.heldout_languages: list[str] = []
        texts: dict[str, list[tuple[int, str]]] = {}
        with tempfile.TemporaryFile() as file:
            for number, item in enumerate(
                progress(read_retrieval_set(folder), f"read {folder}", unit="images")
            ):
                for language, captions in item.captions.items():
                    texts.setdefault(language, []).extend((number, caption) for caption in captions)
                heldout.append(item.heldout)
                self.heldout_languages += set(item.heldout_languages) - {*self.heldout_languages}
                if number % world_size() == rank():
                    image = decode_image(item.image, f"{folder}: {item.name}", max_pixels)
                    file.write(preprocess_image(image, size, preprocess).tobytes())
            if not heldout:
                raise UserError(f"{folder}: no images to retrieve")
            self.images = _map_images(file, size)
        self.heldout = torch.tensor(heldout)
        self.owners = {
            language: torch.tensor([owner for owner, _ in rows]) for language, rows in texts.items()
        }
        self.ids = {language: self._ids([text for _, text in rows]) for language, rows in texts.items()}
        self.frozen = FrozenStates()

    def count_missing_captions(self) -> dict[str, int]:
        """{language: images that have no caption in it, and are none of its candidates}."""
        return {code: len(self.heldout) - len(owner.unique()) for code, owner in sorted(self.owners.items())}

    def _ids(self, texts: list[str]) -> Ragged:
        ids = add_specials(self.tokenizer.encode(texts), self.tokenizer, self.length)
        return Ragged(*map(torch.from_numpy, ids))

    def __call__(self, model: UnifiedModel, bf16: bool) -> dict[str, Any]:
        """{"retrieval": {language: figures}, "heldout": the same of held-out concepts alone, "interval":
        {language: [low, high]}, the 95 % bootstrap interval over images of R@1 (mean of both ways),
        "heldout_languages": [language]}; the
        figures are `chance_r1`, `i2t_r1` ... `t2i_r10`, `n` images. Workers share the encoding; all return
        the same.

        Raises:
            NotFinite: embeddings of the images, or of a language's sentences, are not finite.
        """
        world = world_size()
        local_images = self.frozen.image_vectors(model, self.images, bf16)
        images = torch.empty(len(self.heldout), model.config.embedding)
        for worker, vectors in enumerate(gather_objects(local_images)):
            images[worker::world] = vectors
        require_finite("image embeddings", images)  # on all workers
        languages = sorted(self.ids)[rank() :: world]
        texts = {
            language: self.frozen.sentence_vectors(model, language, self.ids[language], bf16)
            for language in languages
        }
        bad = [language for language, vectors in texts.items() if not is_finite(vectors)]
        raise_on_all_workers(
            f"text embeddings in {', '.join(bad)}: not finite (NaN or infinite)" if bad else None
        )
        local = {language: self._score(language, vectors, images) for language, vectors in texts.items()}
        # alike on all workers: by language, of which each worker has others
        scores = dict(sorted(item for part in gather_objects(local) for item in part.items()))
        return {
            "retrieval": {language: score.figures for language, score in scores.items()},
            "heldout": {language: score.heldout for language, score in scores.items() if score.heldout},
            "interval": {language: score.interval for language, score in scores.items()},
            "heldout_languages": sorted(self.heldout_languages),
        }

    def _score(self, language: str, texts: Tensor, images: Tensor) -> "LanguageScore":
        owner = self.owners[language]
        captioned = owner.unique()
        # an image is asked with all of its captions, so what is held out are rows of these
        i2t = recall_hits(images[captioned], texts, captioned, owner)
        t2i = recall_hits(texts, images[captioned], owner, captioned)
        row_of_image = torch.searchsorted(captioned, owner)
        # seeded by the language alone, so that an export has the run's interval
        interval = recall_interval(i2t[:, 0], t2i[:, 0], row_of_image, "bootstrap", language)
        heldout = self.heldout[captioned]
        return LanguageScore(
            _figures(i2t, t2i, len(captioned)),
            _figures(i2t[heldout], t2i[heldout[row_of_image]], len(captioned)) if heldout.any() else None,
            interval,
        )


def _map_images(file: BinaryIO, size: int) -> Tensor:
    """The images (n, size, size, 3) that `file` holds; it may be closed. Of private pages, which are the
    file's until somebody writes to them: PyTorch has no tensors that cannot be written."""
    file.flush()
    shape = file.tell() // (3 * size**2), size, size, 3
    if not shape[0]:  # more workers than images
        return torch.empty(shape, dtype=torch.uint8)
    return torch.from_numpy(np.memmap(file, np.uint8, "c", shape=shape))


class LanguageScore(NamedTuple):
    """Figures of one language: of all its images; of those held out (as queries, among all candidates); the
    interval of the first."""

    figures: dict[str, float]
    heldout: dict[str, float] | None
    interval: list[float] | None


def _figures(i2t: Tensor, t2i: Tensor, candidates: int) -> dict[str, float]:
    """Of the hits of some images (n, 3) and of their captions (c, 3) among all `candidates`."""
    return {"chance_r1": 1 / candidates, **recall_figures(i2t, t2i), "n": len(i2t)}


def evaluate_folder(model: Path | str, data: Path | str, max_pixels: int = MAX_PIXELS) -> dict[str, Any]:
    """Scores of a model folder, run or checkpoint on the retrieval set `data` (see `Retrieval`), whose images
    have at most `max_pixels`, with what made them: hashes of the model's config.json and of weights,
    tokenizer and set, seconds, captions a second, peak memory, `raylib.provenance`."""
    began, folder = time.perf_counter(), find_model(hold_model(model))
    unified, device = UnifiedModel.from_pretrained(folder).eval(), local_device()
    unified.to(device)
    config, fit = unified.config, find_fit(Path(model), folder) or FitConfig(bf16=False)
    fit.set_precision(unified, device)
    retrieval = ZeroShotRetrieval(
        data,
        Tokenizer.load(find_tokenizer(folder)),
        config.image_size,
        config.positions,
        max_pixels,
        config.preprocess,
    )
    start = time.perf_counter()
    advice = MemoryAdvice().evaluation
    with torch.inference_mode(), advise_on_memory("the evaluation", device, lambda: advice):
        scores = retrieval(unified, fit.uses_bf16(device))
    end = time.perf_counter()
    files = fingerprint_files(
        map(DataFile, (folder / "model.safetensors", find_tokenizer(folder), Path(data))), {}
    )
    return {
        "model": str(model),
        "data": str(data),
        "config_sha256": hash_path(folder / "config.json"),
        "data_sha256": combined_hash(files),
        **provenance(device),
        "evaluation_precision": fit.describe_precision(device),
        "preprocessing": unified.describe_preprocessing(),
        "seconds": end - began,
        "evaluated_per_second": sum(map(len, retrieval.owners.values())) / (end - start),
        "peak_memory_gb": peak_memory(device),
        "items_skipped": retrieval.count_missing_captions(),
        **scores,
    }


def summarize_recall(table: dict[str, Any]) -> dict[str, float]:
    """R@1 (mean of both directions) of English, of the mean of the other languages, of those held out of all
    training text, of held-out concepts; "score", the mean over the trained languages, decides which
    checkpoint is the best."""
    values = {language: mean_recall_at_1(figures) for language, figures in table["retrieval"].items()}
    groups = {
        "score": [values[code] for code in _trained(table)],
        "en_r1": [value for language, value in values.items() if language == "en"],
        "others_r1": [values[code] for code in _trained(table) if code != "en"],
        "heldout_language_r1": [values[code] for code in values if code not in _trained(table)],
        "heldout_r1": [mean_recall_at_1(table["heldout"][code]) for code in _trained(table, "heldout")],
    }
    return {name: mean_or_zero(group) for name, group in groups.items() if group or name == "score"}


def _trained(table: dict[str, Any], part: str = "retrieval") -> list[str]:
    """Languages of a table that training had text in; all, of a table that does not tell."""
    return [language for language in table[part] if language not in table.get("heldout_languages", ())]


def recall_table(scores: dict[str, Any]) -> str:
    """Markdown: recall in % by language, both ways; means, held-out concepts, chance."""
    languages = scores["retrieval"]
    head = [
        "language",
        "R@1",
        "x chance",
        *(c.replace("_r", " R@") for c in COLUMNS),
        "images",
        "chance R@1",
    ]
    trained = sorted(_trained(scores), key=lambda language: (language != "en", language))
    rows = [head, *(_row(language, [languages[language]]) for language in trained)]
    others = [languages[language] for language in trained if language != "en"]
    if len(others) > 1:
        rows.append(_row(f"mean of the other {len(others)}" if "en" in languages else "mean", others))
    for language in sorted(languages.keys() - trained):
        rows.append(_row(f"{language}, in no training text", [languages[language]]))
    held = scores["heldout"]
    if "en" in held:
        rows.append(_row("held-out concepts, en", [held["en"]]))
    if held_others := [held[language] for language in _trained(scores, "heldout") if language != "en"]:
        rows.append(_row("held-out concepts, others", held_others))
    return markdown_table(rows)


def compare_test_sets(result: dict[str, Any]) -> str:
    """Markdown: R@1 in % and times chance on the development set and on each test set of a run, a row a set;
    "" if it has no test sets."""
    tests = result.get("test_sets", {})
    sets = {"development set": result, **tests} if result["retrieval"] else tests
    columns = [f"{who}: {what}" for who in GROUPS.values() for what in ("R@1", "x chance")]
    rows = [["images", "number", *columns]]
    for name, scores in sets.items():
        values, number = summarize_recall(scores), max(f["n"] for f in scores["retrieval"].values())
        shares = [values.get(group) for group in GROUPS]
        cells = [("", "") if x is None else (f"{100 * x:.1f}", f"{x * number:.0f}") for x in shares]
        rows.append([name, str(number), *itertools.chain(*cells)])
    return markdown_table(rows) if tests else ""


def _row(name: str, figures: list[dict[str, float]]) -> list[str]:
    both, chance = (
        mean_or_zero(mean_recall_at_1(f) for f in figures),
        mean_or_zero(f["chance_r1"] for f in figures),
    )
    values = [f"{100 * mean_or_zero(f[c] for f in figures):.1f}" for c in COLUMNS]
    count = f"{mean_or_zero(f['n'] for f in figures):.0f}"
    return [name, f"{100 * both:.1f}", f"{both / chance:.0f}", *values, count, f"{100 * chance:.2f}"]


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON, whole or not at all.

    Raises:
        NotFinite: a number in it is not finite.
    """
    require_finite_values(str(path), result)
    write_json(path, result)
