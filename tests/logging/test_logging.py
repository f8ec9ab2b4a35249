"""training_metrics.json: one object an iteration, whatever happened to the process in between."""

import io
import json
import logging
import sys

import pytest
import torch

from dinov2 import logging as log
from dinov2.logging import MetricLogger, StepClock
from dinov2.logging.trackers import Tracker


class Recorder(Tracker):
    def __init__(self):
        self.seen, self.closed = [], False

    def log(self, values, iteration):
        self.seen.append((iteration, values["loss"]))

    def close(self):
        self.closed = True


def open_log(path, start=0, stop=10, trackers=()):
    return MetricLogger(path, start, stop, batch_size=4, period=3, trackers=trackers)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_iteration_has_a_line_and_the_end_is_written(tmp_path):
    path, tracker = tmp_path / "training_metrics.json", Recorder()
    log = open_log(path, stop=8, trackers=[tracker])
    newest = [log.update(i, {"lr": 0.1 * i}, {"loss": torch.tensor(float(i))}) for i in range(8)]
    assert [len(rows) for rows in newest] == [0, 0, 3, 0, 0, 3, 0, 2]
    log.close()
    assert [(row["iteration"], row["loss"]) for row in lines(path)] == [(i, float(i)) for i in range(8)]
    assert lines(path)[3]["lr"] == pytest.approx(0.3)
    assert tracker.seen == [(i, float(i)) for i in range(8)]
    assert tracker.closed


def test_an_interruption_writes_what_is_pending_first(tmp_path):
    path = tmp_path / "training_metrics.json"
    log = open_log(path)
    log.update(0, {}, {"loss": torch.tensor(1.0)})
    with log.interruption():
        assert len(lines(path)) == 1


def test_resuming_drops_lines_to_be_written_again_and_a_torn_one(tmp_path):
    path = tmp_path / "training_metrics.json"
    path.write_text('{"iteration": 0, "loss": 1}\n{"iteration": 1, "loss": 2}\n{"iteration": 2, "lo')
    log = open_log(path, start=1)
    for i in (1, 2):
        log.update(i, {}, {"loss": torch.tensor(10.0 + i)})
    log.close()
    assert [(row["iteration"], row["loss"]) for row in lines(path)] == [(0, 1), (1, 11.0), (2, 12.0)]


def test_what_is_not_finite_is_null_since_json_has_no_nan(tmp_path):
    path = tmp_path / "training_metrics.json"
    log = open_log(path)
    log.update(0, {}, {"loss": torch.tensor(float("nan"))})
    log.close()
    assert lines(path)[0]["loss"] is None


def test_an_evaluation_goes_to_the_trackers_with_the_iteration_it_follows(tmp_path):
    path, tracker = tmp_path / "training_metrics.json", Recorder()
    log = open_log(path, trackers=[tracker])
    log.log_evaluation(0, {"loss": 0.25})
    for i in range(3):
        log.update(i, {}, {"loss": torch.tensor(float(i))})
    log.log_evaluation(3, {"loss": 0.5})
    assert tracker.seen == [(0, 0.25), (0, 0.0), (1, 1.0), (2, 2.0), (2, 0.5)]
    assert [row["loss"] for row in lines(path)] == [0, 1, 2]
    assert log.newest["loss"] == 2


@pytest.mark.parametrize("method", ["log", "close"])
def test_a_tracker_that_cannot_write_does_not_end_the_run(tmp_path, caplog, method):
    class Full(Recorder):
        def log(self, values, iteration):
            if method == "log":
                raise OSError(28, "No space left on device")

        def close(self):
            raise OSError(28, "No space left on device")

    path, healthy = tmp_path / "training_metrics.json", Recorder()
    log = open_log(path, trackers=[Full(), healthy])
    for i in range(6):
        log.update(i, {}, {"loss": torch.tensor(float(i))})
    log.close()
    assert len(lines(path)) == len(healthy.seen) == 6
    assert healthy.closed
    assert caplog.text.count("Full gets no more numbers") == 1


@pytest.fixture
def now(monkeypatch):
    time = [0.0]
    monkeypatch.setattr(log.time, "perf_counter", lambda: time[0])
    return time


def test_stages_of_several_steps_are_averaged_and_then_forgotten(now):
    clock = StepClock("cpu")
    for seconds in (1.0, 3.0):
        with clock.stage("data"):
            now[0] += seconds
        for _ in range(2):  # two micro-batches of a step
            with clock.stage("student"):
                now[0] += 2 * seconds
    assert clock.means() == {"data": 2.0, "student": 8.0}
    assert clock.means() == {}


def test_what_lies_between_a_stage_and_a_restart_belongs_to_no_stage(now):
    clock = StepClock("cpu")
    with clock.stage("data"):
        pass
    now[0] += 100  # an evaluation
    clock.restart()
    now[0] += 1
    with clock.stage("student"):
        pass
    assert clock.means() == {"data": 0.0, "student": 1.0}


def test_a_stage_that_fails_counts_no_time(now):
    clock = StepClock("cpu")
    with pytest.raises(ValueError, match="wrong"), clock.stage("data"):
        raise ValueError("wrong")
    assert clock.means() == {}


def test_a_clock_that_nobody_reads_stays_small(now, monkeypatch):
    monkeypatch.setattr(log, "MAX_MARKS", 9)
    clock = StepClock("cpu")
    for _ in range(100):
        for name in ("data", "student"):
            with clock.stage(name):
                now[0] += 1
    assert clock.means() == {"student": 1.0, "data": 1.0}


def test_a_number_that_only_logged_iterations_have_is_in_their_lines_alone(tmp_path):
    path = tmp_path / "training_metrics.json"
    log = open_log(path, stop=8)
    assert [i for i in range(8) if log.is_logged(i)] == [2, 5, 7]
    for i in range(8):
        use = {"use": torch.tensor(0.5 * i)} if log.is_logged(i) else {}
        log.update(i, {}, {**use, "loss": torch.tensor(float(i))})
    assert [(row["loss"], row.get("use")) for row in lines(path)] == [
        (float(i), 0.5 * i if i in (2, 5, 7) else None) for i in range(8)
    ]


def test_names_that_are_not_utf8_are_printed_and_logged(tmp_path, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stdout)
    log.setup_logging(tmp_path, name="odd names")
    print("f\udcfcr.png", flush=True)
    logging.getLogger("odd names").warning("f\udcfcr.png")
    assert stdout.buffer.getvalue() == rb"f\udcfcr.png" + b"\n"
    assert rb"f\udcfcr.png" in (tmp_path / "logs" / "log.txt").read_bytes()
