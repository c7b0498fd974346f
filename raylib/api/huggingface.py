"""Our models as those of `transformers`: what `AutoModel` and `AutoProcessor` make of an exported folder.

An export holds this file, and what it needs of ours, as `modeling_polyglance.py` (`raylib.api.source`): so it
is read with `trust_remote_code=True` where Polyglance is not installed. After `import polyglance` these
classes are registered (`register`), and no code of the folder runs.

Shape legend: n texts, b images, L tokens of the longest text, c images of a text, e width of embeddings.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BatchFeature, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_outputs import ModelOutput

from raylib.data.images import load_image, preprocess_image
from raylib.models import stored_backbone
from raylib.models.base import CODE_KEY, Backbone, RetrievalBackbone
from raylib.models.decoder import AnswerDecoder
from raylib.models.finetuned import FinetuneModel
from raylib.models.layers import init_weights
from raylib.models.peft import insert_stored
from raylib.models.vision import normalize_pixels
from raylib.packed import Ragged
from raylib.settings import PreprocessConfig

CODE_FILE = "modeling_polyglance.py"


class PolyglanceConfig(PreTrainedConfig):
    """polyglance: what a model of ours says of itself in its config.json."""

    model_type = "polyglance"

    polyglance: dict[str, Any] | None = None


class PolyglanceClassifierConfig(PolyglanceConfig):
    """Of a fine-tuned model."""

    model_type = "polyglance-classifier"


@dataclass
class PolyglanceOutput(ModelOutput):
    """image_embeds, text_embeds: unit vectors (b, e), (n, e). logits_per_image: (b, n), their cosines over
    the model's temperature, if it has one. logits_per_text: (n, b)."""

    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None


@dataclass
class PolyglanceClassifierOutput(ModelOutput):
    """logits: (n, labels) by `config.id2label`; of a model that generates answers the log of their
    probabilities, -inf at those that are no candidates. loss: cross-entropy, where labels were given."""

    loss: Tensor | None = None
    logits: Tensor | None = None


