"""Parameter-efficient tuning and prompts (paper 4, section 3.2). The modules are in `raylib.models.peft`.

Those with modules freeze all of the model but these, the layer norms of the blocks and the heads; two of them
compose. Their weights are few and kept apart, in RUN/tuned.safetensors.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import PositiveFloat, PositiveInt, PrivateAttr
from torch import nn

from finetune.strategies.base import Context, Strategy
from raylib.errors import UserError
from raylib.models import peft as tuning
from raylib.text import Prompted, Tokenizer


class Tuning(Strategy):
    """What is common to them. `projection`: also tune the map from a text's state to where it meets pictures,
    as the paper does; its public code froze it without meaning to."""

    name: ClassVar[str]

    projection: bool = True

    def modules(self) -> Mapping[str, Any]:
        """Settings of the modules."""
        return self.model_dump(exclude={"projection"})

    def adapt(self, model: nn.Module) -> None:
        """Put the modules in, unless the model has them already, and freeze the rest.

        Raises:
            UserError: sizes that the model's width does not allow; it has such modules of other sizes.
        """
        there, wanted = tuning.described(model).get(self.name), dict(self.modules())
        if there is None:
            tuning.put(model, self.name, wanted)
        elif there != wanted:
            raise UserError(
                f"strategies.{self.name}: the model was tuned with {there}, not {wanted}; give the same "
                "settings"
            )
        tuning.freeze_the_rest(model, self.projection)


class Lora(Tuning):
    """Low-rank changes of the query and value maps of self-attention: W + (`alpha` / `rank`) B A (equation
    12)."""

    name = "lora"
    shown = ("rank",)

    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0


class Adapter(Tuning):
    """A bottleneck after each attention and each feed-forward layer (equation 10)."""

    name = "adapter"
    shown = ("bottleneck",)

    bottleneck: PositiveInt = 24


class Compacter(Tuning):
    """Adapters whose matrices are sums of `n` Kronecker products of rank `rank` (equation 11); the bottleneck
    is the width over `reduction`."""

    name = "compacter"

    n: PositiveInt = 4
    reduction: PositiveInt = 16
    rank: PositiveInt = 1


class SoftPrompt(Tuning):
    """Trainable tokens after a text's first: as many as `words` has, from whose embeddings they start, or
    `tokens` random ones where it is empty. They count in `length=`."""

    name = "soft_prompt"

    words: str = "a photo of"
    tokens: PositiveInt = 20
    _start: tuple[int, ...] = PrivateAttr(())

    def prepare(self, context: Context) -> "SoftPrompt":
        ready = self.model_copy()
        ready._start = (
            tuple(Tokenizer.load(context.tokenizer).encode([self.words])[0].tolist()) if self.words else ()
        )
        return ready

    def modules(self) -> Mapping[str, Any]:
        return {"start": list(self._start), "tokens": len(self._start) or self.tokens}

    def reads(self, tokenizer: Tokenizer, model: nn.Module) -> Tokenizer:
        words = tuning.text_embedding(model).word
        return Prompted(
            tokenizer, ids=tuple(range(words.num_embeddings, words.num_embeddings + len(words.prompt)))
        )


class HardPrompt(Strategy):
    """`words` before every text, in training and in evaluation, whatever its language (paper 4: English ones
    serve best). They count in `length=`. Nothing is frozen, nothing added: alone with `setting=untrained` it
    is the paper's zero-shot row."""

    shown = ("words",)

    words: str = "a photo of"

    def reads(self, tokenizer: Tokenizer, model: nn.Module) -> Tokenizer:
        return Prompted(tokenizer, words=self.words)
