"""Bytes of tensors that are alive, counted while a step runs."""

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.device import DeviceTensor


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that are made in the block and still there: `live` now, `peak` at most. Of a
    simulated GPU (`benchmarks.dry`) its own alone: entered there, what lies on the CPU is not counted."""

    def __init__(self, on_gpu: bool = False):
        super().__init__()
        self.on_gpu, self.live, self.peak = on_gpu, 0, 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in self._storages((args, kwargs))}
        for storage in self._storages(out):
            if storage not in self.known and storage._cdata not in given:
                self.known.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, storage.nbytes())
        return out

    def _storages(self, tree):
        kind = DeviceTensor if self.on_gpu else Tensor
        found = [x for x in tree_leaves(tree) if isinstance(x, kind)]
        return [(x.meta if self.on_gpu else x).untyped_storage() for x in found]

    def _free(self, nbytes):
        self.live -= nbytes
