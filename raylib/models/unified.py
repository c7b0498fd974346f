"""The unified model of paper 2 (section 3.2, figure 2): image encoder, text encoder, unified encoder.

Three routes share the unified encoder: unpaired text skips the cross-attention, image-text pairs attend to
the image, translation pairs attend to the other sentence.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from raylib.config import Config, validate
from raylib.errors import UserError
from raylib.fileio import read_json
from raylib.models.base import TokenSegments, fill, find_segments, save_model
from raylib.models.layers import Encoder, Memory, TextEmbedding, check_layers, init_weights
from raylib.models.peft import described, restore
from raylib.models.vision import SwinEncoder, SwinSizes, VisionEncoder
from raylib.packed import Ragged, first_tokens
from raylib.renames import model_kind, rename_settings

KINDS = (
    "unified",
    "cclm",
    "cclm_swin",
)  # a folder's: CCLM's differ in nothing but sizes (`raylib.models.cclm`)

HEAD_ROWS = 256  # rows of the vocabulary head at a time; PyTorch's automatic choice is 10 x slower on a CPU


class ModelConfig(Config):
    """Sizes of a unified model. The defaults are the paper's `base`: 12 image, 6 text and 6 unified
    layers."""

    vocabulary: int = 250002  # 0: the tokenizer's (`pretrain`)
    width: int = 768
    heads: int = 12
    feedforward: int = 3072
    text_layers: int = 6
    fusion_layers: int = 6
    vision_layers: int = 12
    vision_width: int | None = (
        None  # None: as the text; else its heads are as wide, and a linear map leads up to `width`
    )
    vision_window: int | None = (
        None  # pixels of windows that never see each other (`raylib.models.vision`); None: one
    )
    image_size: int = 256
    patch: int = 16
    positions: int = 512
    embedding: int = 256
    dropout: float = 0.1
    eps: float = 1e-12
    temperature: float = 0.07
    pixel_mean: float | tuple[float, float, float] = (
        127.5  # what is subtracted from a pixel's 0..255, for all colours or each
    )
    pixel_std: float | tuple[float, float, float] = 127.5  # what it is then divided by
    fusion: Literal["cross", "entangled"] = "cross"
    swin: SwinSizes | None = (
        None  # of a Swin in the ViT's place, which vision_layers and vision_width say nothing about
    )

    @model_validator(mode="after")
    def _divisible(self) -> "ModelConfig":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.vision_width and self.vision_width % (self.width // self.heads):
            raise ValueError(
                f"vision_width {self.vision_width} is not a multiple of a head's {self.width // self.heads}"
            )
        if self.image_size % self.stride:
            raise ValueError(
                f"image_size {self.image_size} is no multiple of the {self.stride} pixels of a last patch or "
                "window"
            )
        if self.vision_window and (self.swin or self.vision_window % self.patch):
            raise ValueError(
                f"vision_window {self.vision_window} is for a ViT, and a multiple of its patch {self.patch}"
            )
        return self

    @property
    def stride(self) -> int:
        """Pixels that a patch is wide, for a Swin one of its last stage, or a window: pictures are a multiple
        of it."""
        return self.vision_window or self.patch * (self.swin.merges if self.swin else 1)


class MaskedLanguageHead(nn.Module):
    """Transform of a masked token's state before the vocabulary; the decoder is the word embedding (XLM-R's
    `lm_head`)."""

    def __init__(self, width: int, vocabulary: int, eps: float):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, states: Tensor) -> Tensor:
        """(m, d) -> (m, d), to be multiplied by the word embedding."""
        return self.norm(F.gelu(self.dense(states)))


def _row_by_row(states: Ragged | None) -> Memory | None:
    """What row i of the text attends to: row i of `states`."""
    return None if states is None else Memory(states, torch.arange(len(states.lengths)))


class UnifiedModel(nn.Module):
    """Image, text and unified encoder with their heads. Every text goes in and comes out ragged
    (`raylib.packed`). A backbone of fine-tuning (`raylib.models`)."""

    kind = "unified"
    row_parts = ("text",)  # of a row: pictures are attended to from outside

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config
        stack = dict(width=c.width, heads=c.heads, feedforward=c.feedforward, dropout=c.dropout)
        share = (c.vision_width or c.width) / c.width
        sizes = {name: round(share * stack[name]) for name in ("width", "heads", "feedforward")}
        seen = {"dropout": c.dropout, "out": c.width, "pixels": (c.pixel_mean, c.pixel_std)}
        if c.swin:
            self.vision = SwinEncoder(c.swin, c.image_size, c.patch, **seen)
        else:
            self.vision = VisionEncoder(
                c.image_size, c.patch, c.vision_layers, **sizes, **seen, window=c.vision_window
            )
        self.embedding = TextEmbedding(c.vocabulary, c.positions, c.width, c.dropout, c.eps)
        self.text = Encoder(c.text_layers, **stack, eps=c.eps, cross=False)
        self.fusion = Encoder(c.fusion_layers, **stack, eps=c.eps, cross=c.fusion == "cross")
        self.image_projection = nn.Linear(c.width, c.embedding)
        self.text_projection = nn.Linear(c.width, c.embedding)
        self.masked_head = MaskedLanguageHead(c.width, c.vocabulary, c.eps)
        self.match_head = nn.Linear(c.width, 2)
        self.temperature = nn.Parameter(
            torch.full((1,), c.temperature)
        )  # DeepSpeed broadcasts no 0-d parameter
        self.apply(init_weights)

    def encode_images(self, images: Tensor) -> Ragged:
        """uint8 (b, H, W, 3) -> b rows of states, CLS first."""
        states = self.vision(images)
        return Ragged(states.flatten(0, 1), torch.full((len(states),), states.shape[1]))

    def encode_text(self, ids: Ragged, read: Tensor | None = None) -> Tensor:
        """Ids (T,) -> unimodal states (T, d), or (R, d) of the tokens in `read` (T,)."""
        return self.text(ids.with_values(self.embedding(ids)), read)

    def fuse(self, text: Ragged, read: Tensor | None = None, memory: Memory | None = None) -> Tensor:
        """Unimodal text states (T, d) -> unified states of the read tokens (R, d), grounded in
        `memory`."""
        return self.fusion(text, read, memory)

    def embed_images(self, states: Ragged, *, normalize: bool) -> Tensor:
        """States of n images, CLS first -> vectors (n, e), of length 1 if `normalize`."""
        cls = states.values.index_select(0, states.starts.to(states.values.device))
        vectors = self.image_projection(cls)
        return F.normalize(vectors, dim=-1) if normalize else vectors

    def embed_text(self, ids: Ragged, *, normalize: bool) -> Tensor:
        """Ids of n texts -> vectors (n, e), of length 1 if `normalize`."""
        cls = self.encode_text(ids, first_tokens(ids.lengths))
        return self.embed_text_states(cls, normalize=normalize)

    def embed_text_states(self, cls: Tensor, *, normalize: bool) -> Tensor:
        """CLS states (n, d) of n texts -> vectors (n, e), of length 1 if `normalize`."""
        vectors = self.text_projection(cls)
        return F.normalize(vectors, dim=-1) if normalize else vectors

    @property
    def width(self) -> int:
        return self.config.width

    @property
    def num_layers(self) -> int:
        """Layers that a text passes: those of the text encoder, then the unified ones."""
        return self.config.text_layers + self.config.fusion_layers

    @property
    def num_fusion_layers(self) -> int:
        """How many of them, the top ones, attend to pictures."""
        return self.config.fusion_layers

    def depth_of(self, name: str) -> int | None:
        """Of the parameter `name`: 1 ... `num_layers` bottom up, 0 for the text embeddings, None outside
        (ViT, heads)."""
        part, _, rest = name.partition(".")
        if part == "embedding":
            return 0
        if part not in ("text", "fusion"):
            return None
        return int(rest.split(".")[1]) + 1 + (self.config.text_layers if part == "fusion" else 0)

    def prunable(self) -> list[str]:
        """Names of the matrices of the text and unified layers."""
        return [name for name, p in self.named_parameters() if (self.depth_of(name) or 0) > 0 and p.ndim == 2]

    def fused_cls(self, text: Ragged, memory: Ragged | None, times: int = 1) -> Tensor:
        """CLS states of texts in what grounds them.

        Args:
            text: ids, b rows. memory: states of what they attend to, b x times rows: row i's are i times
                ... . None: nothing; the unified layers read the text alone.
        Returns:
            (b times, d).
        """
        states = text.with_values(self.encode_text(text))
        if times > 1:
            states = states.select_rows(torch.arange(len(text.lengths)).repeat_interleave(times))
        return self.fuse(states, first_tokens(states.lengths), _row_by_row(memory))

    def fused_states(self, text: Ragged, memory: Ragged | None) -> Ragged:
        """As `fused_cls`, with row i of `memory` for row i of `text`, but states of all tokens: rows as
        `text`'s."""
        states = text.with_values(self.encode_text(text))
        return text.with_values(self.fuse(states, memory=_row_by_row(memory)))

    def hidden_states(
        self, text: Ragged, memory: Ragged, layers: Sequence[int]
    ) -> tuple[list[Ragged], TokenSegments]:
        """States of all tokens after some of the layers: those of the text encoder, then the unified ones.

        Args:
            text: ids, n rows. memory: as of `fused_states`. layers: rising, the lowest is 1.
        Returns:
            For each of `layers` rows as `text`'s (T, d); which tokens are what: all are of the text.
        Raises:
            UserError: no such layers; a model in which pictures are part of the rows.
        """
        check_layers(layers, self)
        if not self.fusion.cross:
            raise UserError(
                "fusion=entangled puts pictures into the rows of the top layers alone; states need "
                "fusion=cross"
            )
        below = self.config.text_layers
        low = [layer for layer in layers if layer <= below]
        rows = text.with_values(self.embedding(text))
        found = self.text.after(rows, sorted({*low, below}) if below else [])
        seen = Memory(memory, torch.arange(len(memory.lengths)))
        high = self.fusion.after(
            found[-1] if found else rows, [layer - below for layer in layers if layer > below], seen
        )
        nothing = torch.zeros_like(text.lengths)
        return [*found[: len(low)], *high], find_segments(text.lengths, nothing, nothing)

    def pool(self, cls: Tensor) -> Tensor:
        """CLS states after the last layer are what `fused_cls` returns."""
        return cls

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        description = {"model_type": f"polyglance-{self.kind}", **self.config.model_dump()}
        if described(self):
            description["tuning"] = described(self)
        save_model(self, description, folder)

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> "UnifiedModel":
        """The model that `save` (or `python -m pretrain export`) wrote into `folder`.

        Raises:
            UserError: no such folder, another kind of model, or weights that do not fit the config.
        """
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise UserError(
                    f"{folder}: no {name}; give a folder written by `python -m pretrain export RUN DIR`"
                )
        values = read_json(folder / "config.json")
        values = rename_settings(model_kind(values), values)
        if values.pop("model_type", None) not in [f"polyglance-{kind}" for kind in KINDS]:
            raise UserError(
                f"{folder}: not a Polyglance model; give a folder written by `python -m pretrain export`"
            )
        tuned = values.pop("tuning", {})
        model = cls(validate(ModelConfig, values, str(folder / "config.json")))
        restore(model, tuned)
        return fill(model, folder)


