"""The step's plain padded twin, in the manner of ALBEF's and mVLP's public code: the peer of
`benchmarks.step`.

It shares the `UnifiedModel`'s parameters and takes the objective's batch, and its losses and gradients are
those of `UnifiedObjective` with `OBJECTIVE` and dropout 0. What it does the plain way:
  * every stream is padded to its maximum length, and each pass of it is a call of its own;
  * the positives of ITM are a pass of their own (the masked captions with their images again);
  * keys and values of the images are projected again for each pass that attends to them;
  * the last layer computes all positions, also those that nobody reads;
  * attention is matmul, softmax, matmul;
  * the vocabulary head sees all masked positions at once (`head="masked"`), or all positions (`head="all"`).

Shape legend: n rows, S padded length, C padded length of the memory, d width, h heads, V vocabulary.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raylib.models.attention import Attention, Block
from raylib.models.unified import UnifiedModel
from raylib.objectives import draw_hard_negatives
from raylib.packed import Sentences
from raylib.settings import ObjectiveConfig

# that the recorded figures are of, in which ITM reads VLM's masked captions (`base` has them clean now)
OBJECTIVE = ObjectiveConfig(itm_text="masked")
LENGTHS = {"image_text": 35, "parallel": 50, "text": 64}  # paper 2
IGNORED = -100


class Rows(NamedTuple):
    """`states` (n, S, d) of padded rows and their `mask` (n, S), True at real tokens."""

    states: Tensor
    mask: Tensor


class PaddedTwin(nn.Module):
    """`forward(batch)` -> (total loss, {term: value}), as `UnifiedObjective` on one worker."""

    def __init__(
        self, model: UnifiedModel, head: Literal["masked", "all"] = "masked", lengths: dict = LENGTHS
    ):
        super().__init__()
        self.model, self.head, self.lengths = model, head, lengths

    def forward(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        terms = self._image_text(batch["image_text"]) | self._translation(batch["parallel"])
        mono, width = batch["text"]["text"], self.lengths["text"]
        fused = self._fuse(self._encode(mono, "masked", width))
        terms["xmlm"] = self._masked_language(fused, mono, width)
        return sum(terms.values()), {name: term.detach() for name, term in terms.items()}

    def _image_text(self, batch: dict) -> dict[str, Tensor]:
        text, width, b = batch["text"], self.lengths["image_text"], len(batch["images"])
        images = self._encode_images(batch["images"])
        clean, masked = self._encode(text, "clean", width), self._encode(text, "masked", width)
        image = F.normalize(self.model.image_projection(images[:, 0]), dim=-1)
        sentence = F.normalize(self.model.text_projection(clean.states[:, 0]), dim=-1)
        same = (_equal(batch["image_id"]) | _equal(text.text_id)).to(images.device)
        contrast, scores = self._contrast(image, sentence, same)
        terms = {"ucl_image": contrast}

        mask = torch.ones(images.shape[:2], dtype=torch.bool, device=images.device)
        terms["vlm"] = self._masked_language(self._fuse(masked, Rows(images, mask)), text, width)

        positive = self._match(masked, images)
        wrong_text, is_text_valid = draw_hard_negatives(
            scores.detach(), same, batch["negative_uniforms"][:, 0]
        )
        wrong_image, is_image_valid = draw_hard_negatives(
            scores.detach().T, same, batch["negative_uniforms"][:, 1]
        )
        texts = Rows(*(torch.cat([part, part[wrong_text]]) for part in masked))
        negative = self._match(texts, torch.cat([images[wrong_image], images]))
        is_valid = torch.cat([is_image_valid, is_text_valid])
        wrong = (negative[:, 0] * is_valid).sum() / is_valid.sum().clamp(min=1)
        terms["itm"] = -positive[:, 1].sum() / b - wrong
        return terms

    def _translation(self, batch: dict) -> dict[str, Tensor]:
        sides, width = (batch["source"], batch["target"]), self.lengths["parallel"]
        clean = [self._encode(side, "clean", width) for side in sides]
        masked = [self._encode(side, "masked", width) for side in sides]
        vectors = [F.normalize(self.model.text_projection(rows.states[:, 0]), dim=-1) for rows in clean]
        same = (_equal(sides[0].text_id) | _equal(sides[1].text_id)).to(vectors[0].device)
        contrast, _ = self._contrast(*vectors, same)
        tlm = sum(
            self._masked_language(self._fuse(masked[i], clean[1 - i]), sides[i], width) for i in range(2)
        )
        return {"ucl_translation": contrast, "tlm": tlm}

    def _contrast(self, left: Tensor, right: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
        """InfoNCE, both directions summed; (b, b) scores."""
        scores = left @ right.T / self.model.temperature
        positives = torch.arange(len(left), device=left.device)
        logits = scores.masked_fill(same & ~_equal(positives), -torch.inf)
        return F.cross_entropy(logits, positives) + F.cross_entropy(logits.T, positives), scores

    def _encode(self, text: Sentences, variant: str, width: int) -> Rows:
        """The text encoder over one stream's `clean` or `masked` ids, padded to `width`."""
        ids, mask = _pad(getattr(text, variant), text.lengths, width)
        e = self.model.embedding
        states = e.norm(e.word(ids) + e.position(torch.arange(width, device=ids.device)))
        for block in self.model.text.blocks:
            states = _run(block, Rows(states, mask), None)
        return Rows(states, mask)

    def _encode_images(self, images: Tensor) -> Tensor:
        """uint8 (b, H, W, 3) -> (b, M + 1, d)."""
        vision = self.model.vision
        # a number, or one a channel
        mean, deviation = (
            torch.tensor(value, dtype=vision.cls.dtype, device=images.device).view(-1, 1, 1)
            for value in (vision.pixel_mean, vision.pixel_std)
        )
        pixels = (images.to(vision.cls.dtype).permute(0, 3, 1, 2) - mean) / deviation
        kernel = vision.patch_embedding.weight.view(-1, vision.patch, vision.patch, 3).permute(0, 3, 1, 2)
        patches = (
            F.conv2d(pixels, kernel, vision.patch_embedding.bias, stride=vision.patch)
            .flatten(2)
            .transpose(1, 2)
        )
        x = torch.cat([vision.cls.expand(len(images), 1, -1), patches], 1) + vision.position
        for block in vision.blocks:
            inner = block.attention_norm(x)
            x = x + _attend(block.attention, inner, inner, None)
            x = x + block.output(F.gelu(block.intermediate(block.output_norm(x))))
        return vision.norm(x)

    def _fuse(self, text: Rows, memory: Rows | None = None) -> Tensor:
        """The unified encoder, (n, S, d)."""
        states = text.states
        for block in self.model.fusion.blocks:
            states = _run(block, Rows(states, text.mask), memory)
        return states

    def _match(self, text: Rows, images: Tensor) -> Tensor:
        """Log-probabilities (n, 2) that each text does not, or does, describe its image."""
        mask = torch.ones(images.shape[:2], dtype=torch.bool, device=images.device)
        cls = self._fuse(text, Rows(images, mask))[:, 0]
        return F.log_softmax(self.model.match_head(cls), -1)

    def _masked_language(self, states: Tensor, text: Sentences, width: int) -> Tensor:
        """Mean cross-entropy at the masked positions of `states` (n, S, d)."""
        labels = torch.full_like(text.clean, IGNORED)
        labels[text.positions] = text.labels
        labels = _pad(labels, text.lengths, width, IGNORED)[0]
        if self.head == "masked":
            states, labels = states[labels != IGNORED], labels[labels != IGNORED]
        head = self.model.masked_head
        logits = F.linear(head(states), self.model.embedding.word.weight, head.bias)
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


