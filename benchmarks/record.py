"""Enter finished runs into `results/`, and write the generated parts of README and docs from there.

python -m benchmarks.record RUN              append RUN/result.json to results/runs.jsonl, copy its curve
python -m benchmarks.record --trial RUN ...  append settings and R@1 of each to results/trials.jsonl: the
                                             experiments behind the recipe `tiny`
python -m benchmarks.record --finetune RUN ...  append RUN/result.json of each to results/finetune.jsonl
python -m benchmarks.record --scenes FOLDER  append what the text alone and the image alone reach there
                                             to results/scenes.jsonl
python -m benchmarks.record --search RUN     append what RUN/report.md says of the best to
                                             results/searches.jsonl
python -m benchmarks.record --gpu FILE       append gpu.json of `benchmarks.gpu` to results/gpu.jsonl
python -m benchmarks.record                  only write the pages again from what is recorded
"""

import argparse
import json
import re
import shutil
import statistics
from collections import defaultdict
from pathlib import Path

from benchmarks import (
    ablations,
    balance,
    checkpoint,
    claims_report,
    gpu_tables,
    priors,
    processes,
    search,
    step,
    unfreezing,
)
from benchmarks.results import RESULTS, ROOT, newest
from finetune.report import scores_of
from finetune.tasks.datasets import TASKS
from pretrain.evaluate import recall_table, summarize_recall
from pretrain.train import describe_times
from raylib.display import markdown_table, mean_and_std, percent
from raylib.fileio import append_jsonl, read_jsonl
from raylib.renames import rename_settings

SETTINGS = {"zero_shot": "", "few_shot": "few-shot", "translate_test": "translate-test", "untrained": ""}
# GQA's types of questions, by what their answers are
QUESTION_TYPES = {("verify", "logical"): "yes or no", ("choose", "compare", "query"): "things"}
NOT_MEASURED = "Not measured on a quiet machine yet."
TWIN = "twin, masked positions"  # that which leaves as much out as ours does
FUZZ_RIGHT = ("one line", "accepted and right")
TRANSFER_PREFIX = "transfer_"  # what runs of papers 3 and 4 are called by
BASELINE_LABELS = {
    "majority": "(the most frequent answer)",
    "text": "(logistic regression over the text alone)",
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="*", type=Path, help="folder of a finished run")
    parser.add_argument("--trial", action="store_true", help="RUN is an experiment of other settings")
    parser.add_argument("--finetune", action="store_true", help="RUN is a fine-tuning run")
    parser.add_argument("--scenes", type=Path, help="a folder of emoji scenes")
    parser.add_argument("--search", type=Path, help="the folder of a search that is complete")
    parser.add_argument("--gpu", type=Path, metavar="FILE", help="a measurement of benchmarks.gpu")
    options = parser.parse_args(arguments)
    if options.gpu:
        append_jsonl(RESULTS / "gpu.jsonl", json.loads(options.gpu.read_text(encoding="utf-8")))
    if options.search:
        append_jsonl(RESULTS / "searches.jsonl", read_search_report(options.search))
    if options.scenes:
        append_jsonl(RESULTS / "scenes.jsonl", balance.measure(options.scenes))
    for run in options.run:
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
        if options.finetune:
            append_jsonl(RESULTS / "finetune.jsonl", result)
        elif options.trial:
            append_jsonl(RESULTS / "trials.jsonl", describe_trial(run, result))
        else:
            append_jsonl(RESULTS / "runs.jsonl", result)
            shutil.copy2(run / "curve.png", ROOT / "docs" / "images" / "sample_curve.png")
    write_pages(ROOT)


