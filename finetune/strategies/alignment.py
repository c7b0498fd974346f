"""Translation-based alignment (paper 4, section 3.1): the text of a target language is drawn to what English
says of the same image, the pivot.

| routine | trained on and compared with images | pivot | in a test |
| --- | --- | --- | --- |
| 1 | the target's caption | the English caption | as it is |
| 2 | the target's caption | the English caption, translated into the target | as it is |
| 3 | the target's caption, translated into English | the English caption | translated into English |

`finetune.translation` writes such translations in advance.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import NonNegativeFloat

from finetune.formats import Captioned
from finetune.strategies.base import Captions, Context, Need, Outputs, Strategy, StrategyConfig, Term
from raylib.errors import UserError
from raylib.randomness import Key

if TYPE_CHECKING:  # settings of strategies are read without PyTorch (`raylib.settings`)
    from torch import Tensor

Pivots = dict[tuple[str, str], tuple[str, str]]  # (image, caption) -> (what is trained on, its pivot)


class TranslationAlignmentConfig(StrategyConfig):
    """Translation-based alignment (paper 4). Translations are files made before, `finetune translate`: the
    task's splits `*_to_en` and `*_from_en`."""

    needs = frozenset({"captions", "embeddings"})
    display_fields = ("routine", "loss", "weight")
    mutable_fields = ("weight",)
    translations = ("_to_en", "_from_en")

    routine: Literal[1, 2, 3] = 3
    """Pairs that are drawn together (paper 4, section 3): 1, English and foreign captions; 2, translations of
    the English ones and foreign captions; 3, English captions and translations of the foreign ones, which
    tests then are too."""
    loss: Literal["mse", "pivot", "image"] = "mse"
    """Draw text and pivot together by the mean squared error of their vectors, not of unit length (equation
    7), by contrast of text and pivot (equation 8), or of pivot and image."""
    weight: NonNegativeFloat = 1.0
    """Weight of the alignment term (lambda of equation 9); 0 with routine 3 trains on translations alone, the
    paper's "MT"."""

    @property
    def tests_translations(self) -> bool:
        return self.routine == 3

    def provides(self) -> frozenset[Need]:
        return frozenset({"english_texts"}) if self.routine == 3 else frozenset()

    def build(self, context: Context) -> "TranslationAlignment":
        """Find the pivot of every training caption.

        Raises:
            UserError: an image without English; translations of another number.
        """
        assert context.captions is not None  # `needs` has been checked
        pivots: Pivots = {}
        for language in context.languages:
            pivots |= _pivots_of(self.routine, context.captions, language)
        return TranslationAlignment(pivots, self.loss, self.weight)


class TranslationAlignment(Strategy):
    """Texts drawn to their pivots by a `loss`."""

    def __init__(self, pivots: Pivots, loss: str, weight: float):
        self.pivots, self.loss, self.weight = pivots, loss, weight

    def example(self, example: Any, *key: Key) -> Captioned:
        text, pivot = self.pivots[example.image, example.captions[0]]
        return example._replace(captions=(text,), pivots=(pivot,))

    def terms(self, model: Any) -> dict[str, Term]:
        if not self.weight:
            return {}
        # contrast is a sum over the worker's rows
        divisor = None if self.loss == "mse" else _rows
        return {"alignment": Term(self.weight, self._values, divisor)}

    def _values(self, outputs: Outputs, part: dict) -> "Tensor":
        import torch.nn.functional as F

        text, pivot = outputs.text_embeddings, outputs.pivot_embeddings
        if self.loss == "mse":
            return F.mse_loss(text, pivot, reduction="none").mean(1)
        return outputs.contrast(pivot, text if self.loss == "pivot" else outputs.image_embeddings)


def _pivots_of(routine: int, read: Captions, language: str) -> Pivots:
    """{(image, caption): (what is trained on, pivot)}; an English caption is its own pivot."""
    captions = read("", language)
    if language == "en":
        return {(image, text): (text, text) for image, texts in captions.items() for text in texts}
    english = pivots = read("", "en")
    if routine == 2:
        pivots = read("_from_en", language)
        _same_number(pivots, english, f"translations from English into '{language}'")
    trained = captions
    if routine == 3:
        trained = read("_to_en", language)
        _same_number(trained, captions, f"translations from '{language}' into English")
    missing = [image for image in captions if image not in pivots]
    if missing:
        raise UserError(
            f"strategies.alignment: no English caption of {len(missing)} images, such as {missing[0]}"
        )
    # captions that are no translations of each other take the English ones in turn
    return {
        (image, text): (trained[image][i], pivots[image][i % len(pivots[image])])
        for image, texts in captions.items()
        for i, text in enumerate(texts)
    }


def _rows(part: dict) -> "Tensor":
    import torch

    return torch.full((), float(len(part["image_id"])), device=part["text"].clean.device)


def _same_number(
    translations: Mapping[str, tuple[str, ...]], source: Mapping[str, tuple[str, ...]], what: str
) -> None:
    """Raises UserError where an image has another number of translations than of captions."""
    for image, texts in source.items():
        if (number := len(translations.get(image, ()))) != len(texts):
            raise UserError(
                f"strategies.alignment: {what}: {number} for the {len(texts)} captions of {image}; make them "
                "anew (python -m finetune translate)"
            )
