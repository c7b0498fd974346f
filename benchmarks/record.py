"""Enter finished runs into `results/`, and write the generated parts of README and docs from there.

python -m benchmarks.record RUN              append RUN/result.json to results/runs.jsonl, copy its curve
python -m benchmarks.record --scenes FOLDER  append what the text alone and the image alone reach there
                                             to results/scenes.jsonl
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
from typing import Any

from benchmarks import (
    balance,
    by_hand,
    checkpoint,
    claims_report,
    gpu_tables,
    priors,
    processes,
    retrieval,
    scenes_base,
    step,
    unfreezing,
)
from benchmarks.results import RESULTS, ROOT, newest
from finetune.tasks.datasets import TASKS
from pretrain.evaluate import compare_test_sets, recall_table, summarize_recall
from pretrain.train import describe_times
from raylib.display import markdown_table
from raylib.fileio import append_jsonl, read_jsonl

RUNS = RESULTS / "runs.jsonl"
SEED = 0  # the recipe's: its run is shown, and those of other seeds beside it in a line
NOT_RUN = "Not run yet."
NOT_MEASURED = "Not measured on a quiet machine yet."
TWIN = "twin, masked positions"  # that which leaves as much out as ours does
FUZZ_RIGHT = ("one line", "accepted and right")
# test sets of `make run`, by folder: no setting was chosen on them
TEST_SETS = {"emojione": "EmojiOne", "emojione_monotone": "EmojiOne, monotone"}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="*", type=Path, help="folder of a finished run")
    parser.add_argument("--scenes", type=Path, help="a folder of emoji scenes")
    parser.add_argument("--gpu", type=Path, metavar="FILE", help="a measurement of benchmarks.gpu")
    options = parser.parse_args(arguments)
    if options.gpu:
        append_jsonl(RESULTS / "gpu.jsonl", json.loads(options.gpu.read_text(encoding="utf-8")))
    if options.scenes:
        append_jsonl(RESULTS / "scenes.jsonl", balance.measure(options.scenes))
    for run in options.run:
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
        append_jsonl(RUNS, result)
        if result["seed"] == SEED:
            shutil.copy2(run / "curve.png", ROOT / "docs" / "images" / "sample_curve.png")
    write_pages(ROOT)


def write_pages(root: Path) -> None:
    """Write the generated parts of README.md, docs/ and other pages below `root` from the records."""
    last = [run for run in read_jsonl(RUNS) if run.get("seed") == SEED][-1]
    write_parts(root / "README.md", table=test_table(last), speed_line=speed_line())
    write_parts(root / "docs" / "data.md", layout=task_files())
    claims = claims_report.tables()
    write_parts(root / "benchmarks" / "claims.md", **claims)
    write_parts(root / "raylib" / "sample" / "scenes" / "README.md", **baselines_parts())
    write_parts(
        root / "docs" / "results.md",
        sets=compare_test_sets(last) or NOT_RUN,
        table=test_tables(last),
        reading=describe_run(last),
        **scenes_base.tables(),
        tasks=claims["tasks"],
        claims=claims["claims"],
        worth=claims["worth"],
        priors=priors.table(read_jsonl(priors.FILE)),
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
        retrieval=retrieval.table(read_jsonl(retrieval.FILE)),
    )
    for page, parts in by_hand.pages().items():
        write_parts(root / page, **parts)


def baselines_parts() -> dict[str, str]:
    """Return {"balance", "kinds"}: what the newest benchmark can be answered by, and the kinds of its
    questions beside those of the first one."""
    first, *later = read_jsonl(RESULTS / "scenes.jsonl")
    if not later:
        return {"balance": NOT_RUN, "kinds": NOT_RUN}
    return {"balance": balance.table(later[-1]), "kinds": balance.kinds_table(later[-1], first["kinds"])}


def test_table(result: dict) -> str:
    """A table of R@1 on the test sets of a run, with few rows in sight, the rest folded: English, the best
    and the worst of the others, the means of the others and of the held-out concepts."""
    tables = [
        [line.strip("| ").split(" | ") for line in recall_table(result["test_sets"][name]).splitlines()]
        for name in TEST_SETS
        if name in result.get("test_sets", {})
    ]
    if not tables:
        return NOT_RUN
    head = [
        "language",
        *(f"{TEST_SETS[name]}: {what}" for name in result["test_sets"] for what in ("R@1", "x chance")),
    ]
    # a line of each set, of language, R@1, x chance and more
    _, _, english, *rows = [
        [lines[0][0], *(cell for line in lines for cell in line[1:3])] for lines in zip(*tables, strict=True)
    ]
    others = sorted((row for row in rows if " " not in row[0]), key=lambda row: -float(row[1]))
    rest = [row for row in rows if row in others[1:-1] or row[0] == "held-out concepts, en"]
    visible = [english, others[0], others[-1], *(row for row in rows if " " in row[0] and row not in rest)]
    summary = "<details><summary>the other languages</summary>"
    parts = markdown_table([head, *visible]), summary, markdown_table([head, *rest]), "</details>"
    return "\n\n".join(parts)


def test_tables(result: dict) -> str:
    """A table a test set of a run, then that of its development set."""
    sets = {f"test set: {TEST_SETS[name]}": scores for name, scores in result.get("test_sets", {}).items()}
    sets["development set: Fluent"] = result
    return "\n\n".join(f"*{name}*\n\n{recall_table(scores)}" for name, scores in sets.items())


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


def describe_run(run: dict) -> str:
    """Describe in words what a run came to."""
    values, chance = summarize_recall(run), run["retrieval"]["en"]["chance_r1"]
    losses = ", ".join(f"{k} {v:.2f}" for k, v in run["losses"].items() if k != "grad_norm")
    return (
        f"R@1 is the mean of both directions. On the development set English stands at "
        f"{values['en_r1'] / chance:.0f} times chance, the mean of the other languages at "
        f"{values['others_r1'] / chance:.0f} times. The {run['workers']} workers did {run['steps']} steps "
        f"({'bf16 autocast' if run['bf16'] else 'float32'}, {run['samples_per_second']:.0f} samples/s) and "
        f"spent {describe_times(run)}. Last losses: {losses}. {describe_seeds(run)}"
    )


def describe_seeds(run: dict) -> str:
    """The same recipe with other seeds: what was recorded with as many steps on the same data, newest of each
    seed."""
    seeds = {
        r["seed"]: r
        for r in read_jsonl(RUNS)
        if "seed" in r and (r["steps"], r["data_sha256"]) == (run["steps"], run["data_sha256"])
    }
    if len(seeds) < 2:
        return "One run, one seed: no spread was measured."
    sets = {"the development set": seeds.values()}
    sets |= {label: [r["test_sets"][name] for r in seeds.values()] for name, label in TEST_SETS.items()}
    scores = [f"{label} {' and '.join(map(_times_chance, results))}" for label, results in sets.items()]
    minutes = " and ".join(f"{r['seconds'] / 60:.1f}" for r in seeds.values())
    return (
        f"Seeds {' and '.join(map(str, seeds))}, English / mean of the others, times chance: "
        f"{'; '.join(scores)}; they took {minutes} minutes."
    )


def _times_chance(result: dict[str, Any]) -> str:
    """English / the mean of the others."""
    values, number = summarize_recall(result), max(f["n"] for f in result["retrieval"].values())
    return f"{values['en_r1'] * number:.0f}/{values['others_r1'] * number:.0f}"


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


if __name__ == "__main__":
    main()
