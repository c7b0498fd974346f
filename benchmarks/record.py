"""Enter finished runs into `results/`, and write the generated parts of the READMEs from there.

python -m benchmarks.record RUN              append RUN/result.json to results/runs.jsonl, copy its curve
python -m benchmarks.record --trial RUN ...  append settings and R@1 of each to results/trials.jsonl: the
                                             experiments behind the recipe `tiny`
python -m benchmarks.record --finetune RUN ...  append RUN/result.json of each to results/finetune.jsonl
python -m benchmarks.record --scenes FOLDER  append what is reached there without pictures to
                                             results/scenes.jsonl
python -m benchmarks.record --search RUN     append what RUN/report.md says of the best to
                                             results/searches.jsonl
python -m benchmarks.record                  only write the READMEs again from what is recorded
"""

import argparse
import json
import re
import shutil
from pathlib import Path

from benchmarks.balance import measure
from benchmarks.finetuning import tables, transfer
from benchmarks.step import table as step_table
from pretrain import report
from pretrain.evaluate import summary
from raylib import markdown
from raylib.fileio import append_jsonl, read_jsonl
from raylib.renames import rename_settings

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CURVE = RESULTS / "sample_curve.png"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="*", type=Path, help="folder of a finished run")
    parser.add_argument("--trial", action="store_true", help="RUN is an experiment of other settings")
    parser.add_argument("--finetune", action="store_true", help="RUN is a fine-tuning run")
    parser.add_argument("--scenes", type=Path, help="a folder of emoji scenes")
    parser.add_argument("--search", type=Path, help="the folder of a search that is complete")
    given = parser.parse_args(arguments)
    if given.search:
        append_jsonl(RESULTS / "searches.jsonl", searched(given.search))
    if given.scenes:
        append_jsonl(RESULTS / "scenes.jsonl", measure(given.scenes))
    for run in given.run:
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
        if given.finetune:
            append_jsonl(RESULTS / "finetune.jsonl", result)
        elif given.trial:
            append_jsonl(RESULTS / "trials.jsonl", trial(run, result))
        else:
            append_jsonl(RESULTS / "runs.jsonl", result)
            shutil.copy2(run / "curve.png", CURVE)
    last = read_jsonl(RESULTS / "runs.jsonl")[-1]
    blind = (read_jsonl(RESULTS / "scenes.jsonl") or [{}])[-1]
    runs = newest(read_jsonl(RESULTS / "finetune.jsonl"), "run")
    parts = {"table": report.table(last), "reading": reading(last), "speed": speed()}
    write_parts(ROOT / "README.md", **parts, finetune=tables(runs, blind), transfer=transfer(runs))
    from benchmarks import ablations, search, unfreezing  # which record through this module

    found = [line["found"] for line in read_jsonl(RESULTS / "searches.jsonl")[-1:]]
    write_parts(ROOT / "README.md", search="\n\n".join([*found, search.table(read_jsonl(search.FILE))]))
    saved = unfreezing.table(read_jsonl(unfreezing.FILE)[-1]["seconds"])
    write_parts(
        ROOT / "benchmarks" / "README.md", trials=trials(), ablations=ablations.table(), unfreezing=saved
    )


def write_parts(path: Path, **parts: str) -> None:
    """Replace what stands between the markers of each part."""
    text = path.read_text(encoding="utf-8")
    for name, part in parts.items():
        text = re.sub(
            f"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
            lambda m, p=part: f"{m[1]}{p}\n{m[2]}",
            text,
            flags=re.S,
        )
    path.write_text(text, encoding="utf-8")


def searched(folder: Path) -> dict:
    """What a search's report says of its best."""
    text = (folder / "report.md").read_text(encoding="utf-8")
    head = text.split("\n\n")[1]
    best = text.split("## The best\n\n")[1].split("\n\n## ")[0]
    cost = text.split("## What it cost\n\n")[1].split("\n\n## ")[0]
    return {"search": folder.name, "found": "\n\n".join([head, best, cost])}


