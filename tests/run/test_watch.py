"""How runs are doing, from their status.json: going, ended, broken, half written, and folders without a run."""

import json
import logging
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from dinov2.run import watch
from dinov2.run.watch import find_runs, main, mean_knn, table, table_row
from dinov2.utils.run_status import RunStatus, StatusFile, read_status

SCRIPT = Path(__file__).parents[2] / "scripts" / "watch_run.py"
LOSSES = {"total_loss": 11.0, "dino_global_crops_loss": 10.0, "ibot_loss": 0.5}


@pytest.fixture
def make_run(tmp_path):
    """A run's folder: 10 of 100 iterations done, of a process that lives (this one) or does not."""

    def make(name="run", lives=True, age=0.0, host=None, **settings) -> Path:
        folder = tmp_path / name
        (folder / "logs").mkdir(parents=True)
        (folder / "config.yaml").write_text("train: {}\n")
        usual = {"state": "running", "iteration": 10, "n_iterations": 100, "losses": LOSSES, "eta_seconds": 180.0}
        usual |= {"images_per_second": 32.0, "data_share": 0.25, "seconds_per_iteration": 2.0}
        process = {"host": host or socket.gethostname(), "pid": os.getpid() if lives else ended_process()}
        status = RunStatus(**{**usual, **process, "time": time.time() - age, **settings})
        (folder / "status.json").write_text(json.dumps(asdict(status)))
        return folder

    return make


def ended_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


# --- one run --------------------------------------------------------------------------------------------------------


def test_a_run_that_is_still_going(make_run):
    row = table_row(make_run())
    assert (row["state"], row["step"], row["%"], row["health"]) == ("running", "10/100", "10", "ok")
    assert (row["loss"], row["terms"]) == ("11", "cls 10 ibot 0.5")
    assert (row["img/s"], row["wait"], row["eta"], row["kNN"]) == ("32", "25%", "3m00s", "")


@pytest.mark.parametrize(
    ("settings", "state", "health"),
    [
        ({"state": "finished"}, "finished", "ok"),
        ({"state": "stopped"}, "stopped", "ok"),
        ({"state": "failed", "reason": "CUDA out of memory"}, "failed", "CUDA out of memory"),
        ({"state": "running"}, "killed", "ok"),
        ({"state": "evaluating"}, "killed", "ok"),
        ({"state": "running", "lives": True, "errors": 1}, "running", "1 error logged"),
        ({"state": "starting", "lives": True, "losses": {}, "iteration": 0}, "starting", "ok"),
    ],
)
def test_how_a_run_ended(make_run, settings, state, health):
    row = table_row(make_run(**{"lives": False, **settings}))
    assert (row["state"], row["health"]) == (state, health)


def test_what_is_wrong_is_shown(make_run):
    losses = LOSSES | {"total_loss": None}
    folder = make_run(losses=losses, collapse=["the CLS loss"], skipped_steps=4, rollbacks=2)
    (folder / "bad_images.csv").write_text("path,reason\na.png,torn\nb.png,torn\n")
    row = table_row(folder)
    assert row["health"] == "loss not finite, collapse?, 4 skipped, 2 rolled back, 2 bad images"
    assert row["loss"] == "nan"


def test_a_run_on_another_machine_is_silent_after_a_while(make_run):
    assert table_row(make_run("young", host="elsewhere", lives=False))["state"] == "running"
    assert re.fullmatch(r"silent 1h0\dm", table_row(make_run("old", host="elsewhere", age=4000))["state"])
    slow = make_run("slow", host="elsewhere", age=4000, seconds_between_reports=1000.0)
    assert table_row(slow)["state"] == "running"


@pytest.mark.parametrize("content", [None, b"", b"{ not", b"[]", b"\xff\xfe", b'{"iteration": 3'])
def test_a_folder_without_a_readable_status(make_run, content):
    file = make_run() / "status.json"
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    assert table_row(file.parent)["state"] == "unknown"


def test_a_status_of_another_version_is_read_as_far_as_it_goes(tmp_path):
    (tmp_path / "status.json").write_text('{"iteration": 3, "a later field": 1}')
    assert read_status(tmp_path) == RunStatus(iteration=3)


