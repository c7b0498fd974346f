"""`Backbone`: what a fine-tuning head stands on; and how a model of ours is stored and found again.

A backbone derives from those of these classes that say what it can do:

    RetrievalBackbone   embeds images and texts apart, as vectors that are compared
    FusionBackbone      reads a text together with what it is about: an image, a premise
    RegionBackbone      a `FusionBackbone` on region features in the place of images

`raylib.models.BACKBONES` lists ours by kind; one in a file of the user's is named by that file
(docs/extending.md).

Shape legend: n texts, b images, T tokens, R tokens of an output mask, d width of states, e of embeddings.
"""

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar, cast

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from raylib.config import Config, user_source, validate
from raylib.errors import UserError, hub_hint
from raylib.fileio import read_json_object
from raylib.finite import require_finite_file
from raylib.models import peft
from raylib.models.preprocessor import Preprocessing
from raylib.models.vision import normalize_pixels
from raylib.packed import Ragged, TokenSegments
from raylib.renames import model_kind, rename_settings
from raylib.saving import Files, write_files
from raylib.settings import SQUEEZED, PixelStats, PreprocessConfig
from raylib.weights import limit_model, load_state, read_tensors

DESCRIPTION_KEY = "polyglance"  # in an export's config.json: what a model of ours says of itself
RUN_KEY = "polyglance_run"  # in an export's: how its run read texts and images
DESCRIPTION = "JSON: the description of a model"
CODE_KEY = "code"  # in a stored model's config.json: the file beside it, a user's, that defines its backbone
# what trains a backbone: a classifier, a decoder of answers, contrast alone, contrast and the match head
Use = Literal["classification", "generation", "contrast", "matching"]

M = TypeVar("M", bound=nn.Module)


