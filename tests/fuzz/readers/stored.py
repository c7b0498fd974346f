"""Readers of runs and searches that go on from what they have stored, and of models beside it."""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.fuzz.oracles import load_json
from tests.fuzz.reader import Reader, same

META = {
    "step": 12,
    "workers": 1,
    "score": 0.5,
    "times": {"step": 1.5},
    "losses": {"task": 2.25},
    "evaluation": {"score": 0.5},
    "skipped_steps": 1,
    "interval": {"names": ["task"], "sums": [2.25], "count": 1},
}
RESULT = {
    "run": "r",
    "task": "xvnli",
    "method": "full fine-tuning",
    "steps": 3,
    "setting": "zero_shot",
    "split": "test",
    "seed": 0,
    "accuracy": {"en": 0.5, "de": 0.25},
    "by_type": {},
    "interval": {"en": [0.25, 0.75], "de": None},
    "mean_targets": 0.25,
    "gap": 0.25,
    "counts": {"en": {"n": 4, "unlabelled": 0, "unknown_answers": 0}},
    "answers": {"en": {"n": 4, "answer": "no", "share": 0.5, "right_share": 0.25}, "de": {}},
    "extra_tests": {"far": {"en": {"accuracy": 0.5, "interval": None, "answers": {}}}},
    "params": 100,
    "trainable": 50,
    "disparity": {"std": 0.0, "range": 0.0},
}
PART = {
    "finished": True,
    "steps": 3,
    "seconds": 1.5,
    "times": {"step": 1.0},
    "evaluation": {"dev/en": 0.5},
    "languages": {"en": {"accuracy": 0.5, "interval": [0.25, 0.75], "n": 4, "by_type": {}}},
    "skipped_steps": 0,
}
REPORTS = [
    {
        "at": 1.5,
        "epoch": 1.0,
        "epochs": 2,
        "age": 1.0,
        "judged": True,
        "finished": False,
        "spent": 1.5,
        "s": 0.5,
    },
    {"at": 2.5, "epoch": 2.0, "epochs": 2, "judged": False, "finished": True, "spent": 2.5, "s": 0.75},
]
TRIALS = [
    {"at": 1.0, "seconds": 0.5, "trial": "a", "setting": {"optim.lr": 0.5}},
    {"at": 2.0, "seconds": 1.5, "trial": "b", "setting": {"optim.lr": 0.25}},
    {"at": 3.0, "seconds": 2.5, "trial": "a", "state": "finished", "error": None},
]


