"""Enter a finished run into `results/`, and write the README's generated parts from there.

    python -m benchmarks.record RUN      append RUN/result.json to results/runs.jsonl, copy its curve, write the README
    python -m benchmarks.record          write the README again from what is recorded
"""

import argparse
import json
import re
import shutil
from pathlib import Path

from benchmarks.step import table as step_table
from pretrain import report
from pretrain.evaluate import summary

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CURVE = RESULTS / "sample_curve.png"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="folder of a finished run")
    given = parser.parse_args(arguments)
    if given.run:
        result = json.loads((given.run / "result.json").read_text(encoding="utf-8"))
        with (RESULTS / "runs.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(result, ensure_ascii=False) + "\n")
        shutil.copy2(given.run / "curve.png", CURVE)
    write_readme(ROOT / "README.md")


def write_readme(path: Path) -> None:
    """Replace what stands between the markers of each part."""
    text = path.read_text(encoding="utf-8")
    run = read(RESULTS / "runs.jsonl")[-1]
    parts = {"table": report.table(run), "reading": reading(run), "speed": speed()}
    for name, part in parts.items():
        text = re.sub(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m, p=part: f"{m[1]}{p}\n{m[2]}", text, flags=re.S)
    path.write_text(text, encoding="utf-8")


def reading(run: dict) -> str:
    """What a run came to, in words."""
    values, chance = summary(run), run["retrieval"]["en"]["chance_r1"]
    losses = ", ".join(f"{k} {v:.2f}" for k, v in run["losses"].items() if k != "grad_norm")
    return (
        f"R@1 is the mean of both directions; chance is {100 * chance:.2f} %. English: {values['en_r1'] / chance:.0f} times "
        f"chance; mean of the other languages: {values['others_r1'] / chance:.0f} times. The {run['workers']} workers did "
        f"{run['steps']} steps ({'bf16 autocast' if run['bf16'] else 'float32'}, {run['samples_per_second']:.0f} samples/s) "
        f"and spent {report.spent(run)}. Last losses: {losses}. One run, one seed: no spread was measured."
    )


def speed() -> str:
    """The newest figures of each size of the step benchmark, and of the data benchmark."""
    newest = {record["size"]: record for record in read(RESULTS / "step.jsonl")}
    lines = [step_table(newest[size]) for size in sorted(newest)]
    rates = read(RESULTS / "data.jsonl")[-1]["samples_per_second"]
    rows = ["| reading, samples/s a core | peer | ours | ratio |", "|---|---:|---:|---:|"]
    for what, figures in rates.items():
        (peer, slow), *ours = figures.items()
        rows += [f"| {what}, {mine} | {peer}: {slow:,.0f} | {fast:,.0f} | {fast / slow:.1f}x |" for mine, fast in ours]
    return "\n\n".join([*lines, "\n".join(rows)])


def read(path: Path) -> list[dict]:
    """Records of a results file; none if it is not there."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


if __name__ == "__main__":
    main()
