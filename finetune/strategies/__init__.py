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
from finetune.tasks.base import Task
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
    "StrategiesConfig",
    __base__=Config,
    **{name: (method | None, None) for name, method in STRATEGIES.items()},
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
        asking = [self.all[name] for name in self.using("lr_scale")]
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
                    raise UserError(
                        f"strategies.{name}: another method has a term '{term}' already; leave one of them "
                        "out"
                    )
                terms[term] = value
        return terms

    def draws(self) -> Callable | None:
        """`example`, or None where no method changes examples."""
        return self.example if self.using("example") else None

    def using(self, seam: str) -> list[str]:
        """Names of the methods that do something at this seam: "example", "adapt", "lr_scale" or "terms"."""
        return [
            name
            for name, method in self.all.items()
            if getattr(type(method), seam) is not getattr(Strategy, seam)
        ]


def check_strategies(config: Config, task: Task, methods: Methods) -> None:
    """Refuse methods of a fine-tuning `config` that would have no effect, or none on what is asked for.

    Raises:
        UserError: a term of the loss where the head has no logits, or learns nothing; stages of a training
            that it has not.
    """
    s, terms = config.strategies, methods.using("terms")
    if config.head == "decoder" and terms:
        raise UserError(f"strategies: {', '.join(terms)} needs a classifier's logits; head=decoder has none")
    if s.distillation and not s.distillation.task and not s.distillation.epochs and terms:
        raise UserError(
            f"strategies.distillation.task=0: {', '.join(terms)} is of the classifier, which learns nothing; "
            "set strategies.distillation.task=1"
        )
    if s.distillation and task.num_images != 1:
        raise UserError(
            f"strategies.distillation is about one picture, and texts of {config.task} are about "
            f"{task.num_images}"
        )
    if s.code_mixing and s.code_mixing.stages == "rounds" and (not s.sparse or s.sparse.mask):
        raise UserError(
            "strategies.code_mixing.stages=rounds mixes while a mask is looked for, and this run looks for "
            "none; leave it out, or set strategies.sparse.rate="
        )


__all__ = [
    "STRATEGIES",
    "Context",
    "Methods",
    "Progress",
    "StrategiesConfig",
    "Strategy",
    "Term",
    "check_strategies",
    "chosen",
    "method_name",
]
