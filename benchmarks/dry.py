"""Count what a step asks of a GPU, on a machine without one: `python -m benchmarks.gpu --dry`.

Tensors of the device have no elements (`benchmarks.device`), those of the host are real. `Counter` sees every
operator below autograd, forward and backward: it books each that a GPU would run, each copy between host and
device, and each place where the host would wait.

Elements of small tensors of the device are computed on the CPU besides, since a step copies some indices back
to the host and plans with them, and since lengths say what packed attention computes. Elements that follow
from those of large tensors, such as similarities, are drawn.
"""

import sys
from collections import Counter as Tally
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._dynamo
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.device import META, SMALL, DeviceTensor, device_tensor, simulated_gpu
from benchmarks.results import ROOT
from raylib.precision import set_compiler

OWN_FILES = ("device.py", "dry.py", "gpu_steps.py")
# operators whose result has a size that only the device knows, or whose result is a Python number
WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
    "masked_select",
    "equal",
)
# results that are the input in another shape, or memory that nobody has written yet: no kernel
NO_KERNEL = (
    *("detach", "alias", "_unsafe_view", "_reshape_alias", "lift_fresh", "unbind"),
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"),
)
FILLING = ("zeros", "zeros_like", "new_zeros", "ones", "ones_like", "full", "full_like", "fill", "zero")
ATTENTION = ("_attention", "varlen_attn")


@dataclass
class Operator:
    """One kernel: its phase ("forward", "backward"), name, FLOP, bytes read and written; the function that
    `fit.compile` would fuse it into, if any."""

    phase: str
    name: str
    flops: int
    num_bytes: int
    region: str = ""


