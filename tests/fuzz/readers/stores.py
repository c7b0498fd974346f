"""Readers of images and of region features."""

import io
import zipfile
from pathlib import Path
from typing import Any

from tests.fuzz.reader import Reader


def example_npz(folder: Path) -> Path:
    import numpy as np

    store = folder / "regions"
    store.mkdir()
    for number, name in enumerate(("1", "2")):
        features = np.arange(6, dtype=np.float32).reshape(2, 3) + number
        boxes = np.array([[0, 0, 10, 20], [10, 5, 40, 20]], np.float32)
        np.savez(store / f"{name}.npz", features=features, boxes=boxes, img_h=20, img_w=40)
    return store


def read_npz(path: Path) -> Any:
    from finetune.stores.regions import open_regions

    store = open_regions(path)
    return {name: store.read(name)._asdict() for name in ("1", "2")}


def load_npz(path: Path) -> Any:
    import numpy as np

    found = {}
    for name in ("1", "2"):
        with zipfile.ZipFile(path / f"{name}.npz") as archive:
            arrays = {
                key: np.load(io.BytesIO(archive.read(f"{key}.npy")), allow_pickle=False)
                for key in ("features", "boxes", "img_h", "img_w")
            }
        boxes = arrays["boxes"].astype(np.float32).reshape(-1, 4)
        found[name] = {
            "features": arrays["features"].astype(np.float32).reshape(len(boxes), -1),
            "boxes": boxes,
            "height": float(arrays["img_h"]),
            "width": float(arrays["img_w"]),
            "tags": (),
        }
    return found


READERS = [
    Reader(
        name="regions_npz",
        example=example_npz,
        read=read_npz,
        oracle=load_npz,
        targets=("1.npz",),
        covers=("finetune.stores.regions:_Npz.lookup",),
    ),
]
