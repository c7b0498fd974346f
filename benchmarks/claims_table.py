"""The experiments on emoji scenes that decide the papers' claims: data of `benchmarks.claims`.

An experiment's name is "task/method", "p3/row" or "p4/row". Values that a paper publishes are the first trial
of the search that chooses an experiment's settings.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from finetune.recipes import RECIPES
from raylib.search.space import Float, Int, Knobs, Space

# Every image is encoded once, by an encoder that knows no language
FROZEN_IMAGES = ("image_size=null", 'freeze=["vision"]')
UNTUNED = "-"  # as `tuned_as`: the recipe's settings


class Experiment(NamedTuple):
    """A method on a task.

    knobs: what the search turns, beside the learning rate. published: the paper's values of these. tuned_as:
    the experiment whose chosen values it takes, in place of a search of its own. after, teacher: the
    experiment whose run of the same seed it goes on from, or is taught by. pretraining: that of
    `PRETRAININGS` whose model of the same seed it starts from. errors: per cent of wrong translations among
    those that it reads. cost: CPU-seconds of a run, until one is measured.
    """

    recipe: str
    settings: tuple[str, ...] = ()
    knobs: Mapping[str, Any] = {}
    published: Mapping[str, Any] = {}
    tuned_as: str = ""
    after: str = ""
    teacher: str = ""
    pretraining: str = ""
    errors: int = 0
    cost: float = 250.0


PRIOR = {"strategies.prior.alpha": Float(1, 100, log=True)}
SPARSE = {"strategies.sparse.rate": Float(0.05, 0.3)}
MIXING = {"strategies.code_mixing.probability": Float(0.1, 1)}
UNFREEZING = {"strategies.unfreezing.layers": Int(1, 2)}
DECAY = {"strategies.layer_decay.factor": Float(0.3, 0.95)}
AS_PUBLISHED = {  # one of two layers an epoch is what three of eighteen cannot be here: the fewest
    "strategies.prior.alpha": 10.0,
    "strategies.sparse.rate": 0.1,
    "strategies.code_mixing.probability": 0.9,
    "strategies.unfreezing.layers": 1,
    "strategies.layer_decay.factor": 0.88,
}
WORDNET = ("strategies.prior.source=wordnet",)
# the figures of each epoch: accuracy in all languages, similarity of CLS states
CURVES = ("eval_each_epoch=true", "similarity_items=500")
METHODS: dict[str, tuple[Knobs, tuple[str, ...]]] = {
    "baseline": ({}, ()),
    "prior": (PRIOR, ()),
    "prior_wordnet": (PRIOR, WORDNET),
    "prior_sparse": (PRIOR | SPARSE, ()),
    "mixing": (MIXING, ()),
    "prior_mixing": (PRIOR | MIXING, ()),
    "prior_sparse_mixing": (PRIOR | SPARSE | MIXING, ()),
    "unfreezing": (UNFREEZING, ()),
    "layer_decay": (DECAY, ()),
    "top_layers": ({}, ("strategies.top_layers={}",)),
    "unfreezing_mixing": (UNFREEZING | MIXING, ()),
}
ON = {
    "xgqa": tuple(METHODS),
    "xvnli": ("baseline", "unfreezing", "mixing", "unfreezing_mixing"),
    "xflickrco": ("baseline", "unfreezing", "mixing", "unfreezing_mixing"),
}
SLOW = {"prior_sparse": 2.2, "prior_sparse_mixing": 2.2}


def _method(task: str, name: str) -> Experiment:
    knobs, settings = METHODS[name]
    curves = CURVES if task == "xgqa" and name in ("baseline", "unfreezing") else ()
    return Experiment(
        f"scenes_{task}",
        (*FROZEN_IMAGES, *settings, *curves),
        knobs,
        {path: AS_PUBLISHED[path] for path in knobs},
        cost=250.0 * SLOW.get(name, 1.0),
    )


# P4: 50 captions a language, a set of weights for each; sw is in no text of pretraining
P4_SETTINGS = ("image_size=null", 'languages=["de","id","ru","zh","sw"]')
ALIGNED = "strategies.alignment.routine=3"
WEIGHT: Knobs = {"strategies.alignment.weight": Float(0.01, 100, log=True)}
P4_WEIGHT = {"strategies.alignment.weight": 10.0}


def _aligned(*settings: str, recipe: str = "transfer_mt", **more: Any) -> Experiment:
    """Translations and an alignment; the recipe `transfer_mt` has its weight at 0."""
    return Experiment(recipe, (*P4_SETTINGS, *settings), WEIGHT, P4_WEIGHT, cost=120, **more)


P4 = {
    **{
        name: Experiment(f"transfer_{name}", P4_SETTINGS, cost=100)
        for name in ("full", "mt", "lora", "adapter", "compacter", "soft_prompt")
    },
    **{f"routine{n}": _aligned(f"strategies.alignment.routine={n}") for n in (3, 1, 2)},
    "routine3_lora": _aligned(recipe="transfer_routine3_lora"),
    **{f"{loss}": _aligned(ALIGNED, f"strategies.alignment.loss={loss}") for loss in ("pivot", "image")},
    **{
        f"routine3_errors{share}": _aligned(ALIGNED, tuned_as="p4/routine3", errors=share)
        for share in (10, 30)
    },
    **{
        f"mt_errors{share}": Experiment("transfer_mt", P4_SETTINGS, tuned_as="p4/mt", errors=share, cost=100)
        for share in (10, 30)
    },
    # nothing is trained, nothing drawn: one run
    "zero_shot": Experiment("transfer_zero_shot", P4_SETTINGS, tuned_as=UNTUNED, cost=20),
    "zero_shot_mt": Experiment("transfer_zero_shot_mt", P4_SETTINGS, tuned_as=UNTUNED, cost=20),
    "zero_shot_prompt": Experiment(
        "transfer_zero_shot",
        (*P4_SETTINGS, "strategies.hard_prompt.words=a photo of"),
        tuned_as=UNTUNED,
        cost=20,
    ),
}

# P2, table 5: the last stage of `scenes_base`, from the model that is aligned already, without a term
PRETRAINING_RECIPE = "scenes_base"
PRETRAININGS: dict[str, tuple[str, ...]] = {
    "all": (),
    "no_tlm": ("objective.weights.tlm=0",),
    "no_xmlm": ("objective.weights.xmlm=0",),
    "no_xlc": ("objective.weights.ucl_translation=0",),
    "no_uni_arch": ("model.fusion=entangled",),
}
P2_TASKS = ("xvnli", "xgqa")

# P3: translated questions of two languages, an English teacher; all see the same 9,000 questions
P3_DATA = ("image_size=null", "train_limit=9000", "epochs=4")
DISTILLATION = "strategies.distillation."
P3 = {
    "baseline": Experiment("scenes_xgqa", (*FROZEN_IMAGES, *P3_DATA[1:], 'languages=["en","de","ru"]')),
    "augmentation": Experiment("transfer_student", P3_DATA),
    "distillation": Experiment(
        "transfer_distilled",
        P3_DATA,
        {DISTILLATION + "task": Float(0.1, 10, log=True)},
        {DISTILLATION + "task": 1.0},
        teacher="xgqa/baseline",
        cost=400,
    ),
    "last_layer": Experiment(
        "transfer_distilled",
        (*P3_DATA, DISTILLATION + "layers=[2]", DISTILLATION + "teacher_layers=[2]"),
        tuned_as="p3/distillation",
        teacher="xgqa/baseline",
        cost=400,
    ),
}


def _scenes(task: str, *settings: str, **more: Any) -> Experiment:
    """Another experiment on the recipe of a task."""
    return Experiment(f"scenes_{task}", (*FROZEN_IMAGES, *settings), **more)


EXPERIMENTS: dict[str, Experiment] = {
    **{f"{task}/{name}": _method(task, name) for task, names in ON.items() for name in names},
    **{
        f"{task}/averaging": _scenes(task, "select=average", "fit.keep=6", tuned_as=f"{task}/baseline")
        for task in ON
    },
    "marvl/baseline": _scenes("marvl"),
    # questions as an intermediate task
    "marvl/after_xgqa": _scenes("marvl", after="xgqa/baseline"),
    **{
        f"xgqa/few_shot_{name}": _scenes(
            "xgqa",
            "setting=few_shot",
            "shots=48",
            "optim.lr=1e-4",
            tuned_as=UNTUNED,
            after=f"xgqa/{name}",
        )
        for name in ("baseline", "unfreezing")
    },
    **{
        f"{task}/translate_test": _scenes(
            task, "setting=translate_test", tuned_as=UNTUNED, after=f"{task}/baseline", cost=30
        )
        for task in P2_TASKS
    },
    **{
        f"{task}/pretrained_{name}": _scenes(task, tuned_as=f"{task}/baseline", pretraining=name)
        for task in P2_TASKS
        for name in PRETRAININGS
    },
    **{f"p4/{name}": experiment for name, experiment in P4.items()},
    **{f"p3/{name}": experiment for name, experiment in P3.items()},
}


def space_of(name: str) -> Space:
    """Return what the search turns of an experiment: the learning rate, from a quarter to four times the
    recipe's, and its knobs."""
    experiment = EXPERIMENTS[name]
    rate = RECIPES[experiment.recipe]().optim.lr
    knobs = {"optim.lr": Float(rate / 4, 4 * rate, log=True), **experiment.knobs}
    return Space(
        f"{name} of benchmarks.claims",
        experiment.recipe,
        knobs,
        ({"optim.lr": rate, **experiment.published},),
    )


def pretraining_command(model: Path) -> list[object]:
    """Return the command of the ablations' pretraining."""
    return ["pretrain", PRETRAINING_RECIPE, f"init.model={model}", "runtime=local", "workers=1"]
