"""Pretraining objectives. Here: the declarations that a term of the loss is made of, in a user's file too
(docs/extending.md); the cache of a frozen text encoder; contrast of pairs over the global batch: its order,
which keys are no negatives, InfoNCE, hard negatives.

Losses are *sums* over local rows: the caller divides by the count over all workers.

Shape legend: b local rows, B rows of the global batch, e embedding width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from raylib.distributed import all_gather, count_rows, exchange_rows, plan_exchange, rank
from raylib.facts import WORDS, find_true
from raylib.packed import Ragged, upload
from raylib.precision import exact_addmm, exact_products

Stream = Literal["image_text", "parallel", "text"]
Reads = Literal["embeddings", "masked", "matches"]


@dataclass(frozen=True)
class LossPart:
    """A part of a term, summed over `count` local rows. Several parts of one term add up."""

    value: Tensor
    count: Tensor | int


@dataclass(frozen=True)
class MaskedPart:
    """A part of a term that the vocabulary head makes: states (m, d) of masked positions, their `labels`
    (m,)."""

    states: Tensor
    labels: Tensor


Parts = Sequence[LossPart | MaskedPart]


@dataclass(frozen=True)
class PretrainingTerm:
    """A term of the loss: what `term` makes of a function."""

    loss: Callable[[Any], Parts]
    stream: Stream
    reads: tuple[Reads, ...]
    trains: tuple[str, ...]
    two_way: bool


def term(
    stream: Stream, reads: tuple[Reads, ...], trains: tuple[str, ...], two_way: bool = False
) -> Callable[[Callable[[Any], Parts]], PretrainingTerm]:
    """Make a term of a function from a stream's step (`ImageTextStep`, `TranslationStep`, `TextStep`) to the
    parts of a loss.

    Args:
        stream: that it is about; it is left out where a batch has none.
        reads: sentences' "embeddings"; the "masked" text after the unified encoder; right and wrong "matches"
            of captions and images after it. Only what some term reads is computed.
        trains: parts of the model, beside the text encoder, that it gives a gradient to (`module_group`).
        two_way: its parts are two directions, whose mean `directions=mean` takes.

    Raises:
        ValueError: a stream, or something to read, that no batch has: the term would never be computed.
    """
    # Python checks no Literal: a stream by another name would be in no batch, its term never in the loss
    for name, known in ((stream, get_args(Stream)), *((name, get_args(Reads)) for name in reads)):
        if name not in known:
            raise ValueError(f"@term: '{name}' is none of {', '.join(known)}")
    return lambda loss: PretrainingTerm(loss, stream, reads, trains, two_way)


class FrozenTextCache:
    """CLS states of sentences after a text encoder that never changes, each computed once; no more than
    `LIMIT`. A resumed run, which begins with none, meets a sentence first in another batch: it is the same to
    the bit because a state does not depend on the batch that it is computed in (`UnifiedObjective`).
    """

    LIMIT = 2**17

    def __init__(self) -> None:
        # ids are hashes of the tokens, equal for equal texts in whatever batch they come
        self.row_of: dict[int, int] = {}  # text id -> row of `states`
        self.states = torch.empty(0)

    def cls(self, text_ids: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """(n, d) states of the sentences `text_ids` (n,) on the CPU, of equal ids where equal; `encode(rows)`
        computes those of new ones."""
        ids = text_ids.tolist()
        # reversed, so that of equal texts the first row wins
        first_row = {text: row for row, text in reversed(list(enumerate(ids)))}
        new = [row for text, row in first_row.items() if text not in self.row_of]
        if len(self.row_of) + len(new) > self.LIMIT:
            self.row_of, self.states, new = {}, torch.empty(0), list(first_row.values())
        if new:
            self._append(encode(torch.tensor(new)))
            self.row_of |= {ids[row]: len(self.row_of) + i for i, row in enumerate(new)}
        rows = torch.tensor([self.row_of[text] for text in ids])
        return self.states.index_select(0, upload(rows, self.states.device))

    def _append(self, states: Tensor) -> None:
        used = len(self.row_of)
        if used + len(states) > len(self.states):
            # twice what is needed, so that copying costs no more than a constant for each state
            room = states.new_empty(2 * (used + len(states)), states.shape[1])
            if used:
                room[:used] = self.states[:used]
            self.states = room
        self.states[used : used + len(states)] = states


@dataclass(frozen=True)
class GlobalPairs:
    """The pairs of the global batch, whose rows are in one order on any number of workers (`worker_rows`).

    index: (b,) position of each local row in the global batch, and so the column of its own pair. size: B.
    excluded: (b, B) True where a pair's right side is no negative of the local row's left side: the pair has
        a left or right side equal to the row's, its own pair too, or is of another group; or its right side
        is known to be true of the row's left.
    excluded_left: (b, B) where a pair's left side is no negative of the local row's right side: the same,
        `excluded` itself, but for what is known to be true.
    """

    index: Tensor
    size: int
    excluded: Tensor
    excluded_left: Tensor

    def gather(self, rows: Tensor) -> Tensor:
        """(b, ...) on each worker -> (B, ...), with gradient."""
        return all_gather(rows, count_rows(self.size))

    def logit_mask(self, dtype: torch.dtype) -> Tensor:
        """(b, B) to be added to logits of left sides with all right ones: -inf at false negatives, else 0."""
        return self._mask(self.excluded, dtype)

    def logit_masks(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`logit_mask`, and that of right sides with all left ones."""
        mask = self.logit_mask(dtype)
        if self.excluded_left is self.excluded:
            return mask, mask
        return mask, self._mask(self.excluded_left, dtype)

    def _mask(self, excluded: Tensor, dtype: torch.dtype) -> Tensor:
        mask = torch.zeros(excluded.shape, dtype=dtype, device=excluded.device)
        return mask.masked_fill_(excluded, -torch.inf).scatter_(1, self.index[:, None], 0.0)


