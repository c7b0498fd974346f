"""Encoders of blocks (`raylib.packed`): the text encoder, the unified encoder, and the ViT (Dosovitskiy et
al., 2020), with layer norm before each residual, a CLS token, learned positions.

Everything but images is flat: tokens of all rows end to end; a `Plan` says which belong together.

Shape legend: n rows, d width; T tokens in all, R tokens of an output mask; b images, M patches.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raylib.errors import UserError
from raylib.models.attention import Attention, Block, Plan, plan_attention
from raylib.packed import Ragged, join_rows
from raylib.precision import LayerNorm

# On a CPU, rows run in chunks whose widest activation is so many floats: larger ones leave the cache, and
# malloc maps and unmaps them page by page.
CHUNK = 2**23


def init_weights(module: nn.Module) -> None:
    """Normal weights of variance 1 / inputs, zero biases; embeddings of half that deviation, since they are
    also the decoder of the masked-language head. Use with `Module.apply`. At width 768 this is near BERT's
    0.02; at `tiny`'s width 0.02 would all but close the residual branches, and learning takes three times as
    long (docs/results.md)."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.5 * module.embedding_dim**-0.5)


class Memory(NamedTuple):
    """The memory that rows attend to: `states` of images or sentences, and for each text row the state row
    (n,) it attends to (CPU)."""

    states: Ragged
    rows: Tensor


class TextEmbedding(nn.Module):
    """Word and position embeddings, layer norm. Token types, where a checkpoint has them, are folded into the
    positions (`raylib.models.hf_weights`): every text here is of type 0."""

    def __init__(self, vocabulary: int, positions: int, width: int, dropout: float, eps: float):
        super().__init__()
        self.word = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(positions, width)
        self.norm = LayerNorm(width, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Ragged) -> Tensor:
        """ids (T,) -> (T, d)."""
        return self.add_positions(ids.with_values(self.word(ids.values)))

    def add_positions(self, words: Ragged) -> Tensor:
        """Word embeddings (T, d) -> with their positions, normed (T, d)."""
        # on a GPU, an index out of range would end the process without a line of ours
        longest, positions = max(words.lengths.tolist(), default=0), len(self.position.weight)
        if longest > positions:
            raise UserError(f"a text of {longest} tokens, the model has {positions} positions; lower length=")
        position = torch.arange(len(words.values)) - torch.repeat_interleave(words.starts, words.lengths)
        position = position.to(words.values.device, non_blocking=True)
        return self.dropout(self.norm(words.values + self.position(position)))


