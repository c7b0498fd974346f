"""The experiments on emoji scenes that decide the papers' claims: data of `benchmarks.claims`.

An experiment's name is "task/method", "p3/row" or "p4/row".
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from finetune.recipes import RECIPES, SCENES_LANGUAGES
from raylib.config import override
from raylib.search.space import Float, Space

# Every image is encoded once, by an encoder that knows no language
FROZEN_IMAGES = ("image_size=null", 'freeze=["vision"]')
HELD_OUT = "sw"  # in no text of pretraining: no target, a column of its own
UNTUNED = "-"  # as `tuned_as`: the recipe's settings
RATES = (0.5, 1.0, 2.0, 4.0)  # times the recipe's learning rate


class Experiment(NamedTuple):
    """A method on a task.

    grid: what is chosen, path: values, the learning rate as a multiple of the recipe's; four settings in all.
    tuned_as: the experiment whose chosen values it takes, in place of a choice of its own. after, teacher:
    the experiment whose run of the same seed it goes on from, or is taught by. pretraining: that of
    `PRETRAININGS` whose model of the same seed it starts from. errors: per cent of wrong translations among
    those that it reads. cost: CPU-seconds of a run, until one is measured.
    """

    recipe: str
    settings: tuple[str, ...] = ()
    grid: Mapping[str, tuple[float, ...]] = {"optim.lr": RATES}
    tuned_as: str = ""
    after: str = ""
    teacher: str = ""
    pretraining: str = ""
    errors: int = 0
    cost: float = 250.0


# The papers' doses. They are not searched for: each costs accuracy in English, whose development set would
# turn it down, and with it the method.
PRIOR = ("strategies.prior.alpha=10",)
SPARSE = ("strategies.sparse.rate=0.1",)
MIXING = ("strategies.code_mixing.probability=0.9",)
# one of two layers an epoch is what three of eighteen cannot be here: the fewest
UNFREEZING = ("strategies.unfreezing.layers=1",)
# the figures of each epoch: accuracy in all languages, similarity of CLS states
CURVES = ("eval_each_epoch=true", "similarity_items=500")
METHODS: dict[str, tuple[str, ...]] = {
    "baseline": (),
    "prior": PRIOR,
    "prior_sparse": PRIOR + SPARSE,
    "mixing": MIXING,
    "prior_mixing": PRIOR + MIXING,
    "prior_sparse_mixing": PRIOR + SPARSE + MIXING,
    "unfreezing": UNFREEZING,
    "layer_decay": ("strategies.layer_decay.factor=0.88",),
    "top_layers": ("strategies.top_layers={}",),
    "unfreezing_mixing": UNFREEZING + MIXING,
}
ON = {
    "xgqa": tuple(METHODS),
    "xvnli": ("baseline", "unfreezing", "mixing", "unfreezing_mixing"),
    "xflickrco": ("baseline", "unfreezing", "mixing", "unfreezing_mixing"),
}
SLOW = {"prior_sparse": 2.2, "prior_sparse_mixing": 2.2}


def _method(task: str, name: str) -> Experiment:
    settings = METHODS[name]
    if "mixing" in name:  # words of the held-out language would make it a target
        targets = [code for code in SCENES_LANGUAGES[task] if code not in ("en", HELD_OUT)]
        settings += (f"strategies.code_mixing.languages={json.dumps(targets)}",)
    if task == "xgqa" and name in ("baseline", "unfreezing"):
        settings += CURVES
    return Experiment(f"scenes_{task}", (*FROZEN_IMAGES, *settings), cost=250.0 * SLOW.get(name, 1.0))


# P4: 50 captions a language, a set of weights for each; sw is in no text of pretraining
P4_SETTINGS = ("image_size=null", 'languages=["de","id","ru","zh","sw"]')
ALIGNED = "strategies.alignment.routine=3"
WEIGHT = {"optim.lr": (1.0, 2.0), "strategies.alignment.weight": (1.0, 10.0)}


def _aligned(*settings: str, recipe: str = "transfer_mt", **more: Any) -> Experiment:
    """Translations and an alignment; the recipe `transfer_mt` has its weight at 0."""
    return Experiment(recipe, (*P4_SETTINGS, *settings), WEIGHT, cost=120, **more)


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

# P2, table 5: the last stage of `scenes_base` without a term, half as long, from a model that is aligned and
# whose fusion layers are new, so that both architectures start alike
PRETRAINING_RECIPE = "scenes_base"
HALF = ("fit.steps=1000",)
PRETRAININGS: dict[str, tuple[str, ...]] = {
    "all": HALF,
    "no_tlm": (*HALF, "objective.weights.tlm=0"),
    "no_xmlm": (*HALF, "objective.weights.xmlm=0"),
    "no_xlc": (*HALF, "objective.weights.ucl_translation=0"),
    "no_uni_arch": (*HALF, "model.fusion=entangled"),
}
ABLATION_TASKS = ("xvnli", "xflickrco")
TRANSLATED_TASKS = ("xvnli", "xgqa")

# P3: translated questions of two languages; all see the same 9,000 questions, the teacher too. The languages'
# development sets have 48 questions each, too few to choose an epoch or a rate by: the last epoch is taken,
# and the rate of the row in English.
P3_DATA = ("image_size=null", "train_limit=9000", "epochs=4", "select=last")
DISTILLATION = "strategies.distillation."


def _p3(recipe: str, *settings: str, **more: Any) -> Experiment:
    return Experiment(recipe, (*P3_DATA, *settings), **more)


def _taught(*layers: int) -> Experiment:
    """Distilled from these layers of the teacher's into the student's."""
    compared = [f"{DISTILLATION}{whose}layers={list(layers)}" for whose in ("", "teacher_")]
    return _p3("transfer_distilled", *compared, tuned_as="p3/baseline", teacher="p3/baseline", cost=400)


P3 = {
    "baseline": _p3("scenes_xgqa", 'freeze=["vision"]', 'languages=["en","de","ru"]'),
    "augmentation": _p3("transfer_student", tuned_as="p3/baseline"),
    "distillation": _taught(1, 2),
    "last_layer": _taught(2),
}


def _scenes(task: str, *settings: str, **more: Any) -> Experiment:
    """Another experiment on the recipe of a task."""
    return Experiment(f"scenes_{task}", (*FROZEN_IMAGES, *settings), **more)


# 144 questions, for as many epochs as IGLUE's
FEW_SHOT = ("setting=few_shot", "shots=48", "epochs=20", "batch=16", "last_batch=keep", "select=last")

EXPERIMENTS: dict[str, Experiment] = {
    **{f"{task}/{name}": _method(task, name) for task, names in ON.items() for name in names},
    **{
        f"{task}/averaging": _scenes(task, "select=average", "fit.keep=3", tuned_as=f"{task}/baseline")
        for task in ON
    },
    "marvl/baseline": _scenes("marvl"),
    # questions as an intermediate task
    "marvl/after_xgqa": _scenes("marvl", after="xgqa/baseline", tuned_as="marvl/baseline"),
    **{
        f"xgqa/few_shot_{name}": _scenes(
            "xgqa",
            *FEW_SHOT,
            tuned_as=UNTUNED,
            after=f"xgqa/{name}",
        )
        for name in ("baseline", "unfreezing")
    },
    **{
        f"{task}/translate_test": _scenes(
            task, "setting=translate_test", tuned_as=UNTUNED, after=f"{task}/baseline", cost=30
        )
        for task in TRANSLATED_TASKS
    },
    **{
        f"{task}/pretrained_{name}": _scenes(task, tuned_as=f"{task}/baseline", pretraining=name)
        for task in ABLATION_TASKS
        for name in PRETRAININGS
    },
    **{f"p4/{name}": experiment for name, experiment in P4.items()},
    **{f"p3/{name}": experiment for name, experiment in P3.items()},
}


def space_of(name: str) -> Space:
    """Return the grid that an experiment's settings are chosen from."""
    experiment = EXPERIMENTS[name]
    rate = override(RECIPES[experiment.recipe](), [*experiment.settings]).optim.lr
    grid = {path: tuple(values) for path, values in experiment.grid.items()}
    grid["optim.lr"] = tuple(rate * factor for factor in grid["optim.lr"])
    knobs = {path: Float(min(values), max(values), log=True) for path, values in grid.items()}
    return Space(f"{name} of benchmarks.claims", experiment.recipe, knobs, grid=grid)


def pretraining_command(model: Path) -> list[object]:
    """Return the command of the ablations' pretraining."""
    return ["pretrain", PRETRAINING_RECIPE, f"init.model={model}", "runtime=local", "workers=1"]
