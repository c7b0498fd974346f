"""Readers of what a run and a search are stored in, and of their configs."""

import hashlib
import json
from pathlib import Path
from typing import Any

from tests.fuzz.oracles import (
    dump_lines,
    has_shape,
    is_plain_name,
    load_json,
    write_files,
)
from tests.fuzz.reader import Reader, same

NUMBER = (float, int)
META = {"step": 12, "workers": 1, "score": None, "evaluation_due": True, "losses": {"itc": 1.25}}
META_SHAPE = {
    "step": int,
    "workers": int,
    "score": (float, None),
    "losses?": {str: float},
    "times?": {str: float},
    "evaluation?": {str: float},
    "evaluation_due?": bool,
    "skipped_steps?": int,
    "skipped_in_a_row?": int,
    "samples_replaced?": int,
    "is_scheduled?": bool,
    "total_steps?": int,
}
SCORES = {"evaluation_due": False, "evaluation": {"score": 0.5}, "score": 0.5}
REGISTRY = {
    "checkpoints": ["step_000002", "step_000004"],
    "best": {"checkpoint": "step_000002", "score": 0.5},
    "aside": {"step_000006": "other"},
}
METRICS = dump_lines(*({"step": n, "loss/itc": 2.5 - n, "lr": 0.001} for n in range(4)))
RECORD = {
    "folder": "/work",
    "code": ["abc source def"],
    "data": {"/data/a.tar": {"bytes": 3, "sha256": "ab", "stamp": "1"}},
}


def read_object(path: Path) -> Any:
    from raylib.fileio import read_json_object

    return read_json_object(path, ("step", "workers"))


def load_object(path: Path) -> Any:
    values = load_json(path)
    assert {"step", "workers"} <= values.keys()
    return values


def read_registry(path: Path) -> Any:
    from raylib.checkpoint import read_registry

    found = read_registry(path)
    return {"checkpoints": list(found.checkpoints), "best": found.best, "aside": dict(found.aside)}


def load_registry(path: Path) -> Any:
    stored = load_json(path / "checkpoints" / "registry.json", finite=False)
    if type(stored) is list:
        names, best, aside = sorted(set(stored), key=lambda name: (len(name), name)), None, {}
    else:
        names, best, aside = stored["checkpoints"], stored["best"], stored.get("aside", {})
        best = best and (best["checkpoint"], best["score"])
    assert type(names) is list and all(map(is_plain_name, (*names, *aside, *aside.values())))
    assert best is None or (is_plain_name(best[0]) and has_shape(best[1], float))
    return {"checkpoints": names, "best": best, "aside": aside}


def read_snapshot(path: Path) -> Any:
    from raylib.checkpoint import read_registry

    return list(read_registry(path).checkpoints)


def load_snapshot(path: Path) -> Any:
    path = path / "checkpoints" / "checkpoint_manager_snapshot.json"
    if not path.exists():
        return []
    values = load_json(path, finite=False)
    results = [*values["checkpoint_results"], values["latest_checkpoint_result"]]
    names = [result["checkpoint_dir_name"] for result in results if result]
    assert all(map(is_plain_name, names))
    return sorted(set(names), key=lambda name: (len(name), name))


def read_newest(path: Path) -> Any:
    from raylib.checkpoint import find_newest

    newest = find_newest(path)
    return newest and str(newest.relative_to(path))


def load_newest(path: Path) -> Any:
    if not (path / "checkpoints" / "start.json").is_file():
        return None
    name = load_json(path / "checkpoints" / "start.json")
    assert type(name) is str and name[:1] != "/" and ".." not in name.split("/") and "\0" not in name
    parts = [part for part in name.split("/") if part not in ("", ".")]
    assert parts
    return "/".join(parts)


def read_meta(path: Path) -> Any:
    from raylib.checkpoint import read_meta

    return read_meta(path)


def load_meta(path: Path) -> Any:
    meta = load_json(path / "meta.json", finite=False)
    assert has_shape(meta, META_SHAPE) and 1 <= meta["workers"] < 1 << 20 and 0 <= meta["step"]
    if meta.get("evaluation_due"):
        scores = load_json(path / "scores.json", finite=False)
        assert has_shape(scores, {k: META_SHAPE[k] for k in ("score", "evaluation?", "evaluation_due?")})
        meta |= scores
    return {"times": {}, "losses": {}, "evaluation": {}, **meta}


