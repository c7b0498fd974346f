"""The English model that a student learns from: read, never trained, and no part of what is saved. Its
states may be made once, by all workers together, as safetensors shards, and read back by example.

FOLDER/states-WORKER-NUMBER.safetensors   "states" (T', L, d), rows of some examples end to end
FOLDER/index-WORKER.json                  {id: [number, first token, tokens]}
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, cast

import torch
from pydantic import BaseModel, Field, NonNegativeInt
from safetensors.torch import save_file
from torch import Tensor

from finetune.formats import Example
from raylib.cache import write_sharded
from raylib.data.index import FileBytes
from raylib.data.loading import to_host
from raylib.display import progress
from raylib.errors import NotFinite, UserError, hub_hint, reading
from raylib.fileio import MAX_JSON, read_json
from raylib.finite import is_finite
from raylib.models.base import FusionBackbone, RegionBackbone, read_description
from raylib.models.finetuned import FinetuneModel, find_evaluated, is_foreign, load_backbone
from raylib.strict_json import check_shape, parse_json


class Teacher:
    """`model` after `layers`, in evaluation mode and without gradient. No `nn.Module`: nothing may put it
    among the parts of what it teaches."""

    def __init__(self, model: FinetuneModel, layers: tuple[int, ...], empty: bool = False):
        self.model, self.layers, self.empty = model.eval().requires_grad_(False), layers, empty

    @torch.no_grad()
    def states(self, batch: dict) -> Tensor:
        """A batch of `FinetuneModel.forward` -> states of all tokens after each layer (L, T', d), as rows end
        to end."""
        return torch.stack(
            [rows.values for rows in self.model.hidden_states(batch, self.layers, self.empty)[0]]
        )


def load_teacher(path: Path | str, kind: str, regions: int | None) -> FinetuneModel:
    """The model at `path`: a run of fine-tuning, with its head, or else a backbone of `kind`, whose head says
    nothing.

    regions: the width of the region features that it will see.
    Raises:
        UserError: no model there.
    """
    if not Path(path).exists():
        raise UserError(
            f"strategies.distillation.teacher={path}: no such model; give the run of an English fine-tuning"
            f"{hub_hint(path)}"
        )
    if not is_foreign(Path(path)):
        folder = find_evaluated(path)
        if read_description(folder).get("model_type") == "polyglance-finetuned":
            model = FinetuneModel.from_pretrained(folder, kind)
            if model.is_generative:
                raise UserError(
                    f"strategies.distillation.teacher={path}: its head is a decoder; give a run of "
                    "head=classifier"
                )
            return model
    backbone = load_backbone(path, kind)
    if not isinstance(backbone, FusionBackbone):
        raise UserError(
            f"strategies.distillation.teacher={path}: {backbone.kind} reads texts and images apart; give a "
            "model that reads them together"
        )
    if regions and isinstance(backbone, RegionBackbone):
        backbone.set_region_dim(regions)
    return FinetuneModel(cast(FusionBackbone, backbone), ("?",), 1, 0.0, regions)  # a head that nothing reads


INDEX = dict[str, Annotated[list[NonNegativeInt], Field(min_length=3, max_length=3)]]


class StatesHeader(BaseModel):
    """The header of a shard, of its one tensor."""

    dtype: Literal["F32", "F16"]
    shape: Annotated[list[NonNegativeInt], Field(min_length=3, max_length=3)]
    data_offsets: Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)]


TOKENS = 2**16  # of a shard, about
DTYPES = {"F32": torch.float32, "F16": torch.float16}  # by their names in safetensors


class StoredStates:
    """The folder that `store_states` made. May be sent to loader processes: shards are opened where they are
    first read."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.rows: dict[str, tuple[str, int, int]] = {}  # id -> (shard, first token, tokens)
        for index in sorted(folder.glob("index-*.json")):
            worker = index.stem.removeprefix("index-")
            what, advice = "an index of states", f"delete {folder}, they are made again"
            places = read_json(index, what, advice, shape=INDEX, most=MAX_JSON)
            # a number alone: a text could lead out of the folder
            for name, (number, *row) in places.items():
                self.rows[name] = f"states-{worker}-{number}.safetensors", *row
        self._open: dict[str, _Shard] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}

    def read(self, ids: Sequence[str]) -> Tensor:
        """States (L, T', d) of these examples, row after row.

        Raises:
            UserError: those of an example are not finite; names file and example.
        """
        advice = f"delete {self.folder}, they are made again"
        if missing := [name for name in ids if name not in self.rows]:
            raise UserError(f"{self.folder}: no states of {missing[0]}; {advice}")
        parts = [self._read(*self.rows[name]) for name in ids]
        values = torch.cat(parts)
        if not is_finite(values):
            bad = next(name for name, part in zip(ids, parts, strict=True) if not is_finite(part))
            file = self.folder / self.rows[bad][0]
            raise UserError(
                f"{file}: the teacher's states of {bad} are not finite (NaN or infinite); {advice}"
            )
        return values.transpose(0, 1).contiguous()

    def _read(self, shard: str, first: int, tokens: int) -> Tensor:
        if shard not in self._open:
            if not (self.folder / shard).is_file():
                raise UserError(f"{self.folder}: no {shard}; delete {self.folder}, they are made again")
            self._open[shard] = _Shard(self.folder / shard)
        return self._open[shard].read(first, tokens)