def write_pages(root: Path) -> None:
    """Write the generated parts of README.md and docs/ below `root` from the records."""
    last = read_jsonl(RESULTS / "runs.jsonl")[-1]
    scenes = read_jsonl(RESULTS / "scenes.jsonl")
    baselines = {task: groups["en"] for task, groups in scenes[0]["baselines"].items()}
    runs = newest(read_jsonl(RESULTS / "finetune.jsonl"), "run")
    searches = [line["found"] for line in read_jsonl(RESULTS / "searches.jsonl")[-1:]]
    write_parts(root / "README.md", table=folded_table(recall_table(last)), speed_line=speed_line())
    write_parts(root / "docs" / "data.md", layout=task_files())
    claims = claims_report.tables()
    write_parts(root / "benchmarks" / "claims.md", **claims)
    write_parts(
        root / "raylib" / "sample" / "scenes" / "README.md",
        balance=balance.table(scenes[-1]),
        kinds=balance.kinds_table(scenes[-1], scenes[0]["kinds"]),
    )
    write_parts(
        root / "docs" / "results.md",
        table=recall_table(last),
        reading=describe_run(last),
        finetune=finetune_tables(runs, baselines),
        transfer=transfer_tables(runs),
        search="\n\n".join([*searches, search.table(read_jsonl(search.FILE))]),
        priors=priors.table(read_jsonl(priors.FILE)),
        trials=trial_table(),
        ablations=ablations.table(),
        claims=claims["claims"],
        worth=claims["worth"],
    )
    write_parts(root / "docs" / "cluster.md", drills=drill_table())
    write_parts(root / "docs" / "security.md", fuzz=fuzz_table())
    write_parts(
        root / "docs" / "performance.md",
        speed=speed_tables(),
        processes=processes.table(read_jsonl(processes.FILE)[-1]),
        checkpoint="".join(map(checkpoint.table, read_jsonl(checkpoint.FILE)[-1:])) or NOT_MEASURED,
        gpu=gpu_part(),
        dry=gpu_tables.dry_table(newest(read_jsonl(RESULTS / "dry.jsonl"), "name")),
        unfreezing=unfreezing.table(read_jsonl(unfreezing.FILE)[-1]["seconds"]),
    )


def folded_table(table: str) -> str:
    """A table of recalls with five rows in sight, the rest folded: English, the best and the worst of the
    others, the means of the others and of the held-out concepts. Of its columns, R@1 alone."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    columns = [lines[0].index(name) for name in ("language", "R@1", "x chance", "i2t R@1", "t2i R@1")]
    head, _, english, *rows = [[line[column] for column in columns] for line in lines]
    others = sorted((row for row in rows if " " not in row[0]), key=lambda row: -float(row[1]))
    means = [row for row in rows if row[0].startswith(("mean", "held-out concepts, others"))]
    visible = [english, others[0], others[-1], *means]
    rest = [row for row in rows if row not in visible]
    summary = "<details><summary>the other languages</summary>"
    tables = markdown_table([head, *visible]), summary, markdown_table([head, *rest]), "</details>"
    return "\n\n".join(tables)


def drill_table() -> str:
    """Table of the newest outcome of each drill."""
    rows = [["drill", "what is broken", "times", "seconds", "verdict"]]
    for line in newest(read_jsonl(RESULTS / "drills.jsonl"), "row"):
        cells = (
            f"`{line['row']}`",
            line["what"],
            str(line["count"]),
            f"{line['seconds']:.0f}",
            line["verdict"],
        )
        rows.append(list(cells))
    return markdown_table(rows, words=2) if len(rows) > 1 else "Not recorded yet."


def fuzz_table() -> str:
    """Table of what came of damaged files in the last run of `make fuzz`: a row an area of readers."""
    lines = read_jsonl(RESULTS / "fuzz.jsonl")
    if not lines:
        return "Not recorded yet."
    last = lines[-1]
    facts = ("git", "seed", "date", "machine")
    areas: dict[str, list[dict]] = defaultdict(list)
    for line in newest(lines, "reader"):
        if all(line[fact] == last[fact] for fact in facts):
            areas[line["area"]].append(line)
            areas["all"].append(line)
    rows = [["area", "readers", "files", "one line", "accepted and right", "anything else", "CPU seconds"]]
    for area, found in sorted(areas.items(), key=lambda item: (item[0] == "all", item[0])):
        files, seconds = (sum(line[name] for line in found) for name in ("files", "seconds"))
        counts = [sum(line["outcomes"].get(kind, 0) for line in found) for kind in FUZZ_RIGHT]
        values = (len(found), files, *counts, files - sum(counts), seconds)
        rows.append([area, *(f"{value:,.0f}" for value in values)])
    words = f"Commit {last['git']}, seed {last['seed']}, {last['machine']}, {last['date']}."
    return f"{words}\n\n{markdown_table(rows)}"


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


def read_search_report(folder: Path) -> dict:
    """Read the part about the best from a search's report."""
    text = (folder / "report.md").read_text(encoding="utf-8")
    head = text.split("\n\n")[1]
    best = text.split("## The best\n\n")[1].split("\n\n## ")[0]
    cost = text.split("## What it cost\n\n")[1].split("\n\n## ")[0]
    return {"search": folder.name, "found": "\n\n".join([head, best, cost])}


