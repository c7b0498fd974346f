"""A pretrained model with the head of a classification task.

A text is grounded in what it is about, picture or premise, by the unified encoder's cross-attention; its CLS state goes to
the head. Two pictures ground it twice, and the head sees both states side by side (paper 2, appendix B.2.3).
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finetune.formats.nli import check_labels
from raylib.checkpoint import BEST
from raylib.config import build
from raylib.errors import UserError
from raylib.model.attention import initialise
from raylib.model.encoder import Condition
from raylib.model.folder import find_model
from raylib.model.load import interpolate, load_text, load_vision, text_config
from raylib.model.unified import ModelConfig, UnifiedModel
from raylib.ragged import Ragged, first_tokens

LOCATIONS = 7  # numbers that say where a region is (UC2)
PRETRAINING_ONLY = ("masked_head", "match_head", "image_projection", "text_projection", "temperature")


class Classifier(nn.Module):
    """Two layers with GELU and layer norm between them, the hidden one twice the model's width (VOLTA's classifier)."""

    def __init__(self, inputs: int, width: int, labels: int, dropout: float):
        super().__init__()
        self.hidden = nn.Linear(inputs, 2 * width)
        self.norm = nn.LayerNorm(2 * width)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(2 * width, labels)
        self.apply(initialise)

    def forward(self, states: Tensor) -> Tensor:
        """(b, inputs) -> logits (b, labels)."""
        return self.output(self.dropout(self.norm(F.gelu(self.hidden(states)))))


class Regions(nn.Module):
    """Region features and their locations as states that texts can attend to (UNITER's image embedding)."""

    def __init__(self, features: int, width: int):
        super().__init__()
        self.feature = nn.Linear(features, width)
        self.feature_norm = nn.LayerNorm(width)
        self.location = nn.Linear(LOCATIONS, width)
        self.location_norm = nn.LayerNorm(width)
        self.norm = nn.LayerNorm(width)
        self.apply(initialise)

    def forward(self, features: Tensor, locations: Tensor) -> Tensor:
        """(R, f), (R, 7) -> (R, d)."""
        return self.norm(self.feature_norm(self.feature(features)) + self.location_norm(self.location(locations)))


class FinetuneModel(nn.Module):
    """`unified` and a head over `labels`. `pictures`: how many ground a text at once (a premise counts as one);
    `regions`: the width of region features, if these take the place of pictures."""

    def __init__(self, unified: UnifiedModel, labels: tuple[str, ...], pictures: int, dropout: float, regions: int | None = None):
        super().__init__()
        self.unified, self.labels, self.pictures = unified, labels, pictures
        width = unified.config.width
        self.description = {"labels": list(labels), "pictures": pictures, "head_dropout": dropout, "regions": regions}
        self.head = Classifier(pictures * width, width, len(labels), dropout)
        self.regions = Regions(regions, width) if regions else None
        for part in PRETRAINING_ONLY:  # they would get no gradient, but decay all the same under ZeRO
            getattr(unified, part).requires_grad_(False)

    def forward(self, batch: dict) -> Tensor:
        """Logits (b, labels) of {"text": Ragged ids (b rows)} and what grounds it, of which row i's are rows i c ... i c +
        c - 1: "images" uint8 (b c, H, W, 3), "states" Ragged (of a ViT that ran before), "regions" Ragged (f + 7 wide) or
        "premise" Ragged ids."""
        return self.head(self.ground(batch["text"], self.condition(batch)))

    def condition(self, batch: dict) -> Ragged:
        """What texts of the batch attend to, as states."""
        if "states" in batch:
            return batch["states"].with_values(batch["states"].values.to(self.head.output.weight.dtype))
        if "images" in batch:
            return self.unified.encode_images(batch["images"])
        if "regions" in batch:
            regions = batch["regions"]
            features, locations = regions.values.split([regions.values.shape[1] - LOCATIONS, LOCATIONS], 1)
            return regions.with_values(self.regions(features, locations))
        return batch["premise"].with_values(self.unified.encode_text(batch["premise"]))

    def ground(self, text: Ragged, condition: Ragged) -> Tensor:
        """CLS states of each text under each of its c conditions, side by side: (b, c d)."""
        b, c = len(text.lengths), self.pictures
        states = text.with_values(self.unified.encode_text(text))
        if c > 1:
            states = states.take(torch.arange(b).repeat_interleave(c))
        cls = self.unified.fuse(states, first_tokens(states.lengths), Condition(condition, torch.arange(b * c)))
        return cls.view(b, -1)

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        folder.mkdir(parents=True, exist_ok=True)
        description = {"model_type": "polyglance-finetuned", **self.description, "unified": self.unified.config.model_dump()}
        (folder / "config.json").write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        save_file({k: v.detach().contiguous().cpu() for k, v in self.state_dict().items()}, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: Path) -> "FinetuneModel":
        """The model that `save` wrote into `folder`."""
        values = read_description(folder)
        unified = UnifiedModel(build(ModelConfig, values["unified"], str(folder / "config.json")))
        model = cls(unified, tuple(values["labels"]), values["pictures"], values["head_dropout"], values["regions"])
        return fill(model, folder)


def load_unified(path: Path | str, vision: str | None = None) -> UnifiedModel:
    """The pretrained model that `path` means: an export, a run, a fine-tuned model (its head is left out), or an XLM-R or
    BERT folder in Hugging Face format, whose image encoder is `vision`, a ViT folder, or random.

    Raises:
        UserError: none of these, or weights that do not fit.
    """
    kind = read_description(Path(path)).get("model_type") if (Path(path) / "config.json").is_file() else None
    if kind and not kind.startswith("polyglance"):
        model = UnifiedModel(text_config(path))
        load_text(model, path)
        if vision:
            load_vision(model, vision)
        return model
    folder = find_evaluated(path)
    if read_description(folder)["model_type"] == "polyglance-finetuned":
        return FinetuneModel.from_pretrained(folder).unified
    return UnifiedModel.from_pretrained(folder)


def load_finetuned(path: Path | str, labels: tuple[str, ...]) -> FinetuneModel:
    """The fine-tuned model at `path`, whose classes must be `labels`, in this order.

    Raises:
        UserError: not fine-tuned; its labels differ (both orders are named).
    """
    folder = find_evaluated(path)
    values = read_description(folder)
    if values["model_type"] != "polyglance-finetuned":
        raise UserError(f"{path}: no fine-tuned model; give the run of an English fine-tuning")
    check_labels(labels, tuple(values["labels"]), str(folder / "config.json"))
    return FinetuneModel.from_pretrained(folder)


def find_evaluated(path: Path | str) -> Path:
    """As `find_model`; of a fine-tuning run, the checkpoint that its results come from."""
    path = Path(path)
    if (path / BEST).is_dir() and read_description(path).get("select") == "best":
        return path / BEST
    return find_model(path)


def read_description(folder: Path) -> dict:
    """A model folder's config.json."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{folder}/config.json: not to be read as JSON ({e})") from None


def fill(model: nn.Module, folder: Path) -> nn.Module:
    """Load `folder`/model.safetensors into `model`.

    Raises:
        UserError: a key is missing, left over or of another shape; it is named.
    """
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except RuntimeError as e:
        raise UserError(f"{folder}/model.safetensors does not fit the model: {' '.join(str(e).split())}") from None
    return model


def resize(unified: UnifiedModel, image_size: int) -> None:
    """Give the image encoder another resolution; its position embeddings are interpolated (paper 2, appendix B.2.2).

    Raises:
        UserError: not a multiple of the patch.
    """
    config, vision = unified.config, unified.vision
    if image_size % config.patch:
        raise UserError(f"image_size={image_size} is not a multiple of the model's patch, {config.patch}")
    if image_size != config.image_size:
        with torch.no_grad():
            vision.position = nn.Parameter(interpolate(vision.position, (image_size // config.patch) ** 2).contiguous())
        unified.config = config.model_copy(update={"image_size": image_size})


FREEZABLE = {
    "embeddings": lambda m: m.embedding,
    "text": lambda m: m.text,
    "vision": lambda m: m.vision,
    "fusion": lambda m: m.fusion,
}


def freeze(unified: UnifiedModel, parts: tuple[str, ...]) -> None:
    """Take parts of the model out of training for good: their gradients are never computed."""
    for part in parts:
        FREEZABLE[part](unified).requires_grad_(False)
