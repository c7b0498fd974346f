"""A GPU that is not there, for `benchmarks.dry`: tensors that say they lie on `cuda:0` and have no elements.

To the code under test, and to autocast, a `DeviceTensor` lies on a GPU, so that the CUDA branches are taken;
to PyTorch's C++ below it is a meta tensor, which any build of PyTorch knows how to differentiate.
"""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
META, GPU = torch.device("meta"), torch.device("cuda", 0)
SMALL = 2**17  # elements of a tensor are computed up to so many


class DeviceTensor(torch.Tensor):
    """A tensor on the GPU that is not there. `meta`: its shape and type. `elements`: on the CPU, if known."""

    meta: Tensor
    elements: Tensor | None
    # what C++ asks goes past these two, and gets an answer in `__torch_dispatch__`
    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, meta: Tensor, elements: Tensor | None = None):
        # the keys of a GPU, for autocast; the device that C++ sees comes from `__torch_dispatch__`
        self = torch.Tensor._make_subclass(cls, meta, dispatch_device=True, device_for_backend_keys=GPU)
        self.meta, self.elements = meta, elements
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return META
        raise RuntimeError(f"{func} on a tensor of the dry run, outside of it")

    def known(self) -> Tensor | None:
        """The elements; of small floats whose are unknown, some that are drawn and kept."""
        if self.elements is None and self.is_floating_point() and self.numel() <= SMALL:
            self.elements = torch.empty_strided(self.shape, self.meta.stride(), dtype=self.dtype).normal_()
        return self.elements


def device_tensor(tensor: Tensor) -> DeviceTensor:
    """A tensor of the host, copied onto the device; nothing is counted."""
    is_meta = tensor.device.type == "meta"
    return DeviceTensor(torch.empty_like(tensor, device=META), None if is_meta else tensor.detach().clone())


# Functions whose way C++ chooses by the device, of which it sees none: the ways of CUDA


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not isinstance(x, DeviceTensor):
        return _on_host["dropout"](x, p, training, inplace)
    return torch.native_dropout(x, p, training)[0] if training and p else x


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None) -> Tensor:
    arguments = (dropout_p, is_causal)
    if not isinstance(query, DeviceTensor):
        return _on_host["attention"](query, key, value, attn_mask, *arguments, scale=scale)
    if query.dtype == torch.float32 and torch.is_autocast_enabled("cuda"):
        query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
    if attn_mask is None and query.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(query, key, value, *arguments, scale=scale)[0]
    bias = attn_mask
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    saves = query.requires_grad
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, saves, *arguments, scale=scale
    )[0]


_on_host = {"dropout": F.dropout, "attention": F.scaled_dot_product_attention}


# Of PyTorch's lists of autocast (ATen/autocast_mode.h) what a model here may use: in bf16; in float32; in
# float32 by an argument of their own; in the widest type of their arguments
IN_BF16 = ("linear", "matmul", "mm", "mv", "bmm", "addmm", "addmv", "addbmm", "baddbmm", "conv2d", "einsum")
IN_FLOAT32 = (
    *("exp", "log", "log1p", "reciprocal", "rsqrt", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar"),
    "softplus",
    *("layer_norm", "native_layer_norm", "rms_norm", "norm.Scalar", "norm.ScalarOpt_dim", "kl_div"),
    *("nll_loss", "mse_loss", "logsumexp", "cosine_similarity", "binary_cross_entropy_with_logits"),
)
BY_ARGUMENT = ("softmax.int", "log_softmax.int", "cumsum", "sum", "sum.dim_IntList", "linalg_vector_norm")
IN_WIDEST = ("addcmul", "addcdiv", "dot", "index_put", "scatter_add")


class Autocast:
    """Autocast of CUDA as PyTorch does it: its own kernels ask C++ whether a tensor lies on a GPU, and would
    do nothing. `weights`: parameters in bf16, which it keeps as long as autocast is on."""

    def __init__(self) -> None:
        self.weights: dict[int, Tensor] = {}
        self.library = torch.library.Library("aten", "IMPL")
        for names, wrap in (
            (IN_BF16, lambda *args: self._cast(torch.get_autocast_dtype("cuda"), *args)),
            (IN_FLOAT32, lambda *args: self._cast(torch.float32, *args)),
            (BY_ARGUMENT, self._add_dtype),
            (IN_WIDEST, lambda *args: self._cast(_widest(args), *args)),
        ):
            for name in names:
                packet, _, overload = name.partition(".")
                op = getattr(getattr(aten, packet), overload or "default")
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that this replaces PyTorch's
                    self.library.impl(name, partial(self._below, wrap, op), "AutocastCUDA")

    def close(self) -> None:
        """Put PyTorch's kernels back."""
        self.library._destroy()

    def clear(self) -> None:
        """Forget the weights; `torch.clear_autocast_cache`."""
        self.weights.clear()

    @staticmethod
    def _below(wrap, op, *args, **kwargs):
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return wrap(op, args, kwargs)

    def _cast(self, dtype: torch.dtype, op, args: tuple, kwargs: dict) -> Any:
        args, kwargs = tree_map(partial(self._to, dtype), (args, kwargs))
        return op(*args, **kwargs)

    def _to(self, dtype: torch.dtype, x: Any) -> Any:
        if not isinstance(x, DeviceTensor) or not x.is_floating_point() or x.dtype in (dtype, torch.float64):
            return x
        if x.dtype == torch.float32 and x.is_leaf and x.requires_grad and torch.is_autocast_cache_enabled():
            if id(x) not in self.weights:
                self.weights[id(x)] = x.to(dtype)
            return self.weights[id(x)]
        return x.to(dtype)

    @staticmethod
    def _add_dtype(op, args: tuple, kwargs: dict) -> Any:
        x = args[0]
        if isinstance(x, DeviceTensor) and x.is_floating_point() and x.dtype != torch.float64:
            kwargs = {"dtype": torch.float32} | kwargs
        return op(*args, **kwargs)


def _widest(args: tuple) -> torch.dtype:
    floats = [x for x in tree_leaves(args) if isinstance(x, DeviceTensor) and x.is_floating_point()]
    wide = not floats or any(x.dtype == torch.float32 for x in floats)
    return torch.float32 if wide else torch.get_autocast_dtype("cuda")


@contextmanager
def simulated_gpu() -> Iterator[None]:
    """A block in which PyTorch without CUDA, or without a GPU, does not refuse `cuda:0`."""
    allowed = {
        (torch.cuda, "_lazy_init"): None,
        (torch.cuda, "is_bf16_supported"): True,
        (torch.cuda, "get_device_capability"): (9, 0),  # an H100's
        (torch.cuda, "get_device_properties"): SimpleNamespace(total_memory=80 * 10**9),
        (torch.cuda.amp.common, "amp_definitely_not_available"): False,
    }
    with ExitStack() as stack:
        for (module, name), answer in allowed.items():
            stack.enter_context(mock.patch.object(module, name, return_value=answer))
        stack.enter_context(mock.patch.object(Tensor, "pin_memory", lambda self, *_: self))
        # `torch.tensor(5, device=GPU)` makes a tensor of the host, and copies it by an operator of its own
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        autocast = Autocast()
        stack.callback(autocast.close)
        stack.enter_context(mock.patch.object(torch, "clear_autocast_cache", autocast.clear))
        stack.enter_context(mock.patch.object(F, "dropout", _dropout))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", _attention))
        yield
