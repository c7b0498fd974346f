"""Runs in experiment trackers: each metric once, the same run after a resume, told of its end."""

import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.train import PretrainConfig, run
from raylib import trackers, tracking
from raylib.config import dump_config
from raylib.errors import UserError
from raylib.fileio import append_jsonl, read_json, write_atomically
from raylib.monitoring import read_metrics
from raylib.provenance import commit
from raylib.trackers import ExperimentTracker, Point, RunFacts, TensorBoard, table_rows
from raylib.tracking import RunTracking, track_run

ROOT = Path(__file__).resolve().parent.parent
STEPS = 8
LONG = 400  # steps of a run that is killed at 130, after its checkpoint at 100


class Recorder(ExperimentTracker):
    """Keeps what it is told. `fails`: raises at what is logged."""

    fails, address, id = False, "memory", "1"
    opened: ClassVar[list["Recorder"]] = []

    def __init__(self, facts: RunFacts, stored: dict):
        self.opened.append(self)
        self.facts, self.stored, self.points, self.status = facts, dict(stored), [], None
        self.results: list = []

    def log(self, points):
        if self.fails:
            raise OSError("connection refused\nand more")
        self.points += points

    def log_results(self, split, figures, files):
        self.results += [(split, figures, [file.name for file in files])]

    def close(self, status):
        self.status = status


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", Recorder)
    monkeypatch.setattr(tracking, "SECONDS", 600)  # tests send by themselves
    Recorder.opened.clear()


def track(folder: Path, **tags):
    folder.mkdir(parents=True, exist_ok=True)
    return track_run(folder, "pretrain", {"fit": {"steps": 3}}, tags, ("mlflow",))


def steps_of(points: list[Point], name: str) -> list[int]:
    return [point.step for point in points if name in point.values]


@pytest.mark.usefixtures("recorder")
def test_tracking_sends_each_metric_of_a_step_once_over_restarts(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with track(tmp_path / "run") as first:
        for step in (1, 2, 3):
            append_jsonl(path, {"step": step, "lr": 0.1})
        append_jsonl(path, {"step": 3, "eval/score": 0.5})
        first._send()
        # a worker that was killed goes on from step 2, in the same process of ours
        write_atomically(path, "".join(path.read_text().splitlines(keepends=True)[:2]))
        first._send()
        append_jsonl(path, {"step": 3, "lr": 0.1})
    with track(tmp_path / "run") as second:
        append_jsonl(path, {"step": 3, "eval/score": 0.5})
        append_jsonl(path, {"step": 4, "lr": 0.1})
    (recorder,) = first.trackers.values()
    assert steps_of(recorder.points, "lr") == [1, 2, 3]
    assert steps_of(recorder.points, "eval/score") == [3]
    (recorder,) = second.trackers.values()
    assert recorder.stored["id"] == "1"
    assert steps_of(recorder.points, "lr") == [4] and not steps_of(recorder.points, "eval/score")


@pytest.mark.usefixtures("recorder")
def test_tracking_begun_late_sends_what_was_logged_before(tmp_path):
    append_jsonl_to = tmp_path / "run" / "metrics.jsonl"
    append_jsonl_to.parent.mkdir()
    append_jsonl_to.write_text('{"step": 1, "lr": 0.1, "loss/a": NaN}\n{"step"\n{"step": 2, "lr"')
    with track(tmp_path / "run") as tracked:
        pass
    (recorder,) = tracked.trackers.values()
    assert [(point.step, point.values) for point in recorder.points] == [(1, {"lr": 0.1})]


@pytest.mark.usefixtures("recorder")
def test_tracking_keeps_what_a_tracker_does_not_take(tmp_path, capsys):
    path = tmp_path / "run" / "metrics.jsonl"
    with track(tmp_path / "run") as tracked:
        (recorder,) = tracked.trackers.values()
        recorder.fails = True
        append_jsonl(path, {"step": 1, "lr": 0.1})
        tracked._send()
        tracked._send()
        assert (
            capsys.readouterr().out == "note: fit.track: mlflow takes no metrics now (connection refused)\n"
        )
        recorder.fails = False
        append_jsonl(path, {"step": 2, "lr": 0.1})
    assert steps_of(recorder.points, "lr") == [1, 2]


@pytest.mark.usefixtures("recorder")
@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError, "failed"), (KeyboardInterrupt, "stopped"), (SystemExit, "stopped")],
)
def test_tracking_tells_how_a_run_ended(error, status, tmp_path):
    with pytest.raises(error), track(tmp_path / "run") as tracked:
        raise error
    (recorder,) = tracked.trackers.values()
    assert recorder.status == status
    with track(tmp_path / "run") as tracked:
        tracked.log_results("test", {"de": {"score": 0.5}})
    (recorder,) = tracked.trackers.values()
    assert recorder.status == "finished"
    assert recorder.results == [("test", {"de": {"score": 0.5}}, [])]


