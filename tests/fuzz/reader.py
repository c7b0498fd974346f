"""The record of a reader: what `tests/fuzz/readers/AREA.py` lists, one for each kind of file."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MIB = 1 << 20


def same(values: Any, expected: Any) -> bool:
    """Tell whether two readings are equal, to the bit: nested dicts and sequences, arrays, tensors, numbers.

    A tuple is as a list, a NumPy number as Python's; NaN equals NaN; True is not 1, and 1 is not 1.0.
    """
    import numpy as np
    import torch

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu()
            value = value.view(torch.int16) if value.dtype == torch.bfloat16 else value
            return value.numpy()
        return value.item() if isinstance(value, np.generic) else value

    pairs = [(values, expected)]
    while pairs:  # no recursion: files may be nested as deep as the recursion limit
        one, other = map(plain, pairs.pop())
        if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
            if not (isinstance(one, np.ndarray) and isinstance(other, np.ndarray)):
                return False
            if (one.dtype, one.shape) != (other.dtype, other.shape):
                return False
            if one.dtype.hasobject:
                pairs += zip(one.ravel().tolist(), other.ravel().tolist(), strict=True)
            elif np.ascontiguousarray(one).tobytes() != np.ascontiguousarray(other).tobytes():
                return False
        elif isinstance(one, dict) and isinstance(other, dict):
            if one.keys() != other.keys():
                return False
            pairs += [(one[key], other[key]) for key in one]
        elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
            if len(one) != len(other):
                return False
            pairs += zip(one, other, strict=True)
        elif type(one) is not type(other) or not (one == other or (one != one and other != other)):
            return False
    return True


@dataclass(frozen=True)
class Reader:
    """A reader of files, and how it is known that it read rightly.

    name: for the command line and the table: `json_object`, `safetensors_unified`.
    example: writes a small valid example into an empty folder, the same bytes each time; returns the file or
        folder that is read, anywhere below that folder.
    read: the product's public function, as a caller uses it, wholly: generators are run to their end, stores
        asked for every image. Returns plain values (dicts, lists, arrays, tensors, numbers, strings).
    oracle: another reading of the same path, by json, numpy, h5py, Pillow, tarfile, zipfile, safetensors, csv
        and not by the product. Returns the values that `read` should; raises whatever it likes where there
        are none. It runs only where the product has accepted the file.
    covers: "module:qualname" of each product function that this record runs; a test sees that reading the
        example calls them all, and that every function that opens a file is covered (tests/test_fuzz.py).
    targets: glob patterns, below what `example` returned, of the files that are damaged, if that is a folder;
        one of them at a time.
    agree: compares what `read` and `oracle` returned.
    compares: in words, what is compared, where that is not everything; "": all.
    setup: called once in each process before it reads, for imports that take seconds.
    memory, memory_factor: bytes that reading may take: `memory` + `memory_factor` x bytes of the example's
        folder.
    seconds: CPU time that reading may take; a hang too, where nothing moves for as long.
    address_space: bytes of addresses beyond the above, for libraries that reserve more than they use.
    writes: the reader may change files below the example's folder (a lock, an index beside a shard).
    """

    name: str
    example: Callable[[Path], Path]
    read: Callable[[Path], Any]
    oracle: Callable[[Path], Any]
    covers: tuple[str, ...]
    targets: tuple[str, ...] = ("**/*",)
    agree: Callable[[Any, Any], bool] = same
    compares: str = ""
    setup: Callable[[], object] = field(default=lambda: None)
    memory: int = 256 * MIB
    memory_factor: int = 32
    seconds: float = 10.0
    address_space: int = 1024 * MIB
    writes: bool = True