class Backbone(nn.Module, ABC):
    """A pretrained model. A class declares:

    kind: what its folders say they are, and its key in `BACKBONES`. summary: a line about it.
    config_class: of its sizes. sizes: "base" as published, "tiny" for tests.
    embedding_names: what lies below the layers that a text passes, depth 0. layer_names: the `nn.ModuleList`s
        of these layers, bottom up, depth 1 and on. top_names: what has the last layer's depth too, such as a
        norm behind it. All of them are dotted names of modules; what is under none of them (image encoder,
        heads) has no depth.
    pooler_names: maps behind the last layer, which pruning may take too.
    preprocess: how images come to `image_size` (`raylib.data.images.preprocess_image`).
    pixel_mean, pixel_std: what is subtracted from a pixel's 0..255, and what it is then divided by: for all
        colours, or one each.
    row_parts: of what a row in its layers is made: "text", and perhaps "tags" and "regions"; () where
        `FusionBackbone.hidden_states`, by which it can be distilled, are not to be had.
    has_match_head: it can tell whether an image and a text belong together.
    """

    kind: ClassVar[str]
    summary: ClassVar[str] = ""
    config_class: ClassVar[type[Config]]
    sizes: ClassVar[Mapping[str, Config]] = {}
    stored_kinds: ClassVar[tuple[str, ...]] = ()  # kinds of folder that it can be read from, if not its own
    embedding_names: ClassVar[tuple[str, ...]]
    layer_names: ClassVar[tuple[str, ...]]
    top_names: ClassVar[tuple[str, ...]] = ()
    pooler_names: ClassVar[tuple[str, ...]] = ()
    row_parts: ClassVar[tuple[str, ...]] = ()
    has_match_head: ClassVar[bool] = False
    preprocess: PreprocessConfig = SQUEEZED
    pixel_mean: PixelStats = 127.5
    pixel_std: PixelStats = 127.5

    config: Any

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        # what `raylib.models.peft` has put in: {method: settings}
        self.tuning: dict[str, dict[str, Any]] = {}
        self.frozen_dropout = False  # layers keep their dropout in training, frozen or not

    @classmethod
    @abstractmethod
    def import_weights(cls, path: Path, vision: Path | None = None) -> Self:
        """A model with the published weights at `path`, a file or a folder; `vision`: a folder of the image
        encoder, where that comes from elsewhere.

        Raises:
            UserError: no such weights, or weights that do not fit.
        """

    @property
    def open_choice(self) -> str:
        """Line on what other people's weights leave open, with the settings that choose; "": none."""
        return ""

    @property
    @abstractmethod
    def width(self) -> int:
        """Width of the states that a head gets."""

    @property
    def backbone(self) -> "Backbone":
        """Itself: the pretrained part of any model is its `backbone`."""
        return self

    @property
    def num_layers(self) -> int:
        """Number of transformer layers that a text passes."""
        return sum(len(self._layers(name)) for name in self.layer_names)

    @property
    def num_fusion_layers(self) -> int:
        """Number of these, the top ones, that come after layers of text alone; 0: there are no such
        layers."""
        return 0

    @property
    def image_size(self) -> int:
        """Pixels that images have on a side; whoever defines `encode_images` says it. 0: it takes none."""
        return 0

    @property
    def num_windows(self) -> int:
        """Number of windows of an image that have a CLS state, behind the image's own."""
        return 0

    @property
    def has_cross_attention(self) -> bool:
        """True if texts attend to images by layers of their own, which a decoder of answers builds on."""
        return False

    def depth_of(self, name: str) -> int | None:
        """Depth of the parameter `name`: 1 ... `num_layers` bottom up, 0 for the embeddings, None outside of
        the layers. Layer decay, unfreezing and pruning go by it."""
        # by name and not by module: small modules inside a layer (`raylib.models.peft`) have its depth
        below = 0
        for prefix in self.layer_names:
            if name.startswith(f"{prefix}."):
                return below + 1 + int(name.removeprefix(f"{prefix}.").split(".")[0])
            below += len(self._layers(prefix))
        if name.startswith(tuple(f"{prefix}." for prefix in self.embedding_names)):
            return 0
        return below if name.startswith(tuple(f"{prefix}." for prefix in self.top_names)) else None

    def prunable(self) -> list[str]:
        """Names of the matrices that magnitude pruning may take: of the layers and of the poolers (paper 0
        counts these in)."""
        # vectors, which are biases and norms, stay: they are few, and models need them
        poolers = tuple(f"{name}." for name in self.pooler_names)
        return [
            name
            for name, p in self.named_parameters()
            if p.ndim == 2 and ((self.depth_of(name) or 0) > 0 or name.startswith(poolers))
        ]

    def freezable_parts(self) -> dict[str, nn.Module]:
        """Those of the parts "embeddings", "text", "vision", "image_projection", "fusion" that it has, as
        `freeze` names them."""
        return {}

    def part_names(self) -> dict[str, str]:
        """Return the part of each parameter, as `optim.rates` names them: "vision", "text" (embeddings too),
        "fusion", or "head": everything else."""
        rate_of = {"embeddings": "text", "image_projection": "head"}
        part_of = {
            parameter: rate_of.get(part, part)
            for part, module in self.freezable_parts().items()
            for parameter in module.parameters()
        }
        return {name: part_of.get(parameter, "head") for name, parameter in self.named_parameters()}

    def new_parameters(self) -> frozenset[str]:
        """Return the names of parameters that the weights to start from lack."""
        return frozenset()

    @property
    def image_encoder(self) -> nn.Module | None:
        """The part that makes states of images; None: it takes none."""
        return self.freezable_parts().get("vision")

    def train(self, mode: bool = True) -> Self:
        """Set training mode, but of what is frozen: a module whose parameters all are is in evaluation mode,
        and so has no dropout. Of a backbone with small modules put in (`raylib.models.peft`), or with
        `frozen_dropout`, that is said of the image encoder alone: the rest is what small modules or a
        classifier are trained on, and their papers' code trains them with dropout."""
        super().train(mode)
        root = self.image_encoder if self.tuning or self.frozen_dropout else self
        if mode and root is not None and not all(p.requires_grad for p in root.parameters()):
            frozen: list[nn.Module] = []
            _collect_frozen(root, frozen)
            for module in frozen:
                module.eval()
        return self

    def poolers(self) -> list[nn.Module]:
        """Those of the modules `pooler_names` that it has."""
        return [module for name, module in self.named_modules() if name in self.pooler_names]

    def check_declaration(self) -> None:
        """Check what the class of a user's file declares.

        Raises:
            UserError: one of its names is no module; a property fails; it encodes images of no size.
        """
        declared = {
            "embedding_names": self.embedding_names,
            "layer_names": self.layer_names,
            "top_names": self.top_names,
            "pooler_names": self.pooler_names,
        }
        where = type(self).__name__
        for field, names in declared.items():
            # a str where the tuple's comma was forgotten would be gone through letter by letter
            for name in (names,) if isinstance(names, str) else names:
                try:
                    found = self.get_submodule(name)
                except AttributeError as e:
                    raise UserError(f"{where}.{field}: '{name}': {e}") from None
                if field == "layer_names" and not isinstance(found, nn.ModuleList):
                    raise UserError(
                        f"{where}.{field}: '{name}' is a {type(found).__name__}, no nn.ModuleList"
                    )
            if isinstance(names, str):
                raise UserError(f"{where}.{field}: '{names}' is a str; write ('{names}',)")
        # an AttributeError inside a property would be told as if the property itself were not there
        for name in ("width", "image_size", "num_layers"):
            try:
                inspect.getattr_static(type(self), name).__get__(self)
            except AttributeError as e:
                raise UserError(f"{where}.{name}: {e}") from e
        # images would be opened at a size of 0
        if type(self).encode_images is not Backbone.encode_images and not self.image_size:
            raise UserError(f"{where}.image_size: it encodes images; say how many pixels they have on a side")

    def freeze_unused(self, use: Use) -> None:
        """Take out of training what has no part in `use`: it would get no gradient, but decay under ZeRO."""

    def resize_images(self, size: int) -> None:
        """Take images of `size` pixels.

        Raises:
            UserError: not of this size.
        """
        if size != self.image_size:
            raise UserError(f"image_size={size}: {self.kind}'s image tower has {self.image_size}")

    def encode_images(self, images: Tensor) -> Ragged:
        """uint8 (b, H, W, 3) of `image_size` -> b rows of states, the memory of `FusionBackbone.fused_cls`.

        Raises:
            UserError: it takes no images.
        """
        raise UserError(f"backbone={self.kind} takes no images")

    def count_image_tokens(self) -> int:
        """Count the states that an image becomes; 0: it takes none."""
        if not self.image_size:
            return 0
        device = next(self.parameters()).device
        blank = torch.zeros(1, self.image_size, self.image_size, 3, dtype=torch.uint8, device=device)
        with torch.no_grad():
            return int(self.encode_images(blank).lengths[0])

    def published_preprocessing(self, path: Path, vision: Path | None) -> Preprocessing | None:
        """Preparation of images for the weights at `path`, or of the image encoder's folder `vision`.

        None: as the class says.
        Raises:
            UserError: the folder's `preprocessor_config.json` is damaged, or wants what is not computed.
        """
        return None

    def set_preprocessing(self, preprocessing: Preprocessing) -> None:
        """Prepare images otherwise; what is stored with the weights says so."""
        preprocess, mean, std = preprocessing
        changes = {"preprocess": preprocess, "pixel_mean": mean, "pixel_std": std}
        # a user's class need not keep it among its sizes
        stored = {name: v for name, v in changes.items() if name in type(self.config).model_fields}
        self.config = self.config.model_copy(update=stored)
        self.preprocess, self.pixel_mean, self.pixel_std = preprocess, mean, std

    def describe_preprocessing(self) -> dict[str, Any] | None:
        """Preparation of images, for results; None: it takes none."""
        if not self.image_size:
            return None
        mean, std = (torch.tensor(v).expand(3).tolist() for v in (self.pixel_mean, self.pixel_std))
        return {
            "resize": self.preprocess.resize,
            "resize_to": self.preprocess.resize_to or self.image_size,
            "resample": self.preprocess.resample,
            "crop": self.image_size,
            "pixel_mean": mean,
            "pixel_std": std,
        }

    def pixel_values(self, images: Tensor) -> Tensor:
        """uint8 (b, H, W, 3) -> (b, 3, H, W), normalised as the image encoder was trained."""
        dtype = next(self.parameters()).dtype
        return normalize_pixels(images, self.pixel_mean, self.pixel_std, dtype).permute(0, 3, 1, 2)

    def files(self) -> Files:
        """Return `config.json` and `model.safetensors`, from which `from_pretrained` makes it again."""
        return model_files(self, self, {"model_type": f"polyglance-{self.kind}", **self.sizes_to_store()})

    def save(self, folder: Path | str) -> None:
        """Write `files` into a folder."""
        save_model(Path(folder), self.files())

    def sizes_to_store(self) -> dict[str, Any]:
        """The config, less what a training alone goes by."""
        return self.config.model_dump(exclude={"checkpointing"})

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> Self:
        """The model that `save` (or `python -m pretrain export`) wrote into `folder`.

        Raises:
            UserError: no such folder, another kind of model, or weights that do not fit the config.
        """
        folder, advice = Path(folder), "give a folder written by `python -m pretrain export RUN DIR`"
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise UserError(f"{folder}: no {name}; {advice}{hub_hint(folder)}")
        description = read_description(folder)
        # CCLM's folders are unified models too: a pretraining that goes on from one need not know
        kind = model_kind(description)
        if kind not in (cls.stored_kinds or (cls.kind,)):
            raise UserError(f"{folder}: not a Polyglance model of kind {cls.kind}; {advice}")
        sizes = {k: v for k, v in description.items() if k not in ("model_type", "tuning", CODE_KEY)}
        tuning = peft.check_stored(description.get("tuning"), folder / "config.json")
        with limit_model(folder / "config.json", folder):
            model = cls.from_sizes(sizes, kind, folder)
            # what was put in has weights of its own, so it goes in before these are loaded
            peft.insert_stored(model, tuning)
        return load_weights(model, folder)

    @classmethod
    def from_sizes(cls, sizes: dict[str, Any], kind: str, folder: Path) -> Self:
        """The model of the sizes that are stored in `folder`, under `kind`, with random weights.

        Raises:
            UserError: sizes that it does not have.
        """
        return cls(validate(cls.config_class, rename_settings(kind, sizes), str(folder / "config.json")))

    def change_config(self, changes: Mapping[str, Any]) -> Self:
        """The same weights under a config with `changes`, of fields that say what is computed and not how
        large it is.

        Raises:
            UserError: no such field or value; weights that do not fit it.
        """
        if not changes:
            return self
        config = validate(self.config_class, {**self.config.model_dump(), **changes}, "backbone_config")
        changed = type(self)(config)
        load_state(changed, self.state_dict(), "backbone_config: its model")
        return changed

    def _layers(self, name: str) -> nn.ModuleList:
        return cast(nn.ModuleList, self.get_submodule(name))