class BlockList(nn.ModuleList):
    """Blocks, and a type checker knows that they are."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[Block]: ...
        def __getitem__(self, index: Any) -> Any: ...


class Encoder(nn.Module):
    """A stack of `Block`s over packed rows.

    With `cross` the blocks attend to the memory by layers of their own; without (the paper's ablation "w/o
    uni-arch") a memory is appended to the row and one self-attention sees both. With `causal` (set on a copy
    by `raylib.models.decoder`) a token sees nothing of its row that comes after it; all tokens are output.
    """

    causal = False

    def __init__(
        self, layers: int, width: int, heads: int, feedforward: int, dropout: float, eps: float, cross: bool
    ):
        super().__init__()
        self.cross = cross
        self.blocks = BlockList(Block(width, heads, feedforward, dropout, eps, cross) for _ in range(layers))

    def forward(
        self, text: Ragged, output_mask: Tensor | None = None, memory: Memory | None = None
    ) -> Tensor:
        """States after the last block.

        Args:
            text: values (T, d).
            output_mask: (T,) bool on the CPU; the last block computes these tokens alone. None: all of them.
            memory: seen by cross-attention; None skips it.
        Returns:
            (R, d), the tokens of the mask in flat order; (T, d) without one.
        """
        if memory is not None and not self.cross:
            text, output_mask = _append_memory(text, output_mask, memory)
            memory = None
        device = text.values.device
        assert output_mask is None or not self.causal, "a causal mask lines up with all queries alone"
        output_mask = torch.ones(len(text.values), dtype=torch.bool) if output_mask is None else output_mask
        # once for all chunks and all rows that attend to the same image
        projected = [b.cross_attention.key_value(memory.states.values) for b in self.blocks] if memory else []
        outputs, tokens_of_outputs = [], []
        for rows in self._chunks(text.lengths, device):
            tokens = text.token_index(rows)
            chunk_mask = output_mask[tokens]
            if chunk_mask.any():
                chunk = Ragged(text.values.index_select(0, tokens.to(device)), text.lengths[rows])
                chunk_memory = memory and Memory(memory.states, memory.rows[rows])
                outputs.append(self._run(chunk, chunk_mask, chunk_memory, projected))
                tokens_of_outputs.append(tokens[chunk_mask])
        if not outputs:
            return text.values[:0]
        # chunks took the rows by length: back into the order of the flat tokens
        order = torch.cat(tokens_of_outputs).argsort().to(device, non_blocking=True)
        return torch.cat(outputs).index_select(0, order)

    def layer_states(self, text: Ragged, layers: Sequence[int], memory: Memory | None = None) -> list[Ragged]:
        """States of all tokens, as rows (T, d), after each of `layers`: rising, the lowest is 1."""
        states = []
        for low, high in pairwise([0, *layers]):
            part = Encoder(0, 0, 0, 0, 0.0, 0.0, self.cross)
            part.blocks = self.blocks[low:high]  # the stack's own, not copies
            text = text.with_values(part(text, None, memory))
            states.append(text)
        return states

    def _chunks(self, lengths: Tensor, device: torch.device) -> list[Tensor]:
        """Rows by ascending length, in chunks that run at once."""
        rows = lengths.argsort(stable=True)
        if device.type != "cpu":
            return [rows]
        size = max(1, CHUNK // self.blocks[0].intermediate.out_features)
        chunk = (lengths[rows].cumsum(0) - 1) // size
        return list(rows.split(chunk.unique_consecutive(return_counts=True)[1].tolist()))

    def _run(
        self, text: Ragged, output_mask: Tensor, memory: Memory | None, projected: list[Tensor]
    ) -> Tensor:
        """All blocks over rows of ascending length -> (R, d). `projected`: the memory's keys and values, by
        block."""
        device, x, lengths = text.values.device, text.values, text.lengths
        is_whole = bool(output_mask.all())
        output_index = None if is_whole else output_mask.nonzero().squeeze(1).to(device, non_blocking=True)
        counts = lengths
        if not is_whole:  # how many tokens of each row are output
            counts = output_mask.cumsum(0)[lengths.cumsum(0) - 1].diff(prepend=lengths.new_zeros(1))
        # All tokens are queries but in the last layer, where those of the mask alone are: so two plans serve
        # all layers, or one where these are the same, or where the last layer is the only one.
        queries = [counts] if is_whole or len(self.blocks) == 1 else [lengths, counts]
        plans = [plan_attention(lengths, n, device)._replace(causal=self.causal) for n in queries]
        if memory is not None:
            used, rank = _used_rows(memory)
            memory_tokens = memory.states.token_index(used).to(device, non_blocking=True)
            cross_plans = [_plan_cross(memory.states.lengths[used], rank, n, device) for n in queries]
        for i, block in enumerate(self.blocks):
            is_last = i == len(self.blocks) - 1
            which = -1 if is_last else 0
            cross = None
            if memory is not None:
                cross = projected[i].index_select(0, memory_tokens), cross_plans[which]
            x = block(x, plans[which], cross, output_index if is_last else None)
        return x


def _used_rows(memory: Memory) -> tuple[Tensor, Tensor]:
    """The memory's rows that any text attends to, by ascending length (m,), and for each text row the place
    of its own among them (n,)."""
    used, index = memory.rows.unique(return_inverse=True)
    order = memory.states.lengths[used].argsort(stable=True)
    return used[order], order.argsort()[index]


def _plan_cross(keys: Tensor, rows: Tensor, counts: Tensor, device: torch.device) -> Plan:
    """Plan for memory rows with so many `keys` (m,): the queries of all text rows that attend to one of them
    are together. `rows` (n,): the memory row of each text row; `counts` (n,): its queries."""
    queries = torch.zeros_like(keys).index_add_(0, rows, counts)
    tokens = Ragged(rows, counts).token_index(rows.argsort(stable=True))
    return plan_attention(keys, queries, device, tokens)


def _append_memory(text: Ragged, output_mask: Tensor | None, memory: Memory) -> tuple[Ragged, Tensor]:
    """Each row with its memory appended; only text tokens are output."""
    appended = memory.states.select_rows(memory.rows)
    text_mask = torch.ones(len(text.values), dtype=torch.bool) if output_mask is None else output_mask
    no_output = torch.zeros(len(appended.values), dtype=torch.bool)
    masks = join_rows(text.with_values(text_mask), appended.with_values(no_output))
    return join_rows(text, appended), masks.values


PixelStats = float | tuple[float, float, float]  # of a pixel's 0..255: for all colours, or one each

# what published image encoders were trained with; ViTs in Hugging Face folders: 127.5 both
CLIP_MEAN = (255 * 0.48145466, 255 * 0.4578275, 255 * 0.40821073)
CLIP_STD = (255 * 0.26862954, 255 * 0.26130258, 255 * 0.27577711)
IMAGENET_MEAN = (255 * 0.485, 255 * 0.456, 255 * 0.406)
IMAGENET_STD = (255 * 0.229, 255 * 0.224, 255 * 0.225)


def normalize_pixels(images: Tensor, mean: PixelStats, std: PixelStats, dtype: torch.dtype) -> Tensor:
    """uint8 images (..., 3) -> less the mean, over the standard deviation; floats have been normalised
    before."""
    if images.is_floating_point():
        return images.to(dtype)
    shift, scale = (
        v if isinstance(v, float | int) else torch.tensor(v, dtype=dtype, device=images.device)
        for v in (mean, std)
    )
    return (images.to(dtype) - shift) / scale


class VisionBlock(nn.Module):
    """Pre-norm self-attention and feed-forward."""

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float, eps: float):
        super().__init__()
        self.attention_norm = LayerNorm(width, eps)
        self.attention = Attention(width, heads, dropout)
        self.output_norm = LayerNorm(width, eps)
        self.intermediate = nn.Linear(width, feedforward)
        self.output = nn.Linear(feedforward, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(b, M + 1, d) -> (b, M + 1, d)."""
        b, n, _ = x.shape
        normed = self.attention_norm(x).flatten(0, 1)
        attended = self.attention(normed, self.attention.key_value(normed), Plan([(b, n, n)], None, None))
        x = x + self.dropout(attended.view_as(x))
        return x + self.dropout(self.output(F.gelu(self.intermediate(self.output_norm(x)))))


