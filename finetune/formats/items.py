"""Items of data sets in memory: a million of them in 0.2 GB, which all loader processes of a worker share."""

import pickle
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar, overload

import numpy as np

T = TypeVar("T")


class ItemList(Sequence[T], Generic[T]):
    """Items of any kind, each as bytes in one array until it is read, when it is made anew.

    As Python objects they take three times as much, and that in every loader process: a forked process gets a
    copy of whatever memory it counts references in. Arrays are shared; so they are among the trials of a
    search, by Ray's object store. The bytes are pickled here and never leave memory.

    Attributes:
        data: uint8, all items, end to end. starts, ends: int64 (n,), of each in `data`.
    """

    def __init__(self, items: Iterable[T] = ()):
        data, ends = bytearray(), [0]
        for item in items:
            data += pickle.dumps(item, pickle.HIGHEST_PROTOCOL)
            ends.append(len(data))
        borders = np.array(ends, np.int64)
        self.data, self.starts, self.ends = np.frombuffer(data, np.uint8), borders[:-1], borders[1:]

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, place: int) -> T: ...

    @overload
    def __getitem__(self, place: slice) -> "ItemList[T]": ...

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return self.select(place)
        return pickle.loads(self.data.data[self.starts[place] : self.ends[place]])

    def __iter__(self) -> Iterator[T]:
        data = self.data.data
        for start, end in zip(self.starts.tolist(), self.ends.tolist(), strict=True):
            yield pickle.loads(data[start:end])

    @classmethod
    def join(cls, lists: Sequence["ItemList[T]"]) -> "ItemList[T]":
        """Return the items of all lists, one after the other."""
        if len(lists) == 1:
            return lists[0]
        sizes = [len(each.data) for each in lists]
        offsets = np.repeat(np.cumsum([0, *sizes])[:-1], [len(each) for each in lists])
        whole, nothing = cls(), cls()
        whole.data = np.concatenate([nothing.data, *(each.data for each in lists)])
        whole.starts = np.concatenate([nothing.starts, *(each.starts for each in lists)]) + offsets
        whole.ends = np.concatenate([nothing.ends, *(each.ends for each in lists)]) + offsets
        return whole

    def select(self, place: slice | np.ndarray) -> "ItemList[T]":
        """Return some of the items; the bytes are shared."""
        items: ItemList[T] = ItemList()
        items.data, items.starts, items.ends = self.data, self.starts[place], self.ends[place]
        return items


def select(items: Sequence[T], numbers: Sequence[int]) -> Sequence[T]:
    """Return the items `numbers` of a sequence, which may be an `ItemList`."""
    if isinstance(items, ItemList):
        return items.select(np.array(numbers, np.int64))
    return [items[number] for number in numbers]