def _collect_frozen(module: nn.Module, found: list[nn.Module]) -> tuple[bool, bool]:
    """Add the highest modules in `module` that have parameters, none of which trains. Returns whether it has
    any, and whether one trains."""
    first, has_any, trains = len(found), False, False
    for parameter in module.parameters(recurse=False):
        has_any, trains = True, trains or parameter.requires_grad
    for child in module.children():
        child_has_any, child_trains = _collect_frozen(child, found)
        has_any, trains = has_any or child_has_any, trains or child_trains
    if has_any and not trains:
        found[first:] = [module]
    return has_any, trains


class RetrievalBackbone(Backbone):
    """Embeds images and texts apart."""

    @classmethod
    def has_embeddings(cls, path: Path) -> bool:
        """Return whether published weights at `path` embed images and texts in one space, before they are
        trained any further."""
        return True

    @property
    def max_length(self) -> int:
        """Most tokens of a text, specials included."""
        return self.config.positions

    @property
    @abstractmethod
    def image_size(self) -> int: ...

    @abstractmethod
    def encode_images(self, images: Tensor) -> Ragged: ...

    @abstractmethod
    def embed_images(self, states: Ragged, *, normalize: bool) -> Tensor:
        """The rows of `encode_images` -> vectors (b, e), of length 1 if `normalize`."""

    @abstractmethod
    def embed_text(self, ids: Ragged, *, normalize: bool) -> Tensor:
        """Ids of n texts -> vectors (n, e), of length 1 if `normalize`."""


