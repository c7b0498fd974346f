"""How `scenes_base` was made: what its stages came to, the hash of its weights, and what else was tried.

    python -m benchmarks.scenes_base MODEL RUN ...        MODEL: exported from the last RUN
    python -m benchmarks.scenes_base --try WHAT RUN ...   WHAT differs in these runs from the recipes

Appends a line to results/scenes_base.jsonl, as `make scenes_base` does. RUN: a finished run of pretraining,
with what its curve and its evaluation end with; or one of fine-tuning, with its scores on the development
sets alone (`run_test=false`), or on the test sets of scenes of another seed, which serve as development sets
of all languages (`python -m raylib.sample.scenes OUT seed=1`).
"""

import argparse
import datetime
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.claims_tasks import HELD_OUT
from benchmarks.claims_work import hash_files
from benchmarks.results import RESULTS, commit
from finetune.report import scores_of
from raylib.display import markdown_table, percent
from raylib.errors import UserError
from raylib.fileio import append_jsonl, read_json_object, read_jsonl
from raylib.sample.scenes.writer import ScenesConfig

FILE = RESULTS / "scenes_base.jsonl"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="MODEL or RUN")
    parser.add_argument("--try", dest="what", metavar="WHAT", help="runs that became no model")
    given = parser.parse_args(arguments)
    record: dict[str, Any] = {"commit": commit(), "date": datetime.date.today().isoformat()}
    runs = given.folders
    if given.what is None:
        model, *runs = given.folders
        record["weights"] = hash_files(model, "*.safetensors")
        print(f"{model}: weights {record['weights']}")
    else:
        record["what"] = given.what
    append_jsonl(FILE, record | {"runs": list(map(describe, runs))})


def describe(run: Path) -> dict[str, Any]:
    """Return what a run came to: {"run", "recipe", "seconds", ...}."""
    result = read_json_object(run / "result.json", (), "the result of a run")
    settings = json.loads((run / "config.json").read_text(encoding="utf-8"))
    names = ("run", "steps", "seconds", "params", "data_sha256", "evaluation", "losses", "dev")
    found = {name: result[name] for name in names if name in result}
    if "task" in settings and "dev" not in result:
        scenes = read_json_object(Path(settings["data"], "settings.json"), (), "the settings of scenes")
        if scenes["seed"] == ScenesConfig().seed:
            what = "it was tested on the benchmark; tries are compared on development sets"
            raise UserError(f"{run}: {what}: run_test=false")
        found["dev"] = {code: score for code, score in scores_of(result).items() if code != HELD_OUT}
    return {"recipe": settings["recipe"], **found, "precision": result["evaluation_precision"]}


def stages_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Return a row a stage of the newest model."""
    models = [record for record in records if "weights" in record]
    if not models:
        return "No model has been recorded yet."
    rows = [["stage", "steps", "minutes", "R@1 English, %", "others, %", "ITM accuracy, %"]]
    rows[0] += ["VLM loss", "with a wrong image"]
    for run in models[-1]["runs"]:
        found = run["evaluation"]
        losses = [found.get(name) for name in ("dev_loss/vlm", "dev_loss/vlm_wrong_image")]
        rows.append(
            [
                f"`{run['recipe']}`",
                str(run["steps"]),
                f"{run['seconds'] / 60:.0f}",
                *(percent(found.get(name)) for name in ("en_r1", "others_r1", "itm_accuracy")),
                *("" if loss is None else f"{loss:.2f}" for loss in losses),
            ]
        )
    last = models[-1]
    return f"{markdown_table(rows)}\n\nWeights {last['weights']}; commit {last['commit']}, {last['date']}."


def tries_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Return a row a run that was tried, with its development scores."""
    rows = [["tried", "recipe", "minutes", "English, %", "others, %"]]
    for record in records:
        for run in record["runs"] if "what" in record else ():
            scores = run.get("dev") or {}
            others = [score for code, score in scores.items() if code != "en"]
            figures = run.get("evaluation", {})
            rows.append(
                [
                    record["what"],
                    f"`{run['recipe']}`",
                    f"{run['seconds'] / 60:.1f}",
                    percent(scores.get("en", figures.get("en_r1"))),
                    percent(statistics.fmean(others) if others else figures.get("others_r1")),
                ]
            )
    return markdown_table(rows, words=2) if len(rows) > 1 else "No try has been recorded yet."


def tables() -> dict[str, str]:
    """Return {"stages", "tries"} of the records."""
    records = read_jsonl(FILE)
    return {"stages": stages_table(records), "tries": tries_table(records)}


if __name__ == "__main__":
    main()
