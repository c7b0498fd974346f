"""Text of an objective: sentences on their way through the text encoder, and the loss of its vocabulary.

Shape legend: n sentences, T tokens in all, d width, m masked positions, V vocabulary.
"""

from collections.abc import Callable, Set
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from raylib.models.layers import Memory
from raylib.models.unified import UnifiedModel
from raylib.packed import Ragged, Sentences, concatenate, first_tokens

Version = Literal["clean", "masked"]  # of a sentence
HEAD_ROWS = 256  # rows of the vocabulary head at a time; PyTorch's automatic choice is 10 x slower on a CPU


class EncoderCall:
    """One version of a stream's sentences for the text encoder: which tokens' states come out, and these."""

    states: Tensor  # (R, d) of the tokens in `output_mask`, in flat order; set once the encoder has run

    def __init__(self, ids: Tensor, lengths: Tensor, cls: bool, rows: Tensor | None):
        """`cls`: output every row's CLS; `rows`: output all tokens of these rows."""
        self.ids, self.only_cls = Ragged(ids, lengths), cls and rows is None
        self.output_mask = first_tokens(lengths) if cls else torch.zeros(len(ids), dtype=torch.bool)
        if rows is not None:
            self.output_mask[self.ids.token_index(rows)] = True
        # the encoder's last layer computes these tokens alone: from a token to its place among them
        self.output_index = self.output_mask.cumsum(0) - 1

    def cls(self) -> Tensor:
        """(n, d) CLS states of all rows."""
        return self.states.index_select(0, self.output_index[self.ids.starts].to(self.states.device))

    def rows(self, rows: Tensor) -> Ragged:
        """All states of `rows`, which must have been asked for."""
        tokens = self.output_index[self.ids.token_index(rows)].to(self.states.device)
        return Ragged(self.states.index_select(0, tokens), self.ids.lengths[rows])


class StreamEncoding:
    """One stream's sentences: the `full` batch for contrast, a `subset` of it for the unified encoder.

    Args:
        sentences: local ones, all of them. index: (n,) in the global batch. every: the subset is the
            sentences whose index is a multiple of it.
        embedded: the version whose CLS states contrast reads, if any. fused: versions that the unified
            encoder reads.
    """

    def __init__(
        self,
        sentences: Sentences,
        index: Tensor,
        every: int,
        embedded: Version | None,
        fused: Set[Version],
    ):
        self.full, self.embedded = sentences, embedded
        self.subset_rows = (index % every == 0).nonzero().squeeze(1)
        self.subset = sentences.select_rows(self.subset_rows) if every > 1 else sentences
        self._subset_of_itself = torch.arange(len(self.subset_rows))
        self.calls: dict[Version, EncoderCall] = {}
        # in one order in every process: sums of floats depend on it
        versions: tuple[Version, ...] = ("clean", "masked")
        for version in versions:
            if version == embedded:  # of all rows at least the CLS
                rows = self.subset_rows if version in fused else None
                self.calls[version] = self._call(self.full, version, True, rows)
            elif version in fused:
                self.calls[version] = self._call(self.subset, version, False, self._subset_of_itself)

    @staticmethod
    def _call(sentences: Sentences, version: Version, cls: bool, rows: Tensor | None) -> EncoderCall:
        ids = sentences.clean if version == "clean" else sentences.masked
        return EncoderCall(ids, sentences.lengths, cls, rows)

    def cls(self) -> Tensor:
        """(n, d) CLS states of all sentences, of the version that contrast reads."""
        assert self.embedded is not None
        return self.calls[self.embedded].cls()

    def subset_states(self, version: Version) -> Ragged:
        """States of the subset, for the unified encoder."""
        rows = self.subset_rows if version == self.embedded else self._subset_of_itself
        return self.calls[version].rows(rows)


class FusionCall:
    """One call of the unified encoder for several groups of rows, each with a name."""

    def __init__(self) -> None:
        self.texts: dict[str, Ragged] = {}
        self.output_masks: dict[str, Tensor] = {}
        self.condition_rows: list[Tensor] = []
        self._states: dict[str, Tensor] = {}

    def add(self, name: str, text: Ragged, output_mask: Tensor, condition_rows: Tensor) -> None:
        """Add rows of text states; `condition_rows` (n,) of the condition is what each attends to, and the
        states of tokens in `output_mask` (T,) come out."""
        self.texts[name], self.output_masks[name] = text, output_mask
        self.condition_rows.append(condition_rows)

    def run(self, model: UnifiedModel, condition: Ragged) -> "FusionCall":
        masks = list(self.output_masks.values())
        grounded = Memory(condition, torch.cat(self.condition_rows))
        states = model.fuse(concatenate(list(self.texts.values())), torch.cat(masks), grounded)
        parts = states.split([int(mask.sum()) for mask in masks])
        self._states = dict(zip(self.output_masks, parts, strict=True))
        return self

    def states(self, name: str, tokens: Tensor) -> Tensor:
        """States of a group's `tokens` (T,), which must be among its outputs."""
        states = self._states[name]
        among_outputs = tokens[self.output_masks[name]].nonzero().squeeze(1)
        return states.index_select(0, among_outputs.to(states.device))


