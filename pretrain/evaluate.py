"""Zero-shot image-text retrieval with the unimodal encoders, per language."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from raylib.data.images import decode, resize
from raylib.data.retrieval import read_retrieval
from raylib.device import peak_memory
from raylib.distributed import raise_on_all_workers, world_size
from raylib.errors import UserError
from raylib.finite import is_finite, require_finite
from raylib.metrics import RANKS, mean_hits, mean_or_zero, recall_hits, recall_interval
from raylib.models.base import find_model, find_tokenizer
from raylib.models.unified import UnifiedModel
from raylib.packed import Ragged, first_tokens
from raylib.provenance import DataFile, combined_hash, fingerprint_files, hash_path, provenance
from raylib.text import Tokenizer

IMAGES, SENTENCES = 64, 1024  # encoded at a time


class Retrieval:
    """A retrieval set in memory, ready to score models: pictures resized, captions tokenised, once.

    Args:
        folder: shards, or pictures with `captions.json` (`raylib.data.retrieval`).
        size: pixels a side. length: longest sentence in tokens, specials included.
    """

    def __init__(self, folder: Path | str, tokenizer: Tokenizer, size: int, length: int):
        self.tokenizer, self.length = tokenizer, length
        pictures, heldout, texts = [], [], {}
        for item in read_retrieval(folder):
            picture = decode(item.picture, f"{folder}: {item.name}")
            for language, captions in item.captions.items():
                texts.setdefault(language, []).extend((len(pictures), caption) for caption in captions)
            pictures.append(resize(picture, size))
            heldout.append(item.heldout)
        if not pictures:
            raise UserError(f"{folder}: no pictures to retrieve")
        self.pictures = torch.from_numpy(np.stack(pictures))
        self.heldout = torch.tensor(heldout)
        self.owners = {
            language: torch.tensor([owner for owner, _ in rows]) for language, rows in texts.items()
        }
        self.ids = {language: self._ids([text for _, text in rows]) for language, rows in texts.items()}

    def without_captions(self) -> dict[str, int]:
        """{language: pictures that have no caption in it, and are none of its candidates}."""
        return {code: len(self.pictures) - len(owner.unique()) for code, owner in sorted(self.owners.items())}

    def _ids(self, texts: list[str]) -> list[Tensor]:
        t = self.tokenizer
        return [torch.tensor([t.cls, *ids[: self.length - 2].tolist(), t.sep]) for ids in t.encode(texts)]

    def __call__(self, model: UnifiedModel) -> dict[str, Any]:
        """{"retrieval": {language: figures}, "heldout": the same of held-out concepts alone, "interval":
        {language: [low, high]}, the 95 % bootstrap interval over images of R@1 (mean of both ways)}; the
        figures are `chance_r1`, `i2t_r1` ... `t2i_r10`, `n` pictures. Workers share the encoding; all return
        the same.

        Raises:
            NotFinite: embeddings of the images, or of a language's sentences, are not finite.
        """
        device, size = next(model.parameters()).device, world_size()
        rank = dist.get_rank() if size > 1 else 0
        mine = [language for i, language in enumerate(sorted(self.ids)) if i % size == rank]
        pictures = _exchange({rank: encode_pictures(model, self.pictures[rank::size], device)})
        images = torch.empty(len(self.pictures), model.config.embedding)
        for other, part in pictures.items():
            images[other::size] = part
        require_finite("image embeddings", images)  # on all workers
        texts = {language: encode_sentences(model, self.ids[language], device) for language in mine}
        bad = [language for language, embeddings in texts.items() if not is_finite(embeddings)]
        raise_on_all_workers(
            f"text embeddings in {', '.join(bad)}: not finite (NaN or infinite)" if bad else None
        )
        scored = _exchange(
            {language: self._score(language, embeddings, images) for language, embeddings in texts.items()}
        )
        heldout = {language: held for language in sorted(scored) if (held := scored[language][1])}
        retrieval, interval = ({language: scored[language][i] for language in sorted(scored)} for i in (0, 2))
        return {"retrieval": retrieval, "heldout": heldout, "interval": interval}

    def _score(
        self, language: str, texts: Tensor, images: Tensor
    ) -> tuple[dict, dict | None, list[float] | None]:
        """Figures of one language: of all its pictures; of those held out (as queries, among all candidates);
        and the interval of the first, seeded by the language alone, so that an export has the run's."""
        owner = self.owners[language]
        captioned = owner.unique()
        # a picture is asked with all of its captions, so what is held out are rows of these
        i2t = recall_hits(images[captioned], texts, captioned, owner)
        t2i = recall_hits(texts, images[captioned], owner, captioned)
        place = torch.searchsorted(captioned, owner)
        interval = recall_interval(i2t[:, 0], t2i[:, 0], place, "bootstrap", language)
        everything = _figures(i2t, t2i, len(captioned))
        held = self.heldout[captioned]
        heldout = _figures(i2t[held], t2i[held[place]], len(captioned)) if held.any() else None
        return everything, heldout, interval


