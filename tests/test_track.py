"""Metrics of a run: what MLflow is given."""

import pytest

from raylib.track import Tracker, read_metrics


@pytest.mark.heavy
def test_track_mlflow_has_every_metric_of_the_run(tmp_path):
    import mlflow

    run = tmp_path / "run"
    run.mkdir()
    tracker = Tracker(run, ("mlflow",), 0)
    for step in (1, 2):
        tracker.log(step, {"loss/task": 1 / step, "lr": 0.5})
    tracker.close()
    client = mlflow.MlflowClient()
    (found,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert found.info.run_name == "run" and found.info.status == "FINISHED"
    history = client.get_metric_history(found.info.run_id, "loss/task")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 0.5)]
    assert [record["loss/task"] for record in read_metrics(run)] == [1.0, 0.5]