def trial(run: Path, result: dict) -> dict:
    """An experiment: its settings, what it scored."""
    stored = json.loads((run / "config.json").read_text(encoding="utf-8"))
    settings = flatten(rename_settings("pretrain", stored))
    kept = {
        k: v
        for k, v in settings.items()
        if k.startswith(("objective", "model", "data", "optim", "fit.steps"))
    }
    return {
        "name": result["run"],
        "git": result["git"],
        "settings": kept,
        "seconds": result["seconds"],
        **summary(result),
    }


def flatten(value: dict, prefix: str = "") -> dict:
    """Nested settings by dotted path."""
    out = {}
    for name, inner in value.items():
        out |= flatten(inner, f"{prefix}{name}.") if isinstance(inner, dict) else {prefix + name: inner}
    return out


def trials() -> str:
    """Table of the experiments: the settings in which any two of them differ, and R@1."""
    records = read_jsonl(RESULTS / "trials.jsonl")
    every = sorted({path for r in records for path in r["settings"]})
    paths = [p for p in every if len({json.dumps(r["settings"].get(p)) for r in records}) > 1]
    lines = [[*(f"`{p}`" for p in paths), "English", "mean of the others"]]
    for r in records:
        values = [json.dumps(r["settings"].get(p)) for p in paths]
        lines.append([*values, f"{100 * r['en_r1']:.1f} %", f"{100 * r['others_r1']:.1f} %"])
    return markdown.table(lines)


def reading(run: dict) -> str:
    """What a run came to, in words."""
    values, chance = summary(run), run["retrieval"]["en"]["chance_r1"]
    losses = ", ".join(f"{k} {v:.2f}" for k, v in run["losses"].items() if k != "grad_norm")
    return (
        f"R@1 is the mean of both directions; chance is {100 * chance:.2f} %. English: "
        f"{values['en_r1'] / chance:.0f} times chance; mean of the other languages: "
        f"{values['others_r1'] / chance:.0f} times. The {run['workers']} workers did {run['steps']} steps "
        f"({'bf16 autocast' if run['bf16'] else 'float32'}, {run['samples_per_second']:.0f} samples/s) and "
        f"spent {report.spent(run)}. Last losses: {losses}. {spread(run)}"
    )


def spread(run: dict) -> str:
    """The same recipe with other seeds: what was recorded with as many steps of as many samples, newest of
    each seed."""
    seeds = {
        r["seed"]: summary(r)
        for r in read_jsonl(RESULTS / "runs.jsonl")
        if "seed" in r and r["steps"] == run["steps"]
    }
    if len(seeds) < 2:
        return "One run, one seed: no spread was measured."
    names = {"en_r1": "English", "others_r1": "others", "heldout_r1": "held-out concepts, all languages"}
    scores = [
        f"{name} {', '.join(f'{100 * s[key]:.1f}' for s in seeds.values())} %" for key, name in names.items()
    ]
    return f"R@1 by seed ({', '.join(map(str, seeds))}): {'; '.join(scores)}."


def speed() -> str:
    """The newest figures of each size of the step benchmark, and of the data benchmark."""
    lines = [
        step_table(line)
        for line in sorted(newest(read_jsonl(RESULTS / "step.jsonl"), "size"), key=lambda line: line["size"])
    ]
    rates = read_jsonl(RESULTS / "data.jsonl")[-1]["samples_per_second"]
    rows = ["| reading, samples/s a core | peer | ours | ratio |", "|---|---:|---:|---:|"]
    for what, figures in rates.items():
        (peer, slow), *ours = figures.items()
        rows += [
            f"| {what}, {mine} | {peer}: {slow:,.0f} | {fast:,.0f} | {fast / slow:.1f}x |"
            for mine, fast in ours
        ]
    return "\n\n".join([*lines, "\n".join(rows)])


def newest(records: list[dict], *keys: str) -> list[dict]:
    """The last record of each that has the same values at `keys`."""
    return list({tuple(record[key] for key in keys): record for record in records}.values())


if __name__ == "__main__":
    main()
