"""Runs in experiment trackers: each metric once, the same run after a resume, told of its end."""

import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.train import run
from raylib import trackers, tracking
from raylib.errors import UserError
from raylib.fileio import append_jsonl, read_json, write_atomically
from raylib.track import read_metrics
from raylib.trackers import ExperimentTracker, Point, RunFacts, table_rows
from raylib.tracking import track_run

STEPS = 8


class Recorder(ExperimentTracker):
    """Keeps what it is told. `fails`: raises at what is logged."""

    fails, address, id = False, "memory", "1"

    def __init__(self, facts: RunFacts, stored: dict):
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
    monkeypatch.setattr(tracking, "SECONDS", 0.01)


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
    append_jsonl_to.write_text('{"step": 1, "lr": 0.1, "loss/a": NaN}\n{"step": 2, "lr"')
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
