"""Pure tensor functions. Losses are *sums* over local rows: the caller divides by the count over all workers.

Shape legend: b local rows, B rows of the global batch, e embedding width, m masked positions, d width, V
vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

HEAD_ROWS = 256  # rows of the vocabulary head at a time; PyTorch's automatic choice is 10 x slower on a CPU


def contrastive(
    queries: Tensor, keys: Tensor, positive: Tensor, excluded: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """InfoNCE in one direction, summed (paper 2, equation 1). In float32, also under autocast.

    Args:
        queries: unit vectors (b, e). keys: unit vectors of the global batch (B, e).
        positive: (b,) the key of each query.
        excluded: (b, B) -inf where the key is equal to the positive in content, and so no negative; else 0.
        temperature: (1,).
    Returns:
        (sum of the losses, logits (b, B) without gradient).
    """
    with torch.autocast(queries.device.type, enabled=False):
        # scaled and masked where they are made: at (b, B), every further pass over the logits costs as much
        # as this one
        logits = torch.addmm(excluded, queries.to(excluded.dtype) / temperature, keys.to(excluded.dtype).T)
        return F.cross_entropy(logits, positive, reduction="sum"), logits.detach()


def masked_language(
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
        losses, for_states = scale.new_empty(len(labels)), torch.empty_like(states)
        for_bias, for_weight = torch.zeros_like(bias), None
        with torch.autocast(kind, enabled=False):
            table, shift = weight.to(dtype), bias.to(dtype)
            for first in range(0, len(labels), HEAD_ROWS):
                rows = slice(first, first + HEAD_ROWS)
                part, wanted, counts = states[rows].to(dtype), labels[rows, None], scale[rows, None].to(exact)
                logs = F.log_softmax(F.linear(part, table, shift), -1, dtype=exact)
                losses[rows] = -logs.gather(1, wanted).squeeze(1)
                owed = logs.exp_().mul_(counts).scatter_add_(1, wanted, -counts)  # to the logits
                for_bias += owed.sum(0)
                owed = owed.to(dtype)
                for_states[rows] = owed @ table
                if for_weight is None:
                    for_weight = (owed.T @ part).to(weight.dtype)
                elif dtype == weight.dtype:
                    for_weight.addmm_(owed.T, part)
                else:
                    for_weight += owed.T @ part
            loss = (losses * scale).sum()
        ctx.owed = for_states, torch.zeros_like(weight) if for_weight is None else for_weight, for_bias
        ctx.mark_non_differentiable(losses)
        return loss, losses

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        owed, ctx.owed = ctx.owed, None  # scaled where they are: a second backward is an error
        return *(part.mul_(grad) for part in owed), None, None


def hard_negatives(similarity: Tensor, forbidden: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """One in-batch negative a row, drawn with probability softmax(similarity) (ALBEF; paper 2, equation 3).

    Args:
        similarity: (b, B), divided by the temperature.
        forbidden: (b, B) True at the positive and at every false negative.
        draws: (b,) uniform in [0, 1), one a row: equal draws give equal negatives on any number of workers.
    Returns:
        (index (b,), exists (b,)). Where all keys are forbidden there is no negative: index 0, exists False.
        Scores that are NaN or infinite count as the lowest, so that a diverging model fails in its loss and
        not in here.
    """
    scores = (
        similarity.float().nan_to_num(nan=-1e4, posinf=1e4, neginf=-1e4).masked_fill(forbidden, -torch.inf)
    )
    exists = ~forbidden.all(1)
    chances = scores.masked_fill(~exists[:, None], 0.0).softmax(1).masked_fill(forbidden, 0.0).cumsum(1)
    wanted = draws[:, None].to(chances) * chances[:, -1:]
    index = (chances <= wanted).sum(1)  # first key whose running chance passes the draw
    last = (~forbidden * torch.arange(forbidden.shape[1], device=forbidden.device)).amax(1)
    return torch.where(exists, torch.minimum(index, last), 0), exists