def checkpoint_files() -> dict[str, str | bytes]:
    contents = {"model.safetensors": b"weights", "meta.json": json.dumps({**META, "evaluation_due": False})}
    listing = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, content in contents.items()
        for data in [content.encode() if isinstance(content, str) else content]
    }
    return {**contents, "files-00000.json": json.dumps(listing)}


def read_verified(path: Path) -> Any:
    from raylib.checkpoint import verify

    return verify(path)


def load_verified(path: Path) -> Any:
    """A checkpoint whose list is true of its files."""
    for name, entry in load_json(path / "files-00000.json").items():
        data = (path / name).read_bytes()
        assert name[:1] != "/" and ".." not in name.split("/") and type(entry["bytes"]) is int
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    meta = load_json(path / "meta.json", finite=False)
    assert has_shape(meta, META_SHAPE) and meta["workers"] == 1
    return {"times": {}, "losses": {}, "evaluation": {}, **meta}


def json_lines(path: Path, shape: Any) -> list:
    """The records; a last line that is not whole is none."""
    rows = path.read_bytes().split(b"\n") if path.exists() else []
    found = []
    for number, row in enumerate(rows, 1):
        try:
            record = load_json(row, finite=False)
            assert type(record) is dict
        except Exception:
            assert number == len(rows) or not row.strip()
            continue
        assert has_shape(record, shape), record
        found.append(record)
    return found


def read_metrics(path: Path) -> Any:
    from raylib.monitoring import read_metrics

    return read_metrics(path.parent)


def load_metrics(path: Path) -> Any:
    records = json_lines(path, {str: float})
    if records and "\\ud" in json.dumps(records[-1]):  # half of a surrogate pair: a last line that is none
        records.pop()
    assert all(type(r["step"]) is int and r["step"] >= 0 for r in records)
    return records


def read_resumed(path: Path) -> Any:
    """The lines that a run keeps that goes on from step 2."""
    from raylib.monitoring import MetricsLog

    MetricsLog(path.parent, 2, True)
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_new_lines(path: Path) -> Any:
    from raylib.tracking import NewLines

    return [(point.step, point.values) for point in NewLines(path).read()]


def load_new_lines(path: Path) -> Any:
    """Whole lines of numbers; others are left out."""
    found = []
    data = path.read_bytes() if path.is_file() else b""
    for line in data[: data.rfind(b"\n") + 1].splitlines():
        try:
            record = load_json(line, finite=False)
            json.dumps(record, ensure_ascii=False).encode()  # no half of a surrogate pair
            assert has_shape(record, {str: float})
            found.append((record.pop("step"), record))
        except Exception:
            continue
    return found


def read_tracking(path: Path) -> Any:
    from raylib.trackers import RunFacts
    from raylib.tracking import RunTracking

    return RunTracking(RunFacts(path.parent, "finetune", {}, {}, path.parent, {}), []).stored


def load_tracking(path: Path) -> Any:
    values = load_json(path)
    assert has_shape(values, {str: {"address": str, "id": str, "steps": {str: int}}})
    assert all(step >= 0 for entry in values.values() for step in entry["steps"].values())
    return values


def read_identity(path: Path) -> Any:
    from raylib.provenance import IDENTITY, read_identity

    assert path.name == IDENTITY
    return read_identity(path.parent)


def load_identity(path: Path) -> Any:
    values = load_json(path)
    assert has_shape(
        values,
        {"folder?": str, "code": [str], "data": {str: {"stamp": str, "bytes": int, "sha256": (str, None)}}},
    )
    return {"folder": "", **values}


def example_identity(folder: Path) -> Path:
    from raylib.provenance import IDENTITY

    return write_files({IDENTITY: json.dumps(RECORD)})(folder)


def read_lock(path: Path) -> Any:
    from raylib.lock import stored_owner

    owner = stored_owner(path.parent)
    return owner and owner.token