@pytest.mark.usefixtures("recorder")
def test_tracking_knows_the_search_and_the_run_of_a_part(tmp_path):
    (tmp_path / "find").mkdir()
    (tmp_path / "find" / "search.json").write_text("{}")
    with track(tmp_path / "find" / "trials" / "ab12", seed="3") as trial:
        with track(tmp_path / "find" / "trials" / "ab12") as same:
            assert same is trial
        with track(tmp_path / "find" / "trials" / "ab12" / "de") as part:
            pass
    facts = trial.facts
    assert (facts.name, facts.group, facts.parents) == ("find/trials/ab12", "find", {})
    assert facts.tags.items() >= {"search": "find", "trial": "ab12", "seed": "3"}.items()
    assert (part.facts.name, part.facts.group) == ("find/trials/ab12/de", "find")
    assert part.facts.parents == {"mlflow": "1"}
    with track(tmp_path / "run") as outer, track(tmp_path / "run" / "de") as part:
        pass
    assert (outer.facts.name, outer.facts.group) == ("run", None)
    assert (part.facts.name, part.facts.group) == ("run/de", "run")


@pytest.mark.usefixtures("recorder")
def test_tracking_fine_tuning_has_a_run_of_each_stage_and_one_of_the_results(finetune, tmp_path):
    rounds = ("strategies.sparse.rounds=1", "strategies.sparse.rate=0.2")
    settings = ("select=last", "epochs=1", "name=mine", "runtime=local", "fit.track=mlflow")
    code, printed = finetune("scenes_xgqa", *rounds, *settings)
    assert code == 0, printed
    whole, pruning = Recorder.opened
    assert [each.facts.name for each in Recorder.opened] == ["mine", "mine/round_1"]
    assert [each.status for each in Recorder.opened] == ["finished"] * 2
    assert pruning.facts.parents == {"mlflow": "1"} and pruning.facts.group == "mine"
    assert steps_of(pruning.points, "lr") == steps_of(whole.points, "lr") != []
    ((split, figures, files),) = whole.results
    result = read_json(tmp_path / "mine" / "result.json")
    assert split == "test" and {code: f["score"] for code, f in figures.items()} == result["accuracy"]
    assert files == ["config.json", "result.json", "result.md", "curve.png", "result.png"]
    assert whole.facts.tags["recipe"] == "scenes_xgqa" and whole.facts.tags["seed"] == "0"


def test_tracking_without_trackers_leaves_no_trace(tmp_path):
    with track_run(tmp_path, "pretrain", {}, {}, ()) as tracked:
        tracked.log_results("test", {})
    assert list(tmp_path.iterdir()) == []


def test_tracking_names_a_tracker_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with (
        pytest.raises(UserError, match=r"wandb needs a package .* pip install -e .\[track\]"),
        track_run(tmp_path, "pretrain", {}, {}, ("wandb",)),
    ):
        pass


def test_tracking_results_are_a_row_a_language():
    figures = {"en": {"score": 0.5}, "de": {"score": 0.25, "count": 1.0}}
    assert table_rows(figures) == [["language", "score", "count"], ["en", 0.5, None], ["de", 0.25, 1.0]]
    assert table_rows({}) == []


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    return found.Reload()


