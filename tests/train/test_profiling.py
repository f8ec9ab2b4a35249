"""`--profile`: a trace with the stages of a step, a table to read, and the same training as without."""

import gzip
import json
import logging

import pytest

from dinov2.train import monitor
from dinov2.train.train import main

STAGES = ("data", "teacher", "student", "backward", "optimizer", "teacher update")


@pytest.fixture
def run(run):
    """Train six iterations with `arguments`; returns the run folder."""

    def go(name, *arguments):
        code, folder = run("optim.epochs=3", name=name, arguments=arguments)
        assert code == 0
        return folder

    return go


def test_a_trace_a_table_and_the_same_numbers(run, rows):
    plain, profiled = run("plain"), run("profiled", "--profile", "--profile-steps", "2")
    assert rows(plain) == rows(profiled)
    assert not (plain / "profile").exists()
    with gzip.open(profiled / "profile" / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    n_ranges = {stage: sum(e.get("name") == stage for e in events) for stage in STAGES}
    assert min(n_ranges.values()) >= 2, n_ranges
    table = (profiled / "profile" / "table.txt").read_text()
    assert table.startswith("2 steps on ")
    by_stage, by_operator = table.split("Self CPU time total")[:2]
    for stage in STAGES:
        assert f" {stage}  " in by_stage
    assert "aten::mm" in by_operator


def test_a_training_that_ends_before_says_so_and_writes_what_there_is(run, caplog, monkeypatch):
    monkeypatch.setattr(monitor.logger, "warning", lambda text, *values: told.append(text % values))
    told = []
    folder = run("short", "--profile", "--profile-steps", "50")
    assert told == ["profile: the training ended after 6 steps, so 3 of 50 were recorded"]
    assert (folder / "profile" / "table.txt").read_text().startswith("3 steps on ")


def test_files_that_cannot_be_written_end_no_training(run, monkeypatch, rows):
    def full(*_):
        raise OSError(28, "No space left on device")

    told = []
    monkeypatch.setattr(monitor.profile, "export_chrome_trace", full)
    monkeypatch.setattr(monitor.logger, "warning", lambda text, *values: told.append(text % values))
    folder = run("full", "--profile", "--profile-steps", "1")
    assert len(told) == 1
    assert "No space left on device" in told[0]
    assert len(rows(folder)) == 6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--profile", "--profile-steps", "0"], "--profile-steps 0: at least 1"),
        (["--profile", "--dry-run"], "do not train"),
        (["--profile", "--eval-only"], "do not train"),
    ],
)
def test_what_cannot_be_profiled_is_refused(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--config-file", "none.yaml"])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_where_the_time_goes_is_in_the_log_and_the_rows(run, monkeypatch):
    lines = []
    monkeypatch.setattr(logging.getLogger("dinov2"), "info", lambda text, *values: lines.append(text % values))
    folder = run("run")
    row = json.loads((folder / "training_metrics.json").read_text().splitlines()[-1])
    stages = {name: value for name, value in row.items() if name.startswith("seconds_")}
    assert list(stages) == [f"seconds_{stage.replace(' ', '_')}" for stage in STAGES]
    assert 0.5 * row["iter_time"] < sum(stages.values()) <= row["iter_time"]
    assert 0 < row["matmul_share"] < 1
    newest = next(line for line in reversed(lines) if line.startswith("iteration 6/6"))
    assert " % of matmul rate; data " in newest
    assert ", backward " in newest
