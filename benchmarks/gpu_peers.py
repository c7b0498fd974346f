"""Peers of the step for `benchmarks.gpu`: open_clip, and `transformers`' masked language model, each trained
as its own users train it, under bf16 autocast, with PyTorch's fused AdamW.

Neither is given the way of a batch to the device, or dropout: both make them faster.
"""

import importlib
import sys
import types
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from raylib.models.layers import init_weights
from raylib.models.unified import ModelConfig
from raylib.packed import Ragged, Sentences

CAPTION_LENGTH = 35
BUCKET = 8  # lengths of open_clip's buckets are multiples of it


class _Absent(types.ModuleType):
    """A module that is not installed, of which names can be imported, but nothing can be used."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        def use(*_: Any, **__: Any) -> None:
            raise ImportError(f"{self.__name__}.{name} was used, and {self.__name__} is not installed")

        return type(name, (nn.Module,), {"__init__": use, "BICUBIC": "bicubic", "BILINEAR": "bilinear"})


def import_open_clip() -> Any:
    """open_clip. It imports torchvision and ftfy to read images and text, which is not asked of it here:
    where they are not installed, or do not fit this PyTorch, names stand in their place while it is imported,
    and fail if they are used."""
    importlib.import_module("transformers")  # which looks for torchvision itself, and must not find these
    absent = []
    for package, modules in {
        "torchvision": ("transforms", "transforms.functional", "ops", "ops.misc"),
        "ftfy": (),
    }.items():
        try:
            importlib.import_module(package)
        except (ImportError, RuntimeError, AttributeError):
            absent += [package, *(f"{package}.{module}" for module in modules)]
    for name in absent:
        sys.modules[name] = _Absent(name)
        if parent := name.rpartition(".")[0]:
            setattr(sys.modules[parent], name.rpartition(".")[2], sys.modules[name])
    try:
        return importlib.import_module("open_clip")
    finally:
        for name in absent:
            del sys.modules[name]


class OpenClip:
    """open_clip with towers as large as ours, its loss and its step.

    Args:
        is_bucketed: captions in buckets of like length, each padded to its longest, through a text encoder
            without a mask, which is more than open_clip's own users have; else all padded to the longest
            caption that there is, as its tokenizer does.
    """

    def __init__(self, config: ModelConfig, device: torch.device, is_bucketed: bool, compiled: bool):
        open_clip = import_open_clip()
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"width": config.width, "heads": config.heads, "layers": config.text_layers}
        sizes |= {"vocab_size": config.vocabulary, "context_length": CAPTION_LENGTH}
        head = config.width // config.heads
        vision = open_clip.CLIPVisionCfg(
            layers=config.vision_layers, width=config.width, head_width=head, patch_size=config.patch,
            image_size=config.image_size, mlp_ratio=config.feedforward / config.width,
        )  # fmt: skip
        text = open_clip.CLIPTextCfg(
            **sizes, mlp_ratio=config.feedforward / config.width, no_causal_mask=is_bucketed
        )
        kind = open_clip.CustomTextCLIP if is_bucketed else open_clip.CLIP
        model = kind(config.embedding, vision, text, output_dict=True).to(device).train()
        self.device, self.is_bucketed, self.parameters = device, is_bucketed, list(model.parameters())
        self.loss = open_clip.ClipLoss()
        self.scale = model.logit_scale
        # lengths of buckets are many: each shape compiled by itself would take longer than all steps
        wrap: Callable = (lambda f: torch.compile(f, dynamic=is_bucketed)) if compiled else (lambda f: f)
        self.encode_image, self.encode_text = wrap(model.encode_image), wrap(model.encode_text)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)

    def step(self, batch: dict[str, Any]) -> Tensor:
        """One step on images and captions of one of our batches."""
        part = batch["image_text"]
        images = (part["images"].permute(0, 3, 1, 2).float() - 127.5) / 127.5
        rows = Ragged(part["text"].clean, part["text"].lengths)
        with torch.autocast(self.device.type, torch.bfloat16):
            image = self.encode_image(images, normalize=True)
            text = self._encode_buckets(rows) if self.is_bucketed else self._encode(rows, CAPTION_LENGTH)
            loss = self.loss(image, text, self.scale.exp())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def _encode(self, rows: Ragged, width: int) -> Tensor:
        # `<pad>` is 1; open_clip takes the state of the highest id, whichever that is
        return self.encode_text(rows.padded(width, fill=1)[0], normalize=True)

    def _encode_buckets(self, rows: Ragged) -> Tensor:
        order = rows.lengths.argsort()
        widths = (-(-rows.lengths[order] // BUCKET) * BUCKET).clamp(max=CAPTION_LENGTH)
        sizes = widths.unique_consecutive(return_counts=True)
        parts, first = [], 0
        for width, size in zip(*(x.tolist() for x in sizes), strict=True):
            parts.append(self._encode(rows.select_rows(order[first : first + size]), width))
            first += size
        return torch.cat(parts).index_select(0, order.argsort().to(self.device))


class MaskedLanguageModel:
    """`transformers`' XLM-R with its masked-language head, as deep as our text and unified encoder."""

    def __init__(self, config: ModelConfig, device: torch.device):
        from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM

        torch.manual_seed(0)
        sizes = XLMRobertaConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.width,
            num_hidden_layers=config.text_layers + config.fusion_layers,
            num_attention_heads=config.heads,
            intermediate_size=config.feedforward,
            max_position_embeddings=config.positions + 2,
            type_vocab_size=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.model = XLMRobertaForMaskedLM._from_config(sizes, attn_implementation="sdpa").to(device).train()
        self.model.apply(init_weights)
        self.device = device
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def step(self, batch: dict[str, Any]) -> Tensor:
        """One step on the sentences of one language of our batch, padded to the longest."""
        text: Sentences = batch["text"]["text"]
        labels = torch.full_like(text.clean, -100)
        labels[text.positions.to(self.device)] = text.labels
        width = int(text.lengths.max())
        ids, mask = Ragged(text.masked, text.lengths).padded(width, fill=1)
        targets, _ = Ragged(labels, text.lengths).padded(width, fill=-100)
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.model(input_ids=ids, attention_mask=mask, labels=targets).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss
