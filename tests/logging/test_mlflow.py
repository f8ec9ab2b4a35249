"""Numbers of a run in MLflow: a folder, or a server on this machine that fails in every way."""

import http.server
import threading
from types import SimpleNamespace

import pytest
import torch

from dinov2.logging import MetricLogger
from dinov2.logging.trackers import open_trackers

mlflow = pytest.importorskip("mlflow")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Without a proxy, and short pauses before a server is asked again; what the tracker sets is removed again."""
    for name in ("ALLOW_FILE_STORE", "DISABLE_TELEMETRY", "HTTP_REQUEST_TIMEOUT", "TRACKING_URI"):
        monkeypatch.setenv(f"MLFLOW_{name}", "")
        monkeypatch.delenv(f"MLFLOW_{name}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("no_proxy", "*")


def open_mlflow(folder, config=None, **settings):
    train = SimpleNamespace(tensorboard=False, wandb=SimpleNamespace(enabled=False))
    train.mlflow = SimpleNamespace(**{"enabled": True, "tracking_uri": None, "experiment": "cells", **settings})
    return open_trackers(train, folder, 0, config or {})


def log_iterations(folder, trackers, start, stop):
    log = MetricLogger(folder / "training_metrics.json", start, 10, batch_size=4, period=2, trackers=trackers)
    for i in range(start, stop):
        log.update(i, {"lr": 0.1}, {"total_loss": torch.tensor(float(i))})
    log.log_evaluation(stop, {"two (new)/knn_5/balanced_accuracy": 0.5})
    log.close()
    return log


def runs_in(folder):
    client = mlflow.MlflowClient(folder.absolute().as_uri())
    return client, client.search_runs([client.get_experiment_by_name("cells").experiment_id])


def test_a_resumed_run_is_one_run(tmp_path):
    folder = tmp_path / "first run"
    folder.mkdir()
    config = {"train": {"seed": 0, "wandb": {"entity": None}}, "student": {"arch": "x" * 9999}}
    log_iterations(folder, open_mlflow(folder, config), 0, 3)
    config["train"]["seed"] = 1  # parameters of a run cannot change
    log_iterations(folder, open_mlflow(folder, config), 3, 5)
    client, (run,) = runs_in(folder / "mlruns")
    assert run.info.run_name == "first run"
    assert run.info.status == "FINISHED"
    assert run.data.params == {"train.seed": "0", "train.wandb.entity": "None", "student.arch": "x" * 500}
    losses = client.get_metric_history(run.info.run_id, "total_loss")
    assert sorted((each.step, each.value) for each in losses) == [(i, float(i)) for i in range(5)]
    scores = client.get_metric_history(run.info.run_id, "two _new_/knn_5/balanced_accuracy")
    assert [(each.step, each.value) for each in scores] == [(2, 0.5), (4, 0.5)]


def test_a_run_starts_anew_at_another_place_and_after_it_was_deleted(tmp_path, monkeypatch):
    log_iterations(tmp_path, open_mlflow(tmp_path), 0, 1)
    log_iterations(tmp_path, open_mlflow(tmp_path, tracking_uri=str(tmp_path / "other")), 1, 2)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "third"))
    log_iterations(tmp_path, open_mlflow(tmp_path), 2, 3)
    assert [len(runs_in(tmp_path / name)[1]) for name in ("mlruns", "other", "third")] == [1, 1, 1]
    client, (run,) = runs_in(tmp_path / "third")
    client.delete_run(run.info.run_id)
    log_iterations(tmp_path, open_mlflow(tmp_path), 3, 4)
    assert runs_in(tmp_path / "third")[1][0].info.run_id != run.info.run_id


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, body = self.server.answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *args):
        pass


ANSWERS = {
    "is down": (503, b""),
    "refuses": (403, b'{"error_code": "PERMISSION_DENIED", "message": "no"}'),
    "refuses a value": (400, b'{"error_code": "INVALID_PARAMETER_VALUE", "message": "no"}'),
    "is a portal": (200, b"<html>log in</html>"),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_server_that_fails_does_not_stop_the_training(kind, tmp_path, caplog):
    (tracker,) = open_mlflow(tmp_path)
    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        server.answer = ANSWERS[kind]
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        tracker._client = mlflow.MlflowClient(f"http://127.0.0.1:{server.server_address[1]}")
        with caplog.at_level("ERROR", logger="dinov2"):
            log = log_iterations(tmp_path, [tracker], 0, 4)
        server.shutdown()
    assert log.trackers == []
    assert caplog.text.count("MLflow gets no more numbers") == 1
    assert len((tmp_path / "training_metrics.json").read_text().splitlines()) == 4


def test_a_run_starts_while_the_server_is_down(tmp_path, caplog):
    with caplog.at_level("ERROR", logger="dinov2"):
        assert open_mlflow(tmp_path, tracking_uri="http://127.0.0.1:9") == []
    assert "MLflow gets no more numbers of this part of the run (MLflow: API request to http://127" in caplog.text


def test_what_the_user_can_correct(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"train.mlflow: .*unsupported URI 'foo://x'.*; correct its tracking_uri or"):
        open_mlflow(tmp_path, tracking_uri="foo://x")
    monkeypatch.setitem(__import__("sys").modules, "mlflow", None)
    with pytest.raises(ValueError, match="train.mlflow.enabled is true but MLflow is not installed: pip install mlfl"):
        open_mlflow(tmp_path)