class Counter(TorchDispatchMode):
    """Books operators of `DeviceTensor`s while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.clear()
        # PyTorch's formulas, those of the attention kernels of `varlen_attn` too
        with FlopCounterMode(display=False) as formulas:
            self.formulas = formulas.flop_registry

    def clear(self) -> None:
        """Begin anew."""
        self.phase = "forward"
        self.region = ""
        self.region_calls: Tally[str] = Tally()
        self.operators: list[Operator] = []
        self.waits: Tally[str] = Tally()  # by line, and by what waits there
        self.host_to_device: list[int] = []  # bytes of each copy
        self.device_to_host: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            return META
        name = func._schema.name.removeprefix("aten::")
        leaves = tree_leaves((args, kwargs))
        inputs = [x for x in leaves if isinstance(x, DeviceTensor)]
        target = kwargs.get("device")
        if not inputs and (target is None or target.type == "cpu"):
            kwargs.pop("pin_memory", None)  # of a GPU's driver
            return func(*args, **kwargs)
        if name in ("_to_copy", "copy_") and (copied := self._copy(name, inputs, args, kwargs)) is not None:
            return copied
        for x in leaves:
            if isinstance(x, Tensor) and not isinstance(x, DeviceTensor) and x.ndim:
                self._book_host_to_device(f"{name} with a tensor of the host", x, is_blocking=True)
        if name in WAITING or (name == "index" and any(x.dtype == torch.bool for x in inputs[1:])):
            self._wait(name)
            self.device_to_host.append(8)
        out = self._run(func, name, args, kwargs)
        self._book(func, name, args, kwargs, inputs, out)
        return out

    def _copy(self, name: str, inputs: list[DeviceTensor], args: tuple, kwargs: dict) -> Tensor | None:
        """The result of a copy between host and device, or from the device to itself without change; None:
        it is neither."""
        if name == "copy_":
            target, source = args[:2]
            if isinstance(target, DeviceTensor) and not isinstance(source, DeviceTensor):
                self._book_host_to_device("copy_", source, not (args[2:] or [kwargs.get("non_blocking")])[0])
                target.elements = source.clone()
                return target
            if not isinstance(target, DeviceTensor):
                return target.copy_(self._copy_to_host(source))
            return None
        (source,), device, dtype = args, kwargs.get("device"), kwargs.get("dtype") or args[0].dtype
        if not inputs:
            self._book_host_to_device("to(device)", source, not kwargs.get("non_blocking"))
            return device_tensor(source.to(dtype))
        if device is not None and device.type == "cpu":
            return self._copy_to_host(source).to(dtype)
        if device is not None and dtype == source.dtype:  # C++ took cuda:0 for another device than its own
            return DeviceTensor(source.meta.view(source.meta.shape), source.elements)
        return None

    def _copy_to_host(self, source: DeviceTensor) -> Tensor:
        self._wait("to the host")
        self.device_to_host.append(_size(source))
        elements = source.known()
        if elements is None:
            raise RuntimeError(
                f"a step reads {tuple(source.shape)} {source.dtype} at {project_line()}: unknown here"
            )
        return elements.clone()

    def _book_host_to_device(self, what: str, source: Tensor, is_blocking: bool) -> None:
        if is_blocking:
            self._wait(what)
        self.host_to_device.append(_size(source))
        self.operators.append(Operator(self.phase, "copy from the host", 0, _size(source)))

    def _wait(self, what: str) -> None:
        self.waits[f"{project_line()} {what}"] += 1

    def _run(self, func, name: str, args: tuple, kwargs: dict) -> Any:
        """The result: its shape by PyTorch's meta kernel, elements by that of the CPU."""
        if name in WAITING:  # the shape follows from the elements
            elements = self._elements(func, args, kwargs)
            assert elements is not None, f"{name} at {project_line()}: elements unknown here"
            return tree_map(lambda x: device_tensor(x) if isinstance(x, Tensor) else x, elements)
        out = func(*tree_map(_to_meta, args), **tree_map(_to_meta, kwargs))
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        elements = None
        if not _is_attention(name) and max(map(Tensor.numel, results), default=0) <= SMALL:
            elements = self._elements(func, args, kwargs)
        known = (
            dict(zip(map(id, results), tree_leaves(elements), strict=False)) if elements is not None else {}
        )
        # what an operator changes in place stays the same object
        changed = {id(x.meta): x for x in tree_leaves((args, kwargs)) if isinstance(x, DeviceTensor)}

        def wrap(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            result = changed[id(x)] if id(x) in changed else DeviceTensor(x)
            result.elements = known.get(id(x))
            return result

        return tree_map(wrap, out)

    def _elements(self, func, args: tuple, kwargs: dict) -> Any:
        """The result on the CPU; None: the elements of some argument are unknown."""
        arguments = [x for x in tree_leaves((args, kwargs)) if isinstance(x, DeviceTensor)]
        if any(x.known() is None for x in arguments):
            return None
        args, kwargs = tree_map(_to_cpu, (args, kwargs))
        return func(*args, **kwargs)

    def _book(self, func, name: str, args: tuple, kwargs: dict, inputs: list, out: Any) -> None:
        short = name.removesuffix("_")
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if is_view or name in NO_KERNEL:
            return
        outs = [x for x in tree_leaves(out) if isinstance(x, DeviceTensor)]
        flops = 0
        if formula := self.formulas.get(func._overloadpacket):
            # cumulative lengths with their elements, so that packed attention counts what it is
            shapes = tree_map(_for_formula, (args, kwargs))
            flops = formula(*shapes[0], **shapes[1], out_val=tree_map(_for_formula, out))
        written = sum(map(_size, outs))
        if short in ("index_select", "embedding", "gather"):  # read what they select alone
            num_bytes = 2 * written
        elif short in FILLING:
            num_bytes = written
        elif short in ("index_add", "scatter_add", "scatter") and func._schema.name.endswith("_"):
            num_bytes = 3 * _size(inputs[-1])
        elif short == "index_add":
            num_bytes = 2 * written + 3 * _size(inputs[-1])
        else:
            num_bytes = sum(map(_size, inputs)) + written
        self.operators.append(Operator(self.phase, name, flops, num_bytes, self.region))

    def follow(self, function: Callable[..., Any], backend: str) -> Callable[..., Any]:
        """`torch.compile` of the dry run: `function` as it is, its operators booked as a region, forward and
        backward."""
        region = f"{function.__module__}.{function.__qualname__}"

        def enter(*_: Any) -> None:
            self.region = region

        def leave(*_: Any) -> None:
            self.region = ""

        def run(*args: Any) -> Any:
            self.region_calls[region] += 1
            enter()
            out = function(*args)
            leave()
            edges = [x.grad_fn for x in tree_leaves(out) if isinstance(x, Tensor)]
            inside = {x.grad_fn for x in args if isinstance(x, Tensor)} | {None}  # where the region ends
            while edges:
                if (node := edges.pop()) not in inside and node.next_functions:  # not a parameter's
                    inside.add(node)
                    node.register_prehook(enter)
                    node.register_hook(leave)
                    edges += [following for following, _ in node.next_functions]
            return out

        return run

    def regions(self) -> list[tuple[str, int, int, int, float]]:
        """(function, calls, operators, those of them that are matrix products, GB of the others) of each."""
        rows = []
        for region, calls in self.region_calls.items():
            inside = [op for op in self.operators if op.region == region]
            others = [op for op in inside if not op.flops]
            size = sum(op.num_bytes for op in others) / 1e9
            rows.append((region, calls, len(inside), len(inside) - len(others), size))
        return rows

    def summary(self) -> dict[str, Any]:
        """Figures of what was booked."""
        operators = self.operators
        return {
            "operators": dict(Tally(op.phase for op in operators)),
            "attention_calls": sum(_is_attention(op.name) for op in operators),
            "gb": round(sum(op.num_bytes for op in operators) / 1e9, 1),
            "tflop": round(sum(op.flops for op in operators) / 1e12, 2),
            "waits": dict(self.waits.most_common()),
            "host_to_device": {"copies": len(self.host_to_device), "bytes": sum(self.host_to_device)},
            "device_to_host": {"copies": len(self.device_to_host), "bytes": sum(self.device_to_host)},
        }

    def by_name(self) -> list[tuple[str, int, float, float]]:
        """(name, calls, TFLOP, GB) of each operator, those first that move most."""
        table: dict[str, list[float]] = {}
        for op in self.operators:
            row = table.setdefault(op.name, [0, 0.0, 0.0])
            for i, value in enumerate((1, op.flops / 1e12, op.num_bytes / 1e9)):
                row[i] += value
        rows = [(name, int(calls), flops, size) for name, (calls, flops, size) in table.items()]
        return sorted(rows, key=lambda row: -row[3])


def _is_attention(name: str) -> bool:
    return any(part in name for part in ATTENTION)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _to_meta(x: Any) -> Any:
    if isinstance(x, DeviceTensor):
        return x.meta
    if isinstance(x, torch.device):
        return META
    return x.to(META) if isinstance(x, Tensor) and x.ndim else x


def _to_cpu(x: Any) -> Any:
    if isinstance(x, torch.device):
        return torch.device("cpu")
    return x.elements if isinstance(x, DeviceTensor) else x


def _for_formula(x: Any) -> Any:
    if not isinstance(x, DeviceTensor):
        return x
    return x.meta if x.elements is None or x.is_floating_point() else x.elements


def project_line() -> str:
    """The innermost line of the project under way: raylib/packed.py:86."""
    frame = sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.name not in OWN_FILES and "site-packages" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


@contextmanager
def dry_run() -> Iterator[Counter]:
    """A block in which `cuda:0` is a GPU without elements; gives the counter."""
    counter = Counter()
    with ExitStack() as stack:
        stack.enter_context(simulated_gpu())
        stack.enter_context(mock.patch.object(torch, "compile", counter.follow))
        stack.enter_context(mock.patch.object(torch._dynamo, "maybe_mark_dynamic"))
        stack.enter_context(counter)
        set_compiler("dry run")
        stack.callback(set_compiler, None)
        yield counter