class PolyglancePreTrainedModel(PreTrainedModel):
    """Base of both models: the network of ours is `model`, under whose names weights are stored."""

    config_class = PolyglanceConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ["Block", "VisionBlock"]  # noqa: RUF012  # as `transformers` declares it

    def __init__(self, config: PolyglanceConfig):
        super().__init__(config)
        self.model = build_model(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        init_weights(module)
        if isinstance(module, AnswerDecoder):
            module.fill_ids()

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Write a folder that Polyglance reads too, with the code beside it."""
        weights = kwargs.pop("state_dict", None) or self.state_dict()
        stored = {name.removeprefix("model."): value for name, value in weights.items()}
        super().save_pretrained(save_directory, state_dict=stored, **kwargs)
        code, copy = Path(str(self.config.name_or_path)) / CODE_FILE, Path(save_directory) / CODE_FILE
        if code.is_file() and not copy.exists():
            shutil.copyfile(code, copy)

    def _pack(self, ids: Tensor, mask: Tensor | None) -> Ragged:
        """Padded ids (n, L) -> n rows. Without a mask, what is no padding token is text."""
        mask = (ids != self.config.pad_token_id) if mask is None else mask.bool()
        return Ragged(ids[mask], mask.sum(1).cpu())

    def _encode_images(self, pixel_values: Tensor) -> Ragged:
        """Normalised pixels (b, 3, H, W), or (n, c, 3, H, W) -> b or n c rows of states."""
        size = self.model.backbone.image_size
        if pixel_values.shape[-3:] != (3, size, size):
            raise ValueError(
                f"pixel_values {tuple(pixel_values.shape)}: this model reads (..., 3, {size}, {size})"
            )
        pixels = pixel_values.reshape(-1, 3, size, size).permute(0, 2, 3, 1).contiguous()
        return self.model.backbone.encode_images(pixels.to(self.dtype))


class PolyglanceModel(PolyglancePreTrainedModel):
    """A model that embeds images and texts in one space."""

    model: RetrievalBackbone

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Normalised pixels (b, 3, H, W) -> unit vectors (b, e)."""
        return self.model.embed_images(self._encode_images(pixel_values), normalize=True)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
        """Ids (n, L) -> unit vectors (n, e)."""
        return self.model.embed_text(self._pack(input_ids, attention_mask), normalize=True)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> PolyglanceOutput | tuple:
        """Vectors of texts, of images, or of both and their similarity."""
        output = PolyglanceOutput()
        if pixel_values is not None:
            output.image_embeds = self.get_image_features(pixel_values)
        if input_ids is not None:
            output.text_embeds = self.get_text_features(input_ids, attention_mask)
        if output.image_embeds is not None and output.text_embeds is not None:
            temperature = dict(self.model.named_parameters(recurse=False)).get("temperature", 1.0)
            output.logits_per_image = output.image_embeds @ output.text_embeds.T / temperature
            output.logits_per_text = output.logits_per_image.T
        return output.to_tuple() if return_dict is False else output

    def match(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The log of the odds (n,) that text i and image i belong together, by the image-text matching head,
        which reads both at once. One image is compared with all texts.

        Raises:
            ValueError: the model has no such head.
        """
        if not self.model.has_match_head:
            raise ValueError(f"{self.model.kind} has no image-text matching head")
        model: Any = self.model
        text, images = self._pack(input_ids, attention_mask), self._encode_images(pixel_values)
        if len(images.lengths) == 1:
            images = images.select_rows(torch.zeros(len(text.lengths), dtype=torch.int64))
        # logits in float32: in bf16 those near 8 are 1/16 apart, and would tie
        head, states = model.match_head, model.fused_cls(text, images).float()
        weights = {name: value.float() for name, value in head.named_parameters()}
        logits = torch.func.functional_call(head, weights, (states,))
        return logits[:, 1] - logits[:, 0]


class PolyglanceForClassification(PolyglancePreTrainedModel):
    """A model that was fine-tuned to choose among labels, for a text about an image, about several, or about
    a premise."""

    config_class = PolyglanceClassifierConfig
    model: FinetuneModel

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        premise_ids: Tensor | None = None,
        premise_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> PolyglanceClassifierOutput | tuple:
        """Logits (n, labels) of texts (n, L) about images, of which text i's are rows i c ... of
        `pixel_values`, or about premises (n, L). labels: (n,)."""
        batch: dict[str, Any] = {"text": self._pack(input_ids, attention_mask)}
        if pixel_values is not None:
            batch["states"] = self._encode_images(pixel_values)
        if premise_ids is not None:
            batch["premise"] = self._pack(premise_ids, premise_attention_mask)
        logits = self.model(batch)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        output = PolyglanceClassifierOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output


def build_model(config: PolyglanceConfig) -> Backbone | FinetuneModel:
    """The network that `config` describes, with random weights."""
    values = config.polyglance
    assert values is not None, "a config.json of ours has a key polyglance"
    kind = backbone_class(config)
    sizes = {k: v for k, v in values.items() if k not in ("model_type", "tuning", CODE_KEY)}
    model: Any = kind(kind.config_class(**values.get("sizes", sizes)))
    if "labels" in values:
        model = FinetuneModel.from_description(values, model)
    if tuning := values.get("tuning"):
        insert_stored(model, tuning)
    return model


def backbone_class(config: PolyglanceConfig) -> type[Backbone]:
    """The class of the backbone; in an export's code, the one that it has."""
    return stored_backbone(dict(config.polyglance or {}), Path(str(config.name_or_path)))


class PolyglanceImageProcessor(BaseImageProcessor):
    """Images as evaluation reads them: turned as their EXIF says, transparency over white, resized and
    cropped as the model was trained.

    size: pixels on a side. preparation: `PreprocessConfig`. image_mean, image_std: of colours from 0 to 1.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012  # as `transformers` declares it

    def __init__(
        self,
        size: Any = 224,
        image_mean: Any = 0.5,
        image_std: Any = 0.5,
        preparation: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.preparation = dict(preparation or {})
        side = size if isinstance(size, int) else size["height"]
        self.size = {"height": side, "width": side}
        self.image_mean, self.image_std = (
            [value] * 3 if isinstance(value, float | int) else list(value)
            for value in (image_mean, image_std)
        )

    def fetch_images(self, images: Any) -> Any:
        """Leave paths, addresses and bytes to `preprocess`, which decodes them as evaluation does."""
        return images

    def preprocess(self, images: Any, return_tensors: Any = None, **kwargs: Any) -> BatchFeature:
        """{"pixel_values": (b, 3, size, size) float32}.

        images: a path, URL, bytes of a file, PIL image, array or tensor of uint8 (height, width, 3) or (3,
        height, width); or a list of these, or of lists.
        Raises:
            ValueError: another setting than those of the model; what is no image.
        """
        if changes := {k: v for k, v in kwargs.items() if v is not None and vars(self).get(k) != v}:
            raise ValueError(
                f"{', '.join(changes)}: this model reads images as its folder says, no other way"
            )
        side = self.size["height"]
        config = PreprocessConfig(**self.preparation)
        arrays = [
            preprocess_image(load_image(_rows_first(i), f"image {n}"), side, config)
            for n, i in enumerate(_flat(images))
        ]
        # in numbers from 0 to 255, as evaluation reckons, to the last bit
        mean, std = ((255 * np.array(value)).tolist() for value in (self.image_mean, self.image_std))
        pixels = normalize_pixels(torch.from_numpy(np.stack(arrays)), tuple(mean), tuple(std), torch.float32)
        values = pixels.permute(0, 3, 1, 2).contiguous().numpy()
        return BatchFeature({"pixel_values": values}, tensor_type=return_tensors)


def _flat(images: Any) -> list[Any]:
    if isinstance(images, list | tuple):
        return [image for part in images for image in _flat(part)]
    if isinstance(images, np.ndarray | Tensor) and images.ndim == 4:
        return list(images)
    return [images]


def _rows_first(image: Any) -> Any:
    """An array (3, H, W) -> (H, W, 3); anything else as it is."""
    if isinstance(image, np.ndarray | Tensor):
        array = np.asarray(image)
        is_colour_first = array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3
        return array.transpose(1, 2, 0) if is_colour_first else array
    return image


class PolyglanceProcessor(ProcessorMixin):
    """`PolyglanceImageProcessor` and the tokenizer."""

    def __init__(self, image_processor: Any, tokenizer: Any):
        super().__init__(image_processor, tokenizer)


def register() -> None:
    """Let the Auto classes of `transformers` know these classes."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor

    backends: dict[str, type] = dict.fromkeys(("pil", "torchvision"), PolyglanceImageProcessor)
    for config, model in (
        (PolyglanceConfig, PolyglanceModel),
        (PolyglanceClassifierConfig, PolyglanceForClassification),
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoImageProcessor.register(config, image_processor_classes=backends, exist_ok=True)
        AutoProcessor.register(config, PolyglanceProcessor, exist_ok=True)


register()