def _figures(i2t: Tensor, t2i: Tensor, candidates: int) -> dict[str, float]:
    """Of the hits of some pictures (n, 3) and of their captions (c, 3) among all `candidates`."""
    ways = {"i2t": mean_hits(i2t), "t2i": mean_hits(t2i)}
    recalls = {f"{way}_r{k}": recall[k] for way, recall in ways.items() for k in RANKS}
    return {"chance_r1": 1 / candidates, **recalls, "n": len(i2t)}


def evaluate_folder(model: Path | str, data: Path | str) -> dict[str, Any]:
    """Scores of a model folder, run or checkpoint on the retrieval set `data` (see `Retrieval`), with what
    made them: hashes of the model's config.json and of weights, tokenizer and set, seconds, captions a
    second, peak memory, `raylib.provenance`."""
    began, folder = time.perf_counter(), find_model(model)
    unified = UnifiedModel.from_pretrained(folder).eval()
    unified.to("cuda" if torch.cuda.is_available() else "cpu")
    config = unified.config
    retrieval = Retrieval(data, Tokenizer.load(find_tokenizer(folder)), config.image_size, config.positions)
    start = time.perf_counter()
    with torch.inference_mode():
        scores = retrieval(unified)
    end, device = time.perf_counter(), next(unified.parameters()).device
    files = fingerprint_files(
        map(DataFile, (folder / "model.safetensors", find_tokenizer(folder), Path(data))), {}
    )
    return {
        "model": str(model),
        "data": str(data),
        "config_sha256": hash_path(folder / "config.json"),
        "data_sha256": combined_hash(files),
        **provenance(device),
        "seconds": end - began,
        "evaluated_per_second": sum(map(len, retrieval.ids.values())) / (end - start),
        "peak_memory_gb": peak_memory(device),
        "items_skipped": retrieval.without_captions(),
        **scores,
    }


def encode_pictures(model: UnifiedModel, pictures: Tensor, device: torch.device) -> Tensor:
    """uint8 (n, H, W, 3) -> unit vectors (n, e) on the CPU."""
    parts = []
    for part in pictures.split(IMAGES):
        images = model.encode_images(part.to(device))
        parts.append(model.embed_images(images, normalize=True).float().cpu())
    return torch.cat(parts)


def encode_sentences(model: UnifiedModel, ids: list[Tensor], device: torch.device) -> Tensor:
    """Sentences with specials -> unit vectors (n, e) on the CPU."""
    parts = []
    for start in range(0, len(ids), SENTENCES):
        chunk = ids[start : start + SENTENCES]
        lengths = torch.tensor([len(row) for row in chunk])
        cls = model.encode_text(Ragged(torch.cat(chunk).to(device), lengths), first_tokens(lengths))
        parts.append(model.embed_text_states(cls, normalize=True).float().cpu())
    return torch.cat(parts)


def summary(table: dict[str, Any]) -> dict[str, float]:
    """R@1 (mean of both directions) of English, of the mean of the other languages, of held-out concepts;
    "score", the mean over all languages, decides which checkpoint is the best."""
    values = {language: r1(figures) for language, figures in table["retrieval"].items()}
    others = [value for language, value in values.items() if language != "en"]
    out = {"score": mean_or_zero(values.values())}
    if "en" in values:
        out["en_r1"] = values["en"]
    if others:
        out["others_r1"] = mean_or_zero(others)
    if table["heldout"]:
        out["heldout_r1"] = mean_or_zero(r1(figures) for figures in table["heldout"].values())
    return out


def r1(figures: dict[str, float]) -> float:
    """Recall@1 without a direction: the mean of both."""
    return (figures["i2t_r1"] + figures["t2i_r1"]) / 2


def _exchange(own: dict) -> dict:
    """The union of all workers' dicts."""
    if world_size() == 1:
        return own
    parts = [None] * world_size()
    dist.all_gather_object(parts, own)
    return {key: value for part in parts for key, value in part.items()}
