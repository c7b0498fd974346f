"""The classifier on the state that an image and a text end in, with the heads of public code as settings."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raylib.models.layers import init_weights
from raylib.precision import exact_linear
from raylib.settings import ClassifierConfig

INIT_STD = 0.02  # of BERT's weights


class Classifier(nn.Module):
    """One linear layer, or two with an activation and a layer norm between them."""

    def __init__(self, inputs: int, width: int, labels: int, config: ClassifierConfig, dropout: float = 0.0):
        """inputs: width of the states side by side; width: of one of them. dropout: of the hidden layer."""
        super().__init__()
        self.config = config
        self.pooled_dropout = nn.Dropout(config.pooled_dropout)
        outputs = inputs
        if config.layers == 2:
            outputs = max(1, round(config.hidden_ratio * width))
            self.hidden = nn.Linear(inputs, outputs)
            if config.norm != "none":
                self.norm = nn.LayerNorm(outputs, config.eps)
            self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(outputs, labels)
        if config.init == "scaled":
            self.apply(init_weights)
        if config.init == "normal":
            self.apply(_init_normal)

    def forward(self, states: Tensor) -> Tensor:
        """(b, inputs) -> logits (b, labels)."""
        states = self.pooled_dropout(states)
        if self.config.layers == 2:
            states = self.dropout(self._activate(self.hidden(states)))
        # never in bf16, whose numbers near 8 are 1/16 apart: of labels that tie, the first is predicted
        with torch.autocast(states.device.type, enabled=False):
            return exact_linear(self.output, states.to(self.output.weight.dtype))

    def _activate(self, hidden: Tensor) -> Tensor:
        activation = F.gelu if self.config.activation == "gelu" else F.relu
        if self.config.norm == "before":
            return activation(self.norm(hidden))
        return self.norm(activation(hidden)) if self.config.norm == "after" else activation(hidden)


def _init_normal(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=INIT_STD)
        nn.init.zeros_(module.bias)
