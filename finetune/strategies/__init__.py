"""Fine-tuning methods by name, and how those that a run asks for act together."""

from collections.abc import Callable

from pydantic import create_model
from torch import nn

from finetune.examples import Captioned, Example
from finetune.strategies.alignment import TranslationAlignment
from finetune.strategies.base import Context, Progress, Strategy, Term
from finetune.strategies.code_mixing import CodeMixing
from finetune.strategies.distillation import Distillation
from finetune.strategies.head_first import HeadFirst
from finetune.strategies.prior import LinguisticPrior
from finetune.strategies.rates import LayerDecay, ScheduledUnfreezing, TopLayers
from finetune.strategies.sparse import SparseFineTuning
from finetune.strategies.tuning import Adapter, Compacter, HardPrompt, Lora, SoftPrompt
from raylib.config import Config
from raylib.errors import UserError
from raylib.optim import LayerRates
from raylib.randomness import Key
from raylib.text import Tokenizer

STRATEGIES: dict[str, type[Strategy]] = {
    "prior": LinguisticPrior,
    "sparse": SparseFineTuning,
    "alignment": TranslationAlignment,
    "distillation": Distillation,
    "code_mixing": CodeMixing,
    "head_first": HeadFirst,
    "unfreezing": ScheduledUnfreezing,
    "layer_decay": LayerDecay,
    "top_layers": TopLayers,
    "lora": Lora,
    "adapter": Adapter,
    "compacter": Compacter,
    "soft_prompt": SoftPrompt,
    "hard_prompt": HardPrompt,
}
# a config with a field for each: `strategies.prior.alpha=4` turns a method on, null off
StrategiesConfig = create_model(
    "StrategiesConfig", __base__=Config, **{name: (method | None, None) for name, method in STRATEGIES.items()}
)


def chosen(config: Config) -> dict[str, Strategy]:
    """The methods that are on, by name, in the registry's order."""
    return {name: method for name in STRATEGIES if (method := getattr(config, name)) is not None}


def method_name(config: Config) -> str:
    """What a table calls these methods together; "" for none."""
    return " + ".join(method.called(name) for name, method in chosen(config).items())


class Methods:
    """The methods of a run, ready, as one: what training and evaluation ask of them."""

    def __init__(self, config: Config, context: Context):
        """Raises UserError: what a method's `prepare` finds wrong."""
        self.all = {name: method.prepare(context) for name, method in chosen(config).items()}

    def example(self, example: Example | Captioned, *key: Key) -> Example | Captioned:
        """A training example as all methods show it, one after the other."""
        for method in self.all.values():
            example = method.example(example, *key)
        return example

    def adapt(self, model: nn.Module) -> None:
        """Every method's change of the model, in order."""
        for method in self.all.values():
            method.adapt(model)

    def reads(self, tokenizer: Tokenizer, model: nn.Module) -> Tokenizer:
        """The tokenizer with every method's prompt; `model` is adapted."""
        for method in self.all.values():
            tokenizer = method.reads(tokenizer, model)
        return tokenizer

    def rates(self, depths: int, epoch_steps: int, epochs: int) -> LayerRates | None:
        """The product of the factors, as a function of depth and step; None where no method has any."""
        asking = [m for m in self.all.values() if type(m).lr_scale is not Strategy.lr_scale]
        if not asking:
            return None

        def rate(depth: int | None, step: int) -> float:
            progress = Progress(step, epoch_steps * epochs, step // epoch_steps, epochs)
            product = 1.0
            for method in asking:
                product *= method.lr_scale(depth, depths, progress)
            return product

        return rate

    def terms(self, model: nn.Module) -> dict[str, Term]:
        """All terms side by side.

        Raises:
            UserError: two methods call theirs the same.
        """
        terms: dict[str, Term] = {}
        for name, method in self.all.items():
            for term, value in method.terms(model).items():
                if term in terms:
                    raise UserError(f"strategies.{name}: another method has a term '{term}' already; leave one of them out")
                terms[term] = value
        return terms

    def draws(self) -> Callable | None:
        """`example`, or None where no method changes examples."""
        asking = any(type(m).example is not Strategy.example for m in self.all.values())
        return self.example if asking else None


__all__ = ["STRATEGIES", "Context", "Methods", "Progress", "StrategiesConfig", "Strategy", "Term", "chosen", "method_name"]