class VisionEncoder(nn.Module):
    """Pixels to M = (size / patch)^2 patch states behind one CLS state.

    With `window`, the image is cut into n windows of so many pixels, which never see each other: each has
    the CLS state and the positions of an image of its own, and a learned place among them. The states are
    then the mean of the windows' CLS states, these n themselves, and the patches, window after window. An
    encoder of single drawings so reads a scene of them.
    """

    def __init__(
        self,
        size: int,
        patch: int,
        layers: int,
        width: int,
        heads: int,
        feedforward: int,
        dropout: float,
        out: int,
        pixel_mean: PixelStats = 127.5,
        pixel_std: PixelStats = 127.5,
        window: int | None = None,
    ):
        """`out`: the width that others want. `pixel_mean`, `pixel_std`: of `normalize_pixels`."""
        super().__init__()
        self.patch, self.window = patch, window
        self.pixel_mean, self.pixel_std = pixel_mean, pixel_std
        self.patch_embedding = nn.Linear(3 * patch * patch, width)
        self.cls = nn.Parameter(torch.zeros(width))
        self.position = nn.Parameter(torch.randn(1 + ((window or size) // patch) ** 2, width) * 0.02)
        self.place = nn.Parameter(torch.zeros((size // window) ** 2, width)) if window else None
        self.blocks = nn.ModuleList(
            VisionBlock(width, heads, feedforward, dropout, 1e-12) for _ in range(layers)
        )
        self.norm = LayerNorm(width, 1e-12)
        self.output = nn.Linear(width, out) if out != width else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 images (b, H, W, 3) -> (b, M + 1, out), or (b, 1 + n + M, out). Normalised here, on the
        device."""
        b, height, _, _ = images.shape
        p, side = self.patch, self.window or height
        pixels = normalize_pixels(images, self.pixel_mean, self.pixel_std, self.cls.dtype)
        # Cut the image into its windows, row after row of them, and each window into its patches: every
        # window is then an image of its own, so that self-attention never leaves it. Without windows there is
        # one, the whole image.
        grid = pixels.view(b, height // side, side, -1, side, 3).transpose(2, 3)
        windows = grid.reshape(-1, side // p, p, side // p, p, 3)
        # a patch is flattened as (row, column, colour): `hf_weights.copy_vision` orders a kernel so
        patches = windows.transpose(2, 3).reshape(len(windows), -1, 3 * p * p)
        embedded = self.patch_embedding(patches)
        dtype = self.norm.stream_dtype(embedded)
        cls = self.cls.to(dtype).expand(len(patches), 1, -1)
        x = torch.cat([cls, embedded.to(dtype)], 1) + self.position.to(dtype)
        if self.place is not None:
            x = x + self.place.to(dtype).repeat(b, 1)[:, None]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        if self.place is not None:
            # back to one row an image: the mean CLS comes first, where every reader looks for the image's
            x = x.view(b, len(self.place), *x.shape[1:])
            cls = x[:, :, 0]
            x = torch.cat([cls.mean(1, keepdim=True), cls, x[:, :, 1:].flatten(1, 2)], 1)
        x = self.norm(x)
        return x if self.output is None else self.output(x)

    @property
    def num_windows(self) -> int:
        """Number of CLS states, one a window, behind the first state; 0: the image is one window."""
        return 0 if self.place is None else len(self.place)

    @torch.no_grad()
    def resize(self, size: int) -> None:
        """Take images of another resolution: positions, or the windows' places, are interpolated."""
        if self.window:
            assert self.place is not None
            with_cls = torch.cat([self.place[:1], self.place])  # `interpolate` leaves the first row alone
            self.place = nn.Parameter(interpolate(with_cls, (size // self.window) ** 2)[1:].contiguous())
        else:
            self.position = nn.Parameter(interpolate(self.position, (size // self.patch) ** 2).contiguous())


def interpolate(positions: Tensor, patches: int) -> Tensor:
    """Position embeddings (1 + M, d), CLS first, on a square grid -> (1 + patches, d)."""
    old, new = math.isqrt(len(positions) - 1), math.isqrt(patches)
    if old == new:
        return positions
    grid = positions[1:].T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], grid.flatten(2)[0].T])
