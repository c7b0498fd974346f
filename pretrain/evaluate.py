"""Zero-shot image-text retrieval with the unimodal encoders, per language."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from raylib.collective import raise_together, world_size
from raylib.data.images import decode, resize
from raylib.data.retrieval import read_retrieval
from raylib.errors import UserError
from raylib.finite import is_finite, require_finite
from raylib.metrics import RANKS, mean, recalls
from raylib.model.folder import find_model, find_tokenizer
from raylib.model.unified import UnifiedModel
from raylib.ragged import Ragged, first_tokens
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
        self.owners = {language: torch.tensor([owner for owner, _ in rows]) for language, rows in texts.items()}
        self.ids = {language: self._ids([text for _, text in rows]) for language, rows in texts.items()}

    def _ids(self, texts: list[str]) -> list[Tensor]:
        t = self.tokenizer
        return [torch.tensor([t.cls, *ids[: self.length - 2].tolist(), t.sep]) for ids in t.encode(texts)]

    def __call__(self, model: UnifiedModel) -> dict[str, Any]:
        """{"retrieval": {language: figures}, "heldout": the same of held-out concepts alone}; the figures are
        `chance_r1`, `i2t_r1` ... `t2i_r10`, `n` pictures. Workers share the encoding; all return the same.

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
        raise_together(f"text embeddings in {', '.join(bad)}: not finite (NaN or infinite)" if bad else None)
        scored = _exchange({language: self._score(language, embeddings, images) for language, embeddings in texts.items()})
        heldout = {language: held for language in sorted(scored) if (held := scored[language][1])}
        return {"retrieval": {language: scored[language][0] for language in sorted(scored)}, "heldout": heldout}

    def _score(self, language: str, texts: Tensor, images: Tensor) -> tuple[dict, dict | None]:
        """Figures of one language: of all its pictures; of those held out (as queries, among all candidates)."""
        owner = self.owners[language]
        captioned = owner.unique()
        everything = self._figures(texts, images, owner, captioned, len(captioned))
        held_texts, held_images = self.heldout[owner], captioned[self.heldout[captioned]]
        if not len(held_images):
            return everything, None
        return everything, self._figures(
            texts, images, owner, captioned, len(captioned), texts_asked=held_texts, images_asked=held_images
        )

    def _figures(self, texts, images, owner, captioned, n, texts_asked=None, images_asked=None) -> dict[str, float]:
        images_asked = captioned if images_asked is None else images_asked
        asked, asked_owner = (texts, owner) if texts_asked is None else (texts[texts_asked], owner[texts_asked])
        i2t = recalls(images[images_asked], texts, images_asked, owner)
        t2i = recalls(asked, images[captioned], asked_owner, captioned)
        return {"chance_r1": 1 / n, **{f"i2t_r{k}": i2t[k] for k in RANKS}, **{f"t2i_r{k}": t2i[k] for k in RANKS},
                "n": len(images_asked)}  # fmt: skip


def evaluate_folder(model: Path | str, data: Path | str) -> dict[str, Any]:
    """What a model folder, run or checkpoint scores on the retrieval set `data`; see `Retrieval`."""
    folder = find_model(model)
    unified = UnifiedModel.from_pretrained(folder).eval()
    unified.to("cuda" if torch.cuda.is_available() else "cpu")
    config = unified.config
    retrieval = Retrieval(data, Tokenizer.load(find_tokenizer(folder)), config.image_size, config.positions)
    with torch.inference_mode():
        return {"model": str(model), "data": str(data), **retrieval(unified)}


def encode_pictures(model: UnifiedModel, pictures: Tensor, device: torch.device) -> Tensor:
    """uint8 (n, H, W, 3) -> unit vectors (n, e) on the CPU."""
    parts = []
    for part in pictures.split(IMAGES):
        images = model.encode_images(part.to(device))
        parts.append(model.embed_images(images.values.index_select(0, images.starts.to(device))).float().cpu())
    return torch.cat(parts)


def encode_sentences(model: UnifiedModel, ids: list[Tensor], device: torch.device) -> Tensor:
    """Sentences with specials -> unit vectors (n, e) on the CPU."""
    parts = []
    for start in range(0, len(ids), SENTENCES):
        chunk = ids[start : start + SENTENCES]
        lengths = torch.tensor([len(row) for row in chunk])
        cls = model.encode_text(Ragged(torch.cat(chunk).to(device), lengths), first_tokens(lengths))
        parts.append(model.embed_text(cls).float().cpu())
    return torch.cat(parts)


def summary(table: dict[str, Any]) -> dict[str, float]:
    """R@1 (mean of both directions) of English, of the mean of the other languages, of held-out concepts; "score",
    the mean over all languages, decides which checkpoint is the best."""
    values = {language: r1(figures) for language, figures in table["retrieval"].items()}
    others = [value for language, value in values.items() if language != "en"]
    out = {"score": mean(values.values())}
    if "en" in values:
        out["en_r1"] = values["en"]
    if others:
        out["others_r1"] = mean(others)
    if table["heldout"]:
        out["heldout_r1"] = mean(r1(figures) for figures in table["heldout"].values())
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
