"""Images by id, in a folder or a tar; and what a text is about as it enters a batch: images, states of an
image encoder that ran before, or region features."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from finetune.formats.items import ItemList
from finetune.stores import BOX_DIM, SUFFIXES, Regions, folders_of, may_hold, normalise_boxes, stem
from finetune.stores.regions import RegionStore, open_regions
from raylib.cache import EncoderStates, open_once, precompute_features, remove_encoder_states
from raylib.data.augmentation import augment_image, count_uniforms
from raylib.data.image_headers import MAX_BYTES
from raylib.data.images import BadImage, decode_image, preprocess_image, read_image_file
from raylib.data.index import FileBytes
from raylib.data.tars import TarScan
from raylib.display import progress
from raylib.errors import UserError, error_line
from raylib.fileio import nfc
from raylib.packed import Ragged
from raylib.randomness import string_key
from raylib.settings import MAX_PIXELS, SQUEEZED, AugmentConfig, PreprocessConfig

if TYPE_CHECKING:
    from finetune.config import FinetuneConfig

log = logging.getLogger(__name__)


class ImageFile(NamedTuple):
    """Position of an image's bytes: its path in the store, the file, the offset in it and the size; -1 for a
    whole file."""

    path: str
    file: str
    offset: int = 0
    size: int = -1


class ImageStore:
    """Images by id. An id may end like a file name or not, and MSCOCO's may be a name or its number.
    Folders in an id count where images of several folders have one name, as MaRVL's of several languages
    do. May be sent to, and forked into, other processes."""

    def __init__(self, path: Path, files: dict[str, list[ImageFile]]):
        """files: {id without folder and ending: images of this name}."""
        self.path, self.max_pixels = path, MAX_PIXELS
        # in the order of hashes of their names: found by bisection, and shared by all processes, as arrays
        # are and a dict is not
        by_hash = sorted((_name_hash(name), name) for name in files)
        self.hashes = np.array([value for value, _ in by_hash], np.int64)
        self.files = ItemList((name, files[name]) for _, name in by_hash)
        self._tar: FileBytes | None = None
        self._identities: dict[str, int] = {}

    def has(self, name: str) -> bool:
        """Tell whether there is an image of this id."""
        return bool(self._find(name))

    def read(self, name: str) -> np.ndarray:
        """Read the image, uint8 RGB (H, W, 3).

        Raises:
            BadImage: no such id, or a file that is gone or does not decode. UserError: several images (they
                are named); a tar that became shorter.
        """
        return decode_image(self._bytes(name), f"{self.path}, {name}", self.max_pixels)

    def identity(self, name: str) -> int:
        """63-bit hash of the encoded bytes, as of a sample in shards: one image may have several ids, and lie
        in several files.

        Raises:
            BadImage: no such id. UserError: several.
        """
        if name not in self._identities:
            self._identities[name] = string_key(self._bytes(name))
        return self._identities[name]

    def _bytes(self, name: str) -> bytes:
        images = self._find(name)
        if not images:
            raise BadImage(f"{self.path}: no image '{name}'; check images=")
        if len(images) > 1:
            paths = ", ".join(image.path for image in images[:3]) + (", ..." if len(images) > 3 else "")
            raise UserError(f"{self.path}: {len(images)} images called '{name}': {paths}; leave one")
        (image,) = images
        if image.size < 0:
            try:
                return read_image_file(image.file)
            except FileNotFoundError:  # since the store was opened
                raise BadImage(f"{image.file}: gone since the run began") from None
            except OSError as error:
                line = error_line(error, image.file)
                raise BadImage(str(line)) if isinstance(line, UserError) else line or error from None
        if image.size > MAX_BYTES:
            raise BadImage(f"{self.path}, {name}: {image.size:,} bytes, and an image may have {MAX_BYTES:,}")
        if self._tar is None:
            self._tar = FileBytes(Path(image.file))
        return self._tar.read(image.size, image.offset)

    def _find(self, name: str) -> list[ImageFile]:
        found, folders = self._images_called(stem(name)), folders_of(name)
        if len(found) > 1:
            return [image for image in found if folders <= folders_of(image.path)]
        return [image for image in found if may_hold(name, folders_of(image.path))]

    def _images_called(self, name: str) -> list[ImageFile]:
        value = _name_hash(name)
        place = int(self.hashes.searchsorted(value))
        while place < len(self.hashes) and self.hashes[place] == value:
            other, images = self.files[place]
            if other == name:
                return images
            place += 1
        return []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tar": None}


def _name_hash(name: str) -> int:
    return string_key(name.encode(errors="surrogatepass"))  # a file's name need not be UTF-8


def open_images(path: Path | str, max_pixels: int = MAX_PIXELS) -> ImageStore:
    """Open the images of a folder and all that is below it, or of a tar, which a process reads once; of an
    image of more than `max_pixels` nothing is read.

    Raises:
        UserError: neither; a tar that is damaged, or compressed; no image in it; two images of one id in
            one folder (both are named).
    """
    store = copy(open_once(Path(path), _open_images))  # the list of images is shared, the limit is not
    store.max_pixels = max_pixels
    return store


def _open_images(path: Path) -> ImageStore:
    if path.is_dir():
        found = _list_folder(path)
    elif path.suffix == ".tar" and path.is_file():
        members = TarScan(path, hashes=False).files.items()
        found = (ImageFile(name, str(path), offset, size) for name, (offset, size) in members)
    else:
        # the default is DATA/images.tar, or else this
        tar = "" if path.exists() or path.suffix == ".tar" else f", and no {path.name}.tar beside it"
        raise UserError(f"{path}: neither a folder nor a .tar of images{tar}; give it with images=")
    # names are compared without folder and ending; two in one folder could not be told apart later
    files: dict[str, list[ImageFile]] = {}
    for image in progress(found, f"list {path}", unit="files"):
        if image.path.lower().endswith(SUFFIXES):
            others = files.setdefault(stem(image.path), [])
            for other in others:
                if nfc(os.path.dirname(other.path)) == nfc(os.path.dirname(image.path)):
                    names = " and ".join(sorted((other.path, image.path)))
                    raise UserError(f"{path}: two images called '{stem(other.path)}': {names}; leave one")
            others.append(image)
    if not files:
        raise UserError(f"{path}: no images ({', '.join(SUFFIXES)}) in it")
    return ImageStore(path, files)


def _list_folder(path: Path) -> Iterator[ImageFile]:
    """Every file below `path`. A link to nothing is none (git-annex leaves such)."""
    for folder, _, files in os.walk(path, followlinks=True):
        with os.scandir(folder) as entries:  # which knows links without looking at each file
            links = {entry.name for entry in entries if entry.is_symlink()}
        for file in files:
            full_path = os.path.join(folder, file)
            if file not in links or os.path.exists(full_path):
                yield ImageFile(os.path.relpath(full_path, path), full_path)


class ImageSource:
    """Images of a store at `size` x `size`, prepared as `preprocess` says; in training augmented, if `config`
    says how."""

    def __init__(
        self,
        store: ImageStore,
        size: int,
        config: AugmentConfig | None = None,
        preprocess: PreprocessConfig = SQUEEZED,
    ):
        self.store, self.size, self.config, self.preprocess = store, size, config, preprocess

    @property
    def num_draws(self) -> int:
        """Number of uniform draws that the augmentation of one image takes."""
        return count_uniforms(self.config) if self.config else 0

    def read(self, names: Sequence[str], draws: np.ndarray | None = None) -> dict[str, Any]:
        """Read {"images": uint8 (n, size, size, 3)}; `draws` (n, d): augment by them.

        Raises:
            BadImage: an image is missing or does not decode.
        """
        images = np.empty((len(names), self.size, self.size, 3), np.uint8)
        for i, name in enumerate(names):
            image = self.store.read(name)
            if draws is None or self.config is None:
                images[i] = preprocess_image(image, self.size, self.preprocess)
            else:
                images[i] = augment_image(image, self.size, self.config, draws[i])
        return {"images": torch.from_numpy(images)}

    def read_usable(self, names: Sequence[str]) -> tuple[torch.Tensor, dict[str, str]]:
        """(images (n, size, size, 3), black in the place of each that cannot be used, {its name: why})."""
        try:
            return self.read(names)["images"], {}
        except BadImage:  # which are these?
            images, faults = torch.zeros(len(names), self.size, self.size, 3, dtype=torch.uint8), {}
        for i, name in enumerate(names):
            try:
                images[i] = self.read([name])["images"][0]
            except BadImage as error:
                faults[name] = str(error)
        return images, faults


class PrecomputedFeatures:
    """States of a store's images that a frozen image encoder has made before."""

    num_draws = 0

    def __init__(self, states: EncoderStates, store: ImageStore):
        self.states, self.store = states, store

    def read(self, names: Sequence[str], draws: np.ndarray | None = None) -> dict[str, Any]:
        """Read {"states": n rows (T, d)}.

        Raises:
            BadImage: there was no image to be encoded.
        """
        self.require_usable(names)
        return {"states": self.states.read(names)}

    def require_usable(self, names: Sequence[str]) -> None:
        """Raise BadImage where one of them could not be read when it was to be encoded."""
        if fault := next((self.states.faults[name] for name in names if name in self.states.faults), None):
            raise BadImage(fault)


