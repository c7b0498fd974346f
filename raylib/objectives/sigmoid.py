"""The sigmoid contrast of pairs (SigLIP; Zhai et al. 2023, arXiv:2303.15343), block by block.

Each pair of a left and a right side is a question of its own: do they belong together? So no row needs all
keys at once. The right sides go round the workers, and only one block of logits is there at a time: b x k, of
this worker's rows and one worker's keys; forward and, computed again, backward.

Shape legend: b local rows, k of one worker, e embedding width.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from raylib.distributed import all_gather, pass_on, rank, ring, world_size
from raylib.facts import WORDS, find_true
from raylib.precision import exact_products

ROWS = 4096  # of a block; with few workers b may be large


def sigmoid_contrast(
    left: Tensor, right: Tensor, ids: Tensor, counts: list[int], temperature: Tensor, bias: Tensor
) -> Tensor:
    """Return the sum over local rows and the keys of all workers of -log sigmoid(z (cos / temperature +
    bias)), where z is 1 of a row's own key and -1 of others; those of equal content are left out. In float32,
    also under autocast.

    Args:
        left, right: unit vectors (b, e).
        ids: (b, 2) of left and right, equal for equal content; or (b, 2 + 2 WORDS), with what is true of the
            left and what the right claims (`raylib.facts`).
        counts: rows of each worker.
        temperature, bias: (1,), trained.
    """
    with torch.autocast(left.device.type, enabled=False):
        dtype = temperature.dtype
        return _SigmoidContrast.apply(
            left.to(dtype), right.to(dtype), all_gather(ids, counts), counts, temperature, bias.to(dtype)
        )


def _blocks(
    left: Tensor, right: Tensor, ids: Tensor, counts: list[int]
) -> Iterator[tuple[slice, int, Tensor, Tensor, bool]]:
    """Go through this worker's rows and one worker's keys after the other: (rows, number of the worker, its
    keys (k, e), which pairs are left out, whether the rows' own keys are on its diagonal)."""
    b, ids_of = len(left), ids.split(counts)
    for worker, keys in ring(right, counts):
        key_ids = ids_of[worker][:, :2]
        for start in range(0, b, ROWS):
            rows = slice(start, min(start + ROWS, b))
            row_ids = ids_of[rank()][rows, None, :2]
            excluded = (row_ids == key_ids).any(2)
            if ids.shape[1] > 2:
                truths, claims = ids_of[rank()][rows, 2 : 2 + WORDS], ids_of[worker][:, 2 + WORDS :]
                excluded |= find_true(truths, claims)
            if worker == rank():
                excluded[:, rows].fill_diagonal_(False)
            yield rows, worker, keys, excluded, worker == rank()


class _SigmoidContrast(torch.autograd.Function):
    @staticmethod
    @exact_products()
    def forward(
        ctx,
        left: Tensor,
        right: Tensor,
        ids: Tensor,
        counts: list[int],
        temperature: Tensor,
        bias: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(left, right, ids, temperature, bias)
        ctx.counts = counts
        loss = bias.new_zeros(())
        for rows, _, keys, excluded, own in _blocks(left, right, ids, counts):
            logits = torch.addmm(bias, left[rows] / temperature, keys.T)
            # -log sigmoid(-x) = softplus(x), and -log sigmoid(x) = softplus(x) - x
            loss += F.softplus(logits).masked_fill_(excluded, 0.0).sum()
            if own:
                loss -= logits[:, rows].diagonal().sum()
        return loss

    @staticmethod
    @exact_products()
    def backward(ctx, grad: Tensor):
        left, right, ids, temperature, bias = ctx.saved_tensors
        # room for the keys of any worker, for it travels on
        left_grad, keys_grad = torch.zeros_like(left), right.new_zeros(max(ctx.counts), right.shape[1])
        temperature_grad, bias_grad = torch.zeros_like(temperature), torch.zeros_like(bias)
        held = rank()
        for rows, worker, keys, excluded, own in _blocks(left, right, ids, ctx.counts):
            if worker != held:
                # what this worker's rows owe to keys travels with them, and is added to on the way
                held, keys_grad = worker, pass_on(keys_grad)
            logits = torch.addmm(bias, left[rows] / temperature, keys.T)
            logits_grad = logits.sigmoid().masked_fill_(excluded, 0.0)
            if own:
                logits_grad[:, rows].diagonal().sub_(1.0)
            logits_grad *= grad
            left_grad[rows] = left_grad[rows] + logits_grad @ keys / temperature
            keys_grad[: len(keys)] += logits_grad.T @ (left[rows] / temperature)
            bias_grad += logits_grad.sum()
            temperature_grad -= (logits_grad * (logits - bias)).sum() / temperature
        if world_size() > 1:
            keys_grad = pass_on(keys_grad)  # home from the last worker
        return left_grad, keys_grad[: len(right)], None, None, temperature_grad, bias_grad
