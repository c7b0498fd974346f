"""Every fine-tuning experiment of the README: name, recipe, settings. Each runs for the seeds 0, 1, 2.

Settings of a method that differ from its paper's say why; none was chosen by looking at a test set.
"""

from typing import NamedTuple

from finetune.recipes import TRANSFER_ROWS

# The image encoder is frozen and every picture encoded once: it knows no language, and half of a step's time
# is saved
ALL = ("image_size=null", 'freeze=["vision"]', "epochs=2", "optim.lr=3e-4", "fit.bf16=false")


class Experiment(NamedTuple):
    """A row of a table; its runs are called `name`_seedN. `after`, `teacher`: the experiment whose run of the
    same seed it goes on from, or is taught by."""

    name: str
    recipe: str
    settings: tuple[str, ...] = ALL
    after: str | None = None
    teacher: str | None = None


FROZEN = ('freeze=["embeddings","text","vision"]',)
PRIOR = ("strategies.prior.alpha=10",)
SPARSE = (
    "strategies.sparse.rate=0.16",
    "strategies.sparse.rounds=3",
)  # as sparse as five rounds of 10 %, in less time
MIXED = ("strategies.code_mixing.probability=0.9",)
UNFREEZING = (
    "strategies.unfreezing.layers=3",
)  # of 8 layers in 2 epochs: the lowest two are never trained, as paper 1's three
COMBINATIONS = {
    "frozen": FROZEN,
    "code_mixing": MIXED,
    "unfreezing": UNFREEZING,
    "prior_vectors": PRIOR,
    "layer_decay": (
        "strategies.layer_decay.factor=0.75",
    ),  # of 8 layers; 0.88 of 18 leaves the lowest about as little
    "top_layers": ("strategies.top_layers.layers=2",),
    "unfreezing_mixing": (*UNFREEZING, *MIXED),
    "frozen_mixing": (*FROZEN, *MIXED),
    "sparse": SPARSE,
    "prior_sparse_mixing": (*PRIOR, *SPARSE, *MIXED),  # paper 0's best
    "prior_wordnet": (*PRIOR, "strategies.prior.source=wordnet"),
}
# not on the others: a prior over 3 verdicts says nothing, and this model's top 2 layers are all that `frozen`
# leaves to train
ON_XGQA = ("prior_vectors", "prior_wordnet", "prior_sparse_mixing", "top_layers")
RETRIEVAL = (
    *ALL,
    "candidates=8",
    "test_limit=500",
    "train_limit=4500",
)  # pairs with hard negatives take four times as long

BASELINES = (
    Experiment("xgqa_baseline", "scenes_xgqa"),
    Experiment("xvnli_baseline", "scenes_xvnli"),
    Experiment("marvl_baseline", "scenes_marvl"),
    Experiment("xflickrco_baseline", "scenes_xflickrco", RETRIEVAL),
    Experiment(
        "xgqa_few_shot",
        "scenes_xgqa",
        (*ALL, "setting=few_shot", "shots=48", "optim.lr=1e-4"),
        after="xgqa_baseline",
    ),
    Experiment("xgqa_translate_test", "scenes_xgqa", (*ALL, "setting=translate_test"), after="xgqa_baseline"),
)
METHODS = (
    *(
        Experiment(f"xgqa_{name}", "scenes_xgqa", (*ALL, *settings))
        for name, settings in COMBINATIONS.items()
    ),
    *(
        Experiment(f"xvnli_{name}", "scenes_xvnli", (*ALL, *settings))
        for name, settings in COMBINATIONS.items()
        if name not in ON_XGQA
    ),
    *(
        Experiment(f"xflickrco_{name}", "scenes_xflickrco", (*RETRIEVAL, *settings))
        for name, settings in COMBINATIONS.items()
        if name not in ON_XGQA
    ),
)
CPU = ("image_size=null", "fit.bf16=false")
TRANSFER = (
    *(
        Experiment(f"transfer_{row}", f"transfer_{row}", (*CPU, "test_limit=500"))
        for row in (*TRANSFER_ROWS, "zero_shot", "zero_shot_mt")
    ),
    Experiment("transfer_student", "transfer_student", (*CPU, "train_limit=3000")),
    # the paper's weight of 1, and a new classifier: too little to teach anything here
    Experiment(
        "transfer_distilled",
        "transfer_distilled",
        (
            *CPU,
            "train_limit=3000",
            "strategies.distillation.weights=null",
            "strategies.distillation.classifier=new",
        ),
        teacher="xgqa_baseline",
    ),
    Experiment("transfer_taught", "transfer_distilled", (*CPU, "train_limit=3000"), teacher="xgqa_baseline"),
)