def align_pairs(pairs: Tensor, size: int, groups: int = 1) -> GlobalPairs:
    """Find the pairs that are no negatives of each other among those of all workers.

    Args:
        pairs: (b, 3) of each local pair its index in the global batch, and the ids of its left and its right
            side, equal for equal content; or (b, 3 + 2 WORDS), with what is true of its left side and what
            its right side claims (`raylib.facts`).
        size: of the global batch. groups: equal parts of it, whose pairs know nothing of each other.
    """
    index, left_id, right_id = pairs[:, :3].unbind(1)
    # one gather, not two: each waits for the slowest worker
    all_pairs = all_gather(pairs[:, 1:], count_rows(size))
    left_ids, right_ids = all_pairs[:, :2].unbind(1)
    excluded = (left_id[:, None] == left_ids) | (right_id[:, None] == right_ids)
    if groups > 1:
        columns = torch.arange(size, device=index.device)
        excluded |= (index * groups // size)[:, None] != columns * groups // size
    if pairs.shape[1] == 3:
        return GlobalPairs(index, size, excluded, excluded)
    (truths, claims), (all_truths, all_claims) = (
        facts.split(WORDS, 1) for facts in (pairs[:, 3:], all_pairs[:, 2:])
    )
    # "dog" is no wrong caption of an image of dog and cat, but the image of a dog is a wrong one, and a hard
    # one, of "dog and cat": each direction has its own mask
    excluded_left = excluded | find_true(all_truths, claims).T
    return GlobalPairs(index, size, excluded | find_true(truths, all_claims), excluded_left)


def info_nce(
    queries: Tensor, keys: Tensor, positive: Tensor, logit_mask: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """InfoNCE in one direction, summed (paper 2, equation 1). In float32, also under autocast.

    Args:
        queries: unit vectors (b, e).
        keys: unit vectors of the global batch (B, e).
        positive: (b,) the key of each query.
        logit_mask: (b, B) -inf where the key is equal to the positive in content, and so no negative; else 0.
        temperature: (1,).
    Returns:
        (sum of the losses, logits (b, B) without gradient).
    """
    with torch.autocast(queries.device.type, enabled=False):
        # scaled and masked in the product itself: at (b, B), each further pass over the logits costs as much
        scaled = queries.to(logit_mask.dtype) / temperature
        logits = exact_addmm(logit_mask, scaled, keys.to(logit_mask.dtype).T)
        return F.cross_entropy(logits, positive, reduction="sum"), logits.detach()


@dataclass(frozen=True)
class NegativeScores:
    """Scores by which hard negatives are drawn, among pairs of a left and a right side.

    left_to_right, right_to_left: (b, B) similarities of local rows to all keys, over the temperature.
    forbidden, forbidden_left: (b, B) the pair itself, and false negatives, among right and among left sides.
    counts: rows of each worker, of the B.
    """

    left_to_right: Tensor
    right_to_left: Tensor
    forbidden: Tensor
    forbidden_left: Tensor
    counts: list[int]

    def subset(self, rows: Tensor, every: int) -> "NegativeScores":
        """The same for local `rows` and columns, whose index is a multiple of `every`."""
        if every == 1:
            return self
        size = self.forbidden.shape[1]
        columns = torch.arange(0, size, every, device=rows.device)
        tables = (self.left_to_right, self.right_to_left, self.forbidden, self.forbidden_left)
        to_right, to_left, forbidden, forbidden_left = (
            table.index_select(0, rows).index_select(1, columns) for table in tables
        )
        return NegativeScores(to_right, to_left, forbidden, forbidden_left, count_rows(size, every))


@dataclass(frozen=True)
class PairContrast:
    """A contrast both ways, each summed over `count` local rows, and the scores for hard negatives, where
    these are drawn."""

    left_to_right: Tensor
    right_to_left: Tensor
    count: int
    scores: NegativeScores | None


def contrast_pairs(left: Tensor, right: Tensor, pairs: GlobalPairs, temperature: Tensor) -> PairContrast:
    """Contrast unit vectors `left` and `right` (b, e) with those of all workers."""
    # both sides in one gather, which waits for the slowest worker
    both = pairs.gather(torch.cat([left, right], 1))
    all_left, all_right = both.split([left.shape[1], right.shape[1]], 1)
    mask, left_mask = pairs.logit_masks(temperature.dtype)
    left_loss, left_logits = info_nce(left, all_right, pairs.index, mask, temperature)
    right_loss, right_logits = info_nce(right, all_left, pairs.index, left_mask, temperature)
    excluded, counts = (pairs.excluded, pairs.excluded_left), count_rows(pairs.size)
    scores = NegativeScores(left_logits, right_logits, *excluded, counts)
    return PairContrast(left_loss, right_loss, len(left), scores)


@torch.no_grad()
def score_pairs(left: Tensor, right: Tensor, pairs: GlobalPairs, temperature: Tensor) -> NegativeScores:
    """Scores of unit vectors `left` and `right` (b, e) for hard negatives, as those of `contrast_pairs`."""
    with torch.autocast(left.device.type, enabled=False), exact_products():
        left, right = left.to(temperature.dtype), right.to(temperature.dtype)
        both = pairs.gather(torch.cat([left, right], 1))
        all_left, all_right = both.split([left.shape[1], right.shape[1]], 1)
        to_right, to_left = left / temperature @ all_right.T, right / temperature @ all_left.T
    excluded, counts = (pairs.excluded, pairs.excluded_left), count_rows(pairs.size)
    return NegativeScores(to_right, to_left, *excluded, counts)


@dataclass(frozen=True)
class Negatives:
    """Hard negatives of the fused pairs of the global batch, both ways.

    images: the local ones, then those of other workers that this one needs, once each, since the unified
        encoder projects each to keys and values; wrong_image: (b,) rows of these. captions: states of the
        local ones; all_captions, wrong_caption: as of images. has_image, has_caption: (b,) whether there is a
        wrong one. Rows are on the CPU.
    """

    images: Ragged
    wrong_image: Tensor
    captions: Ragged
    all_captions: Ragged
    wrong_caption: Tensor
    has_image: Tensor
    has_caption: Tensor


def find_negatives(
    images: Ragged, captions: Ragged, lengths: Tensor, scores: NegativeScores, uniforms: Tensor
) -> Negatives:
    """Draw a wrong caption and a wrong image, hard ones of the global batch, for each pair, and fetch their
    states from the workers that have them.

    Args:
        images, captions: states of the local pairs; all images of all workers are equally long.
        lengths: (b,) of the captions, on the device.
        uniforms: (b, 2) in [0, 1), for the caption and for the image.
    """
    device = images.values.device
    wrong_caption, has_caption = draw_hard_negatives(scores.left_to_right, scores.forbidden, uniforms[:, 0])
    wrong_image, has_image = draw_hard_negatives(scores.right_to_left, scores.forbidden_left, uniforms[:, 1])
    # what all workers need and have, in one gather, and the one wait for the device in a step: every host
    # must know which rows travel, and wrong captions' lengths decide how attention runs
    table = all_gather(torch.stack([wrong_caption, wrong_image, lengths], 1), scores.counts).cpu()
    wrong_captions, wrong_images, caption_lengths = table.unbind(1)
    caption_plan = plan_exchange(wrong_captions, rank(), scores.counts)
    image_plan = plan_exchange(wrong_images, rank(), scores.counts)
    if torch.is_autocast_enabled(device.type):
        # the unified encoder projects them to keys and values in bf16 in any case
        images = images.with_values(images.values.to(torch.get_autocast_dtype(device.type)))
    return Negatives(
        exchange_rows(images, images.lengths[:1].expand(len(table)), image_plan),
        image_plan.rows,
        captions,
        exchange_rows(captions, caption_lengths, caption_plan),
        caption_plan.rows,
        has_image,
        has_caption,
    )


def draw_hard_negatives(similarity: Tensor, forbidden: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """One in-batch negative a row, drawn with probability softmax(similarity) (ALBEF; paper 2, equation 3).

    Args:
        similarity: (b, B), divided by the temperature.
        forbidden: (b, B) True at the positive and at every false negative.
        uniforms: (b,) in [0, 1), one a row: equal ones give equal negatives on any number of workers.
    Returns:
        (index (b,), valid (b,)). Where all keys are forbidden there is no negative: index 0, valid False.
        Scores that are NaN or infinite count as the lowest, so that a diverging model fails in its loss and
        not in here.
    """
    scores = (
        similarity.float().nan_to_num(nan=-1e4, posinf=1e4, neginf=-1e4).masked_fill(forbidden, -torch.inf)
    )
    valid = ~forbidden.all(1)
    # a softmax over nothing but -inf would be NaN: such rows get any finite scores, and no chance at all
    chances = scores.masked_fill(~valid[:, None], 0.0).softmax(1).masked_fill(forbidden, 0.0)
    if torch.are_deterministic_algorithms_enabled():
        # a GPU's running sum of floats has no fixed order; one of integers needs none
        chances = (chances.double() * 2**52).long().cumsum(1).double() / 2**52
    else:
        chances = chances.cumsum(1)
    # the draw is scaled to the last running sum, which rounding keeps from being exactly 1
    threshold = uniforms[:, None].to(chances) * chances[:, -1:]
    index = (chances <= threshold).sum(1)  # first key whose running chance passes the threshold
    last_allowed = (~forbidden * torch.arange(forbidden.shape[1], device=forbidden.device)).amax(1)
    return torch.where(valid, torch.minimum(index, last_allowed), 0), valid