class _Shard:
    """One file of `StoredStates`: safetensors read in place, and not mapped (`FileBytes`)."""

    def __init__(self, path: Path):
        self.content = FileBytes(path)
        self.advice = f"delete {path.parent}, they are made again"
        with reading(path, "states (safetensors)", self.advice):
            header = int.from_bytes(self.content[:8], "little")
            if header > len(self.content) - 8:
                raise ValueError("it is cut off, or damaged")
            states = parse_json(self.content[8 : 8 + header])["states"]
            check_shape(states, StatesHeader)
            (self.tokens, *self.shape), self.dtype = states["shape"], DTYPES[states["dtype"]]
            start, end = states["data_offsets"]
            self.offset = 8 + header + start
            size = self.tokens * math.prod(self.shape) * self.dtype.itemsize
            if end - start != size or self.offset + size != len(self.content):
                raise ValueError("it is cut off, or damaged")

    def read(self, first: int, tokens: int) -> Tensor:
        """(tokens, L, d)."""
        if first + tokens > self.tokens:
            raise UserError(f"{self.content.path}: {self.tokens} tokens, not {first + tokens}; {self.advice}")
        values = torch.empty(tokens, *self.shape, dtype=self.dtype)
        row_bytes = math.prod(self.shape) * self.dtype.itemsize
        buffer = values.view(torch.uint8).numpy().reshape(-1).data
        self.content.read_into(buffer, self.offset + first * row_bytes)
        return values


def store_states(
    folder: Path,
    examples: Sequence[Example],
    states: Callable[[Sequence[Example]], tuple[Tensor, list[int]]],
    batch: int,
    dtype: torch.dtype = torch.float32,
) -> StoredStates:
    """All workers together: `states(examples)` -> ((L, T', d), tokens of each row) of all `examples`, `batch`
    at a time, one of each id. The folder appears whole: one that is there already is taken as it is.

    Raises:
        NotFinite: states of an example are not finite, or too large for `dtype`.
    """
    unique = list({e.id: e for e in examples}.values())
    write_sharded(
        folder,
        lambda out, rank, world: _StateShards(out, rank, dtype).write(unique[rank::world], states, batch),
    )
    return StoredStates(folder)


class _StateShards:
    """The shards that one worker writes."""

    def __init__(self, folder: Path, worker: int, dtype: torch.dtype):
        self.folder, self.worker, self.dtype = folder, worker, dtype
        self.index: dict[str, tuple[int, int, int]] = {}
        self.number, self.tokens = 0, 0
        self.parts: list[Tensor] = []

    def write(self, examples: Sequence[Example], states: Callable, batch: int) -> None:
        chunks = [examples[start : start + batch] for start in range(0, len(examples), batch)]
        all_lengths: list[list[int]] = []

        def computed() -> Iterator[Tensor]:
            for chunk in progress(chunks, "states of the teacher", len(examples), "examples", len):
                values, lengths = states(chunk)
                all_lengths.append(lengths)
                # before the check: what is finite in float32 may overflow in float16
                yield values.transpose(0, 1).to(self.dtype)

        for chunk, values in zip(chunks, to_host(computed()), strict=True):
            lengths = all_lengths.pop(0)
            if not is_finite(values):
                parts = zip(chunk, values.split(lengths), strict=True)
                bad = next(example for example, part in parts if not is_finite(part))
                raise NotFinite(
                    f"the teacher's states of {bad.id}: not finite (NaN or infinite) in {self.dtype}"
                )
            for example, length in zip(chunk, lengths, strict=True):
                self.index[example.id] = self.number, self.tokens, length
                self.tokens += length
            self.parts.append(values)
            # shards of a fixed number of tokens: read back by random access, written with little in memory
            if self.tokens >= TOKENS:
                self._close()
        if self.parts:
            self._close()
        (self.folder / f"index-{self.worker}.json").write_text(json.dumps(self.index), encoding="utf-8")

    def _close(self) -> None:
        name = f"states-{self.worker}-{self.number}.safetensors"
        save_file({"states": torch.cat(self.parts).contiguous()}, self.folder / name)
        self.number, self.tokens, self.parts = self.number + 1, 0, []