def describe_trial(run: Path, result: dict) -> dict:
    """Describe an experiment: its settings and scores."""
    stored = json.loads((run / "config.json").read_text(encoding="utf-8"))
    settings = flatten(rename_settings("pretrain", stored))
    relevant = {
        k: v
        for k, v in settings.items()
        if k.startswith(("objective", "model", "data", "optim", "fit.steps"))
    }
    return {
        "name": result["run"],
        "git": result["git"],
        "settings": relevant,
        "seconds": result["seconds"],
        **summarize_recall(result),
    }


def flatten(value: dict, prefix: str = "") -> dict:
    """Nested settings by dotted path."""
    out = {}
    for name, inner in value.items():
        out |= flatten(inner, f"{prefix}{name}.") if isinstance(inner, dict) else {prefix + name: inner}
    return out


def trial_table() -> str:
    """Table of the experiments: the settings in which any two of them differ, and R@1."""
    records = read_jsonl(RESULTS / "trials.jsonl")
    every = sorted({path for r in records for path in r["settings"]})
    paths = [p for p in every if len({json.dumps(r["settings"].get(p)) for r in records}) > 1]
    lines = [[*(f"`{p}`" for p in paths), "English", "mean of the others"]]
    for r in records:
        values = [json.dumps(r["settings"].get(p)) for p in paths]
        lines.append([*values, f"{100 * r['en_r1']:.1f} %", f"{100 * r['others_r1']:.1f} %"])
    return markdown_table(lines)


def describe_run(run: dict) -> str:
    """Describe in words what a run came to."""
    values, chance = summarize_recall(run), run["retrieval"]["en"]["chance_r1"]
    losses = ", ".join(f"{k} {v:.2f}" for k, v in run["losses"].items() if k != "grad_norm")
    return (
        f"R@1 is the mean of both directions; chance is {100 * chance:.2f} %. English: "
        f"{values['en_r1'] / chance:.0f} times chance; mean of the other languages: "
        f"{values['others_r1'] / chance:.0f} times. The {run['workers']} workers did {run['steps']} steps "
        f"({'bf16 autocast' if run['bf16'] else 'float32'}, {run['samples_per_second']:.0f} samples/s) and "
        f"spent {describe_times(run)}. Last losses: {losses}. {describe_seeds(run)}"
    )


