"""Heads: the cross-entropy over the vocabulary, whose logits are the largest tensors of a step; and the
classifier on the state that an image and a text end in.

Shape legend: b texts, m positions, d width, V vocabulary, r rows of a chunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raylib.models.layers import init_weights
from raylib.precision import autocast_dtype, exact_linear, fusible
from raylib.settings import ClassifierConfig

HEAD_ROWS = 256  # rows at a time on a CPU; PyTorch's automatic choice is 10 x slower there
MEMORY_SHARE = 1 / 20  # of a GPU's memory that the logits of a chunk, and what is made of them, may take
INIT_STD = 0.02  # of BERT's weights
ALIGNMENT = 64  # columns of a table are a multiple of it on a GPU, whose matrix units want aligned rows


def head_rows(device: torch.device, vocabulary: int, bytes_a_logit: int) -> int:
    """Return how many rows of logits to hold at a time; by the device alone, so that sums come out alike in
    every step."""
    if device.type == "cpu":
        return HEAD_ROWS
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(HEAD_ROWS, int(memory * MEMORY_SHARE) // (bytes_a_logit * vocabulary))


def vocabulary_loss(
    states: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy over the vocabulary at masked positions (paper 2, equation 2).

    Logits exist for `head_rows` positions at a time, and once: their gradient is taken in the same breath, so
    that memory does not grow with the number of positions and nothing is computed again.
    (`F.linear_cross_entropy` does so too, but weighs all positions alike: a call for each term, each with a
    gradient as large as the vocabulary; and torch 2.11 has none.)

    Args:
        states: (m, d).
        weight: (V, d).
        bias: (V,).
        labels: (m,).
        scale: (m,) what each position counts.
    Returns:
        (sum of scale * loss, the losses (m,), which carry no gradient).
    """
    return _VocabularyLoss.apply(states, weight, bias, labels, scale, torch.is_grad_enabled())


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, states: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, scale: Tensor, has_backward: bool
    ):
        kind = states.device.type
        dtype = autocast_dtype(kind) or weight.dtype
        with torch.autocast(kind, enabled=False):
            ctx.is_lean = kind != "cpu" and dtype == torch.bfloat16
            gradients = _lean_gradients if ctx.is_lean else _gradients
            # evaluation needs none, frozen embeddings need not the largest
            needed = has_backward and any(ctx.needs_input_grad), has_backward and ctx.needs_input_grad[1]
            losses, *ctx.grads = gradients(states, weight, bias, labels, scale, dtype, needed)
            loss = (losses * scale).sum()
        ctx.mark_non_differentiable(losses)
        return loss, losses

    @staticmethod
    def backward(ctx, loss_grad: Tensor, _):
        grads, ctx.grads = ctx.grads, None  # scaled in place: a second backward is an error
        states_grad, weight_grad, bias_grad = grads
        if ctx.is_lean and weight_grad is not None:
            # cast, and parted from the bias's columns, in the same pass
            out = weight_grad.new_empty(weight_grad.shape, dtype=bias_grad.dtype)
            weight_grad = torch.mul(weight_grad, loss_grad, out=out)
        elif weight_grad is not None:
            weight_grad.mul_(loss_grad)
        return states_grad.mul_(loss_grad), weight_grad, bias_grad.mul_(loss_grad), None, None, None