def load_lock(path: Path) -> Any:
    """The token of a whole record; "" of a torn one, None of none."""
    if not path.is_file():
        return None
    try:
        record = load_json(path)
        types = {"token": str, "pid": int, "start": str | None, "since": str, "ray": dict | None}
        assert all(isinstance(record[name], kind) for name, kind in types.items())
        assert all(isinstance(record.get(name, ""), str) for name in ("host", "boot", "locks", "command"))
        assert 0 < record["pid"] < 1 << 31 and type(record["pid"]) is int
        assert record["ray"] is None or isinstance(record["ray"]["job"], str)
    except Exception:
        return ""
    return record["token"]


LOCK = {
    "token": "ab",
    "pid": 1,
    "start": "2",
    "boot": "x",
    "host": "h",
    "since": "now",
    "ray": None,
    "locks": "x",
}


def example_lock(folder: Path) -> Path:
    from raylib.lock import LOCK as NAME

    return write_files({NAME: json.dumps(LOCK)})(folder)


def read_finetune_config(path: Path) -> Any:
    from finetune.config import FinetuneConfig
    from raylib.config import load_config

    return load_config(FinetuneConfig, path).model_dump(mode="json")


def load_finetune_config(path: Path) -> Any:
    """The settings that the file has, in the config that they make."""
    import yaml

    from finetune.config import FinetuneConfig

    if path.suffix == ".yaml":

        class Once(yaml.SafeLoader):
            def construct_mapping(self, node: Any, deep: bool = False) -> dict:
                keys = [key.value for key, _ in node.value]
                assert len(set(keys)) == len(keys), "a key twice"
                return super().construct_mapping(node, deep)

        values = yaml.load(path.read_bytes(), Once)
    else:
        values = load_json(path)
    assert type(values) is dict
    return FinetuneConfig.model_validate(values).model_dump(mode="json")


CONFIG = {"task": "xvnli", "model": "runs/model", "data": "runs/data", "epochs": 3, "fit": {"bf16": False}}
YAML = "task: xvnli\nmodel: runs/model\ndata: runs/data\nepochs: 3\nfit:\n  bf16: false\n  log_every: 5\n"


def read_space(path: Path) -> Any:
    from finetune.config import FinetuneConfig
    from raylib.search.config import read_search

    return read_search(path.parent, FinetuneConfig, None)


def load_space(path: Path) -> Any:
    if not path.is_file():
        return None
    values = load_json(path)
    assert has_shape(values, {"search": {str: Any}, "recipe": {str: Any}})
    return values


def same_settings(values: Any, expected: Any) -> bool:
    """What the file has is as it is there; the rest are defaults."""
    if values is None or expected is None:
        return values is expected
    return all(
        same(values[part].get(name, value), value) or values[part][name] == value
        for part in ("search", "recipe")
        for name, value in expected[part].items()
    )


def example_search(folder: Path) -> Path:
    search = {"space": "best_of_scenes", "name": "a", "num_trials": 4}
    values = {"search": search, "recipe": {"task": "xvnli", "epochs": 3}, "space": {}}
    return write_files({"search.json": json.dumps(values)})(folder)


TRIALS = dump_lines(
    {"at": 1.0, "seconds": 0.0, "trial": "a", "setting": {"optim.lr": 0.1}},
    {"at": 2.0, "seconds": 1.5, "trial": "b", "setting": {"optim.lr": 0.2}},
    {"at": 3.0, "seconds": 2.5, "trial": "a", "state": "finished", "error": None},
)
REPORTS = dump_lines(
    {"at": 1.0, "epoch": 1, "epochs": 2, "score": 0.25, "spent": 1.0},
    {"at": 2.0, "epoch": 2, "epochs": 2, "score": 0.5, "spent": 2.0, "finished": True},
)


def read_trials(path: Path) -> Any:
    from raylib.search.trial_log import TrialLog

    log = TrialLog(path.parent)
    return {"settings": log.settings, "outcomes": log.outcomes}