@pytest.mark.usefixtures("recorder")
def test_tracking_stores_no_password_and_knows_a_run_of_an_address_with_one(tmp_path):
    """An earlier version stored addresses as they were given."""
    stored = {"address": "http://ada:s3cret@host", "id": "7", "steps": {"a": 3}}
    tmp_path.joinpath("tracking.json").write_text(json.dumps({"mlflow": stored}))
    with track(tmp_path):
        pass
    assert Recorder.opened[0].stored["address"] == "http://***@host"
    assert "s3cret" not in tmp_path.joinpath("tracking.json").read_text()


def test_tracking_tensorboard_has_a_run_that_went_on(mini):
    settings = ["name=tracked", "runtime=local", "workers=1", 'fit.track=["tensorboard"]', "fit.save_every=3"]
    config = mini(*settings, f"fit.steps={STEPS}")
    run(mini(*settings, f"fit.steps={STEPS}", "fit.stop_after=3"))
    folder = Path(config.runs) / "tracked"
    append_jsonl(folder / "metrics.jsonl", {"step": 5, "lr": 0.0})  # after the checkpoint: it comes again
    result = run(config)
    found = events(folder)
    assert [e.step for e in found.Scalars("loss/itm")] == list(range(1, STEPS + 1))
    assert [e.value for e in found.Scalars("lr")] == pytest.approx(
        [r["lr"] for r in read_metrics(folder) if "lr" in r]
    )
    assert found.Images("curve") and "config/text_summary" in found.Tags()["tensors"]
    assert "test/text_summary" in found.Tags()["tensors"] and result["finished"]
    stored = read_json(folder / "tracking.json")["tensorboard"]
    assert stored["steps"]["loss/itm"] == STEPS


class Start:
    """A start of a run in a process of its own: `python -m pretrain`, its output in `lines`."""

    def __init__(self, config: PretrainConfig, tracker: str, **env: str):
        file = Path(config.runs) / "config_to_run.json"
        file.write_text(dump_config(config), encoding="utf-8")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "MLFLOW_"))}
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", "pretrain", "--config", file, f'fit.track=["{tracker}"]'],
            env={**inherited, **env},
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.lines: list[str] = []

    def until(self, words: str) -> "Start":
        """Read up to a line with these words."""
        for line in self.process.stdout:
            self.lines.append(line)
            if words in line:
                return self
        raise AssertionError("".join(self.lines))

    def end(self, number: int | None = None) -> int:
        """Send a signal, or none; return the exit code."""
        if number is not None:
            self.process.send_signal(number)
        self.lines += self.process.communicate(timeout=240)[0].splitlines(keepends=True)
        return self.process.returncode


@pytest.fixture
def long_run(mini):
    settings = ("name=tracked", "runtime=local", "workers=1", f"fit.steps={LONG}", "fit.save_every=100")
    return mini(*settings, "recipe=tiny")