class SharedFeatures(PrecomputedFeatures):
    """States that a model reads once for all texts of a batch that are about the same image."""

    def read(self, names: Sequence[str], draws: np.ndarray | None = None) -> dict[str, Any]:
        """Read {"states": rows (T, d) of the different images, "state_rows": the row of each of `names`}."""
        self.require_usable(names)
        place = {name: i for i, name in enumerate(dict.fromkeys(names))}
        return {
            "states": self.states.read(list(place)),
            "state_rows": torch.tensor([place[name] for name in names]),
        }


class RegionFeatures:
    """Detector features with their boxes side by side. `has_tags`: the model reads tags of the objects
    too. `limit`: of an image's regions the first so many are read."""

    num_draws = 0

    def __init__(self, store: RegionStore, has_tags: bool = False, limit: int | None = None):
        self.store, self.has_tags, self.limit = store, has_tags, limit

    def read(self, names: Sequence[str], draws: np.ndarray | None = None) -> dict[str, Any]:
        """Read {"regions": n rows (R, f + 7)}; if `has_tags`, with "tags": the names of each image's
        objects."""
        return join_regions([self.store.read(name) for name in names], self.has_tags, self.limit)


def join_regions(
    images: Sequence[Regions], has_tags: bool = False, limit: int | None = None
) -> dict[str, Any]:
    """Region features of images as a model reads them (`RegionFeatures`)."""
    if limit:
        images = [r._replace(features=r.features[:limit], boxes=r.boxes[:limit]) for r in images]
    lengths, width = [len(regions.boxes) for regions in images], images[0].features.shape[1]
    values, start = np.empty((sum(lengths), width + BOX_DIM), np.float32), 0
    for regions, length in zip(images, lengths, strict=True):
        rows = values[start : start + length]
        rows[:, :width] = regions.features
        rows[:, width:] = normalise_boxes(regions.boxes, regions.height, regions.width)
        start += length
    joined = {"regions": Ragged(torch.from_numpy(values), torch.tensor(lengths))}
    return joined | {"tags": [regions.tags for regions in images]} if has_tags else joined


VisualSource = ImageSource | PrecomputedFeatures | RegionFeatures


def open_visual(
    config: "FinetuneConfig",
    size: int,
    has_tags: bool = False,
    preprocess: PreprocessConfig = SQUEEZED,
) -> ImageSource | RegionFeatures:
    """Open the images of a run, prepared as `preprocess` says, or the region features in their place;
    `has_tags`: with the names of the objects."""
    if config.regions:
        return RegionFeatures(open_regions(config.regions), has_tags, config.max_regions)
    images = open_images(config.images_path, config.max_pixels)
    return ImageSource(images, size, config.augment, preprocess)


@contextmanager
def encoded_images(
    model: Any, visual: VisualSource | None, names: Callable[[], Iterable[str]], folder: Path, bf16: bool
) -> Iterator[VisualSource | None]:
    """Encode images once, all of `names` together: their states lie in `folder` inside the block. Regions,
    and images that were encoded before, are left as they are."""
    if not isinstance(visual, ImageSource):
        yield visual
        return
    remove_encoder_states(folder)  # what a killed evaluation has left is another model's
    try:
        states = precompute_features(model, visual, names(), folder, bf16)
        yield PrecomputedFeatures(states, visual.store)
    finally:
        remove_encoder_states(folder)