def load_trials(path: Path) -> Any:
    """Of lines that are whole, also behind what a crash cut off."""
    settings, outcomes = {}, {}
    for record in crash_records(path, "at"):
        assert has_shape(record, {"at": float, "seconds": float, "trial": str}) and is_plain_name(
            record["trial"]
        )
        if "setting" in record:
            assert type(record["setting"]) is dict
            settings[record["trial"]] = record["setting"]
        else:
            assert record["state"] in ("finished", "stopped", "failed")
            assert has_shape(record["error"], (str, None))
            outcomes[record["trial"]] = (record["state"], record["error"])
    return {"settings": settings, "outcomes": outcomes}


def crash_records(path: Path, key: str) -> list[dict]:
    """Objects with `key`, each the end of what is left of its line."""
    found = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        rest, records = line.strip(b"\0"), []
        start = 0 if _with_key(rest, key) else rest.rfind(b"{")
        while start >= 0:
            if record := _with_key(rest[start:], key):
                records, rest, start = [record, *records], rest[:start], len(rest[:start])
            start = rest.rfind(b"{", 0, start)
        found += records
    return found


def _with_key(data: bytes, key: str) -> dict | None:
    try:
        record = load_json(data, finite=False)
    except Exception:
        return None
    return record if type(record) is dict and key in record else None


def read_trial_reports(path: Path) -> Any:
    from raylib.search.trial import REPORTS as NAME
    from raylib.search.trial import read_reports

    assert path.name == NAME
    return read_reports(path.parent)


def load_trial_reports(path: Path) -> Any:
    shape = {"finished": bool, "judged": bool, "trouble": (str, None)}
    records = json_lines(path, {str: Any})
    for record in records:
        assert all(has_shape(value, shape.get(name, float)) for name, value in record.items()), record
    return records


def example_reports(folder: Path) -> Path:
    from raylib.search.trial import REPORTS as NAME

    return write_files({NAME: REPORTS})(folder)


def example_journal(folder: Path) -> Path:
    """A journal that Optuna wrote, of a study of two trials; its times are taken out."""
    import optuna

    from raylib.search.optuna import JOURNAL

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = folder / JOURNAL
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    study = optuna.create_study(
        study_name="a", storage=storage, direction="maximize", sampler=optuna.samplers.RandomSampler(0)
    )
    study.optimize(lambda trial: trial.suggest_float("optim.lr", 0.01, 0.1, log=True), n_trials=2)
    return path


def read_journal(path: Path) -> Any:
    from raylib.search.optuna import load_evidence

    trials, outside = load_evidence(path.parent, "a", {})
    return [trial.values for trial in trials], outside


def load_journal(path: Path) -> Any:
    """The values of trials that Optuna's records finish and that have no parameter, which lie in an empty
    space, and how many others there are."""
    finished, studies, placed = {}, set(), set()
    for r in json_lines(path, {str: Any}):
        if r["op_code"] == 0:
            studies.add(r["study_name"])
        if r["op_code"] == 6 and r.get("state") == 1:
            finished[r["trial_id"]] = r["values"]
        if r["op_code"] == 5:
            placed.add(r["trial_id"])
    assert "a" in studies
    inside = [values for trial, values in finished.items() if trial not in placed]
    return inside, len(finished) - len(inside)


def read_note(path: Path) -> Any:
    from raylib.api.predict import _note

    return _note(str(path / "out.jsonl"), NOTE)


def load_note(path: Path) -> Any:
    values = load_json(path / "out.jsonl.run.json")
    # null is as good as nothing; older versions did not note the preprocessing
    assert {name: value for name, value in values.items() if value is not None} == WITHOUT_NULL


NOTE = {"settings": {"text": True}, "weights": "ab", "tokenizer": "cd", "inputs": "ef", "preprocessing": None}
WITHOUT_NULL = {name: value for name, value in NOTE.items() if value is not None}
INPUTS = [{"image": f"{n}.png"} for n in range(4)]
OUTPUT = dump_lines(*({**item, "embedding": [0.5, 1.5]} for item in INPUTS[:3]))