def _attend(attention: Attention, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
    """x (n, S, d) over context (n, C, d), of which `mask` (n, C) is real -> (n, S, d)."""
    n, length, d = x.shape
    shape = (n, -1, attention.heads, d // attention.heads)
    queries = attention.query(x).view(shape).transpose(1, 2)
    keys, values = (part.reshape(shape).transpose(1, 2) for part in attention.key_value(context).split(d, -1))
    scores = queries @ keys.transpose(2, 3) / shape[-1] ** 0.5
    if mask is not None:
        scores = scores + torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, -1e4)[:, None, None]
    out = scores.softmax(-1) @ values
    return attention.output(out.transpose(1, 2).reshape(n, length, d))


def _run(block: Block, text: Rows, memory: Rows | None) -> Tensor:
    x = block.attention_norm(text.states + _attend(block.attention, text.states, text.states, text.mask))
    if memory is not None:
        x = block.cross_norm(x + _attend(block.cross_attention, x, *memory))
    return block.output_norm(x + block.output(F.gelu(block.intermediate(x))))


def _pad(values: Tensor, lengths: Tensor, width: int, filler: int = 1) -> tuple[Tensor, Tensor]:
    """Flat values (T,) -> (n, width), and where they are real; `filler` is `<pad>`."""
    mask = (torch.arange(width) < lengths[:, None]).to(values.device)
    padded = torch.full(mask.shape, filler, dtype=values.dtype, device=values.device)
    padded[mask] = values
    return padded, mask


def _equal(ids: Tensor) -> Tensor:
    """(n, n) True where two rows have the same id."""
    return ids[:, None] == ids