@pytest.fixture
def mlflow_server(tmp_path):
    """The address of an MLflow server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = Path(sys.prefix) / "mlflow" / "bin" / "mlflow"
    server = subprocess.Popen(
        [program, "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        + ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db"]
        + ["--artifacts-destination", str(tmp_path / "server")],
        stdout=(tmp_path / "server.log").open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    limit = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            break
        except OSError:
            assert server.poll() is None and time.monotonic() < limit, (tmp_path / "server.log").read_text()
            time.sleep(0.3)
    yield address
    os.killpg(server.pid, signal.SIGTERM)
    server.wait(timeout=60)


@pytest.mark.heavy
def test_tracking_mlflow_server_has_one_run_over_a_kill_and_a_resume(long_run, mlflow_server):
    from mlflow import MlflowClient

    env, client = {"MLFLOW_TRACKING_URI": mlflow_server, "MLFLOW_EXPERIMENT_NAME": "mine"}, None
    killed = Start(long_run, "mlflow", **env).until(f"step 130/{LONG}")
    client = MlflowClient(mlflow_server)

    def the_run():
        (found,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
        return found

    assert the_run().info.status == "RUNNING"
    assert killed.end(signal.SIGTERM) == 143, killed.lines
    assert killed.lines[-1].startswith("stopped by SIGTERM at step ")
    first = the_run()
    assert (first.info.status, first.info.run_name) == ("KILLED", "tracked")
    assert first.data.params["model.width"] == "32" and first.data.params["fit.steps"] == str(LONG)
    assert first.data.tags["mlflow.source.git.commit"] == commit()
    assert first.data.tags["recipe"] == "tiny" and first.data.tags["seed"] == "0"
    assert Start(long_run, "mlflow", **env).end() == 0
    last = the_run()
    assert (last.info.run_id, last.info.status) == (first.info.run_id, "FINISHED")
    history = client.get_metric_history(last.info.run_id, "loss/itm")
    logged = [record for record in read_metrics(Path(long_run.runs) / "tracked") if "loss/itm" in record]
    assert [(point.step, point.value) for point in history] == [(r["step"], r["loss/itm"]) for r in logged]
    assert [point.step for point in history] == list(range(1, LONG + 1))
    result = read_json(Path(long_run.runs) / "tracked" / "result.json")
    assert last.data.metrics["test/de/i2t_r1"] == result["retrieval"]["de"]["i2t_r1"]
    artifacts = {artifact.path for artifact in client.list_artifacts(last.info.run_id)}
    assert artifacts == {"config.json", "result.json", "curve.png", "test.csv"}


@pytest.mark.heavy
def test_tracking_mlflow_without_a_server_keeps_a_database_beside_the_runs(mini):
    from mlflow import MlflowClient

    config = mini("name=tracked", "runtime=local", "workers=1", "fit.steps=2")
    assert Start(config, "mlflow").end() == 0
    client = MlflowClient(f"sqlite:///{config.runs}/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("polyglance").experiment_id])
    assert found.info.status == "FINISHED" and found.data.metrics["lr"] > 0
    assert (Path(config.runs) / "mlartifacts" / found.info.run_id / "artifacts" / "curve.png").is_file()


TRIAL = """
import sys
from pathlib import Path
from raylib.tracking import RunTracking, track_run

with track_run(Path(sys.argv[1]), "finetune", {"batch": 8}, {"seed": "0"}, ("mlflow",)) as tracking:
    tracking.log_results("dev", {"de": {"score": 0.5}})
