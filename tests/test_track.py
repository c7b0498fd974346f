"""Metrics of a run: what MLflow is given."""

import pytest

from raylib.track import Tracker, read_metrics


@pytest.mark.heavy
@pytest.mark.parametrize("server", [False, True])
def test_track_mlflow_has_every_metric_of_the_run(tmp_path, monkeypatch, server):
    """In a file of the run, or where MLFLOW_TRACKING_URI points."""
    import mlflow

    if server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'server.db'}")
    run = tmp_path / "run"
    run.mkdir()
    tracker = Tracker(run, ("mlflow",), 0)
    for step in (1, 2):
        tracker.log(step, {"loss/task": 1 / step, "lr": 0.5})
    tracker.close()
    assert (run / "mlflow.db").is_file() != server
    client = mlflow.MlflowClient()
    (found,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert found.info.run_name == "run" and found.info.status == "FINISHED"
    history = client.get_metric_history(found.info.run_id, "loss/task")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 0.5)]
    assert [record["loss/task"] for record in read_metrics(run)] == [1.0, 0.5]
