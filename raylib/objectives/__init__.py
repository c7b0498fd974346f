"""Pretraining objectives. Here: the declarations that a term of the loss is made of, in a user's file too
(docs/extending.md), and the cache of a frozen text encoder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import BeforeValidator, ConfigDict, Field, NonNegativeFloat
from torch import Tensor

from raylib.config import Config, NameOrFile, UserFile, load_user_file, lookup
from raylib.errors import UserError

Stream = Literal["image_text", "parallel", "text"]
Reads = Literal["embeddings", "masked", "matches"]


@dataclass(frozen=True)
class LossPart:
    """A part of a term, summed over `count` local rows. Several parts of one term add up."""

    value: Tensor
    count: Tensor | int


@dataclass(frozen=True)
class MaskedPart:
    """A part of a term that the vocabulary head makes: states (m, d) of masked positions, their `labels`
    (m,)."""

    states: Tensor
    labels: Tensor


Parts = Sequence[LossPart | MaskedPart]


@dataclass(frozen=True)
class PretrainingTerm:
    """A term of the loss: what `term` makes of a function."""

    loss: Callable[[Any], Parts]
    stream: Stream
    reads: tuple[Reads, ...]
    trains: tuple[str, ...]
    two_way: bool


def term(
    stream: Stream, reads: tuple[Reads, ...], trains: tuple[str, ...], two_way: bool = False
) -> Callable[[Callable[[Any], Parts]], PretrainingTerm]:
    """Make a term of a function from a stream's step (`ImageTextStep`, `TranslationStep`, `TextStep`) to the
    parts of a loss.

    Args:
        stream: that it is about; it is left out where a batch has none.
        reads: sentences' "embeddings"; the "masked" text after the unified encoder; right and wrong "matches"
            of captions and images after it. Only what some term reads is computed.
        trains: parts of the model, beside the text encoder, that it gives a gradient to (`module_group`).
        two_way: its parts are two directions, whose mean `directions=mean` takes.

    Raises:
        ValueError: a stream, or something to read, that no batch has: the term would never be computed.
    """
    # Python checks no Literal: a stream by another name would be in no batch, its term never in the loss
    for name, known in ((stream, get_args(Stream)), *((name, get_args(Reads)) for name in reads)):
        if name not in known:
            raise ValueError(f"@term: '{name}' is none of {', '.join(known)}")
    return lambda loss: PretrainingTerm(loss, stream, reads, trains, two_way)


class UserTerm(Config):
    """A term in a user's own file."""

    file: NameOrFile
    """Python file of yours with the term: my_term.py, or my_term.py:function where it has several."""
    weight: NonNegativeFloat = 1.0
    """Weight of the term in the loss."""

    @property
    def path(self) -> Path:
        """Return where the file lies; of stored settings, where the run keeps its copy."""
        return self.file.path if isinstance(self.file, UserFile) else Path(self.file)

    def load(self) -> PretrainingTerm:
        """Raises UserError: no such file, no such term in it, several and none is named."""
        path, name = self.path, self.file.partition(":")[2]
        entries = {k: v for k, v in vars(load_user_file(path)).items() if isinstance(v, PretrainingTerm)}
        if not entries:
            raise UserError(f"{path}: no function in it is a term; @term above a function makes it one")
        if not name and len(entries) > 1:
            raise UserError(
                f"{path}: several terms ({', '.join(entries)}); say which: {path}:{next(iter(entries))}"
            )
        return lookup(name, entries, f"term of {path}") if name else next(iter(entries.values()))


class UserTerms(Config):
    """Terms in users' own files, by any name: `my=my_term.py`, `my.weight=0.5`."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[
        str, Annotated[UserTerm, BeforeValidator(lambda v: {"file": v} if isinstance(v, str) else v)]
    ] = Field(init=False)

    def items(self) -> list[tuple[str, UserTerm]]:
        return list(self.__pydantic_extra__.items())


class FrozenTextCache:
    """CLS states of sentences after a text encoder that never changes, each computed once; no more than
    `LIMIT`.

    A state is computed among the sentences of its first batch. A resumed run meets it first in another one,
    where sums of floats may come out otherwise in the last bits: it is the same run to rounding, not to the
    bit.
    """

    LIMIT = 2**17

    def __init__(self) -> None:
        # ids are hashes of the tokens, equal for equal texts in whatever batch they come
        self.row_of: dict[int, int] = {}  # text id -> row of `states`
        self.states = torch.empty(0)

    def cls(self, text_ids: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """(n, d) states of the sentences `text_ids` (n,), of equal ids where equal; `encode(rows)` computes
        those of new ones."""
        ids = text_ids.tolist()
        # reversed, so that of equal texts the first row wins
        first_row = {text: row for row, text in reversed(list(enumerate(ids)))}
        new = [row for text, row in first_row.items() if text not in self.row_of]
        if len(self.row_of) + len(new) > self.LIMIT:
            self.row_of, self.states, new = {}, torch.empty(0), list(first_row.values())
        if new:
            self._append(encode(torch.tensor(new)))
            self.row_of |= {ids[row]: len(self.row_of) + i for i, row in enumerate(new)}
        rows = torch.tensor([self.row_of[text] for text in ids], device=self.states.device)
        return self.states.index_select(0, rows)

    def _append(self, states: Tensor) -> None:
        used = len(self.row_of)
        if used + len(states) > len(self.states):
            # twice what is needed, so that copying costs no more than a constant for each state
            room = states.new_empty(2 * (used + len(states)), states.shape[1])
            if used:
                room[:used] = self.states[:used]
            self.states = room
        self.states[used : used + len(states)] = states