class FusionBackbone(Backbone):
    """Reads texts together with the memory that they are about: states of images, or of a premise."""

    @property
    def is_text_first(self) -> bool:
        """True if the text comes before the memory in the rows of `joint_states`."""
        return True

    @abstractmethod
    def encode_text(self, ids: Ragged, output_mask: Tensor | None = None) -> Tensor:
        """Ids of n texts -> states (T, d) of texts by themselves, as of a premise, or (R, d) of the
        tokens in `output_mask` (T,) of bool."""

    @abstractmethod
    def fused_cls(self, text: Ragged, memory: Ragged | None, per_text: int = 1) -> Tensor:
        """CLS states of texts together with what they are about.

        Args:
            text: ids, n rows.
            memory: n x per_text rows, of `encode_images` or `encode_text`; those of text i are rows
                i per_text ... . None: they are about nothing, and are read alone.
            per_text: how many images a text is about, each by itself (`num_images` of a task).
        Returns:
            (n per_text, d).
        """

    def hidden_states(
        self, text: Ragged, memory: Ragged, layers: Sequence[int], empty: bool = False
    ) -> tuple[list[Ragged], TokenSegments]:
        """States of all tokens after some of the layers, before the pooler.

        Args:
            text: ids, n rows.
            memory: n rows, as of `fused_cls`.
            layers: rising, the lowest is 1.
            empty: each row ends with a slot without a region; where rows have regions.
        Returns:
            For each of `layers` n rows (T, d); which of these tokens are what.
        """
        raise UserError(f"backbone={self.kind} gives no states of its layers")

    def check_layers(self, layers: Sequence[int]) -> None:
        """Raises UserError: `layers` are not some of the layers, rising."""
        if not layers or any(low >= high for low, high in pairwise([0, *layers, self.num_layers + 1])):
            raise UserError(
                f"layers {list(layers)}: {self.kind} has layers 1 to {self.num_layers}; name some, each "
                "once, rising"
            )

    def pool(self, cls: Tensor) -> Tensor:
        """CLS states (n, d) after the last layer -> what `fused_cls` returns."""
        return cls

    def joint_states(self, text: Ragged, memory: Ragged) -> Ragged:
        """Rows (T + S, d) of each text's states and its memory's after the last layer; arguments as of
        `hidden_states`."""
        raise UserError(f"backbone={self.kind} gives no states of texts and images in one space")