READERS = [
    Reader(
        "json_object",
        write_files({"meta.json": json.dumps(META)}),
        read_object,
        load_object,
        tuple(f"raylib.fileio:read_{what}" for what in ("bytes", "json", "json_object"))
        + ("raylib.strict_json:parse_json",),
    ),
    Reader(
        "registry",
        write_files({"checkpoints/registry.json": json.dumps(REGISTRY), "config.json": "{}"}),
        read_registry,
        load_registry,
        ("raylib.checkpoint:read_registry",),
        targets=("checkpoints/registry.json",),
    ),
    Reader(
        "ray_snapshot",
        write_files(
            {
                "checkpoints/checkpoint_manager_snapshot.json": json.dumps(
                    {
                        "checkpoint_results": [{"checkpoint_dir_name": f"step_00000{n}"} for n in (2, 4)],
                        "latest_checkpoint_result": {"checkpoint_dir_name": "step_000006"},
                    }
                ),
                "config.json": "{}",
            }
        ),
        read_snapshot,
        load_snapshot,
        ("raylib.checkpoint:read_registry",),
        targets=("checkpoints/*.json",),
    ),
    Reader(
        "checkpoint_start",
        write_files({"checkpoints/start.json": '"checkpoints/step_000004"', "config.json": "{}"}),
        read_newest,
        load_newest,
        ("raylib.checkpoint:find_newest",),
        targets=("checkpoints/start.json",),
    ),
    Reader(
        "checkpoint_meta",
        write_files({"meta.json": json.dumps(META), "scores.json": json.dumps(SCORES)}),
        read_meta,
        load_meta,
        ("raylib.checkpoint:read_meta",),
    ),
    Reader(
        "checkpoint_files",
        write_files(checkpoint_files()),
        read_verified,
        load_verified,
        ("raylib.checkpoint:_read_listing",),
        targets=("files-00000.json", "meta.json"),
    ),
    Reader(
        "metrics",
        write_files({"metrics.jsonl": METRICS}),
        read_metrics,
        load_metrics,
        ("raylib.monitoring:read_metrics", "raylib.fileio:read_jsonl", "raylib.fileio:_parse_record"),
    ),
    Reader(
        "metrics_of_tracking",
        write_files({"metrics.jsonl": METRICS}),
        read_new_lines,
        load_new_lines,
        ("raylib.tracking:NewLines.read",),
    ),
    Reader(
        "tracking",
        write_files(
            {"tracking.json": json.dumps({"wandb": {"address": "a", "id": "b", "steps": {"loss": 3}}})}
        ),
        read_tracking,
        load_tracking,
        ("raylib.tracking:RunTracking.__init__",),
    ),
    Reader("identity", example_identity, read_identity, load_identity, ("raylib.provenance:read_identity",)),
    Reader("lock", example_lock, read_lock, load_lock, ("raylib.lock:_read_record", "raylib.lock:_parse")),
    Reader(
        "config_json",
        write_files({"config.json": json.dumps(CONFIG)}),
        read_finetune_config,
        load_finetune_config,
        ("raylib.config:load_config",),
    ),
    Reader(
        "config_yaml",
        write_files({"best.yaml": YAML}),
        read_finetune_config,
        load_finetune_config,
        ("raylib.config:load_config", "raylib.strict_yaml:parse_yaml"),
    ),
    Reader(
        "search",
        example_search,
        read_space,
        load_space,
        ("raylib.search.config:read_search",),
        agree=same_settings,
        compares="the settings that the file has",
    ),
    Reader(
        "trials",
        write_files({"trials.jsonl": TRIALS}),
        read_trials,
        load_trials,
        (
            "raylib.search.trial_log:TrialLog.__init__",
            "raylib.fileio:repair_jsonl",
            "raylib.fileio:_may_be_cut_off",
        ),
    ),
    Reader(
        "trial_reports",
        example_reports,
        read_trial_reports,
        load_trial_reports,
        ("raylib.search.trial:read_reports",),
    ),
    Reader(
        "journal",
        example_journal,
        read_journal,
        load_journal,
        ("raylib.search.optuna:JournalReader.__init__",),
        compares="how many trials have finished",
    ),
    Reader(
        "output_note",
        write_files({"out.jsonl.run.json": json.dumps(NOTE), "out.jsonl": OUTPUT}),
        read_note,
        load_note,
        ("raylib.api.predict:_note",),
        targets=("out.jsonl.run.json",),
    ),
]
