"""Which tensors of a checkpoint a model has taken: none may be left over, missing or of another shape
unnoticed."""

import re

import torch
from torch import Tensor, nn

from raylib.errors import UserError


class Taken:
    """A checkpoint's tensors, and which of them have been used, are missing or do not fit."""

    def __init__(self, weights: dict[str, Tensor], folder):
        self.weights, self.folder = weights, folder
        self.used: set[str] = set()
        self.wrong: list[str] = []

    def __call__(self, name: str) -> Tensor:
        self.used.add(name)
        if name not in self.weights:
            raise UserError(f"{self.folder}: tensor '{name}' is missing")
        return self.weights[name]

    def copy(self, to: Tensor, *names: str) -> None:
        """Copy the tensors `names`, one below the other, into `to`; what is wrong is kept for `finish`."""
        self.used.update(names)
        absent = [f"missing {name}" for name in names if name not in self.weights]
        if not absent:
            value = torch.cat([self.weights[name] for name in names])
            if value.shape == to.shape:
                to.copy_(value)
                return
            absent = [f"{' + '.join(names)} is {tuple(value.shape)}, wanted {tuple(to.shape)}"]
        self.wrong += absent

    def copy_layer(self, layer: nn.Module, name: str) -> None:
        self.copy(layer.weight, f"{name}.weight")
        self.copy(layer.bias, f"{name}.bias")

    def copy_attention(self, attention: nn.Module, heads: str, output: str) -> None:
        self.copy_layer(attention.query, f"{heads}.query")
        for part in ("weight", "bias"):
            self.copy(getattr(attention.key_value, part), f"{heads}.key.{part}", f"{heads}.value.{part}")
        self.copy_layer(attention.output, output)

    def finish(self, unused: list[str]) -> None:
        left = [k for k in self.weights if k not in self.used and not any(re.match(p, k) for p in unused)]
        wrong = self.wrong + [f"unused {k}" for k in left]
        if wrong:
            raise UserError(f"{self.folder} does not fit the model: {'; '.join(wrong)}")
