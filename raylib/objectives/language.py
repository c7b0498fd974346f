"""A stream's sentences on their way through the text encoder: which texts go in, which of their states are
read."""

from collections.abc import Callable

import torch
from torch import Tensor

from raylib.packed import Ragged, Sentences, first_tokens


class Pass:
    """Sentences on their way through the text encoder: which tokens are read of it, then their states."""

    def __init__(self, ids: Tensor, lengths: Tensor, cls: bool, rows: Tensor | None):
        """`cls`: read every row's CLS; `rows`: read all tokens of these rows."""
        self.ids, self.only_cls = Ragged(ids, lengths), cls and rows is None
        self.read = first_tokens(lengths) if cls else torch.zeros(int(lengths.sum()), dtype=torch.bool)
        if rows is not None:
            self.read[self.ids.tokens(rows)] = True
        self.place = self.read.cumsum(0) - 1
        self.states: Tensor | None = None  # (R, d), set by the encoder

    def cls(self) -> Tensor:
        """(n, d) CLS states of all rows."""
        return self.states.index_select(0, self.place[self.ids.starts].to(self.states.device))

    def rows(self, rows: Tensor) -> Ragged:
        """All states of `rows`, which must have been read."""
        tokens = self.place[self.ids.tokens(rows)].to(self.states.device)
        return Ragged(self.states.index_select(0, tokens), self.ids.lengths[rows])


class Side:
    """One stream's sentences: all of them for UCL, those that are `fused` for the unified encoder."""

    def __init__(self, sentences: Sentences, index: Tensor, every: int):
        self.all, self.fused = sentences, (index % every == 0).nonzero().squeeze(1)
        self.few = sentences.take(self.fused) if every > 1 else sentences
        self.passes: dict[str, Pass] = {}

    def plan(self, ucl: str | None, fuse: set[str]) -> None:
        """`ucl`: which text UCL wants, if any; `fuse`: which texts the unified encoder wants."""
        for name in ("clean", "masked"):  # in one order in every process: sums of floats depend on it
            if name != ucl and name not in fuse:
                continue
            sentences = self.all if name == ucl else self.few
            rows = (self.fused if name == ucl else torch.arange(len(self.fused))) if name in fuse else None
            self.passes[name] = Pass(getattr(sentences, name), sentences.lengths, name == ucl, rows)

    def rows(self, name: str) -> Ragged:
        """States of the fused sentences, clean or masked."""
        states = self.passes[name]
        return states.rows(
            self.fused if len(states.ids.lengths) > len(self.fused) else torch.arange(len(self.fused))
        )


class KnownTexts:
    """CLS states of sentences after a text encoder that never changes, each computed once; no more than
    `LIMIT`.

    A state is computed among the sentences of its first batch. A resumed run meets it first in another one,
    where sums of floats may come out otherwise in the last bits: it is the same run to rounding, not to the
    bit.
    """

    LIMIT = 2**17

    def __init__(self):
        self.place: dict[int, int] = {}
        self.states: Tensor | None = None

    def cls(self, texts: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """(n, d) states of the sentences `texts` (n,), of equal ids where equal; `encode(rows)` makes those
        of new ones."""
        ids = texts.tolist()
        first = {text: row for row, text in reversed(list(enumerate(ids)))}
        new = [row for text, row in first.items() if text not in self.place]
        if len(self.place) + len(new) > self.LIMIT:
            self.place, self.states, new = {}, None, list(first.values())
        if new:
            self._add(encode(torch.tensor(new)))
            self.place |= {ids[row]: len(self.place) + i for i, row in enumerate(new)}
        return self.states.index_select(
            0, torch.tensor([self.place[text] for text in ids], device=self.states.device)
        )

    def _add(self, made: Tensor) -> None:
        """Put states behind those that are there; when there is no room, twice the room is made."""
        used = len(self.place)
        if self.states is None or used + len(made) > len(self.states):
            room = made.new_empty(2 * (used + len(made)), made.shape[1])
            if used:
                room[:used] = self.states[:used]
            self.states = room
        self.states[used : used + len(made)] = made
