"""Readers of weights, tokenizers, masks and states that training stored."""

from pathlib import Path
from typing import Any

from tests.fuzz.reader import Reader


def example_safetensors(folder: Path) -> Path:
    import torch
    from safetensors.torch import save_file

    path = folder / "model.safetensors"
    save_file({"a.weight": torch.arange(12.0).reshape(3, 4), "a.bias": torch.ones(3)}, path)
    return path


def read_weights(path: Path) -> Any:
    from raylib.weights import read_tensors

    return read_tensors(path)


def load_safetensors(path: Path) -> Any:
    import numpy as np
    from safetensors.numpy import load

    tensors = load(path.read_bytes())
    assert all(np.isfinite(value).all() for value in tensors.values())
    return tensors


READERS = [
    Reader(
        name="safetensors",
        example=example_safetensors,
        read=read_weights,
        oracle=load_safetensors,
        covers=("raylib.weights:read_tensors",),
    ),
]
