"""A pretrained model with the head of a classification task.

A text is grounded in what it is about, image or premise, by the unified encoder's cross-attention; its CLS
state goes to the head. Two images ground it twice, and the head sees both states side by side (paper 2,
appendix B.2.3). A head that generates answers (`raylib.models.decoder`) sees the states of all tokens.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import Field, NonNegativeInt, model_validator
from torch import Tensor, nn

from raylib import checkpoint
from raylib.config import Config, Size, user_files, validate
from raylib.errors import UserError
from raylib.lock import is_under_way
from raylib.models import find_backbone, find_model, find_tokenizer, peft, stored_backbone
from raylib.models.attention import Attention
from raylib.models.base import (
    Backbone,
    FusionBackbone,
    RegionBackbone,
    load_weights,
    model_files,
    read_description,
    read_run_settings,
    save_model,
)
from raylib.models.decoder import AnswerDecoder, DecoderConfig
from raylib.models.heads import Classifier
from raylib.models.layers import Memory, init_weights
from raylib.models.preprocessor import Preprocessing
from raylib.models.single_stream import RegionEmbedding
from raylib.models.unified import UnifiedModel
from raylib.packed import Ragged, TokenSegments
from raylib.renames import model_kind
from raylib.saving import Files
from raylib.settings import SQUEEZED, ClassifierConfig, FitConfig, stored_fit
from raylib.weights import limit_model

log = logging.getLogger(__name__)


class StoredModel(Config):
    """The config.json of a `FinetuneModel`; "answers": of each label, <s>, tokens, </s>."""

    takes_urls = ("labels", "backbone")  # they are names, whatever they look like

    backbone: str
    sizes: dict[str, Any]
    labels: tuple[str, ...] = Field(min_length=1)
    num_images: int = Field(gt=0, le=16)
    head_dropout: float = Field(ge=0, le=1)
    classifier: ClassifierConfig = ClassifierConfig()
    regions: Size | None = None
    answers: tuple[Annotated[list[NonNegativeInt], Field(min_length=2)], ...] | None = None
    decoder: DecoderConfig = DecoderConfig()

    @model_validator(mode="after")
    def _fits(self) -> "StoredModel":
        if self.answers is not None and len(self.answers) != len(self.labels):
            raise ValueError(f"{len(self.answers)} answers for {len(self.labels)} labels")
        return self


class FinetuneModel(nn.Module):
    """`backbone` and a head over `labels`. `num_images`: how many ground a text at once (a premise counts as
    one); `regions`: the width of region features, if these take the place of images; `answers`: token ids
    of the labels, for a head that generates them (`is_generative`), and ranks them as `decoder` says;
    `classifier`: the head that does not."""

    def __init__(
        self,
        backbone: FusionBackbone,
        labels: tuple[str, ...],
        num_images: int,
        dropout: float,
        regions: int | None = None,
        answers: Sequence[Sequence[int]] | None = None,
        decoder: DecoderConfig | None = None,
        classifier: ClassifierConfig | None = None,
    ):
        super().__init__()
        self.backbone, self.labels, self.num_images = backbone, labels, num_images
        self.is_generative, self.has_new_head = answers is not None, True
        self.description: dict[str, Any] = {
            "labels": list(labels),
            "num_images": num_images,
            "head_dropout": dropout,
            "regions": regions,
        }
        classifier = classifier or ClassifierConfig()
        self.head: Classifier | AnswerDecoder
        if answers is not None:
            decoder = decoder or DecoderConfig()
            self.description |= {"answers": [list(ids) for ids in answers], "decoder": decoder.model_dump()}
            self.head = AnswerDecoder(cast(UnifiedModel, backbone), answers, decoder)
        else:
            self.description["classifier"] = classifier.model_dump()
            inputs = num_images * backbone.width
            self.head = Classifier(inputs, backbone.width, len(labels), classifier, dropout)
        # a backbone that reads regions has an embedding of its own for them
        self.regions: RegionEmbedding | None = None
        if regions and not isinstance(backbone, RegionBackbone):
            self.regions = RegionEmbedding(regions, backbone.width).apply(init_weights)
        backbone.freeze_unused("generation" if self.is_generative else "classification")

    def forward(self, batch: dict) -> Tensor:
        """Logits (b, labels) of {"text": Ragged ids (b rows)} and what grounds it, of which row i's are rows
        i c ... i c + c - 1: "images" uint8 (b c, H, W, 3), "states" Ragged (of a ViT that ran before; with
        "state_rows" (b c,) on the CPU, which of them each row's is),
        "regions" Ragged (f + 7 wide), with "tags" Ragged ids where the backbone reads them, or "premise"
        Ragged ids. Of a decoder: log-probabilities, -inf at labels that are no candidates."""
        if isinstance(self.head, AnswerDecoder):
            return self.head.rank(*self._question(batch))
        return self.head(self.fused_cls(batch["text"], self._shared_memory(batch)))

    def answer_loss(self, batch: dict) -> Tensor:
        """A decoder's loss, summed over the batch: that of `forward` with "scores" (b, labels)."""
        assert isinstance(self.head, AnswerDecoder)
        return self.head.loss(*self._question(batch), batch["scores"])

    def _question(self, batch: dict) -> tuple[UnifiedModel, Ragged]:
        """Return what a decoder reads: the backbone, and the states of the grounded questions."""
        backbone = cast(UnifiedModel, self.backbone)  # no other has cross-attention
        return backbone, backbone.fused_states(batch["text"], self._shared_memory(batch))

    def memory(self, batch: dict) -> Ragged | None:
        """Return what texts of the batch attend to, as states; None: they are about nothing."""
        if "states" in batch:
            # made once in float32 or float16, while the model may be in bf16
            return batch["states"].with_values(batch["states"].values.to(next(self.head.parameters()).dtype))
        if "images" in batch:
            return self.backbone.encode_images(batch["images"])
        if "regions" in batch:
            regions = batch["regions"]
            if self.regions is not None:
                return regions.with_values(self.regions(regions.values))
            return cast(RegionBackbone, self.backbone).embed_regions(regions, batch.get("tags"))
        if "premise" in batch:
            return batch["premise"].with_values(self.backbone.encode_text(batch["premise"]))
        return None

    def _shared_memory(self, batch: dict) -> Any:
        """Return `memory`, of a batch with "state_rows" in the rows of its texts; a backbone that attends to
        it from outside reads and projects what several texts are about once."""
        memory, rows = self.memory(batch), batch.get("state_rows")
        if memory is None or rows is None:
            return memory
        is_outside = isinstance(self.backbone, UnifiedModel)
        return Memory(memory, rows) if is_outside else memory.select_rows(rows)

    def fused_cls(self, text: Ragged, memory: Any) -> Tensor:
        """CLS states of each text with each of its c images, side by side: (b, c d)."""
        return self.backbone.fused_cls(text, memory, per_text=self.num_images).view(len(text.lengths), -1)

    def hidden_states(
        self, batch: dict, layers: Sequence[int], empty: bool = False
    ) -> tuple[list[Ragged], TokenSegments]:
        """States of all tokens of each text in the one image that grounds it, after some of the layers
        (`raylib.models`). `empty`: of a backbone whose rows hold regions, and of a slot without one."""
        memory = self.memory(batch)
        assert memory is not None, "a text about nothing has no rows with an image's"
        return self.backbone.hidden_states(batch["text"], memory, layers, empty)

    def answer(self, last: Ragged) -> Tensor:
        """Logits (b, labels) from the states after the last layer: as `forward`, where one image grounds a
        text."""
        return self.head(self.backbone.pool(last.first()))

    @property
    def num_layers(self) -> int:
        return self.backbone.num_layers

    @property
    def num_fusion_layers(self) -> int:
        return self.backbone.num_fusion_layers

    def depth_of(self, name: str) -> int | None:
        """Return the depth by the backbone's `depth_of`; None for the head and regions."""
        return (
            self.backbone.depth_of(name.removeprefix("backbone.")) if name.startswith("backbone.") else None
        )

    def part_names(self) -> dict[str, str]:
        """Return the part of each parameter, by the backbone's `part_names`; "head" outside of it."""
        parts = {f"backbone.{name}": part for name, part in self.backbone.part_names().items()}
        return {name: parts.get(name, "head") for name, _ in self.named_parameters()}

    def new_parameters(self) -> frozenset[str]:
        """Return the names of parameters that the weights to start from lack: of a classifier, and of the
        embedding of regions; a decoder begins as a copy of the backbone's layers."""
        if not self.has_new_head:
            return frozenset()
        copied = ("backbone.", "head.layers.") if self.is_generative else ("backbone.",)
        return frozenset(name for name, _ in self.named_parameters() if not name.startswith(copied))

    def prunable(self) -> list[str]:
        """Names of the matrices that pruning may take: the backbone's, never the head's."""
        return [f"backbone.{name}" for name in self.backbone.prunable()]

    def files(self) -> Files:
        """Return `config.json` and `model.safetensors`."""
        description = {
            "model_type": "polyglance-finetuned",
            **self.description,
            "backbone": self.backbone.kind,
            "sizes": self.backbone.sizes_to_store(),
        }
        return model_files(self, self.backbone, description)

    def save(self, folder: Path | str) -> None:
        """Write `files` into a folder."""
        save_model(Path(folder), self.files())

    @classmethod
    def from_pretrained(cls, folder: Path, name: str = "") -> "FinetuneModel":
        """The model that `save` wrote into `folder`; `name` as of `stored_backbone`."""
        values, where = read_description(folder), folder / "config.json"
        kind = stored_backbone(values, folder, name)
        stored = {key: values[key] for key in StoredModel.model_fields if key in values}
        described = validate(StoredModel, stored, str(where)).model_dump()
        tuning = peft.check_stored(values.get("tuning"), where)
        with limit_model(where, folder):
            backbone = cast(
                FusionBackbone, kind.from_sizes(described["sizes"], described["backbone"], folder)
            )
            model = cls.from_description(described, backbone)
            # what was put in has weights of its own, so it goes in before these are loaded
            peft.insert_stored(model, tuning)
        model.has_new_head = False
        return load_weights(model, folder)

    @classmethod
    def from_description(cls, values: Mapping[str, Any], backbone: FusionBackbone) -> "FinetuneModel":
        """The model of a stored config.json, on a backbone of its sizes, with random weights."""
        return cls(
            backbone,
            tuple(values["labels"]),
            values["num_images"],
            values["head_dropout"],
            values["regions"],
            values.get("answers"),
            DecoderConfig(**values.get("decoder", {})),
            ClassifierConfig(**values.get("classifier", {})),
        )


def load_backbone(
    path: Path | str,
    kind: str = "unified",
    vision: str | None = None,
    changes: Mapping[str, Any] | None = None,
    preprocessing: Literal["model", "opencv"] = "model",
) -> Backbone:
    """The pretrained model that `path` means: an export, a run, a fine-tuned model (its head is left out), or
    a folder of weights that the backbone `kind` can start from (`raylib.models`), whose image encoder is
    `vision`, or random.

    Args:
        changes: of the config of weights that are not ours (`Backbone.change_config`).
        preprocessing: of images, the model's own, or all of an image squeezed by OpenCV.
    Raises:
        UserError: none of these, or weights that do not fit; a model of ours with another config.
    """
    backbone = _load_backbone(path, kind, vision, changes or {})
    if preprocessing == "opencv":
        if backbone.preprocess != SQUEEZED:
            stats = backbone.pixel_mean, backbone.pixel_std
            backbone.set_preprocessing(Preprocessing(SQUEEZED, *stats))
    elif is_foreign(Path(path)):
        published = backbone.published_preprocessing(Path(path), Path(vision) if vision else None)
        if published:
            backbone.set_preprocessing(published)
    return backbone


def _load_backbone(path: Path | str, kind: str, vision: str | None, changes: Mapping[str, Any]) -> Backbone:
    if is_foreign(Path(path)):
        backbone = find_backbone(kind).import_weights(Path(path), Path(vision) if vision else None)
        backbone = backbone.change_config(changes)
        if backbone.open_choice:
            log.warning("%s: %s", path, backbone.open_choice)
        if user_files(kind):
            backbone.check_declaration()
        return backbone
    folder = find_evaluated(path)
    description = read_description(folder)
    stored = _kind(description, Path(path), folder)
    if kind != "unified" and find_backbone(kind).kind != stored:
        raise UserError(
            f"{path} is a model of ours on the backbone {stored}; backbone={kind} needs weights of that kind"
        )
    if vision:
        raise UserError(f"{path} has an image encoder; leave vision={vision} out")
    if description.get("model_type") == "polyglance-finetuned":
        backbone = FinetuneModel.from_pretrained(folder, kind).backbone
    else:
        backbone = stored_backbone({**description, "backbone": stored}, folder, kind).from_pretrained(folder)
    own = backbone.config.model_dump()
    if differ := {name: own.get(name) for name, value in (changes or {}).items() if own.get(name) != value}:
        raise UserError(
            f"{path} was trained with other values than backbone_config asks for "
            f"({', '.join(f'{name}={value}' for name, value in differ.items())}); set "
            f"{' '.join(f'backbone_config.{name}=null' for name in differ)}"
        )
    return backbone


def _kind(description: dict, path: Path, folder: Path) -> str:
    """The backbone of the model in `folder`, one of the run `path`. Retrieval runs of CCLM once stored theirs
    as unified: what they are is in the run's settings."""
    kind = description.get("backbone", model_kind(description))
    if kind == "unified" and "backbone" not in description:
        run = find_run(path, folder)
        stored = read_description(run).get("backbone") if run else None
        if stored in UnifiedModel.stored_kinds:
            return stored
    return kind


def trained_languages(path: Path) -> list[str]:
    """Return the languages of a run of fine-tuning that trained a model for each, in folders of their names;
    [] of any other model."""
    settings = read_description(path) if (path / "config.json").is_file() else {}
    # the model of one language has checkpoints, and its stages folders, of its own
    is_apart = settings.get("setting") in ("few_shot", "single_language")
    if not is_apart or any((path / checkpoint.FOLDER).glob("step_*")):
        return []
    return sorted(p.parent.name for p in path.glob("*/config.json") if (p.parent / "part.json").is_file())


def model_for_language(path: str, language: str) -> str:
    """Return the path of the model that a training in `language` starts from: of a run that trained one for
    each language, the one for it; else the model itself.

    Raises:
        UserError: the run has none for it.
    """
    languages = trained_languages(Path(path))
    if languages and language not in languages:
        raise UserError(
            f"model={path}: it has trained a model each for {', '.join(languages)}, and none for "
            f"'{language}'; set languages={','.join(languages)}, or give another model="
        )
    return str(Path(path) / language) if languages else path


def find_run(path: Path, folder: Path) -> Path | None:
    """The run that the model in `folder`, found at `path`, is of; None of an export."""
    # a checkpoint is RUN/checkpoints/STEP, of earlier versions also RUN/best
    for place in (path, folder.parent, folder.parent.parent):
        if (place / "config.json").is_file() and "fit" in read_description(place):
            return place
    return None


def find_fit(path: Path, folder: Path) -> FitConfig | None:
    """Return the precision in which the model in `folder`, found at `path`, was trained; None: not known."""
    run = find_run(path, folder)
    if run:
        return stored_fit(read_description(run), run)
    return stored_fit(read_run_settings(folder), folder)


def tokenizer_at(path: Path | str) -> Path:
    """The tokenizer file of the model at `path` (`load_backbone`)."""
    path = Path(path)
    if is_foreign(path):
        return find_tokenizer(path if path.is_dir() else path.parent)
    return find_tokenizer(path if (path / "config.json").is_file() else find_evaluated(path))


def is_foreign(path: Path) -> bool:
    """Return whether weights that are not ours lie at `path`: a file, a folder with another program's
    config.json, or one with files of weights as PyTorch writes them."""
    if not path.is_dir():
        return path.is_file()
    stored = read_description(path).get("model_type") if (path / "config.json").is_file() else None
    if stored:
        return not str(stored).startswith("polyglance")
    return any(file.suffix in (".bin", ".pt", ".pth", ".th") for file in path.iterdir())


def find_evaluated(path: Path | str) -> Path:
    """Return the folder of `find_model`; of a fine-tuning run, the checkpoint that its results come from."""
    path = Path(path)
    # a run that chose its best epoch went on training after it; one that averages has its mean beside them
    best, average = checkpoint.find_best(path), path / checkpoint.AVERAGE
    if average.is_dir() and read_description(path).get("select") == checkpoint.AVERAGE:
        return average
    return best if best and read_description(path).get("select") == "best" else find_model(path)


def hold_model(path: Path | str) -> Path:
    """Return the checkpoint that `find_evaluated` names now, of a run that is under way: it stays where it is
    until this process ends, whatever the run keeps; any other path as it is."""
    path = Path(path)
    run = path.parent if path.name == "best" else path
    while (run / checkpoint.FOLDER).is_dir() and is_under_way(run):
        folder = find_evaluated(path)
        if checkpoint.hold_checkpoint(folder) or not folder.is_relative_to(run / checkpoint.FOLDER):
            return folder
    return path


def weights_of(path: Path | str) -> Path:
    """Return what is read of the model at `path`: of ours, the file of weights alone, for a run's folder goes
    on changing."""
    path = Path(path)
    return path if is_foreign(path) else find_evaluated(path) / "model.safetensors"


def freeze(backbone: Backbone, parts: tuple[str, ...]) -> None:
    """Take parts of the model out of training for good: their gradients are never computed.

    Raises:
        UserError: this backbone has no such part.
    """
    known = backbone.freezable_parts()
    for part in parts:
        if part not in known:
            raise UserError(f"freeze: {backbone.kind} has no part '{part}'; it has: {', '.join(known)}")
        known[part].requires_grad_(False)


def set_dropout(backbone: Backbone, hidden: float | None, attention: float | None) -> None:
    """Set the dropout of a backbone outside of its image encoder: of embeddings and hidden states, and of
    attention; None leaves it as it is."""
    encoder = backbone.image_encoder
    outside = set() if encoder is None else set(encoder.modules())
    for module in backbone.modules():
        if module in outside:
            continue
        if hidden is not None and isinstance(module, nn.Dropout):
            module.p = hidden
        if attention is not None and isinstance(module, Attention):
            module.dropout = attention
