"""Translation-based alignment (paper 4, section 3.1): the text of a target language is drawn to what English
says of the same image, the pivot.

| routine | trained on and compared with images | pivot | in a test |
| --- | --- | --- | --- |
| 1 | the target's caption | the English caption | as it is |
| 2 | the target's caption | the English caption, translated into the target | as it is |
| 3 | the target's caption, translated into English | the English caption | translated into English |

None of them is about English itself: a training on it alone has no alignment term, and in one on several
languages at once English rows count in none.

`finetune.translation` writes such translations in advance.
"""

import functools
from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, Literal

from pydantic import NonNegativeFloat

from finetune.formats import Captioned
from finetune.strategies.base import Captions, Context, Need, Outputs, Strategy, StrategyConfig, Term
from raylib.errors import UserError
from raylib.randomness import Key

if TYPE_CHECKING:  # settings of strategies are read without PyTorch (`raylib.settings`)
    from torch import Tensor

    from finetune.batches import ExtraInputs

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
    follow: Literal["paper", "code"] = "paper"
    """Equation 8, or the public code, whose contrasts are means of both directions (`directions`)."""
    loss: Literal["mse", "pivot", "image"] = "mse"
    """Draw text and pivot together by the mean squared error of their vectors, not of unit length (equation
    7), by contrast of text and pivot (equation 8), or of pivot and image."""
    directions: Literal["one", "both"] = "one"
    """Contrast of `loss`: each pivot finds its text or image among the others'; or the mean of this and of
    the other way round."""
    weight: NonNegativeFloat = 1.0
    """Weight of the alignment term (lambda of equation 9); 0 with routine 3 trains on translations alone, the
    paper's "MT"."""

    @classmethod
    def derived_defaults(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"directions": "both" if values.get("follow") == "code" else "one"}

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
            if language != "en":
                pivots |= _pivots_of(self.routine, context.captions, language)
        return TranslationAlignment(
            pivots, self.loss, self.weight, context.languages, self.directions == "both"
        )


class TranslationAlignment(Strategy):
    """Texts drawn to their pivots by a `loss`; languages: of what is trained on, English having no pivots.
    two_way: a contrast is the mean of both directions."""

    def __init__(
        self,
        pivots: Pivots,
        loss: str,
        weight: float,
        languages: Sequence[str] = (),
        two_way: bool = False,
    ):
        self.pivots, self.loss, self.weight, self.two_way = pivots, loss, weight, two_way
        self.is_english = tuple(languages) == ("en",)
        self.has_english = "en" in languages and not self.is_english

    def example(self, example: Any, *key: Key) -> Captioned:
        if self.is_english:
            return example
        text = example.captions[0]
        # every row of a batch has a pivot; `_aligned` leaves out those that are their own
        text, pivot = self.pivots.get((example.image, text), (text, text))
        return example._replace(captions=(text,), pivots=(pivot,))

    def batch_inputs(self) -> "ExtraInputs | None":
        if not self.has_english:
            return None
        # texts as they are trained on: `example` has changed them
        return functools.partial(_aligned, {(image, text) for (image, _), (text, _) in self.pivots.items()})

    def terms(self, model: Any) -> dict[str, Term]:
        if not self.weight or self.is_english:
            return {}
        # contrast is a sum over the worker's rows
        divisor = None if self.loss == "mse" and not self.has_english else _rows
        return {"alignment": Term(self.weight, self._values, divisor)}

    def _values(self, outputs: Outputs, part: dict) -> "Tensor":
        import torch.nn.functional as F

        text, pivot, rows = outputs.text_embeddings, outputs.pivot_embeddings, part.get("aligned")
        if self.loss == "mse":
            values = F.mse_loss(text, pivot, reduction="none").mean(1)
            return values if rows is None else values[rows]
        other = text if self.loss == "pivot" else outputs.image_embeddings
        one_way = outputs.contrast(pivot, other, rows)
        return (one_way + outputs.contrast(other, pivot, rows)) / 2 if self.two_way else one_way


def _pivots_of(routine: int, read: Captions, language: str) -> Pivots:
    """{(image, caption): (what is trained on, pivot)} of a language that is not English."""
    captions = read("", language)
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


def _aligned(
    texts: Set[tuple[str, str]], pairs: Sequence[Any], visual: Any, part: dict[str, Any]
) -> dict[str, Any]:
    """{"aligned": (b,) bool, which rows are drawn to a pivot}; texts: (image, text) of those that have
    one."""
    import torch

    return {"aligned": torch.tensor([(pair.image, pair.captions[0]) in texts for pair in pairs])}


def _rows(part: dict) -> "Tensor":
    """Number of this worker's rows that are drawn to a pivot."""
    import torch

    device = part["text"].clean.device
    if "aligned" in part:  # not 0 over all workers, where a batch is English alone: no term is 0 / 0
        return part["aligned"].sum().to(device, torch.float32).clamp(min=1e-30)
    return torch.full((), float(len(part["image_id"])), device=device)


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