def describe_seeds(run: dict) -> str:
    """The same recipe with other seeds: what was recorded with as many steps of as many samples, newest of
    each seed."""
    seeds = {
        r["seed"]: summarize_recall(r)
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


def speed_tables() -> str:
    """The newest figures of each size of the step benchmark, and of the data benchmark."""
    lines = [
        step.table(line)
        for line in sorted(newest(read_jsonl(RESULTS / "step.jsonl"), "size"), key=lambda line: line["size"])
    ]
    rates = read_jsonl(RESULTS / "data.jsonl")[-1]["samples_per_second"]
    rows = ["| reading, samples/s a core | peer | ours | ratio |", "|---|---:|---:|---:|"]
    for name, figures in rates.items():
        (peer, slow), *ours = figures.items()
        label = name.replace("pictures", "images")  # the records keep their keys
        rows += [
            f"| {label}, {variant} | {peer}: {slow:,.0f} | {fast:,.0f} | {fast / slow:.1f}x |"
            for variant, fast in ours
        ]
    return "\n\n".join([*lines, "\n".join(rows)])


def gpu_part() -> str:
    """The newest measurement on each kind of GPU."""
    lines = gpu_tables.measured_lines(read_jsonl(RESULTS / "gpu.jsonl"))
    by_device = {line["parts"]["machine"]["device"]: line for line in lines}
    return "\n\n".join(map(gpu_tables.tables, by_device.values())) or "No GPU has run it yet."


def speed_line() -> str:
    """What a GPU reaches, if one was measured; the pretraining step beside its padded twin, and reading
    beside its peers: the newest ratios, in two sentences."""
    measured = gpu_tables.measured_lines(read_jsonl(RESULTS / "gpu.jsonl"))
    steps = []
    for line in sorted(newest(read_jsonl(RESULTS / "step.jsonl"), "size"), key=lambda line: line["size"]):
        ours, twin = (statistics.median(line["seconds"][name]) for name in ("ours", TWIN))
        memory = line["peak_gb"][TWIN] / line["peak_gb"]["ours"]
        steps.append(f"{twin / ours:.1f}x as fast at `{line['size']}`, in {1 / memory:.0%} of the memory")
    rates = read_jsonl(RESULTS / "data.jsonl")[-1]["samples_per_second"]
    ratios = [max(figures.values()) / next(iter(figures.values())) for figures in rates.values()]
    return (f"{gpu_tables.sentence(measured[-1])}\n\n" if measured else "") + (
        "A pretraining step beside its padded twin, which computes the same losses and gradients (one CPU "
        f"thread, float32): {'; '.join(steps)}. From shard to model input: {min(ratios):.1f} to "
        f"{max(ratios):.1f} times the samples a second of webdataset with open_clip's transform, or with "
        "SentencePiece."
    )


def task_files() -> str:
    """Markdown table of the files that each task reads."""
    rows = [["task", "languages", "split", "file"]]
    for name, task in TASKS.items():
        for number, (split, where) in enumerate(task.splits.items()):
            paths = " or ".join(f"`{one.path}`" for one in (where, *where.others))
            first = [f"`{name}`", " ".join(task.languages)] if number == 0 else ["", ""]
            rows.append([*first, split, paths])
    return markdown_table(rows, words=4)


def finetune_tables(records: list[dict], baselines: dict[str, dict[str, float]]) -> str:
    """Markdown of the runs on emoji scenes: a table a task, a row a method, seeds together. `baselines`:
    measured by `benchmarks.balance` on the same data, in English."""
    tasks: dict[str, list[dict]] = defaultdict(list)
    for record in records:
        if not record["run"].startswith(TRANSFER_PREFIX):
            tasks[record["task"]].append(record)
    tables = [_finetune_table(task, rows, baselines.get(task, {})) for task, rows in tasks.items()]
    return "\n\n".join(tables) or "No fine-tuning run has been recorded yet."


def transfer_tables(records: list[dict]) -> str:
    """Markdown of papers 3 and 4's runs: retrieval by method, with how far languages are apart; then
    distillation."""
    records = [record for record in records if record["run"].startswith(TRANSFER_PREFIX)]
    retrieval = [r for r in records if "retrieval" in r]
    rows = [
        [
            "retrieval: %",
            "seeds",
            "mean recall",
            "R@1",
            "std of languages",
            "range",
            "weights trained",
            "training, s",
        ]
    ]
    for name, group in _by_method(retrieval).items():
        firsts = [statistics.fmean(v for code, v in r["recall_at_1"].items() if code != "en") for r in group]
        rows.append(
            [
                name,
                str(len(group)),
                mean_and_std(r["mean_targets"] for r in group),
                mean_and_std(firsts),
                mean_and_std(r["disparity"]["std"] for r in group),
                mean_and_std(r["disparity"]["range"] for r in group),
                f"{100 * group[0]['trainable'] / group[0]['params']:.2f}" if group[0]["seconds"] else "",
                f"{statistics.median(r['seconds'] for r in group):.0f}" if group[0]["seconds"] else "",
            ]
        )
    distilled = [r for r in records if r["task"] == "xgqa_translated"]
    codes = sorted({code for r in distilled for code in r["accuracy"]})
    distilled_rows = [["questions: accuracy, %", "seeds", *codes, "mean", "training, s"]]
    for name, group in _by_method(distilled).items():
        seconds = f"{statistics.median(r['seconds'] for r in group):.0f}"
        distilled_rows.append(
            [
                name,
                str(len(group)),
                *(mean_and_std(r["accuracy"].get(code) for r in group) for code in codes),
                mean_and_std(r["mean_targets"] for r in group),
                seconds,
            ]
        )
    tables = [markdown_table(part) for part in (rows, distilled_rows) if len(part) > 1]
    return "\n\n".join(tables) or "Not measured yet."


def _by_method(records: list[dict]) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = defaultdict(list)
    for record in records:
        setting = {"untrained": "as it is", "translate_test": "as it is, on translations"}.get(
            record["setting"]
        )
        groups[setting or record["method"]].append(record)
    return groups


def _finetune_table(task: str, records: list[dict], baselines: dict[str, float]) -> str:
    groups: dict[str, list[dict]] = defaultdict(list)
    for record in records:
        setting = SETTINGS.get(record["setting"], record["setting"])
        groups[", ".join(filter(None, (setting, record["method"])))].append(record)
    what = "mean recall" if "retrieval" in records[0] else "accuracy"
    head = [f"{task}: {what}, %", "seeds", "English", "mean of the targets", "gap"]
    kinds = [
        group
        for group in QUESTION_TYPES
        if any(set(group) & set(by) for r in records for by in r.get("by_type", {}).values())
    ]
    head += [f"targets, {QUESTION_TYPES[group]}" for group in kinds]
    scores = [
        (percent(_mean_of_targets(r.get("synonym_accuracy"))), percent(r["mean_targets"])) for r in records
    ]
    synonyms = any(kind and kind != strict for kind, strict in scores)
    pruned = any(r["sparsity"] for r in records)
    head += ["targets, synonyms right"] if synonyms else []
    head += ["weights at zero, %"] if pruned else []
    head += ["training, s"]
    lines = [head]
    for key, name in BASELINE_LABELS.items():
        if key in baselines:
            lines.append([name, "", percent(baselines[key]), *[""] * (len(head) - 3)])
    for name, group in groups.items():
        row = [
            name,
            str(len({r["seed"] for r in group})),
            mean_and_std(scores_of(r).get("en") for r in group),
            mean_and_std(r["mean_targets"] for r in group),
            mean_and_std(r["gap"] for r in group),
        ]
        row += [mean_and_std(_mean_of_kinds(r, group_of) for r in group) for group_of in kinds]
        if synonyms:
            row.append(mean_and_std(_mean_of_targets(r.get("synonym_accuracy")) for r in group))
        if pruned:
            row.append(percent(group[0]["sparsity"]) if group[0]["sparsity"] else "")
        seconds = statistics.median(r["seconds"] for r in group)  # of wall time: some runs waited for others
        lines.append([*row, f"{seconds:.0f}" if seconds else ""])
    return markdown_table(lines)


def _mean_of_kinds(record: dict, kinds: tuple[str, ...]) -> float | None:
    """Mean over the targets, and over these types of questions."""
    values = [
        by[kind] for code, by in record["by_type"].items() if code != "en" for kind in kinds if kind in by
    ]
    return statistics.fmean(values) if values else None


def _mean_of_targets(scores: dict[str, float] | None) -> float | None:
    others = [score for code, score in (scores or {}).items() if code != "en"]
    return statistics.fmean(others) if others else None


if __name__ == "__main__":
    main()
