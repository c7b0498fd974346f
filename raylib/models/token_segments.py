"""Where in rows of text and of what grounds it which tokens are."""

from typing import NamedTuple

import torch
from torch import Tensor

from raylib.packed import Ragged, first_tokens


class Places(NamedTuple):
    """Which of the T tokens of n rows are what: positions in the flat rows, int64 on the CPU, in the order in
    which words, tags and regions came, which is that of their own rows.

    cls: (n,). text: n rows (W,), from CLS to SEP. tags: n rows (G,), their SEP last. regions: n rows (R,).
    empty: (n,) the last tokens of the rows, if these are slots without a region; else (0,).
    """

    cls: Tensor
    text: Ragged
    tags: Ragged
    regions: Ragged
    empty: Tensor


def find_places(text: Tensor, tags: Tensor, regions: Tensor, empty: bool = False) -> Places:
    """The places in rows of so many tokens each: three times (n,), on the CPU. `empty`: and one more in each
    row."""
    lengths = torch.stack([text, tags, regions, torch.full_like(text, int(empty))], 1)
    part = (
        torch.arange(4).repeat(len(text)).repeat_interleave(lengths.flatten())
    )  # (T,): 0 text, 1 tags, 2 regions, 3 empty
    cls = first_tokens(lengths.sum(1)).nonzero().squeeze(1)
    *rows, last = ((part == i).nonzero().squeeze(1) for i in range(4))
    return Places(cls, *(Ragged(values, lengths[:, i]) for i, values in enumerate(rows)), last)
