"""Translation-based alignment (paper 4, section 3.1): the text of a target language is drawn to what English
says of the same picture, the pivot.

| routine | trained on and compared with pictures | pivot | in a test |
| --- | --- | --- | --- |
| 1 | the target's caption | the English caption | as it is |
| 2 | the target's caption | the English caption, translated into the target | as it is |
| 3 | the target's caption, translated into English | the English caption | translated into English |
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PrivateAttr
from torch import Tensor, nn

from finetune.examples import Captioned, Example
from finetune.strategies.base import Context, Outputs, Strategy, Term
from raylib.errors import UserError
from raylib.randomness import Key


class TranslationAlignment(Strategy):
    """`weight`: lambda of equation 9; 0 with routine 3 trains on translations alone, the paper's "MT".
    `loss`: how text and pivot are drawn together, the mean squared error of their vectors, not of unit length
    (equation 7), contrast of text and pivot (equation 8), or of pivot and picture. Translations are files
    made before: the task's splits `*_to_en` and `*_from_en`."""

    shown = ("routine", "loss", "weight")

    routine: Literal[1, 2, 3] = 3
    loss: Literal["mse", "pivot", "image"] = "mse"
    weight: NonNegativeFloat = 1.0
    _pairs: dict[tuple[str, str], tuple[str, str]] = PrivateAttr(default_factory=dict)

    def prepare(self, context: Context) -> "TranslationAlignment":
        """Find the pivot of every training caption.

        Raises:
            UserError: training reads no language but English; a picture without English; translations of
                another number.
        """
        if context.captions is None:
            raise UserError(
                "strategies.alignment draws captions of other languages to English ones: it needs a "
                "retrieval task and setting=few_shot, single_language or all_language"
            )
        ready = self.model_copy()
        ready._pairs = {}
        for language in context.languages:
            ready._pairs |= self._of_language(context.captions, language)
        return ready

    def _of_language(self, read: Callable[[str, str], dict[str, tuple[str, ...]]], language: str) -> dict:
        """{(picture, caption): (what is trained on, pivot)}; an English caption is its own pivot."""
        own = read("", language)
        if language == "en":
            return {(image, text): (text, text) for image, texts in own.items() for text in texts}
        english = pivots = read("", "en")
        if self.routine == 2:
            pivots = read("_from_en", language)
            _same_number(pivots, english, f"translations from English into '{language}'")
        shown = own
        if self.routine == 3:
            shown = read("_to_en", language)
            _same_number(shown, own, f"translations from '{language}' into English")
        missing = [image for image in own if image not in pivots]
        if missing:
            raise UserError(
                f"strategies.alignment: no English caption of {len(missing)} pictures, such as {missing[0]}"
            )
        return {
            (image, text): (shown[image][i], pivots[image][i % len(pivots[image])])
            for image, texts in own.items()
            for i, text in enumerate(texts)
        }

    def example(self, example: Example | Captioned, *key: Key) -> Captioned:
        text, pivot = self._pairs[example.image, example.captions[0]]
        return example._replace(captions=(text,), pivots=(pivot,))

    def terms(self, model: nn.Module) -> dict[str, Term]:
        if not self.weight:
            return {}
        # contrast is a sum over the worker's rows
        count = None if self.loss == "mse" else _rows
        return {"alignment": Term(self.weight, self._values, count)}

    def _values(self, outputs: Outputs, part: dict) -> Tensor:
        text, pivot = outputs.text_embeddings, outputs.pivot_embeddings
        if self.loss == "mse":
            return F.mse_loss(text, pivot, reduction="none").mean(1)
        return outputs.contrast(pivot, text if self.loss == "pivot" else outputs.image_embeddings)


def _rows(part: dict) -> Tensor:
    return torch.tensor(float(len(part["image_id"])), device=part["image_id"].device)


def _same_number(made: dict[str, tuple[str, ...]], source: dict[str, tuple[str, ...]], what: str) -> None:
    """Raises UserError where a picture has another number of translations than of captions."""
    for image, texts in source.items():
        if len(made.get(image, ())) != len(texts):
            raise UserError(
                f"strategies.alignment: {what}: {len(made.get(image, ()))} for the {len(texts)} captions of "
                f"{image}; make them anew (python -m finetune translate)"
            )
