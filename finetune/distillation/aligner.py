"""Words that translate each other, found by a multilingual encoder (awesome-align, Dou and Neubig 2021):
sub-words whose states pick each other out, in both directions.

    P[i, j] = softmax_j(x_i y_j), Q[i, j] = softmax_i(x_i y_j); i and j are aligned if both are above the
    threshold

Words are aligned if any of their sub-words are. The states are those of a middle layer (the paper: the 8th of
mBERT's 12).
"""

import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from raylib.errors import UserError, require
from raylib.finite import require_finite_file
from raylib.text import Tokenizer

IDEOGRAPHS = ("CJK", "HIRAGANA", "KATAKANA")  # how the names of letters begin that are words by themselves


class Aligner:
    """An encoder of `transformers`, from a folder with its tokenizer."""

    def __init__(self, folder: Path | str, layer: int = 8, threshold: float = 1e-3, device: str = "cpu"):
        """Raises UserError: no encoder there, or no such layer, or weights that are not finite."""
        transformers = require("transformers", "transfer")
        if not (Path(folder) / "config.json").is_file():
            raise UserError(f"{folder}: no config.json; give the folder of a multilingual encoder")
        self.tokenizer = Tokenizer.load(folder)
        self.model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).to(device).eval()
        require_finite_file(folder, self.model.state_dict())
        depth = self.model.config.num_hidden_layers
        if not 0 < layer <= depth:
            raise UserError(f"{folder}: layer={layer}, but it has layers 1 to {depth}")
        self.layer, self.threshold, self.device = layer, threshold, device
        self.most = getattr(self.model.config, "max_position_embeddings", 512) - 2

    def align(self, pairs: Sequence[tuple[Sequence[str], Sequence[str]]]) -> list[list[tuple[int, int]]]:
        """The links (word, English word) of each pair of sentences, given as words."""
        sides = [self._encode([pair[side] for pair in pairs]) for side in (0, 1)]
        found = []
        for (states, owners), (others, english) in zip(*sides, strict=True):
            links = align_subwords(states, others, self.threshold).nonzero().tolist()
            found.append(sorted({(owners[i], english[j]) for i, j in links}))
        return found

    @torch.inference_mode()
    def _encode(self, sentences: Sequence[Sequence[str]]) -> list[tuple[Tensor, list[int]]]:
        """For each sentence the states of its sub-words (T, d), without specials, and the word that each
        belongs to."""
        t, rows, owners = self.tokenizer, [], []
        for words in sentences:
            cut = t.encode(list(words)) if words else []
            owner = np.repeat(np.arange(len(cut)), [len(ids) for ids in cut])[: self.most - 2]
            rows.append(
                [
                    t.cls,
                    *np.concatenate([*cut, np.empty(0, np.int64)])[: self.most - 2].astype(int).tolist(),
                    t.sep,
                ]
            )
            owners.append(owner.tolist())
        longest = max(map(len, rows))
        ids = torch.tensor([row + [t.pad] * (longest - len(row)) for row in rows], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=self.device)
        states = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[
            self.layer
        ]
        return [(states[i, 1 : 1 + len(owner)].float(), owner) for i, owner in enumerate(owners)]


def align_subwords(states: Tensor, others: Tensor, threshold: float) -> Tensor:
    """(T, d), (U, d) -> (T, U) bool: pairs whose probability is above the threshold in both directions."""
    scores = states @ others.T
    if not scores.numel():
        return scores.bool()
    return (scores.softmax(1) > threshold) & (scores.softmax(0) > threshold)


def cut_words(text: str) -> list[str]:
    """The words of a text, in any language: letters with their marks, numbers; each sign and each ideograph
    by itself."""
    words, going_on = [], False
    for character in text:
        kind = unicodedata.category(character)[0]
        alone = kind in "PS" or unicodedata.name(character, "").startswith(IDEOGRAPHS)
        if character.isspace():
            going_on = False
        elif alone or not going_on:
            words.append(character)
            going_on = not alone
        else:
            words[-1] += character
    return words