"""


@pytest.mark.heavy
def test_tracking_mlflow_database_is_made_once_by_trials_that_begin_together(tmp_path):
    from mlflow import MlflowClient

    (tmp_path / "find").mkdir()
    (tmp_path / "find" / "search.json").write_text("{}")
    folders = [tmp_path / "find" / "trials" / name for name in "abc"]
    for folder in folders:
        folder.mkdir(parents=True)
    started = [subprocess.Popen([sys.executable, "-c", TRIAL, folder], cwd=ROOT) for folder in folders]
    assert [process.wait(timeout=240) for process in started] == [0, 0, 0]
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("polyglance").experiment_id])
    assert {(run.info.run_name, run.data.tags["group"]) for run in runs} == {
        (f"find/trials/{name}", "find") for name in "abc"
    }
    assert all(run.info.status == "FINISHED" and run.data.metrics == {"dev/de/score": 0.5} for run in runs)


@pytest.mark.heavy
def test_tracking_mlflow_server_that_is_away_is_one_line(mini, tmp_path):
    config = mini("name=tracked", "runtime=local", "workers=1", "fit.steps=2")
    away = Start(config, "mlflow", MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert away.end() == 2
    assert "error: fit.track: mlflow does not take the run (" in away.lines[-1]


def wandb_records(folder: Path) -> Iterator:
    """The records of an offline run: protobufs in LevelDB's log format, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("*.wandb")
    data, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 2**15 - place % 2**15) < 7:  # no header fits the rest of a block
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def wandb_history(records: list) -> list[tuple[int, dict]]:
    """(step, values) of each row that was logged."""
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            values = {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            rows.append((record.history.step.num, values))
    return rows


@pytest.mark.heavy
def test_tracking_wandb_offline_has_one_run_over_a_kill_and_a_resume(long_run):
    env = {"WANDB_MODE": "offline", "WANDB_PROJECT": "mine", "WANDB_ENTITY": "us", "WANDB_RUN_GROUP": "group"}
    killed = Start(long_run, "wandb", **env).until(f"step 130/{LONG}")
    time.sleep(1 + 3 * tracking.SECONDS)  # wandb writes its file once a second
    assert killed.end(signal.SIGKILL) == -signal.SIGKILL
    last = Start(long_run, "wandb", **env)
    assert last.end() == 0, "".join(last.lines)
    folders = sorted((Path(long_run.runs) / "tracked" / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    starts = [list(wandb_records(folder)) for folder in folders]
    runs = [next(r.run for r in start if r.WhichOneof("record_type") == "run") for start in starts]
    assert runs[0].run_id == runs[1].run_id
    for one in runs:
        assert (one.project, one.entity, one.run_group) == ("mine", "us", "group")
        assert (one.display_name, list(one.tags)) == ("tracked", ["recipe:tiny"])
        config = {item.key: json.loads(item.value_json) for item in one.config.update}
        assert config["model"]["width"] == 32 and config["git"] == commit()
    steps = [step for start in starts for step, row in wandb_history(start) if "loss/itm" in row]
    # a killed process takes along what W&B has not written, the last second and the newest step
    assert steps == sorted(set(steps))
    assert steps[:130] == list(range(1, 131)) and steps[-100:] == list(range(LONG - 99, LONG + 1))
    rows = {name: value for _, row in wandb_history(starts[1]) for name, value in row.items()}
    assert rows["curve._type"] == "image-file" and rows["test/table._type"] == "table-file"
    files = {str(path.relative_to(folders[1])) for path in folders[1].rglob("*") if path.is_file()}
    assert {"files/result.json", "files/curve.png", "files/config.json"} <= files
    (code,) = [r.exit.exit_code for r in starts[1] if r.WhichOneof("record_type") == "exit"]
    assert code == 0


@pytest.mark.heavy
@pytest.mark.parametrize(("ends", "exit_code", "code"), [("error", 2, 1), ("ctrl-c", 130, 255)])
def test_tracking_wandb_is_told_of_an_end_before_the_end(ends, exit_code, code, long_run, mini):
    if ends == "error":
        diverging = ("optim.lr=1e30", "optim.clip=1e30", "fit.max_skipped=0", "fit.steps=50")
        config = mini("name=tracked", "runtime=local", "workers=1", *diverging)
        start, number = Start(config, "wandb", WANDB_MODE="offline"), None
    else:
        start, number = Start(long_run, "wandb", WANDB_MODE="offline").until("step 10/"), signal.SIGINT
    assert start.end(number) == exit_code, "".join(start.lines)
    (folder,) = (Path(long_run.runs) / "tracked" / "wandb").glob("offline-run-*")
    (found,) = [r.exit.exit_code for r in wandb_records(folder) if r.WhichOneof("record_type") == "exit"]
    assert found == code


def test_tensorboard_goes_on_after_a_full_disk_without_a_traceback(tmp_path, capfd):
    """The limit of a file's size in the place of the full disk."""
    facts = RunFacts(tmp_path, "pretrain", {"a": 1}, {}, tmp_path, {})
    tracker, limit = TensorBoard(facts, {}), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    point = Point(0, 1, {f"value{i}": 1.0 for i in range(200)})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, limit[1]))
        with pytest.raises(OSError, match="File too large"):
            for _ in range(9):  # the first error may come out of a later call
                tracker.log([point])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    tracker.log([point])
    tracker.close("finished")
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"scalars": 0}).Reload()
    assert len(events.Tags()["scalars"]) == 200
    assert "Traceback" not in capfd.readouterr().err


def test_tracking_goes_on_where_its_own_file_cannot_be_written(tmp_path, capsys):
    facts = RunFacts(tmp_path, "pretrain", {}, {}, tmp_path, {})
    tracking = RunTracking(facts, ["tensorboard"])
    (tmp_path / "tracking.json").unlink()
    (tmp_path / "tracking.json").mkdir()  # nothing can be renamed to it
    append_jsonl(tmp_path / "metrics.jsonl", {"step": 1, "loss/itm": 0.5})
    tracking._send()
    tracking.close()
    assert f"note: fit.track: {tmp_path}/tracking.json is not written" in capsys.readouterr().out