def _gradients(
    states: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    needed: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Losses (m,), and the gradients of `states`, `weight` and `bias`: products in `dtype`, the rest in
    float32 or better. `needed`: whether any gradient is, and that of `weight`; others are not to be read."""
    exact = torch.promote_types(dtype, torch.float32)
    losses, states_grad = scale.new_empty(len(labels)), torch.empty_like(states)
    bias_grad, weight_grad = torch.zeros_like(bias), None
    table, shift = _cast_table(weight, bias, dtype)
    size = head_rows(states.device, len(table), 2 * exact.itemsize)
    for first in range(0, len(labels), size):
        rows = slice(first, first + size)
        chunk, targets, counts = states[rows].to(dtype), labels[rows, None], scale[rows, None].to(exact)
        log_chances = F.log_softmax(F.linear(chunk, table, shift), -1, dtype=exact)
        losses[rows] = -log_chances.gather(1, targets).squeeze(1)
        if not needed[0]:
            continue
        # the gradient of cross-entropy is softmax - one-hot; made in place, the logits' memory over
        logits_grad = log_chances.exp_().mul_(counts).scatter_add_(1, targets, -counts)
        bias_grad += logits_grad.sum(0)[: len(bias)]
        logits_grad = logits_grad.to(dtype)
        states_grad[rows] = logits_grad @ table
        by_word = logits_grad.T[: len(bias)]
        if not needed[1]:
            continue
        # zeros as large as the vocabulary are only written where there is no chunk at all
        if weight_grad is None:
            weight_grad = (by_word @ chunk).to(weight.dtype)
        elif dtype == weight.dtype:
            weight_grad.addmm_(by_word, chunk)
        else:
            weight_grad += by_word @ chunk
    if weight_grad is None and needed[1]:
        weight_grad = torch.zeros_like(weight)
    return losses, states_grad, weight_grad, bias_grad


def _cast_table(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The decoder in `dtype`, on a GPU with as many rows that no position chooses as `ALIGNMENT` asks for."""
    missing = -len(weight) % ALIGNMENT
    if weight.device.type == "cpu" or not missing:
        return weight.to(dtype), bias.to(dtype)
    table = weight.new_empty(len(weight) + missing, weight.shape[1], dtype=dtype)
    table[: len(weight)] = weight
    table[len(weight) :] = 0
    return table, F.pad(bias.to(dtype), (0, missing), value=-torch.inf)


def _lean_gradients(
    states: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    needed: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """As `_gradients`, with a third of its traffic: nothing of the logits' size is float32, and what each
    position counts is multiplied into states, not into logits. The gradient of `weight` is in `dtype` where
    one chunk makes it."""
    losses, states_grad = scale.new_empty(len(labels)), torch.empty_like(states)
    num_words, width = weight.shape
    grad = None
    table, shift = _cast_table(weight, bias, dtype)
    size = head_rows(states.device, len(table), 2 * dtype.itemsize)
    for first in range(0, len(labels), size):
        rows = slice(first, first + size)
        chunk, counts = states[rows], scale[rows, None].float()
        losses[rows], logits_grad = _softmax_gradient(
            F.linear(chunk.to(dtype), table, shift), labels[rows, None]
        )
        if not needed[0]:
            continue
        states_grad[rows] = (logits_grad @ table) * counts
        # The gradient of the bias comes out of the product that makes the weight's, as that of two more
        # columns: what positions count, as a sum of two numbers in `dtype`. Eight columns keep rows aligned.
        high = counts.to(dtype)
        columns = [high, (counts - high).to(dtype), high.new_zeros(len(high), 6)]
        if needed[1]:
            columns.append((chunk * counts).to(dtype))
        chunk_grad = logits_grad.T[:num_words] @ torch.cat(columns, 1)
        if grad is None:
            grad = chunk_grad if size >= len(labels) else chunk_grad.to(weight.dtype)
        else:
            grad += chunk_grad
        # or the next chunk's logits would be made beside them
        del logits_grad, chunk_grad
    if grad is None:
        grad = weight.new_zeros(num_words, 8 + width)
    return losses, states_grad, grad[:, 8:] if needed[1] else None, grad[:, :2].sum(1, dtype=bias.dtype)


@fusible
def _softmax_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (r,) in float32, and softmax - one-hot in the dtype of the logits (r, V); targets (r, 1)."""
    chances = logits.softmax(-1)  # PyTorch's kernel computes in float32
    # The chance of all other words says more of a likely target than its own, whose digits end near 1. Of an
    # unlikely target it says nothing: there the likeliest word, whose chance is never denormal, gives the sum
    # that all are divided by.
    others = chances.scatter_(1, targets, 0.0).sum(1, keepdim=True, dtype=torch.float32)
    top, index = chances.max(1, keepdim=True)
    log_sum = logits.gather(1, index).float() - top.float().log()
    losses = torch.where(others < 0.5, -torch.log1p(-others), log_sum - logits.gather(1, targets).float())
    return losses.squeeze(1), chances.scatter_(1, targets, -others.to(chances.dtype))


class Classifier(nn.Module):
    """One linear layer, or two with an activation and a layer norm between them."""

    def __init__(self, inputs: int, width: int, labels: int, config: ClassifierConfig, dropout: float = 0.0):
        """inputs: width of the states side by side; width: of one of them. dropout: of the hidden layer."""
        super().__init__()
        self.config = config
        self.pooled_dropout = nn.Dropout(config.pooled_dropout)
        outputs = inputs
        if config.layers == 2:
            outputs = max(1, round(config.hidden_ratio * width))
            self.hidden = nn.Linear(inputs, outputs)
            if config.norm != "none":
                self.norm = nn.LayerNorm(outputs, config.eps)
            self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(outputs, labels)
        if config.init == "scaled":
            self.apply(init_weights)
        if config.init == "normal":
            self.apply(_init_normal)

    def forward(self, states: Tensor) -> Tensor:
        """(b, inputs) -> logits (b, labels)."""
        states = self.pooled_dropout(states)
        if self.config.layers == 2:
            states = self.dropout(self._activate(self.hidden(states)))
        # never in bf16, whose numbers near 8 are 1/16 apart: of labels that tie, the first is predicted
        with torch.autocast(states.device.type, enabled=False):
            return exact_linear(self.output, states.to(self.output.weight.dtype))

    def _activate(self, hidden: Tensor) -> Tensor:
        activation = F.gelu if self.config.activation == "gelu" else F.relu
        if self.config.norm == "before":
            return activation(self.norm(hidden))
        return self.norm(activation(hidden)) if self.config.norm == "after" else activation(hidden)


def _init_normal(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=INIT_STD)
        nn.init.zeros_(module.bias)
