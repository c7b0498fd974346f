"""Calls of the encoders in a pretraining step: planned before the values are there, so that all plans travel
to the device together (`raylib.packed.Uploads`).

Shape legend: n rows, T tokens in all, R tokens of an output mask, d width.
"""

from collections.abc import Mapping, Sequence, Set
from functools import cached_property
from typing import get_args

import torch
from torch import Tensor

from raylib.models.layers import Encoder, MemoryLayout
from raylib.packed import (
    Sentences,
    Uploads,
    row_starts,
    select,
    token_index,
    unless_in_order,
    upload,
)
from raylib.settings import Version


class EncoderRows:
    """Rows for an encoder, planned before their values are there: which tokens' states come out of it, and,
    once it has run, these states.

    Args:
        lengths: (n,).
        outputs: flat positions of the tokens that come out, by a name.
    """

    states: Tensor  # (R, d) of the tokens in `output_mask`, in flat order

    def __init__(self, lengths: Tensor, outputs: Mapping[str, Tensor], uploads: Uploads):
        self.lengths, self.output_mask = lengths, torch.zeros(int(lengths.sum()), dtype=torch.bool)
        for positions in outputs.values():
            self.output_mask[positions] = True
        # from a flat position to its place among the tokens that come out
        self._output_index = self.output_mask.cumsum(0) - 1
        count = int(self.output_mask.sum())
        self._outputs = uploads.add(
            {name: unless_in_order(self._output_index[at], count) for name, at in outputs.items()}
        )

    def output(self, name: str) -> Tensor:
        """States of the tokens of this name."""
        # a view for each reader: gradients, and so their sums, come together as if each had selected rows
        return select(self.states.view_as(self.states), self._outputs.value[name])

    def states_at(self, positions: Tensor) -> Tensor:
        """States at flat `positions` (k,), on the CPU, which must be among those that come out."""
        return self.states.index_select(0, upload(self._output_index[positions], self.states.device))


class StreamEncoding:
    """One stream's sentences: the `full` batch for contrast, a `subset` of it for the unified encoder.

    Args:
        sentences: local ones, all of them.
        index: (n,) in the global batch.
        every: the subset is the sentences whose index is a multiple of it.
        embedded: the version whose CLS states contrast reads, if any.
        fused: versions that the unified encoder reads.
    """

    def __init__(
        self,
        sentences: Sentences,
        index: Tensor,
        every: int,
        embedded: Version | None,
        fused: Set[Version],
        uploads: Uploads,
    ):
        self.full, self.embedded = sentences, embedded
        self.subset_rows = (index % every == 0).nonzero().squeeze(1)
        # `lengths` and `positions` are those of the subset
        self.lengths, self.positions, tokens = sentences.lengths, sentences.positions, None
        if every > 1:
            self.lengths, self.positions, tokens = sentences.find_rows(self.subset_rows)
        self._subset_index = uploads.add(tokens)
        self.calls: dict[Version, EncoderRows] = {}
        # in one order in every process: sums of floats depend on it
        for version in get_args(Version):
            if version == embedded or version in fused:
                lengths = self.full.lengths if version == embedded else self.lengths
                outputs = {"cls": row_starts(lengths)} if version == embedded else {}
                if version in fused:
                    outputs["fused"] = token_index(lengths, self._fused_rows(version))
                self.calls[version] = EncoderRows(lengths, outputs, uploads)
        # masks are drawn anew in each step: only clean sentences come again, and may be remembered
        self.only_cls = embedded == "clean" and "clean" not in fused

    def _fused_rows(self, version: Version) -> Tensor:
        """Rows of the subset in the call of `version`."""
        return self.subset_rows if version == self.embedded else torch.arange(len(self.subset_rows))

    @cached_property
    def subset(self) -> Sentences:
        """The sentences of `subset_rows`."""
        if (index := self._subset_index.value) is None:
            return self.full
        tokens, text_id = index["tokens"], self.full.text_id[self.subset_rows]
        clean, masked = (ids.index_select(0, tokens) for ids in (self.full.clean, self.full.masked))
        labels = self.full.labels.index_select(0, index["labels"])
        return Sentences(clean, masked, self.lengths, self.positions, labels, text_id)

    def ids(self, version: Version) -> Tensor:
        """(T,) of the rows in `calls`."""
        of = self.full if version == self.embedded else self.subset
        return of.clean if version == "clean" else of.masked

    def cls(self) -> Tensor:
        """(n, d) CLS states of all sentences, of the version that contrast reads."""
        assert self.embedded is not None
        return self.calls[self.embedded].output("cls")

    def states(self, version: Version) -> Tensor:
        """(T, d) states of the subset, for the unified encoder."""
        return self.calls[version].output("fused")


class EncoderCall:
    """Groups of rows that pass an encoder together, grounded in `memory`: planned now, run when their values
    are there."""

    def __init__(
        self,
        encoder: Encoder,
        groups: Sequence[EncoderRows],
        uploads: Uploads,
        memory: MemoryLayout | None = None,
    ):
        self.encoder, self.groups = encoder, groups
        self.lengths = torch.cat([group.lengths for group in groups])
        mask = torch.cat([group.output_mask for group in groups])
        self.plan = uploads.add(encoder.plan(self.lengths, uploads.device, mask, memory))

    def run(self, values: Tensor, memory: Tensor | None = None) -> None:
        """Values of all groups' tokens (T, d), states of the memory (C, d): gives the groups their states."""
        states = self.encoder.run(values, self.plan.value, memory)
        parts = states.split([int(group.output_mask.sum()) for group in self.groups])
        for group, part in zip(self.groups, parts, strict=True):
            group.states = part
