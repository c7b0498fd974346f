"""Readers of what a run or a search stored before, where the next start, a command or another run goes on
from it."""

import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

from tests.fuzz.oracles import dump_lines, load_json, write_files
from tests.fuzz.reader import Reader
from tests.fuzz.readers.state import METRICS, TRIALS, crash_records, load_metrics

INPUTS = [{"image": f"{n}.png"} for n in range(4)]
OUTPUT = dump_lines(*({**item, "embedding": [0.5, 1.5]} for item in INPUTS[:3]))
SETTINGS = {"task": "xvnli", "model": "m", "data": "d", "epochs": 3, "fit": {"bf16": False, "seed": 7}}
RESULT = {"task": "xvnli", "method": "plain", "steps": 3, "finished": True, "accuracy": {"en": 0.5}}


def read_resumed(path: Path) -> Any:
    """The lines that a run keeps that goes on from step 2."""
    from raylib.monitoring import MetricsLog

    MetricsLog(path.parent, 2, True)
    return [json.loads(line) for line in path.read_text().splitlines()]


def load_resumed(path: Path) -> Any:
    """What is left of the steps up to the second, whole lines alone. It has been rewritten by now."""
    records = load_metrics(path)
    assert all(record["step"] <= 2 for record in records)
    return records


def read_output(path: Path) -> Any:
    """(lines that are kept, those with an error), and their bytes, of a copy: the rest is cut off."""
    from raylib.api.predict import _keep_whole_batches, locked_output

    copy = path.with_name("copy.jsonl") if path.is_file() else path
    if path.is_file():
        shutil.copyfile(path, copy)
    with locked_output(copy) as file:
        counts = _keep_whole_batches(file, INPUTS, 1)
    return counts, copy.read_bytes()


def load_output(path: Path) -> Any:
    """The lines up to the first that is not whole, or not of its input."""
    kept, errors = [], 0
    for item, line in zip(INPUTS, io.BytesIO(path.read_bytes()), strict=False):
        try:
            assert line.endswith(b"\n")
            record = load_json(line)
            assert type(record) is dict
            assert all(record.get(name) == value for name, value in item.items())
        except Exception:
            break
        kept.append(line)
        errors += "error" in record
    return (len(kept), errors), b"".join(kept)


def read_settings(path: Path) -> Any:
    from finetune.lineage import read_lineage

    lineage = read_lineage(path.parent)
    return lineage.config and lineage.config.model_dump(mode="json"), lineage.seeds


def load_settings(path: Path) -> Any:
    """The config that the file's settings make; settings that are none of today's are left out."""
    from finetune.config import FinetuneConfig
    from raylib.config import read_stored_settings

    values = load_json(path)
    assert type(values["fit"]) is dict
    if "task" not in values:
        config = None
    else:
        config = read_stored_settings(FinetuneConfig, values, path.parent).config
    seed = values["fit"].get("seed", 0 if config is None else config.fit.seed)
    return config and config.model_dump(mode="json"), () if seed is None else (seed,)


def same_lineage(values: Any, expected: Any) -> bool:
    return values[0] == expected[0]


def read_start(path: Path) -> Any:
    """The config that a run's folder has after another start with the same settings."""
    from finetune.config import FinetuneConfig
    from raylib.launch import open_run
    from raylib.lock import hold_run

    config = FinetuneConfig.model_validate({**SETTINGS, "name": "data", "runs": str(path.parent)})
    with hold_run(path):
        open_run(config)
    return json.loads((path / "config.json").read_text())["epochs"]


def example_start(folder: Path) -> Path:
    return write_files({"config.json": json.dumps({**SETTINGS, "name": "data"})})(folder).parent


def ask_git() -> None:
    """What is asked of git is asked once in a process, and of no file that is read."""
    from raylib.provenance import code_version

    code_version()


def read_result(path: Path) -> Any:
    from finetune.train import _stored_result

    return _stored_result(path.parent)


def load_result(path: Path) -> Any:
    values = load_json(path) if path.exists() else {}
    assert type(values) is dict
    return values


def read_setting(path: Path) -> Any:
    from raylib.search.trial_log import _read_setting

    return _read_setting(path)


