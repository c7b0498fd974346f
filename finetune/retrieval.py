"""Two-stage retrieval (paper 2, appendix B.2.3; ALBEF): the unimodal encoders choose K candidates of each query, the ITM
head ranks them. Every picture and every sentence is encoded once, so the cost grows with N + N K and not with N^2. Of models
without that head, or runs with `matching=false`, the first stage is all.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.batches import encode_texts
from finetune.examples import Captioned
from finetune.pictures import Encoded, Pixels, encode_pictures
from raylib.collective import raise_together, world_size
from raylib.data.states import States, write_states
from raylib.finite import is_finite, require_finite
from raylib.metrics import RANKS, mean
from raylib.model.encoder import Condition
from raylib.ragged import Ragged, first_tokens
from raylib.text import Tokenizer

SENTENCES, PAIRS = 256, 512  # encoded, or ranked, at a time


def retrieve(
    model: nn.Module, items: Sequence[Captioned], pictures: Pixels | Encoded, tokenizer: Tokenizer, length: int,
    candidates: int | None, folder: Path, bf16: bool = False,
) -> dict[str, Any]:
    """Recall of one language's pictures and captions both ways; all workers together, all return the same.

    candidates: K; 0 ranks every pair; None ranks none: the cosine decides.
    folder: for states, gone afterwards; all workers must see it.
    Returns:
        {"i2t_r1" ... "t2i_r10", "mean_recall", "n": pictures, "captions", "chance_r1", "pairs": how many were ranked}.
    Raises:
        NotFinite: embeddings, or scores of the match head, are not finite.
    """
    _forget(folder)  # states that a killed evaluation has left are another model's
    try:
        ranker = _Ranker(model, items, pictures, tokenizer, length, folder, bf16, ranks=candidates is not None)
        i2t, i2t_pairs = ranker.recalls(ranker.image_vectors, ranker.text_vectors, candidates, image_asks=True)
        t2i, t2i_pairs = ranker.recalls(ranker.text_vectors, ranker.image_vectors, candidates, image_asks=False)
    finally:
        _forget(folder)
    figures = {f"i2t_r{k}": v for k, v in i2t.items()} | {f"t2i_r{k}": v for k, v in t2i.items()}
    return {
        **figures, "mean_recall": mean(figures.values()), "n": len(items), "captions": len(ranker.owner),
        "chance_r1": 1 / len(items), "pairs": i2t_pairs + t2i_pairs,
    }  # fmt: skip


class _Ranker:
    """Unit vectors of all pictures and captions; where the match head `ranks`, their states too."""

    def __init__(self, model, items, pictures, tokenizer: Tokenizer, length: int, folder: Path, bf16: bool, ranks: bool):
        self.model, self.bf16, self.device = model.eval(), bf16, next(model.parameters()).device
        self.names = [item.image for item in items]
        texts = [caption for item in items for caption in item.captions]
        self.owner = torch.tensor([i for i, item in enumerate(items) for _ in item.captions])
        self.keys = [str(i) for i in range(len(texts))]
        if isinstance(pictures, Encoded):
            self.images: States = pictures.states
        else:
            self.images = encode_pictures(model, pictures, self.names, folder / "images", bf16)

        def ids_of(keys: Sequence[str]) -> Ragged:
            ids = encode_texts([texts[int(key)] for key in keys], tokenizer, length)
            return ids.with_values(ids.values.to(self.device))

        def encode(keys: Sequence[str]) -> Ragged:
            ids = ids_of(keys)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                states = model.encode_text(ids)
            return ids.with_values(states.float())

        def embed_sentences(keys: Sequence[str]) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                return model.embed_sentences(ids_of(keys))

        def embed_states(keys: Sequence[str]) -> Tensor:
            states = self._states(self.texts, keys)
            return model.embed_text(states.values[states.starts])

        with torch.inference_mode():
            self.image_vectors = _vectors(self.names, lambda names: model.embed_pictures(self._states(self.images, names)))
            if ranks:
                self.texts: States = write_states(folder / "texts", self.keys, encode, SENTENCES)
            self.text_vectors = _vectors(self.keys, embed_states if ranks else embed_sentences)
        require_finite("image embeddings", self.image_vectors)
        require_finite("text embeddings", self.text_vectors)

    def recalls(
        self, queries: Tensor, keys: Tensor, candidates: int | None, image_asks: bool
    ) -> tuple[dict[int, float], int]:
        """({k: recall@k}, pairs ranked) of all queries; this worker ranks every world-th one."""
        count = 0 if candidates is None else min(candidates or len(keys), len(keys))
        mine = torch.arange(_rank(), len(queries), world_size())
        hits, finite = torch.zeros(len(RANKS), dtype=torch.int64), True
        for chunk in mine.split(max(1, PAIRS // max(1, count))):
            final = queries[chunk] @ keys.T
            if count:
                chosen = final.topk(count, dim=1).indices
                match = self._match(chunk, chosen, image_asks)
                finite = finite and is_finite(match)
                # candidates first, by the ITM head; then the others, by similarity, which is at most 1
                final = (final - 4).scatter(1, chosen, match)
            own = self.owner[None] == chunk[:, None] if image_asks else torch.arange(len(keys))[None] == self.owner[chunk, None]
            best = final.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
            ahead = ((final >= best) & ~own).sum(1)  # a tie counts as ahead: a collapsed model scores 0
            hits += torch.stack([(ahead < k).sum() for k in RANKS])
        raise_together(None if finite else "scores of the match head: not finite (NaN or infinite)")
        if world_size() > 1:
            hits = hits.to(self.device)
            dist.all_reduce(hits)
        return {k: int(h) / len(queries) for k, h in zip(RANKS, hits, strict=True)}, len(queries) * count

    @torch.inference_mode()
    def _match(self, queries: Tensor, chosen: Tensor, image_asks: bool) -> Tensor:
        """(q, K) probability that query and candidate belong together."""
        asked = queries[:, None].expand_as(chosen)
        image, text = (asked, chosen) if image_asks else (chosen, asked)
        out = []
        for images, texts in zip(image.flatten().split(PAIRS), text.flatten().split(PAIRS), strict=True):
            seen, rows = images.unique(return_inverse=True)
            condition = self._states(self.images, [self.names[i] for i in seen])
            said = self._states(self.texts, [self.keys[i] for i in texts])
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                cls = self.model.fuse(said, first_tokens(said.lengths), Condition(condition, rows))
                logits = self.model.match_head(cls)
            out.append(logits.float().softmax(1)[:, 1].cpu())
        return torch.cat(out).view_as(chosen)

    def _states(self, states: States, names: Sequence[str]) -> Ragged:
        rows = states.read(names)
        return rows.with_values(rows.values.to(self.device).float())


def _vectors(names: Sequence[str], embed: Callable[[Sequence[str]], Tensor]) -> Tensor:
    """Unit vectors (n, e) of all `names`, some at a time."""
    parts = [embed(names[start : start + SENTENCES]).float().cpu() for start in range(0, len(names), SENTENCES)]
    return F.normalize(torch.cat(parts), dim=1)


def _forget(folder: Path) -> None:
    """Remove what is in `folder`, once no worker needs it any more."""
    if world_size() > 1:
        dist.barrier()
    if _rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)


def _rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0
