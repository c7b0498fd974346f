"""Number formats of a step: the dtype of the residual stream under autocast, TF32, and the products that stay
exact float32; functions that may be compiled into fewer kernels.

Weights, optimizer states and losses are float32 whatever the settings; matrix products of activations follow
autocast.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raylib.errors import UserError
from raylib.settings import Residual

Function = TypeVar("Function", bound=Callable[..., Any])

_compiler: str | None = None  # torch.compile's backend; None: nothing is compiled


def autocast(device: torch.device, bf16: bool) -> torch.autocast:
    """Return the context in which models compute, in training and in evaluation: bf16 where a run is in
    `bf16` (`FitConfig.uses_bf16`), else float32. Scores are compared in float32, outside of it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def autocast_dtype(kind: str) -> torch.dtype | None:
    """Return the dtype of autocast on a kind of device ("cuda"); None: it is off. "meta", which autocast does
    not know, is told by its name: of `is_autocast_available` torch 2.11 compiles nothing."""
    is_on = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if is_on else None


class LayerNorm(nn.LayerNorm):
    """Layer norm that decides the dtype of the residual stream under autocast, whose own returns float32: so
    each addition reads and writes four bytes a number, and each linear layer casts its input.

    `residual`: that dtype; None: autocast's on CUDA, float32 elsewhere. In bfloat16 the kernel keeps its
    statistics in float32.
    """

    residual: torch.dtype | None = None

    def stream_dtype(self, x: Tensor) -> torch.dtype:
        """Return the dtype of a residual stream that begins with `x`."""
        kind = x.device.type
        dtype = autocast_dtype(kind)
        if dtype is None:
            return x.dtype
        return self.residual or (dtype if kind == "cuda" else torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.stream_dtype(x)
        if dtype == torch.float32 or autocast_dtype(x.device.type) is None:
            return super().forward(x)
        # autocast would send it back to float32
        with torch.autocast(x.device.type, enabled=False):
            weights = self.weight.to(dtype), self.bias.to(dtype)
            return F.layer_norm(x.to(dtype), self.normalized_shape, *weights, self.eps)


def set_residual(model: nn.Module, residual: Residual | None) -> None:
    """Set the dtype of the residual streams of `model` under autocast; None: by the device."""
    for module in model.modules():
        if isinstance(module, LayerNorm):
            module.residual = None if residual is None else getattr(torch, residual)


def replace_norms(model: nn.Module) -> None:
    """Put a `LayerNorm` in the place of each of PyTorch's in a model of others, with its parameters."""
    for name, norm in [(n, m) for n, m in model.named_modules() if type(m) is nn.LayerNorm]:
        ours = LayerNorm(norm.normalized_shape, norm.eps, device="meta")
        ours.weight, ours.bias = norm.weight, norm.bias
        model.set_submodule(name, ours)


def join_cast(dtype: torch.dtype, *parts: Tensor) -> Tensor:
    """Return the rows of `parts` end to end in `dtype`, without a copy of theirs in between, forward or
    backward."""
    return _JoinCast.apply(dtype, *parts)


class _JoinCast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dtype: torch.dtype, *parts: Tensor) -> Tensor:
        ctx.sizes, ctx.dtypes = [len(part) for part in parts], [part.dtype for part in parts]
        joined = parts[0].new_empty(sum(ctx.sizes), *parts[0].shape[1:], dtype=dtype)
        for rows, part in zip(joined.split(ctx.sizes), parts, strict=True):
            rows.copy_(part)
        return joined

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows = zip(grad.split(ctx.sizes), ctx.dtypes, ctx.needs_input_grad[1:], strict=True)
        return None, *(part.to(dtype) if needed else None for part, dtype, needed in rows)


def set_tf32(enabled: bool) -> None:
    """Let a GPU multiply float32 in TF32, whose products have 10 bits behind the point and float32's range.
    The setting is the process's."""
    # the older of PyTorch's two interfaces: both torch 2.11 and 2.13 read it without a warning, and
    # torch.compile refuses a mixture of the two
    torch.set_float32_matmul_precision("high" if enabled else "highest")


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiply in float32 proper in the block, whatever `set_tf32` says; a backward pass has a block of its
    own."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def exact_addmm(bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """bias + a @ b, in float32 proper whatever `set_tf32` says, backward too: for scores, of which small
    differences decide. Under autocast, call it where that is switched off.

    Args:
        bias: broadcast to (n, m).
        a: (n, k).
        b: (k, m).
    """
    return _ExactAddmm.apply(bias, a, b) if a.device.type == "cuda" else torch.addmm(bias, a, b)


def exact_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer(x)`, on a GPU in float32 proper also under autocast. A CPU has no TF32, and follows autocast.

    Args:
        x: (n, k).
    """
    if x.device.type != "cuda":
        return layer(x)
    with torch.autocast("cuda", enabled=False):
        return exact_addmm(layer.bias, x.to(layer.weight.dtype), layer.weight.T)


class _ExactAddmm(torch.autograd.Function):
    # autograd calls `backward` when the block that `forward` ran in is long over: each sets the precision
    @staticmethod
    def forward(ctx, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.bias_shape = bias.shape
        with exact_products():
            return torch.addmm(bias, a, b)

    @staticmethod
    def backward(ctx, grad: Tensor):
        a, b = ctx.saved_tensors
        needs_bias, needs_a, needs_b = ctx.needs_input_grad
        with exact_products():
            return (
                grad.sum_to_size(ctx.bias_shape) if needs_bias else None,
                grad @ b.T if needs_a else None,
                (grad.T @ a).T if needs_b else None,
            )


def set_compiler(backend: str | None) -> None:
    """Choose the backend of `torch.compile` for all functions that are `fusible`; None: they run as they are.
    The setting is the process's.

    Raises:
        UserError: inductor, and no C++ compiler, without which nothing comes of it on a GPU either.
    """
    global _compiler
    compilers = (os.environ.get("CXX") or "g++", "clang++")
    if backend == "inductor" and not any(map(shutil.which, compilers)):
        raise UserError("fit.compile: no C++ compiler (g++, clang++ or CXX=) on this machine; leave it out")
    _compiler = backend
    if backend:
        # compiled is a part of a block: cut by DDP's buckets, it would be fused less and overlap no more
        torch._dynamo.config.optimize_ddp = False


def fusible(function: Function) -> Function:
    """Make a function of tensors one that `set_compiler` has compiled: for chains of additions, norms and the
    like, each of which would read and write all of its tensors. Attention, with its plan, stays outside.

    Compiled for any number of rows: tensors of other lengths, in every step, compile nothing again. Dropout
    then draws other numbers than PyTorch's own. Evaluation, in inference mode, is left as it is: it would be
    compiled once more.
    """
    compiled: dict[str, Callable[..., Any]] = {}

    @wraps(function)
    def run(*args):
        if _compiler is None or torch.is_inference_mode_enabled():
            return function(*args)
        if _compiler not in compiled:
            compiled[_compiler] = torch.compile(function, backend=_compiler)
        for x in args:
            if isinstance(x, Tensor):
                torch._dynamo.maybe_mark_dynamic(x, 0)
        return compiled[_compiler](*args)

    return cast(Function, run)