def test_knn_is_the_mean_over_sets_of_the_largest_k(make_run):
    found = {"iteration": 8, "evaluation/a/knn_1_balanced_accuracy": 0.1, "evaluation/a/knn_20_balanced_accuracy": 0.4}
    found |= {"evaluation/b/knn_5_balanced_accuracy": 0.6, "evaluation/b/linear_balanced_accuracy": 1.0}
    assert mean_knn(found) == 0.5
    row = table_row(make_run(evaluation=found))
    assert (row["kNN"], row["of"]) == ("0.500", "@8")


def test_the_status_is_whole_and_keeps_its_counts_over_a_resume(tmp_path, monkeypatch):
    first = StatusFile(tmp_path, 100, resumed=False)
    first.status.rollbacks = 2
    for _ in range(2):
        first.emit(_record("cannot read a.png"))
    first.write("running")
    monkeypatch.setattr(
        "dinov2.utils.run_status.os.replace", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full"))
    )
    first.write("finished")  # a full disk: the file stays as it was
    monkeypatch.undo()
    assert read_status(tmp_path).state == "running"
    counted = {"cannot read a.png": 2}
    assert read_status(tmp_path).warnings == counted
    second = StatusFile(tmp_path, 100, resumed=True)
    assert (second.status.rollbacks, second.status.resumed, second.status.warnings) == (2, 1, counted)
    assert StatusFile(tmp_path, 100, resumed=False).status.warnings == {}


def _record(text: str) -> logging.LogRecord:
    return logging.LogRecord("dinov2", logging.WARNING, __file__, 1, text, None, None)


# --- the command ----------------------------------------------------------------------------------------------------


def test_eighty_columns_hold_the_main_numbers_and_nothing_is_longer(make_run):
    evaluation = {"iteration": 112500, "evaluation/a/knn_20_balanced_accuracy": 0.8423}
    usual = table_row(
        make_run(
            *("small_from_scratch",),
            **{"iteration": 112500, "n_iterations": 125000, "eta_seconds": 97_320.0, "images_per_second": 1234.5},
            losses=LOSSES | {"total_loss": 10.123},
            evaluation=evaluation,
        )
    )
    heading, line = table([usual], 80)
    assert heading.split()[:5] == ["run", "state", "step", "%", "loss"]
    for shown in ("small_from_scratch", "running", "112500/125000", " 90 ", "10.12", "1d03h", "0.842", "1234", "ok"):
        assert shown in line
    assert "ibot 0.5" in table([usual], 200)[1]
    trouble = table_row(make_run("trouble", collapse=["a"], skipped_steps=12, losses={"total_loss": None}))
    trouble |= {"state": "silent 12m30s", "health": "collapse?, " + "x" * 300}
    for width in (20, 40, 80, 200):
        assert all(len(text) <= width for text in table([usual, trouble], width))
    assert "collapse?" in table([usual, trouble], 80)[2]
    odd = table_row(make_run("a\x1b[2J", state="failed", reason="\x1b[31mred"))
    assert "\x1b" not in table([odd], 80)[1]


def test_the_command_over_a_folder_of_runs_and_folders_without_one(make_run, tmp_path, capsys):
    make_run("a", state="finished", lives=False)
    make_run("b")
    (tmp_path / "other").mkdir()
    assert main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [text.split()[:2] for text in shown] == [["run", "state"], ["a", "finished"], ["b", "running"]]
    for wrong, words in (("other", "holds no run"), ("missing", "is no folder")):
        assert main([str(tmp_path / "a"), str(tmp_path / wrong)]) == 2
        said = capsys.readouterr()
        assert words in said.err
        assert said.out == ""
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), "--interval", "0"])
    assert find_runs([tmp_path / "b"]) == [tmp_path / "b"]


def test_following_ends_with_the_runs(make_run, monkeypatch, capsys):
    folder, waited = make_run(), []

    def end_it(seconds):
        waited.append(seconds)
        (folder / "status.json").write_text(json.dumps({"state": "finished"}))

    monkeypatch.setattr(watch.time, "sleep", end_it)
    assert main([str(folder), "--follow", "--interval", "3"]) == 0
    assert waited == [3.0]
    shown = capsys.readouterr().out.splitlines()
    assert [text.split()[1] for text in shown] == ["state", "running", "state", "finished"]


def test_the_script_answers_at_once_without_torch(make_run):
    code = f"import runpy, sys; sys.argv = ['watch_run.py', {str(make_run())!r}]\n"
    code += f"try:\n    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    code += "except SystemExit as end:\n    sys.exit(end.code or 10 * ('torch' in sys.modules))"
    environment = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "10/100" in done.stdout
