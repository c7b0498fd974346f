"""Items of data sets as bytes in one array."""

import pickle

import numpy as np
import pytest

from finetune.batches import BatchOrder, CaptionBatches, EpochBatches
from finetune.formats import Captioned, Example
from finetune.formats.items import ItemList, select

ITEMS = [
    Example(
        "q1",
        ("où est le chat ?", "a"),
        ("42.jpg", "b/é.png"),
        {"yes": 1.0, "\ud83d": 0.3},
        "verify",
        ("red cat",),
        "pivot",
        (((0, 2), (3, 4)),),
        ("https://x",),
    ),
    Example("", (), (), {}),
    Captioned("image", ("one", "two"), ("eins",), "address"),
    {"a user's own": [np.float32(0.5), None, 3]},
]


def test_items_are_read_as_they_were():
    items = ItemList(iter(ITEMS))
    assert len(items) == 4 and list(items) == ITEMS == [items[i] for i in range(4)]
    assert items[-1] == ITEMS[-1] == items[np.int64(3)] and type(items[0]) is Example
    assert list(items[1:3]) == ITEMS[1:3] and items[1:3].data is items.data
    assert list(pickle.loads(pickle.dumps(items))) == ITEMS
    with pytest.raises(IndexError):
        items[4]
    assert not ItemList() and list(ItemList()) == []


def test_items_are_joined_and_selected():
    items = ItemList(ITEMS)
    assert list(ItemList.join([items[2:], ItemList(), items])) == ITEMS[2:] + ITEMS
    assert ItemList.join([items]) is items and list(ItemList.join([])) == []
    for whole in (items, ITEMS):
        assert list(select(whole, [3, 0])) == [ITEMS[3], ITEMS[0]] and not select(whole, [])


@pytest.mark.parametrize("kind", [EpochBatches, CaptionBatches])
def test_batches_of_items_are_those_of_a_list(kind):
    examples = [Captioned(f"{i}", tuple(f"{i} {j}" for j in range(1 + i % 3))) for i in range(20)]
    order = BatchOrder(4, seed=1)
    more = (None, None, 8) if kind is CaptionBatches else ()
    batches = [
        kind(whole, *more, order) if kind is CaptionBatches else kind(whole, order)
        for whole in (examples, ItemList(examples))
    ]
    read = [[each.changed_examples(0, each.rows(step)[2]) for step in range(9)] for each in batches]
    assert read[0] == read[1]
    if kind is CaptionBatches:
        pairs = [pair for batch in read[0] for pair in batch]
        assert len(batches[0].examples) == sum(len(e.captions) for e in examples)
        assert all(
            pair.captions[0].startswith(f"{pair.image} ") and len(pair.captions) == 1 for pair in pairs
        )
        assert len(set(pairs)) == len(pairs)
