"""Two-stage retrieval (paper 2, appendix B.2.3; ALBEF): the unimodal encoders choose K candidates of each
query, the ITM head ranks them, by the difference of its two logits (from 17 on, their softmax in float32 is
1.0 for all). Of models without that head, or runs with `use_itm_head=false`, the first stage is all.

Cost grows with N + N K and not with N^2: every image and every sentence is encoded once; a pair that is a
candidate of its image and of its text is scored once; and pairs are scored image after image, so that each
image is read and projected once (again after every 2 `PAIRS` of its own pairs).

Shape legend: n images, c captions, K candidates, P different pairs, e width of embeddings.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.batches import encode_texts
from finetune.formats import Captioned
from finetune.stores.images import ImageSource, PrecomputedFeatures, encoded_images
from raylib.cache import EncoderStates, ItemStates, remove_encoder_states, write_encoder_states
from raylib.data.loading import to_device
from raylib.display import progress
from raylib.distributed import all_reduce, rank, world_size
from raylib.finite import require_finite
from raylib.metrics import RANKS, hit_chances, mean_or_zero, nearest_keys, recall_figures, recall_interval
from raylib.models.layers import Memory
from raylib.packed import Ragged, first_tokens
from raylib.precision import autocast, exact_products
from raylib.randomness import Key, permutation
from raylib.text import Tokenizer

# encoded, scored by the match head, compared with all keys, at a time
SENTENCES, PAIRS, QUERIES = 256, 512, 512


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
        many were ranked, those that both ways rank counted twice}.
    Raises:
        NotFinite: embeddings, or scores of the match head, are not finite.
    """
    remove_encoder_states(folder)  # states that a killed evaluation has left are another model's
    names = [item.image for item in items]
    try:
        with encoded_images(model, visual, lambda: names, folder / "images", bf16) as encoded:
            states, ranks = cast(PrecomputedFeatures, encoded).states, candidates is not None
            ranker = _Ranker(model, items, states, tokenizer, length, folder, bf16, ranks)
            i2t, t2i, pairs = ranker.hits(candidates)
            # what cannot be read is a black image among the candidates: it is not found, and finds nothing
            faults = [states.faults[name] for name in names if name in states.faults]
            usable = torch.tensor([[name not in states.faults] for name in names])
            i2t, t2i = i2t * usable, t2i * usable[ranker.owner.cpu()]
    finally:
        remove_encoder_states(folder)
    return summarise_hits(ranker.owner, i2t, t2i, faults, pairs, key)


def summarise_hits(
    owner: Tensor, i2t: Tensor, t2i: Tensor, faults: Sequence[str], pairs: int, key: tuple[Key, ...]
) -> dict[str, Any]:
    """Figures of a language, as of `retrieve`, of the hits (n, 3) of images and (c, 3) of captions.

    owner: (c,) the image of each caption. faults: what is wrong with images that cannot be read.
    """
    figures = recall_figures(i2t, t2i)
    interval, first = (
        recall_interval(*hits, owner, "bootstrap", *key)
        for hits in ((i2t.mean(1), t2i.mean(1)), (i2t[:, 0], t2i[:, 0]))
    )
    return {
        **figures,
        **({"bad_images": len(faults), "bad_image": faults[0]} if faults else {}),
        "mean_recall": mean_or_zero(figures.values()),
        "interval": interval,
        "recall_at_1_interval": first,
        "n": len(i2t),
        "captions": len(owner),
        "chance_r1": 1 / len(i2t),
        "pairs": pairs,
    }


def match_pairs(model: Any, texts: Ragged, images: Memory, bf16: bool) -> Tensor:
    """(n,) log of the odds that each of n texts, states (T, d), belongs to the image that it attends to."""
    with autocast(texts.values.device, bf16):
        cls = model.fuse(texts, first_tokens(texts.lengths), images)
    # outside of autocast: bf16 logits near 8 are 1/16 apart, and would tie
    logits = model.match_logits(cls.float()).float()
    return logits[:, 1] - logits[:, 0]


