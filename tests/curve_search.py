"""A stage that computes its score, and goes on from its checkpoints, for searches in seconds; and a command
that runs such a search, which drills kill:

    python -m tests.curve_search RUNS [search settings] [-- recipe settings]
"""

import sys
import time
from pathlib import Path

from raylib.command import entry_point
from raylib.config import override
from raylib.fileio import append_jsonl, read_json, write_json
from raylib.launch import LaunchConfig, run_folder
from raylib.loop import FitConfig
from raylib.search.config import GOALS, SearchConfig, SearchJob
from raylib.search.space import Float, Space


class CurveConfig(LaunchConfig):
    x: float = 0.5
    n: int = 1
    epochs: int = 3
    wait: float = 0.0
    megabytes: float = 0.0  # of a checkpoint
    fit: FitConfig = FitConfig()


class CurveJob(SearchJob):
    """Scores are a function of x, seed and epoch; every training is a line in trained.jsonl."""

    command = "finetune"
    more_epochs_hint = "more epochs="
    mutable_paths = ("x",)

    def trial_config(self, config, dev_sets):
        return config

    def describe_selection(self, dev_sets):
        return "a function of x"

    def metric_names(self, config, dev_sets):
        return GOALS[dev_sets]

    def check_config(self, config):
        pass

    def epochs_per_run(self, config):
        return config.epochs

    def parse_report(self, config, metrics):
        return metrics["step"], {name: metrics[name] for name in GOALS["both"]}

    def data_files(self, config):
        return []

    def verifies_content(self, config):
        return False

    def run(self, config, reporter):
        folder = run_folder(config)
        if (folder / "result.json").is_file():
            return read_json(folder / "result.json")
        checkpoint = folder / "checkpoints" / "epoch.json"
        done = read_json(checkpoint) if checkpoint.is_file() else 0
        if not done:
            line = {"run": config.name, "x": config.x, "seed": config.fit.seed}
            append_jsonl(folder.parents[1] / "trained.jsonl", line)
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        # as `raylib.loop` does, it reports the checkpoint that it goes on from again
        for epoch in range(max(1, done), config.epochs + 1):
            time.sleep(config.wait)
            write_json(checkpoint, epoch)
            if config.megabytes:
                (folder / "checkpoints" / "weights").write_bytes(bytes(int(config.megabytes * 2**20)))
            scores = self.scores(config, epoch)
            reporter({"step": epoch, "ready": time.time(), **scores}, folder)
        write_json(folder / "result.json", scores)
        return scores

    def evaluate_tests(self, folder):
        assert (Path(folder) / "checkpoints").is_dir()
        return {"English": 0.5, "targets": 0.25}

    @staticmethod
    def scores(config, epoch):
        seed = config.fit.seed % 7 / 100
        goals = {"english_dev": 0.3, "target_dev": 0.7}
        return {g: (1 - (config.x - best) ** 2) * (0.5 + epoch / 8) / 2 + seed for g, best in goals.items()}


@entry_point("the same command goes on")
def main(arguments):
    """Run a search of one trial at a time, which comes to the same however often it is killed."""
    from raylib.search.search import run_search

    split = arguments.index("--") if "--" in arguments else len(arguments)
    runs, *settings = arguments[:split]
    first = SearchConfig(recipe="curve", name="search", runs=runs, num_trials=6, num_finalists=1)
    config = override(first, ["final_seeds=1", "max_concurrent=1", "cpus_per_trial=1", *settings])
    space = Space("", "", {"x": Float(0, 1)}, published=({"x": 0.2},))
    run_search(config, "x", space, CurveJob(), override(CurveConfig(), list(arguments[split + 1 :])))
    return 0


if __name__ == "__main__":
    # trials import the stage by its module's name
    from tests import curve_search

    sys.exit(curve_search.main())