def vocabulary_loss(
    states: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy over the vocabulary at masked positions (paper 2, equation 2).

    Logits exist for `HEAD_ROWS` positions at a time, and once: their gradient is taken in the same breath, so
    that memory does not grow with the number of positions and nothing is computed again.
    (`F.linear_cross_entropy` does so too, but weighs all positions alike: a call for each term, each with a
    gradient as large as the vocabulary.)

    Args:
        states: (m, d). weight: (V, d). bias: (V,). labels: (m,). scale: (m,) what each position counts.
    Returns:
        (sum of scale * loss, the losses (m,), which carry no gradient).
    """
    return _VocabularyLoss.apply(states, weight, bias, labels, scale)


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, scale: Tensor):
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        exact = torch.promote_types(dtype, torch.float32)
        losses, states_grad = scale.new_empty(len(labels)), torch.empty_like(states)
        bias_grad, weight_grad = torch.zeros_like(bias), None
        with torch.autocast(kind, enabled=False):
            table, shift = weight.to(dtype), bias.to(dtype)
            for first in range(0, len(labels), HEAD_ROWS):
                rows = slice(first, first + HEAD_ROWS)
                chunk, targets, counts = (
                    states[rows].to(dtype),
                    labels[rows, None],
                    scale[rows, None].to(exact),
                )
                log_chances = F.log_softmax(F.linear(chunk, table, shift), -1, dtype=exact)
                losses[rows] = -log_chances.gather(1, targets).squeeze(1)
                # the gradient of cross-entropy is softmax - one-hot; made in place, the logits' memory over
                logits_grad = log_chances.exp_().mul_(counts).scatter_add_(1, targets, -counts)
                bias_grad += logits_grad.sum(0)
                logits_grad = logits_grad.to(dtype)
                states_grad[rows] = logits_grad @ table
                # zeros as large as the vocabulary are only written where there is no chunk at all
                if weight_grad is None:
                    weight_grad = (logits_grad.T @ chunk).to(weight.dtype)
                elif dtype == weight.dtype:
                    weight_grad.addmm_(logits_grad.T, chunk)
                else:
                    weight_grad += logits_grad.T @ chunk
            loss = (losses * scale).sum()
        ctx.grads = states_grad, torch.zeros_like(weight) if weight_grad is None else weight_grad, bias_grad
        ctx.mark_non_differentiable(losses)
        return loss, losses

    @staticmethod
    def backward(ctx, loss_grad: Tensor, _):
        grads, ctx.grads = ctx.grads, None  # scaled in place: a second backward is an error
        return *(grad.mul_(loss_grad) for grad in grads), None, None
