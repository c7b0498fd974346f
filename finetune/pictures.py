"""What grounds a text, as it enters a batch: pixels, states of an image encoder that ran before, or region
features."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from finetune.model import LOCATIONS
from finetune.stores import PictureStore, RegionStore, locations, open_pictures, open_regions
from raylib.data.images import AugmentConfig, augment, resize
from raylib.data.states import States, write_states
from raylib.models.unified import UnifiedModel
from raylib.packed import Ragged

if TYPE_CHECKING:
    from finetune.config import FinetuneConfig

ENCODED = 64  # pictures through the image encoder at a time


class ImageSource:
    """Pictures of a store at `size` x `size`; in training augmented, if `config` says how."""

    def __init__(self, store: PictureStore, size: int, config: AugmentConfig | None = None):
        self.store, self.size, self.config = store, size, config

    @property
    def num_draws(self) -> int:
        """How many uniform draws the augmentation of one picture takes."""
        return self.config.draws if self.config else 0

    def read(self, names: Sequence[str], draws: np.ndarray | None = None) -> dict[str, Tensor]:
        """{"images": uint8 (n, size, size, 3)}; `draws` (n, d): augment by them."""
        images = np.empty((len(names), self.size, self.size, 3), np.uint8)
        for i, name in enumerate(names):
            picture = self.store.read(name)
            images[i] = (
                resize(picture, self.size)
                if draws is None
                else augment(picture, self.size, self.config, draws[i])
            )
        return {"images": torch.from_numpy(images)}


class PrecomputedFeatures:
    """States of pictures of a store that a frozen image encoder has made before."""

    num_draws = 0

    def __init__(self, states: States, store: PictureStore):
        self.states, self.store = states, store

    def read(self, names: Sequence[str], draws: None = None) -> dict[str, Ragged]:
        """{"states": n rows (T, d)}."""
        return {"states": self.states.read(names)}


class RegionFeatures:
    """Detector features with their locations side by side. `tagged`: the model reads tags of the objects
    too."""

    num_draws = 0

    def __init__(self, store: RegionStore, tagged: bool = False):
        self.store, self.tagged = store, tagged

    def read(self, names: Sequence[str], draws: None = None) -> dict[str, Ragged | list]:
        """{"regions": n rows (R, f + 7)}; if `tagged`, with "tags": the names of each picture's objects."""
        parts, tags = [], []
        for name in names:
            regions = self.store.read(name)
            tags.append(regions.tags)
            where = locations(regions.boxes, regions.height, regions.width, LOCATIONS)
            parts.append(np.concatenate([regions.features, where], 1))
        lengths = torch.tensor([len(part) for part in parts])
        rows = {"regions": Ragged(torch.from_numpy(np.concatenate(parts).astype(np.float32)), lengths)}
        return rows | {"tags": tags} if self.tagged else rows


VisualSource = ImageSource | PrecomputedFeatures | RegionFeatures


def open_visual(config: "FinetuneConfig", size: int, tagged: bool = False) -> ImageSource | RegionFeatures:
    """The images of a run, or the region features in their place; `tagged`: with the names of the objects."""
    if config.regions:
        return RegionFeatures(open_regions(config.regions), tagged)
    return ImageSource(open_pictures(config.images_path), size, config.augment)


def precompute_features(
    model: UnifiedModel, pixels: ImageSource, names: Iterable[str], folder: Path, bf16: bool = False
) -> States:
    """All workers together: states of the pictures `names` after `model`'s image encoder, kept in `folder`;
    in float16 if they were made in bf16, which is no finer."""
    device = next(model.parameters()).device

    def encode(chunk: Sequence[str]) -> Ragged:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            states = model.encode_images(pixels.read(chunk)["images"].to(device))
        return states.with_values(states.values.float())

    training = model.training
    model.eval()
    with torch.inference_mode():
        states = write_states(
            folder, sorted(set(names)), encode, ENCODED, torch.float16 if bf16 else torch.float32
        )
    model.train(training)
    return states
