"""Paper 2's ablations (its table 5) at the smallest size: each recipe pretrained, its zero-shot retrieval,
then one task.

    python -m benchmarks.ablations [--seeds 1] [--folder runs/ablations] [--quick]

`tiny` with all terms at weight 1, which its recipe for the ten minutes is not. What is finished in FOLDER is
not made again; results/ablations.jsonl has every record, the table in docs/results.md the newest of each
recipe and seed.
"""

import argparse
import json
from pathlib import Path

from benchmarks.results import RESULTS, newest, run_module
from pretrain.evaluate import summarize_recall
from raylib.display import markdown_table, mean_and_std
from raylib.fileio import append_jsonl, read_jsonl

FILE = RESULTS / "ablations.jsonl"
ABLATION_TITLES = {
    "tiny": "all terms",
    "tiny_no_tlm": "without TLM",
    "tiny_no_xmlm": "without xMLM",
    "tiny_no_xlc": "without cross-lingual contrast",
    "tiny_no_uni_arch": "without the unified architecture",
}
PRETRAIN = (
    "runtime=local",
    "workers=1",
    "fit.steps=300",
    "fit.eval_every=300",
    "objective.fuse_every=8",
    "data.image_text.batch=256",
    "data.parallel.batch=512",
    "data.text.batch=64",
)
TERM_NAMES = ("ucl_image", "ucl_translation", "vlm", "tlm", "xmlm", "itm")
OFF = {"tiny_no_tlm": "tlm", "tiny_no_xmlm": "xmlm", "tiny_no_xlc": "ucl_translation"}
FINETUNE = ("epochs=3", "optim.lr=3e-4", "train_limit=3000", "image_size=64", "freeze=[]")
FINETUNE += ("extra_tests={}", "shuffled_images=false")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs/ablations"))
    parser.add_argument(
        "--quick", action="store_true", help="one step of everything, nothing recorded: does it run?"
    )
    options = parser.parse_args(arguments)
    folder = options.folder / "quick" if options.quick else options.folder
    scenes = folder / "scenes"
    if not scenes.is_dir():
        run_module("raylib.sample.scenes", scenes)
    for seed in range(options.seeds):
        for recipe in ABLATION_TITLES:
            line = run(recipe, seed, folder, scenes, options.quick)
            if not options.quick and line not in read_jsonl(FILE):
                append_jsonl(FILE, line)
                run_module("benchmarks.record")


def run(recipe: str, seed: int, folder: Path, scenes: Path, quick: bool) -> dict:
    """Pretrain, fine-tune on entailment; what both came to."""
    name = f"{recipe}_seed{seed}"
    weights = [f"objective.weights.{term}={int(OFF.get(recipe) != term)}" for term in TERM_NAMES]
    quick_steps, quick_items = (
        (["fit.steps=1", "fit.eval_every=1"], ["epochs=1", "train_limit=64", "test_limit=32"])
        if quick
        else ([], [])
    )
    identity = [f"name={name}", f"runs={folder}", f"fit.seed={seed}"]
    run_module("pretrain", recipe, *identity, *PRETRAIN, *weights, *quick_steps)
    settings = [
        f"name={name}_xvnli",
        f"runs={folder}",
        f"model={folder / name}",
        f"data={scenes}",
        f"fit.seed={seed}",
    ]
    run_module("finetune", "scenes_xvnli", *settings, *FINETUNE, *quick_items)
    pretrained, task = (
        json.loads((folder / run / "result.json").read_text()) for run in (name, f"{name}_xvnli")
    )
    return {
        "recipe": recipe,
        "seed": seed,
        **summarize_recall(pretrained),
        "seconds": pretrained["seconds"],
        "xvnli": task["accuracy"],
        "xvnli_targets": task["mean_targets"],
    }


def table() -> str:
    """Markdown: a row an ablation, seeds as means."""
    rows = [["pretrained", "seeds", "R@1 English", "R@1 others", "xvnli English", "xvnli targets"]]
    for recipe, title in ABLATION_TITLES.items():
        lines = newest([line for line in read_jsonl(FILE) if line["recipe"] == recipe], "seed")
        if lines:
            columns = [
                [x["en_r1"] for x in lines],
                [x["others_r1"] for x in lines],
                [x["xvnli"]["en"] for x in lines],
                [x["xvnli_targets"] for x in lines],
            ]
            rows.append([title, str(len(lines)), *map(mean_and_std, columns)])
    return markdown_table(rows)


if __name__ == "__main__":
    main()