class RegionBackbone(FusionBackbone):
    """Reads region features in the place of images."""

    @abstractmethod
    def set_region_dim(self, features: int) -> None:
        """Make the model take region features so wide.

        Raises:
            UserError: it was trained on others.
        """

    @abstractmethod
    def embed_regions(self, regions: Ragged, tags: Ragged | None = None) -> Any:
        """Features and boxes (R, f + 7) of each image -> the memory of `fused_cls`. `tags`: ids of the names
        of each image's objects, where `row_parts` has "tags"."""


def model_files(model: nn.Module, backbone: Backbone, description: dict[str, Any]) -> Files:
    """Return `model.safetensors`, of tensors that are the model's own, and `config.json`: the description,
    with what was put into the backbone, and the name of the user's file that defines it, which is among them.
    """
    files: dict[str, Any] = {}
    if backbone.tuning:
        description = {**description, "tuning": backbone.tuning}
    if source := user_source(type(backbone)):
        # the code that ran, not what the file says by now: so the folder can be read wherever it is taken
        files[source.name] = source.content
        description = {**description, CODE_KEY: f"{source.name}:{type(backbone).__name__}"}
    files["config.json"] = (json.dumps(description, indent=2, ensure_ascii=False) + "\n").encode()
    return {**files, "model.safetensors": {name: x.detach() for name, x in model.state_dict().items()}}


def save_model(folder: Path, files: Files) -> None:
    """Write the files of a model.

    Raises:
        UserError: a weight is not finite; it is named, and nothing written.
    """
    # nothing is written before all of it is known to be good: a folder is a model or it is not there
    weights = files["model.safetensors"]
    assert not isinstance(weights, bytes)
    require_finite_file(folder / "model.safetensors", weights)
    folder.mkdir(parents=True, exist_ok=True)
    write_files(folder, files)


class StoredObjective(BaseModel, extra="allow"):
    """The part of a run's settings that names its losses."""

    weights: dict[str, Any] = {}


class StoredDescription(BaseModel, extra="allow"):
    """A model as its config.json describes it, as far as its kind goes by that; or the settings of a run."""

    model_type: str = ""
    code: str = ""  # CODE_KEY
    backbone: str | dict[str, Any] | None = None
    setting: str = ""
    fit: dict[str, Any] = {}
    objective: StoredObjective | None = None


class StoredExport(StoredDescription):
    """The config.json of an export."""

    polyglance: StoredDescription | None = None  # DESCRIPTION_KEY
    polyglance_run: StoredDescription | None = None  # RUN_KEY


def read_description(folder: Path) -> dict[str, Any]:
    """A model folder's config.json, or a run's; settings by the names that they have now.

    Raises:
        UserError: it is damaged, or another program's.
    """
    values = read_json_object(folder / "config.json", (), DESCRIPTION, shape=StoredExport)
    # an export has its description beside what `transformers` reads
    values = values.get(DESCRIPTION_KEY) or {k: v for k, v in values.items() if k != RUN_KEY}
    # a run keeps its settings where a model keeps its description
    return rename_settings("finetune" if "fit" in values else model_kind(values), values)


def read_run_settings(folder: Path) -> dict[str, Any]:
    """Return what an export has of the settings of its run; {} of what has none."""
    return read_json_object(folder / "config.json", (), DESCRIPTION, shape=StoredExport).get(RUN_KEY) or {}


def load_weights(model: M, folder: Path) -> M:
    """Load `folder`/model.safetensors into `model`.

    Raises:
        UserError: a key is missing, left over, of another shape or not finite; it is named.
    """
    load_state(model, read_weights(folder), folder / "model.safetensors")
    return model


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of `folder`/model.safetensors.

    Raises:
        UserError: it is no such file; one is not finite and named.
    """
    return read_tensors(folder / "model.safetensors")
