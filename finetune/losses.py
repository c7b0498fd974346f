"""Losses of fine-tuning: pure tensor functions. Shape legend: b examples, C labels, k labels of an
example."""

import torch
from torch import Tensor


def linguistic_prior(logits: Tensor, answer: Tensor, distance: Tensor, k: int) -> Tensor:
    """The expected distance of the prediction from the true answer (paper 0, section 3, L_prior): sum over c
    of p(y_c) d(y_c, y*), where c runs over the k most probable labels only.

    p is the softmax over all C labels; those k are not made to sum to 1. The gradient flows through p alone.

    Args:
        logits: (b, C). answer: (b,) int64, the true labels.
        distance: (C, C), [c, y] = d(y_c, y*): the predicted label first; in its precision all is computed,
        also under autocast. k: how many labels; all where there are fewer.
    Returns:
        (b,).
    """
    with torch.autocast(logits.device.type, enabled=False):
        probability, label = (
            logits.to(distance.dtype).softmax(1).topk(min(k, logits.shape[1]), sorted=False)
        )  # (b, k) both
        return (probability * distance[label, answer[:, None]]).sum(1)