class _Ranker:
    """Unit vectors of all images and captions; where the match head `ranks`, their states too."""

    def __init__(
        self,
        model,
        items,
        images: EncoderStates,
        tokenizer: Tokenizer,
        length: int,
        folder: Path,
        bf16: bool,
        ranks: bool,
    ):
        self.model, self.bf16, self.device = model.eval(), bf16, next(model.parameters()).device
        names = [item.image for item in items]
        texts = [caption for item in items for caption in item.captions]
        owner = [i for i, item in enumerate(items) for _ in item.captions]
        self.owner = torch.tensor(owner, device=self.device)  # (c,)
        keys = [str(i) for i in range(len(texts))]

        def read(keys: Sequence[str]) -> Ragged:
            return encode_texts([texts[int(key)] for key in keys], tokenizer, length)

        def encode(ids: Ragged) -> Ragged:
            with autocast(self.device, bf16):
                states = model.encode_text(to_device(ids, self.device))
            return ids.with_values(states.float())

        def embed_images(items: Sequence[int]) -> Tensor:
            return model.embed_images(self.images.read(items), normalize=False)

        def embed_texts(items: Sequence[int]) -> Tensor:
            if ranks:
                return model.embed_text_states(self.texts.read_first(items), normalize=False)
            ids = to_device(read([keys[i] for i in items]), self.device)
            with autocast(self.device, bf16):
                return model.embed_text(ids, normalize=False)

        with torch.inference_mode():
            self.images = ItemStates(images, names, self.device)
            self.image_vectors = _unit_vectors(len(names), embed_images)
            if ranks:
                text_states = write_encoder_states(
                    folder / "texts", keys, read, encode, SENTENCES, unit="captions"
                )
                self.texts = ItemStates(text_states, keys, self.device)
            self.text_vectors = _unit_vectors(len(keys), embed_texts)
        require_finite("image embeddings", self.image_vectors)
        require_finite("text embeddings", self.text_vectors)

    @torch.inference_mode()
    def hits(self, candidates: int | None) -> tuple[Tensor, Tensor, int]:
        """(chance of each image, and of each caption, to hit within each of RANKS: float64 (n, 3), (c, 3) on
        the CPU; pairs ranked). Workers share the work in blocks of a fixed size, so that no number depends on
        how many there are."""
        images, texts = self.image_vectors, self.text_vectors
        own = torch.arange(len(images), device=self.device)
        if candidates is None:
            i2t = _hits(images, texts, own, self.owner)
            return i2t, _hits(texts, images, self.owner, own), 0
        nearest_texts, nearest_images = (
            _nearest(queries, keys, min(candidates or len(keys), len(keys)))
            for queries, keys in ((images, texts), (texts, images))
        )
        # pairs as numbers: those that both ways rank are scored once
        rows = torch.arange(len(texts), device=self.device)[:, None]
        of_images = own[:, None] * len(texts) + nearest_texts
        of_texts = nearest_images * len(texts) + rows
        pairs, places = torch.cat([of_images.flatten(), of_texts.flatten()]).unique(return_inverse=True)
        match = self.match((pairs // len(texts)).cpu(), (pairs % len(texts)).cpu())
        require_finite("scores of the match head", match)
        i2t_match, t2i_match = match[places].split([of_images.numel(), of_texts.numel()])
        i2t = _hits(images, texts, own, self.owner, nearest_texts, i2t_match.view_as(of_images))
        t2i = _hits(texts, images, self.owner, own, nearest_images, t2i_match.view_as(of_texts))
        return i2t, t2i, len(places)

    @torch.inference_mode()
    def match(self, images: Tensor, texts: Tensor) -> Tensor:
        """(P,) log of the odds that image and text belong together; all workers together score the pairs of
        their numbers, which are on the CPU."""
        # Image after image, so that each is read and projected once; those with equally many texts together,
        # since attention pads the queries of an image to those of the block's longest.
        order = (images.bincount()[images] * (1 + images.max()) + images).argsort(stable=True)
        images, texts = images[order], texts[order]
        scores = torch.zeros(len(images), device=self.device)
        share = _blocks(images)[rank() :: world_size()]
        size = sum(block.stop - block.start for block in share)
        for block in progress(share, "rank", size, "pairs", lambda block: block.stop - block.start):
            unique_images, rows = images[block].unique(return_inverse=True)
            memory = Memory(self.images.read(unique_images.tolist()), rows)
            scores[block] = match_pairs(self.model, self.texts.read(texts[block].tolist()), memory, self.bf16)
        # each is one worker's, and 0 on the others: their sum is exact
        return torch.empty_like(scores).index_copy_(0, to_device(order, self.device), all_reduce(scores))


def _blocks(images: Tensor) -> list[slice]:
    """Slices of pairs that are scored together: about `PAIRS` of them, and all of an image, if these are not
    more than 2 `PAIRS`. images: (P,), equal ones together."""
    counts = images.unique_consecutive(return_counts=True)[1]
    # an image belongs to the block in which its last pair would lie: no block grows beyond 2 `PAIRS` but by
    # an image that has more than `PAIRS` itself
    block = (counts.cumsum(0) - 1) // PAIRS
    sizes = torch.zeros(int(block[-1]) + 1, dtype=torch.int64).index_add_(0, block, counts)
    ends = sizes.cumsum(0).tolist()
    return [
        slice(start, min(start + 2 * PAIRS, end))
        for first, end in zip([0, *ends[:-1]], ends, strict=True)
        for start in range(first, end, 2 * PAIRS)
    ]


def _shares(count: int) -> list[slice]:
    """This worker's slices of so many queries."""
    return [slice(start, start + QUERIES) for start in range(0, count, QUERIES)][rank() :: world_size()]


def _nearest(queries: Tensor, keys: Tensor, count: int) -> Tensor:
    """(q, count) the nearest keys of each query, the same on all workers."""
    # ties at the last place are broken by a fixed order, not by the place in the file: a collapsed model
    # would find its own captions there
    order = torch.from_numpy(permutation(len(keys), "candidates")).to(queries.device)
    nearest = torch.zeros(len(queries), count, dtype=torch.int64, device=queries.device)
    with exact_products():
        for rows in _shares(len(queries)):
            nearest[rows] = nearest_keys(queries[rows] @ keys.T, count, order)
    return all_reduce(nearest)


def _hits(
    queries: Tensor,
    keys: Tensor,
    query_owner: Tensor,
    key_owner: Tensor,
    candidate_index: Tensor | None = None,
    match: Tensor | None = None,
) -> Tensor:
    """(q, 3) chances to hit, of all workers, on the CPU. candidate_index, match: (q, K), keys that stand
    before all others, and their scores."""
    hits = torch.zeros(len(queries), len(RANKS), dtype=torch.float64, device=queries.device)
    with exact_products():
        for rows in _shares(len(queries)):
            scores, first = queries[rows] @ keys.T, None
            if candidate_index is not None and match is not None:
                # two levels: candidates by the match head, and after all of these the others, by similarity
                first = torch.zeros_like(scores, dtype=torch.bool).scatter(1, candidate_index[rows], True)
                scores = scores.scatter(1, candidate_index[rows], match[rows])
            hits[rows] = hit_chances(scores, query_owner[rows, None] == key_owner, first)
    return all_reduce(hits).cpu()


def _unit_vectors(count: int, embed: Callable[[Sequence[int]], Tensor]) -> Tensor:
    """Unit vectors (n, e) of so many items, some at a time."""
    chunks = [range(start, min(start + SENTENCES, count)) for start in range(0, count, SENTENCES)]
    return F.normalize(
        torch.cat([embed(c).float() for c in progress(chunks, "embed", count, size=len)]), dim=1
    )