class FrozenTextCache:
    """CLS states of sentences after a text encoder that never changes, each computed once; no more than
    `LIMIT`.

    A state is computed among the sentences of its first batch. A resumed run meets it first in another one,
    where sums of floats may come out otherwise in the last bits: it is the same run to rounding, not to the
    bit.
    """

    LIMIT = 2**17

    def __init__(self) -> None:
        self.row_of: dict[int, int] = {}  # text id -> row of `states`
        self.states = torch.empty(0)

    def cls(self, text_ids: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """(n, d) states of the sentences `text_ids` (n,), of equal ids where equal; `encode(rows)` computes
        those of new ones."""
        ids = text_ids.tolist()
        first_row = {text: row for row, text in reversed(list(enumerate(ids)))}
        new = [row for text, row in first_row.items() if text not in self.row_of]
        if len(self.row_of) + len(new) > self.LIMIT:
            self.row_of, self.states, new = {}, torch.empty(0), list(first_row.values())
        if new:
            self._append(encode(torch.tensor(new)))
            self.row_of |= {ids[row]: len(self.row_of) + i for i, row in enumerate(new)}
        rows = torch.tensor([self.row_of[text] for text in ids], device=self.states.device)
        return self.states.index_select(0, rows)

    def _append(self, states: Tensor) -> None:
        used = len(self.row_of)
        if used + len(states) > len(self.states):
            # twice what is needed, so that copying costs no more than a constant for each state
            room = states.new_empty(2 * (used + len(states)), states.shape[1])
            if used:
                room[:used] = self.states[:used]
            self.states = room
        self.states[used : used + len(states)] = states


def vocabulary_loss(
    states: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy over the vocabulary at masked positions (paper 2, equation 2).

    Logits exist for `HEAD_ROWS` positions at a time, and once: their gradient is taken in the same breath, so
    that memory does not grow with the number of positions and nothing is computed again.
    (`F.linear_cross_entropy` does so too, but weighs all positions alike: a call for each term, each with a
    gradient as large as the vocabulary.)

    Args:
        states: (m, d). weight: (V, d). bias: (V,). labels: (m,). scale: (m,) what each position counts.
    Returns:
        (sum of scale * loss, the losses (m,), which carry no gradient).
    """
    return _VocabularyLoss.apply(states, weight, bias, labels, scale)


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, scale: Tensor):
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        exact = torch.promote_types(dtype, torch.float32)
        losses, states_grad = scale.new_empty(len(labels)), torch.empty_like(states)
        bias_grad, weight_grad = torch.zeros_like(bias), None
        with torch.autocast(kind, enabled=False):
            table, shift = weight.to(dtype), bias.to(dtype)
            for first in range(0, len(labels), HEAD_ROWS):
                rows = slice(first, first + HEAD_ROWS)
                chunk, targets, counts = (
                    states[rows].to(dtype),
                    labels[rows, None],
                    scale[rows, None].to(exact),
                )
                log_chances = F.log_softmax(F.linear(chunk, table, shift), -1, dtype=exact)
                losses[rows] = -log_chances.gather(1, targets).squeeze(1)
                # the gradient of cross-entropy is softmax - one-hot; made in place, the logits' memory over
                logits_grad = log_chances.exp_().mul_(counts).scatter_add_(1, targets, -counts)
                bias_grad += logits_grad.sum(0)
                logits_grad = logits_grad.to(dtype)
                states_grad[rows] = logits_grad @ table
                # zeros as large as the vocabulary are only written where there is no chunk at all
                if weight_grad is None:
                    weight_grad = (logits_grad.T @ chunk).to(weight.dtype)
                elif dtype == weight.dtype:
                    weight_grad.addmm_(logits_grad.T, chunk)
                else:
                    weight_grad += logits_grad.T @ chunk
            loss = (losses * scale).sum()
        ctx.grads = states_grad, torch.zeros_like(weight) if weight_grad is None else weight_grad, bias_grad
        ctx.mark_non_differentiable(losses)
        return loss, losses

    @staticmethod
    def backward(ctx, loss_grad: Tensor, _):
        grads, ctx.grads = ctx.grads, None  # scaled in place: a second backward is an error
        return *(grad.mul_(loss_grad) for grad in grads), None, None
