"""Parameter-efficient tuning and prompts (paper 4, section 3.2). The modules are in `raylib.models.peft`.

Those with modules freeze all of the model but these, the layer norms of the blocks and the heads; two of them
compose. Their weights are few and kept apart, in RUN/tuned.safetensors.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, cast

from pydantic import PositiveFloat, PositiveInt

from finetune.strategies.base import Context, Need, Strategy, StrategyConfig
from raylib.errors import UserError
from raylib.models import peft
from raylib.text import PromptedTokenizer, Tokenizer


class PeftConfig(StrategyConfig):
    """Settings common to those with modules."""

    method: ClassVar[str]  # as `raylib.models.peft` calls it

    projection: bool = True
    """Also tune the map from a text's state to where it meets images, as the paper does; its public code
    froze it without meaning to."""

    def removes(self) -> Mapping[Need, str]:
        return {"dense_weights": ""}

    def build(self, context: Context) -> "PeftModules":
        return PeftModules(self.method, self.model_dump(exclude={"projection"}), self.projection)


class LoraConfig(PeftConfig):
    """Low-rank changes of the query and value maps of self-attention: W + (`alpha` / `rank`) B A (equation
    12)."""

    method = "lora"
    display_fields = ("rank",)

    rank: PositiveInt = 8
    """Rank of the changes (paper 4, equation 12)."""
    alpha: PositiveFloat = 16.0
    """Scale: changes are multiplied by `alpha` / `rank`."""


class AdapterConfig(PeftConfig):
    """A bottleneck after each attention and each feed-forward layer (equation 10)."""

    method = "adapter"
    place = "the same places, behind the outputs of layers"
    display_fields = ("bottleneck",)

    bottleneck: PositiveInt = 24
    """Width of the bottleneck."""


class CompacterConfig(PeftConfig):
    """Adapters whose matrices are sums of `n` Kronecker products of rank `rank` (equation 11); the bottleneck
    is the width over `reduction`."""

    method = "compacter"
    place = AdapterConfig.place

    n: PositiveInt = 4
    """Kronecker products that a matrix is the sum of."""
    reduction: PositiveInt = 16
    """The bottleneck is the width over this."""
    rank: PositiveInt = 1
    """Rank of the factors."""


class SoftPromptConfig(PeftConfig):
    """Trainable tokens after a text's first: as many as `words` has, from whose embeddings they start, or
    `tokens` random ones where it is empty. They count in `length=`."""

    method = "soft_prompt"
    changes_texts = True

    words: str = "a photo of"
    """Words from whose embeddings the tokens start, one for each of theirs; empty: random ones."""
    tokens: PositiveInt = 20
    """Number of tokens where `words` is empty."""

    def build(self, context: Context) -> "SoftPrompt":
        start = Tokenizer.load(context.tokenizer).encode([self.words])[0].tolist() if self.words else []
        return SoftPrompt(self.method, {"start": start, "tokens": len(start) or self.tokens}, self.projection)


class HardPromptConfig(StrategyConfig):
    """`words` before every text, in training and in evaluation, whatever its language (paper 4: English ones
    serve best). They count in `length=`. Nothing is frozen, nothing added: alone with `setting=untrained` it
    is the paper's zero-shot row."""

    acts_untrained = True
    changes_texts = True
    display_fields = ("words",)

    words: str = "a photo of"
    """Words before every text."""

    def build(self, context: Context) -> "HardPrompt":
        return HardPrompt(self.words)


class PeftModules(Strategy):
    """Small modules of a `method`, with their `settings`, which are all that trains beside norms and
    heads."""

    def __init__(self, method: str, settings: Mapping[str, Any], projection: bool = True):
        self.method, self.settings, self.projection = method, dict(settings), projection

    def adapt(self, model: Any) -> None:
        """Put the modules in, unless the model has them already, and freeze the rest.

        Raises:
            UserError: sizes that the model's width does not allow; it has such modules of other sizes.
        """
        # a run that goes on from a tuned model trains the modules that it has
        existing = model.backbone.tuning.get(self.method)
        if existing is None:
            peft.insert(model, self.method, self.settings)
        elif existing != self.settings:
            raise UserError(
                f"strategies.{self.method}: the model was tuned with {existing}, not {self.settings}; give "
                "the same settings"
            )
        peft.freeze_pretrained(model, self.projection)


class SoftPrompt(PeftModules):
    """Trainable tokens, whose ids come after the vocabulary's."""

    def wrap_tokenizer(self, tokenizer: Tokenizer, model: Any) -> Tokenizer:
        words = cast(peft.PromptedEmbedding, peft.text_embedding(model).word)
        first = words.num_embeddings
        return PromptedTokenizer(tokenizer, ids=tuple(range(first, first + len(words.prompt))))


class HardPrompt(Strategy):
    """Words before every text."""

    def __init__(self, words: str):
        self.words = words

    def wrap_tokenizer(self, tokenizer: Tokenizer, model: Any) -> Tokenizer:
        return PromptedTokenizer(tokenizer, words=self.words)
