"""Two-stage retrieval (paper 2, appendix B.2.3; ALBEF): the unimodal encoders choose K candidates of each
query, the ITM head ranks them, by the difference of its two logits (from 17 on, their softmax in float32 is
1.0 for all). Every image and every sentence is encoded once, so the cost grows with N + N K and not with
N^2. Of models without that head, or runs with `use_itm_head=false`, the first stage is all.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.batches import encode_texts
from finetune.formats import Captioned
from finetune.stores.images import ImageSource, PrecomputedFeatures, precompute_features
from raylib.cache import EncoderStates, remove_encoder_states, write_encoder_states
from raylib.display import progress
from raylib.distributed import raise_on_all_workers, rank, world_size
from raylib.finite import is_finite, require_finite
from raylib.metrics import RANKS, hit_chances, mean_or_zero, nearest_keys, recall_figures, recall_interval
from raylib.models.layers import Memory
from raylib.packed import Ragged, first_tokens
from raylib.precision import exact_linear
from raylib.randomness import Key, permutation
from raylib.text import Tokenizer

SENTENCES, PAIRS = 256, 512  # encoded, or ranked, at a time


def retrieve(
    model: nn.Module,
    items: Sequence[Captioned],
    visual: ImageSource | PrecomputedFeatures,
    tokenizer: Tokenizer,
    length: int,
    candidates: int | None,
    folder: Path,
    bf16: bool = False,
    key: tuple[Key, ...] = (),
) -> dict[str, Any]:
    """Recall of one language's images and captions both ways; all workers together, all return the same.

    candidates: K; 0 ranks every pair; None ranks none: the cosine decides.
    folder: for states, gone afterwards; all workers must see it. key: seeds the bootstrap's draws.
    Returns:
        {"i2t_r1" ... "t2i_r10", "mean_recall", "interval": its 95 % bootstrap interval over images,
        "recall_at_1_interval": that of `recall_at_1`, "n": images, "captions", "chance_r1", "pairs": how
        many were ranked}.
    Raises:
        NotFinite: embeddings, or scores of the match head, are not finite.
    """
    remove_encoder_states(folder)  # states that a killed evaluation has left are another model's
    try:
        ranker = _Ranker(model, items, visual, tokenizer, length, folder, bf16, ranks=candidates is not None)
        i2t, i2t_pairs = ranker.hits(
            ranker.image_vectors, ranker.text_vectors, candidates, queries_are_images=True
        )
        t2i, t2i_pairs = ranker.hits(
            ranker.text_vectors, ranker.image_vectors, candidates, queries_are_images=False
        )
    finally:
        remove_encoder_states(folder)
    figures = recall_figures(i2t, t2i)
    interval, first = (
        recall_interval(*hits, ranker.owner, "bootstrap", *key)
        for hits in ((i2t.mean(1), t2i.mean(1)), (i2t[:, 0], t2i[:, 0]))
    )
    return {
        **figures,
        "mean_recall": mean_or_zero(figures.values()),
        "interval": interval,
        "recall_at_1_interval": first,
        "n": len(items),
        "captions": len(ranker.owner),
        "chance_r1": 1 / len(items),
        "pairs": i2t_pairs + t2i_pairs,
    }


def match_pairs(model: Any, texts: Ragged, images: Memory, bf16: bool) -> Tensor:
    """(n,) on the CPU: log of the odds that each of n texts, states (T, d), belongs to the image that it
    attends to."""
    with torch.autocast(texts.values.device.type, torch.bfloat16, enabled=bf16):
        cls = model.fuse(texts, first_tokens(texts.lengths), images)
    # outside of autocast: bf16 logits near 8 are 1/16 apart, and would tie
    logits = exact_linear(model.match_head, cls.float()).float()
    return (logits[:, 1] - logits[:, 0]).cpu()


class _Ranker:
    """Unit vectors of all images and captions; where the match head `ranks`, their states too."""

    def __init__(
        self, model, items, visual, tokenizer: Tokenizer, length: int, folder: Path, bf16: bool, ranks: bool
    ):
        self.model, self.bf16, self.device = model.eval(), bf16, next(model.parameters()).device
        self.names = [item.image for item in items]
        texts = [caption for item in items for caption in item.captions]
        self.owner = torch.tensor([i for i, item in enumerate(items) for _ in item.captions])
        self.keys = [str(i) for i in range(len(texts))]
        if isinstance(visual, PrecomputedFeatures):
            self.images: EncoderStates = visual.states
        else:
            self.images = precompute_features(model, visual, self.names, folder / "images", bf16)

        def ids_of(keys: Sequence[str]) -> Ragged:
            ids = encode_texts([texts[int(key)] for key in keys], tokenizer, length)
            return ids.with_values(ids.values.to(self.device))

        def encode(keys: Sequence[str]) -> Ragged:
            ids = ids_of(keys)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                states = model.encode_text(ids)
            return ids.with_values(states.float())

        def embed_ids(keys: Sequence[str]) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                return model.embed_text(ids_of(keys), normalize=True)

        def embed_states(keys: Sequence[str]) -> Tensor:
            states = self._states(self.texts, keys)
            return model.embed_text_states(states.values[states.starts], normalize=True)

        with torch.inference_mode():
            self.image_vectors = _vectors(
                self.names, lambda names: model.embed_images(self._states(self.images, names), normalize=True)
            )
            if ranks:
                self.texts: EncoderStates = write_encoder_states(
                    folder / "texts", self.keys, encode, SENTENCES, unit="captions"
                )
            self.text_vectors = _vectors(self.keys, embed_states if ranks else embed_ids)
        require_finite("image embeddings", self.image_vectors)
        require_finite("text embeddings", self.text_vectors)

    def hits(
        self, queries: Tensor, keys: Tensor, candidates: int | None, queries_are_images: bool
    ) -> tuple[Tensor, int]:
        """(chance of each query to hit within each of RANKS, float64 (n, 3); pairs ranked). A worker takes
        every world-th chunk of queries: chunks, and so all numbers, are the same whatever the number of
        workers."""
        count = 0 if candidates is None else min(candidates or len(keys), len(keys))
        hits, finite = torch.zeros(len(queries), len(RANKS), dtype=torch.float64), True
        # ties at the K-th place are broken by a fixed order, not by the place in the file: a collapsed model
        # would find its own captions there
        order = torch.from_numpy(permutation(len(keys), "candidates"))
        # a chunk has about PAIRS pairs for the match head, whatever K is; its size is fixed, or scores would
        # depend on the number of workers
        chunks = torch.arange(len(queries)).split(max(1, PAIRS // max(1, count)))
        share, unit = chunks[rank() :: world_size()], "images" if queries_are_images else "captions"
        for chunk in progress(share, f"rank for {unit}", sum(map(len, share)), unit, len):
            scores, first = queries[chunk] @ keys.T, None
            if count:
                candidate_index = nearest_keys(scores, count, order)
                match = self._match(chunk, candidate_index, queries_are_images)
                finite = finite and is_finite(match)
                # two levels: candidates by the match head, and after all of these the others, by similarity
                first = torch.zeros_like(scores, dtype=torch.bool).scatter(1, candidate_index, True)
                scores = scores.scatter(1, candidate_index, match)
            is_positive = (
                self.owner[None] == chunk[:, None]
                if queries_are_images
                else torch.arange(len(keys))[None] == self.owner[chunk, None]
            )
            hits[chunk] = hit_chances(scores, is_positive, first)
        raise_on_all_workers(None if finite else "scores of the match head: not finite (NaN or infinite)")
        if world_size() > 1:  # every row is one worker's, and 0 on the others: their sum is exact
            hits = hits.to(self.device)
            dist.all_reduce(hits)
        return hits.cpu(), len(queries) * count

    @torch.inference_mode()
    def _match(self, queries: Tensor, candidate_index: Tensor, queries_are_images: bool) -> Tensor:
        """(q, K) log of the odds that query and candidate belong together."""
        query = queries[:, None].expand_as(candidate_index)
        image, text = (query, candidate_index) if queries_are_images else (candidate_index, query)
        out = []
        for images, texts in zip(image.flatten().split(PAIRS), text.flatten().split(PAIRS), strict=True):
            # an image that several texts of the chunk attend to is read and projected once
            unique_images, rows = images.unique(return_inverse=True)
            image_states = self._states(self.images, [self.names[i] for i in unique_images])
            text_states = self._states(self.texts, [self.keys[i] for i in texts])
            out.append(match_pairs(self.model, text_states, Memory(image_states, rows), self.bf16))
        return torch.cat(out).view_as(candidate_index)

    def _states(self, states: EncoderStates, names: Sequence[str]) -> Ragged:
        rows = states.read(names)
        return rows.with_values(rows.values.to(self.device).float())


def _vectors(names: Sequence[str], embed: Callable[[Sequence[str]], Tensor]) -> Tensor:
    """Unit vectors (n, e) of all `names`, some at a time."""
    chunks = [names[start : start + SENTENCES] for start in range(0, len(names), SENTENCES)]
    waited = progress(chunks, "embed", len(names), size=len)
    parts = [embed(chunk).float().cpu() for chunk in waited]
    return F.normalize(torch.cat(parts), dim=1)