def dump(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def dump_lines(path: Path, records: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def load_any(data: Path | bytes) -> Any:
    """JSON with NaN and Infinity, which earlier versions wrote."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        assert all(repr(found[key]) == repr(value) for key, value in pairs), "a key twice"
        return found

    return json.loads(data if isinstance(data, bytes) else data.read_bytes(), object_pairs_hook=once)


def load_records(path: Path) -> list[Any]:
    """The objects of JSON lines; a last one that a crash cut off is none."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = load_any(line)
            assert isinstance(record, dict)
            json.dumps(record, ensure_ascii=False).encode()  # no half of a surrogate pair
            records.append(record)
        except (ValueError, AssertionError, RecursionError):
            if number < len(lines):
                raise
    return records


def keep(path: Path) -> None:
    """Keep what a reader writes anew."""
    if path.is_file():
        shutil.copyfile(path, path.with_name(f"{path.name}.before"))


def before(path: Path) -> Path:
    """The file as it was read."""
    return path.with_name(f"{path.name}.before")


# ---- any JSON


def example_lines(folder: Path) -> Path:
    return dump_lines(folder / "log.jsonl", [{"step": i, "loss/a": i / 4, "text": "ä"} for i in range(4)])


def read_lines(path: Path) -> Any:
    from raylib.fileio import read_jsonl

    return read_jsonl(path)


def read_repaired(path: Path) -> Any:
    from raylib.fileio import read_jsonl, repair_jsonl

    keep(path)
    repair_jsonl(path, "step")
    return read_jsonl(path)


def load_repaired(path: Path) -> Any:
    """The records that the file has whole, and those that it had whole before."""
    records = load_records(path)
    assert all("step" in record for record in records)
    if not before(path).exists():
        return records, []
    whole = []
    for line in before(path).read_bytes().split(b"\n"):
        try:
            record = load_any(line)
        except (ValueError, AssertionError):
            continue
        whole += [record] if isinstance(record, dict) and "step" in record else []
    return records, whole


def are_repaired(values: Any, expected: Any) -> bool:
    records, whole = expected
    return same(values, records) and all(any(same(one, other) for other in records) for one in whole)


# ---- configs


def example_code(folder: Path) -> Path:
    path = folder / "task.py"
    path.write_text("NAME = 'abc'\nSPACE = {'optim.lr': (1, 2.5)}\nLIST = [None, True, b'x']\n")
    return path


def read_code(path: Path) -> Any:
    from raylib.config import load_user_file

    module = load_user_file(path)
    del sys.modules[module.__name__]  # nobody else can import it
    return {name: value for name, value in vars(module).items() if not name.startswith("__")}


def load_code(path: Path) -> Any:
    import runpy

    return {name: value for name, value in runpy.run_path(str(path)).items() if not name.startswith("__")}


# ---- a run


def write_checkpoint(folder: Path, meta: dict) -> Path:
    dump(folder / "meta.json", meta)
    (folder / "model.safetensors").write_bytes(b"weights")
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(folder.iterdir())
        if path.name != "meta.json"
    }
    dump(folder / "files-00000.json", files)
    return folder


def example_settled(folder: Path) -> Path:
    """A run of an earlier version, whose best checkpoint has weights that may not be finite."""
    import torch
    from safetensors.torch import save_file

    run = folder / "run"
    for path, step in ((run / "checkpoints/step_000002", 2), (run / "best", 2)):
        old = {name: value for name, value in META.items() if name != "skipped_steps"}
        dump(path / "meta.json", {**old, "step": step})
        save_file({"a": torch.ones(2, 2)}, path / "model.safetensors")
    dump(run / "checkpoints/registry.json", ["step_000002"])
    return run


def read_settled(path: Path) -> Any:
    from raylib.checkpoint import read_registry, settle

    keep(path / "checkpoints/registry.json")
    settle(path)
    registry = read_registry(path)
    return registry.checkpoints, registry.best


def load_settled(path: Path) -> Any:
    from safetensors.numpy import load

    best, registry = None, before(path / "checkpoints/registry.json")
    stored = load_any(registry) if registry.exists() else ["step_000002"]
    names = stored["checkpoints"] if isinstance(stored, dict) else stored
    folder = path / "checkpoints" / "step_000002"
    try:
        assert (folder / "meta.json").is_file() and (folder / "model.safetensors").is_file()
        meta = load_any(folder / "meta.json")
        tensors = load((folder / "model.safetensors").read_bytes())
        is_finite = all((abs(tensor) < float("inf")).all() for tensor in tensors.values())
        if meta["score"] is not None and abs(meta["score"]) < float("inf") and is_finite:
            best = ["step_000002", meta["score"]]
    except Exception:
        best = None
    return sorted(set(names), key=lambda name: (len(name), name)), best


def are_settled(values: Any, expected: Any) -> bool:
    """Tell whether the checkpoint is registered, and the best one if it is sound."""
    (names, best), (stored, expected_best) = values, expected
    is_adopted = "step_000002" in names and set(names) - {"step_000002"} == set(stored) - {"step_000002"}
    return (list(names) == stored or is_adopted) and (best is None or list(best) == expected_best)


def example_lock(folder: Path) -> Path:
    record = {
        "token": "abc",
        "host": "elsewhere",
        "boot": "b",
        "pid_namespace": "n",
        "pid": 12,
        "start": "123",
        "since": "2026-11-27",
        "locks": "local",
        "command": "finetune x",
        "ray": None,
    }
    dump(folder / "run/lock.json", record)
    return folder / "run"


def read_lock(path: Path) -> Any:
    from raylib.lock import hold_run

    with hold_run(path):
        return "held"


def example_result(folder: Path) -> Path:
    return dump(folder / "run/result.json", RESULT).parent


def read_result(path: Path) -> Any:
    from finetune import report

    result = report.read_result(path)
    report.scores_of(result)
    return result


def load_result(path: Path) -> Any:
    return load_any(path / "result.json")


def example_part(folder: Path) -> Path:
    return dump(folder / "part.json", PART)


def read_part(path: Path) -> Any:
    from finetune.report import read_part

    return read_part(path)


# ---- a search


def example_trials(folder: Path) -> Path:
    path = dump_lines(folder / "s/trials.jsonl", TRIALS).parent
    for trial in ("a", "b", "c"):
        dump_lines(path / "trials" / trial / "told.jsonl", REPORTS)
        dump(path / "trials" / trial / "setting.json", {"optim.lr": 0.125})
    return path


def read_trials(path: Path) -> Any:
    from raylib.search.trial import read_setting
    from raylib.search.trial_log import TrialLog

    log = TrialLog(path)
    log.restore_from_folders(path / "tune")
    for trial in ("a", "b", "c"):
        log.end(trial, "stopped")
        read_setting(path / "trials" / trial)
    log.ended_trials()
    return log.results(("s",))


def load_trials(path: Path) -> Any:
    records = load_records(path / "trials.jsonl")
    settings = {record["trial"]: record["setting"] for record in records if "setting" in record}
    states = {record["trial"]: record["state"] for record in records if "setting" not in record}
    found = []
    for trial, setting in settings.items():
        reports = load_records(path / "trials" / trial / "told.jsonl")
        found.append((trial, states[trial], setting, (reports or [{}])[-1].get("s")))
    return found


def are_trials(values: Any, expected: Any) -> bool:
    own = [(each.id, each.state, each.setting, each.scores.get("s")) for each in values]
    marks = ("repeat_of", "replicate")
    clean = [(t, s, {k: v for k, v in c.items() if k not in marks}, x) for t, s, c, x in expected]
    return len(own) == len(clean) and all(
        same(one[:3], other[:3]) and (one[3] is None or same(one[3], other[3]))
        for one, other in zip(own, clean, strict=True)
    )


def example_journal(folder: Path) -> Path:
    from raylib.search.trial_log import TrialLog

    path = folder / "s"
    dump_lines(path / "trials.jsonl", TRIALS[:1])
    study = open_study(TrialLog(path))
    for i, value in enumerate((0.25, 0.5)):
        trial = study.ask()
        trial.suggest_float("optim.lr", 0.0, 1.0)
        trial.set_user_attr("trial", f"x{i}")
        study.tell(trial, value)
    return path


def open_study(log: Any) -> Any:
    import optuna

    from raylib.search.optuna import open_study

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return open_study(log, "s", ("score",))


def read_evidence(path: Path) -> Any:
    from raylib.search.optuna import load_evidence
    from raylib.search.space import Float

    trials, _ = load_evidence(path, "s", {"optim.lr": Float(0, 1)})
    return [trial.values for trial in trials]


def load_evidence(path: Path) -> Any:
    import optuna

    from raylib.search.optuna import JournalReader

    storage = optuna.storages.JournalStorage(JournalReader(path / "optuna.journal"))
    trials = optuna.load_study(study_name="s", storage=storage).get_trials()
    return [
        trial.values
        for trial in trials
        if trial.state.name == "COMPLETE" and set(trial.params) == {"optim.lr"}
        if type(trial.params["optim.lr"]) is float and 0 <= trial.params["optim.lr"] <= 1
    ]


def example_finalists(folder: Path) -> Path:
    return dump(folder / "finals/settings.json", [["1", "published"], [{"optim.lr": 0.5}, None]]).parent


def read_finalists(path: Path) -> Any:
    from raylib.search.final_runs import read_finalists

    return read_finalists(path)


def load_finalists(path: Path) -> Any:
    return load_json(path / "settings.json")[1] if (path / "settings.json").exists() else []


def example_tests(folder: Path) -> Path:
    return dump(folder / "test.json", {"English": 0.5, "targets": 0.25})


def read_tests(path: Path) -> Any:
    from raylib.search.final_runs import read_test_scores

    return read_test_scores(path)


def load_tests(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        values = load_any(path)
        assert all(type(value) in (int, float) for value in values.values())
        return values
    except Exception:  # told, and evaluated again
        return None


# ---- what stands beside data sets


def example_baselines(folder: Path) -> Path:
    scores = {"majority": 0.5, "text": 0.625}
    return dump(
        folder / "baselines.json", {"xgqa": {"en": scores, "targets": scores}, "marvl": {"en": scores}}
    )


def read_baselines(path: Path) -> Any:
    from finetune.recipes import RECIPES
    from finetune.report import read_baselines
    from raylib.config import override

    return read_baselines(override(RECIPES["scenes_xgqa"](), [f"data={path.parent}"]))


def load_baselines(path: Path) -> Any:
    found = load_json(path).get("xgqa") if path.exists() else None
    return {"baselines": found} if found else {}


# ---- models as the interface reads them


def example_description(folder: Path) -> Path:
    path = folder / "model"
    run = {"fit": {"residual": "float32"}, "setting": "zero_shot", "task": "xvnli"}
    own = {"model_type": "polyglance-unified", "width": 8}
    dump(path / "config.json", {"model_type": "clip", "polyglance": own, "polyglance_run": run})
    for name in ("model.safetensors", "tokenizer.model"):
        (path / name).write_bytes(b"content of " + name.encode())
    return path


def read_model(path: Path) -> Any:
    from raylib.models import stored_code
    from raylib.models.base import read_description, read_run_settings
    from raylib.models.finetuned import find_fit

    description, run = read_description(path), read_run_settings(path)
    stored_code(path)
    find_fit(path, path)
    return description, run


def load_model(path: Path) -> Any:
    values = load_json(path / "config.json")
    own = values.get("polyglance") or {k: v for k, v in values.items() if k != "polyglance_run"}
    return own, values.get("polyglance_run") or {}


def example_facts(folder: Path) -> Path:
    run = example_result(folder)
    dump(run / "config.json", {"task": "xvnli", "fit": {"seed": 1}, "model": "m"})
    dump(run / "checkpoints/registry.json", {"checkpoints": ["step_000012"], "best": None})
    write_checkpoint(run / "checkpoints/step_000012", META)
    return run


def read_facts(path: Path) -> Any:
    from torch import nn

    from raylib.api.export import find_facts

    model: Any = SimpleNamespace(path=path, network=nn.Linear(1, 1))
    facts = find_facts(model, path / "checkpoints" / "step_000012")
    return facts.step, facts.result.get("accuracy")


def load_facts(path: Path) -> Any:
    meta = path / "checkpoints/step_000012/meta.json"
    result = load_any(path / "result.json") if (path / "result.json").exists() else {}
    is_run = (path / "config.json").is_file() and "fit" in load_json(path / "config.json")
    if "dev" in result or result.get("finished") is False or not is_run:
        result = {}
    return load_any(meta)["step"] if meta.exists() else None, result.get("accuracy")


READERS = [
    Reader(
        "jsonl",
        example_lines,
        read_lines,
        load_records,
        ("raylib.fileio:read_jsonl", "raylib.fileio:_parse_record"),
    ),
    Reader(
        "jsonl_repair",
        example_lines,
        read_repaired,
        load_repaired,
        ("raylib.fileio:repair_jsonl", "raylib.fileio:_may_be_cut_off", "raylib.fileio:_read_lines"),
        agree=are_repaired,
        compares="that all lines are records, with those that were whole",
    ),
    Reader("user_file", example_code, read_code, load_code, ("raylib.config:load_user_file",)),
    Reader(
        "settle",
        example_settled,
        read_settled,
        load_settled,
        ("raylib.checkpoint:_not_finite_of",),
        agree=are_settled,
        compares="that the checkpoint stays, and is the best one only if its score and weights are finite",
    ),
    Reader(
        "run_lock",
        example_lock,
        read_lock,
        lambda path: "held",
        ("raylib.lock:_acquire", "raylib.lock:_parse", "raylib.lock:_read_record"),
        compares="that the run can be held",
    ),
    Reader("result", example_result, read_result, load_result, ("finetune.report:read_result",)),
    Reader("part", example_part, read_part, load_any, ("finetune.report:read_part",)),
    Reader(
        "trials_go_on",
        example_trials,
        read_trials,
        load_trials,
        (
            "raylib.search.trial_log:TrialLog.__init__",
            "raylib.search.trial_log:_read_setting",
            "raylib.search.trial:read_reports",
            "raylib.search.trial:repair_reports",
            "raylib.search.trial:read_setting",
        ),
        agree=are_trials,
    ),
    Reader(
        "warm_start",
        example_journal,
        read_evidence,
        load_evidence,
        ("raylib.search.optuna:JournalReader.__init__",),
        targets=("**/optuna.journal",),
        compares="the scores of the trials",
        memory=512 << 20,
    ),
    Reader(
        "finalists",
        example_finalists,
        read_finalists,
        load_finalists,
        ("raylib.search.final_runs:read_finalists",),
    ),
    Reader(
        "test_scores", example_tests, read_tests, load_tests, ("raylib.search.final_runs:read_test_scores",)
    ),
    Reader(
        "baselines", example_baselines, read_baselines, load_baselines, ("finetune.report:read_baselines",)
    ),
    Reader(
        "description",
        example_description,
        read_model,
        load_model,
        (
            "raylib.models.base:read_description",
            "raylib.models.base:read_run_settings",
            "raylib.models.finetuned:find_fit",
        ),
        targets=("config.json",),
    ),
    Reader(
        "export_facts",
        example_facts,
        read_facts,
        load_facts,
        ("raylib.api.export:find_facts",),
        targets=("result.json", "config.json", "**/meta.json"),
    ),
]