def load_setting(path: Path) -> Any:
    """None of a file that is damaged: the setting is found elsewhere, or the search says that it is not."""
    if not path.is_file():
        return None
    try:
        values = load_json(path) if path.is_file() else None
        assert type(values) is dict
    except Exception:
        return None
    return values


def example_study(folder: Path) -> Path:
    from tests.fuzz.readers.state import example_journal

    (folder / "data").mkdir()
    (folder / "data" / "trials.jsonl").write_text(TRIALS)
    example_journal(folder / "data")
    return folder / "data"


def read_study(path: Path) -> Any:
    """How many trials a search's study has; one that is damaged is made anew, from the log."""
    from raylib.search.optuna import open_study
    from raylib.search.trial_log import TrialLog

    return len(open_study(TrialLog(path), "a", ["score"]).trials)


def load_study(path: Path) -> Any:
    """Of what the journal holds now."""
    from raylib.search.optuna import JOURNAL

    records = crash_records(path / JOURNAL, "op_code")
    names: list[str] = []
    count = 0
    for record in records:
        if record["op_code"] == 0 and record["study_name"] not in names:
            names.append(record["study_name"])
        # trials of a study that is not there yet are none: its first line may have been damaged
        count += record["op_code"] == 4 and dict(enumerate(names)).get(record["study_id"]) == "a"
    return count


def read_embeddings_note(path: Path) -> Any:
    from raylib.api.predict import PredictConfig, hash_model, require_same_model

    config = PredictConfig(model=str(path / "model"), task="images")
    return require_same_model(path / "images.npy", config), hash_model(config)["weights"]


def load_embeddings_note(path: Path) -> Any:
    weights = hashlib.sha256((path / "model" / "model.safetensors").read_bytes()).hexdigest()
    note = path / "images.npy.run.json"
    return None, load_json(note)["weights"] if note.exists() else weights


def example_embeddings(folder: Path) -> Path:
    weights = b"weights"
    note = {"weights": hashlib.sha256(weights).hexdigest(), "settings": {}}
    return write_files(
        {
            "images.npy.run.json": json.dumps(note),
            "model/model.safetensors": weights,
            "model/tokenizer.model": b"tokenizer",
            "model/config.json": json.dumps({"model_type": "polyglance"}),
        }
    )(folder)


READERS = [
    Reader(
        "metrics_resumed",
        write_files({"metrics.jsonl": METRICS}),
        read_resumed,
        load_resumed,
        ("raylib.monitoring:MetricsLog.__init__",),
        compares="the lines that are kept, by their own file",
    ),
    Reader(
        "output_lines",
        write_files({"out.jsonl": OUTPUT}),
        read_output,
        load_output,
        ("raylib.api.predict:_keep_whole_batches",),
    ),
    Reader(
        "run_settings",
        write_files({"config.json": json.dumps(SETTINGS)}),
        read_settings,
        load_settings,
        ("finetune.lineage:_read",),
        agree=same_lineage,
        compares="the config",
    ),
    Reader(
        "run_start",
        example_start,
        read_start,
        lambda path: 3,
        ("raylib.launch:open_run",),
        targets=("config.json",),
        setup=ask_git,
        compares="a setting: the product refuses any other",
    ),
    Reader(
        "stored_result",
        write_files({"result.json": json.dumps(RESULT)}),
        read_result,
        load_result,
        ("finetune.train:_stored_result",),
    ),
    Reader(
        "trial_setting",
        write_files({"setting.json": json.dumps({"optim.lr": 0.1, "freeze": ["text"]})}),
        read_setting,
        load_setting,
        ("raylib.search.trial_log:_read_setting",),
    ),
    Reader(
        "study",
        example_study,
        read_study,
        load_study,
        ("raylib.search.optuna:open_study",),
        targets=("optuna.journal",),
        compares="how many trials there are",
    ),
    Reader(
        "embeddings_note",
        example_embeddings,
        read_embeddings_note,
        load_embeddings_note,
        ("raylib.api.predict:require_same_model",),
        targets=("images.npy.run.json",),
    ),
]
