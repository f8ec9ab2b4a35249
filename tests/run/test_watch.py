"""How runs are doing, told from their files: going, ended, broken, half written, and folders without a run."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dinov2.run import watch
from dinov2.run.watch import LogReader, RunWatch, Status, find_runs, main, newest_knn, read_tail, table

SCRIPT = Path(__file__).parents[2] / "scripts" / "watch_run.py"
START = "10:00:00 I seed 0; dinov2 0.1 at abc; torch 2.10.0; Python 3.11\n10:00:01 I data      8 pictures in 1 list\n"
STEP = "10:00:02 I iteration 10/100  eta 0:01:30  40.0 images/s (waiting for data 10 %)  lr 1e-3  total 5.0\n"
DONE = "10:01:00 I done: runs/a holds config.yaml, training_metrics.json, checkpoints and eval/\n"


def line(iteration: int, **more) -> str:
    row = {"iteration": iteration, "lr": 0.1, "total_loss": 10.0 + iteration % 3, "ibot_loss": 0.5}
    timing = {"skipped_steps": 0.0, "iter_time": 2.0, "data_time": 0.5, "images_per_second": 32.0}
    return json.dumps({**row, **timing, **more}) + "\n"


@pytest.fixture
def make_run(tmp_path):
    """A run's folder: `n` of 100 iterations done, of a process that lives (this one) or does not."""

    def make(name="run", n=10, log=START + STEP, lives=True, last="", **more) -> Path:
        folder = tmp_path / name
        (folder / "logs").mkdir(parents=True)
        (folder / "config.yaml").write_text(
            "train: {OFFICIAL_EPOCH_LENGTH: 50, log_period: 10}\noptim: {epochs: 2.0}\n"
        )
        (folder / "logs" / "log.txt").write_text(log)
        (folder / ".lock").write_text(
            f"process {os.getpid() if lives else ended_process()} of {socket.gethostname()}\n"
        )
        if n:
            (folder / "training_metrics.json").write_text("".join(line(i, **more) for i in range(n)) + last)
        return folder

    return make


def ended_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


def look(folder: Path) -> Status:
    return RunWatch(folder).look()


# --- one run --------------------------------------------------------------------------------------------------------


def test_a_run_still_going_also_with_a_half_written_line(make_run):
    status = look(make_run(last='{"iteration": 10, "total_lo'))
    assert (status.state, status.done, status.total, status.health) == ("running", 10, 100, [])
    assert status.loss == 11.0
    assert status.losses == {"ibot": 0.5}
    assert (status.images_per_second, status.waiting, status.seconds_to_go) == (32.0, 0.25, 180.0)
    assert not status.has_ended


@pytest.mark.parametrize(
    ("lives", "more", "state", "health"),
    [
        (False, DONE, "done", []),
        (False, "10:01:00 W stopped after iteration 10, as asked; the same command goes on\n", "stopped", []),
        (
            False,
            "10:01:00 E the run stopped: CUDA out of memory\nTraceback (most recent call last):\n  ...\n",
            "failed",
            ["CUDA out of memory"],
        ),
        (False, "10:01:00 E train.dataset_path: no lists\n", "failed", ["train.dataset_path: no lists"]),
        (False, "", "killed", []),
        (
            True,
            "10:01:00 E the teacher after iteration 5 could not be judged: x\n" + STEP,
            "running",
            ["1 error logged"],
        ),
        (True, DONE + START, "running", []),  # taken up again
        # since the end only a command that did not come to train, as --eval-only
        (False, DONE + START.split("\n")[0] + "\n", "done", []),
    ],
)
def test_how_a_run_ended(make_run, lives, more, state, health):
    status = look(make_run(lives=lives, log=START + STEP + more))
    assert (status.state, status.health) == (state, health)


def test_what_is_wrong_is_said(make_run):
    sign = "the CLS loss"
    log = (
        START
        + f"10:00:05 W collapse? {sign} is 9.9, not below 9.8 (x), as the mean of iterations 1 to 2: y. What\n"
        + "10:00:06 W iteration 9, rank 0: bad: went back to iteration 5, and passes over 3 batches (rollback 2 of 3)\n"
    )
    folder = make_run(log=log, skipped_steps=4.0, total_loss=None)
    (folder / "bad_images.csv").write_text("path,reason\na.png,torn\nb.png,torn\n")
    status = look(folder)
    assert status.health == ["loss not finite", "collapse?", "4 skipped", "2 rolled back", "2 bad images"]
    assert "nan" in table([status], 200)[1]
    with open(folder / "logs" / "log.txt", "a") as file:
        file.write(f"10:00:09 I {sign} has recovered: 9 in iterations 3 to 4\n")
    assert "collapse?" not in look(folder).health


def test_a_run_that_says_nothing_for_long_is_silent(make_run):
    folder = make_run()
    (folder / ".lock").write_text("process 1 of another-machine\n")
    assert look(folder).state == "running"
    for file in ("training_metrics.json", "logs/log.txt", "config.yaml"):
        os.utime(folder / file, (time.time() - 4000,) * 2)
    assert re.fullmatch(r"silent 1h0\dm", look(folder).state)


def test_a_run_that_begins_and_one_of_which_little_is_left(make_run):
    status = look(make_run("begins", n=0))
    assert (status.state, status.done, status.loss, status.seconds_to_go) == ("starting", 0, None, None)
    poor = make_run("poor")
    for file in ("config.yaml", "logs/log.txt", ".lock"):
        (poor / file).unlink()
    assert (look(poor).done, look(poor).total) == (10, None)
    assert "10/?" in table([look(poor)], 80)[1]
    (poor / "config.yaml").write_text("{ not: [yaml")
    (poor / "training_metrics.json").write_bytes(b"\xff\xfe[]\n{}\n")
    assert look(poor).done == 0


def test_the_newest_evaluation_that_can_be_read(make_run):
    folder = make_run() / "eval"
    for n, text in {
        8: json.dumps(
            {
                "datasets": {
                    "a": {"knn": {"knn_1": {"balanced_accuracy": 0.1}, "knn_20": {"balanced_accuracy": 0.4}}},
                    "b": {"knn": {"knn_5": {"balanced_accuracy": 0.6}}, "linear": {"balanced_accuracy": 1.0}},
                }
            }
        ),
        16: '{"datasets": {"a"',
        12: '{"datasets": {}}',
        20: "[]",
    }.items():
        (folder / f"training_{n}").mkdir(parents=True)
        (folder / f"training_{n}" / "results.json").write_text(text)
    assert newest_knn(folder) == (0.5, 8)


# --- files that grow ------------------------------------------------------------------------------------------------


def test_only_the_end_of_the_numbers_is_read(tmp_path):
    file = tmp_path / "training_metrics.json"
    file.write_text("".join(line(i) for i in range(5000)))
    found = read_tail(file, 1000)
    assert 1 <= len(found) < 10
    assert found[-1]["iteration"] == 4999
    assert read_tail(file, 20)[-1]["iteration"] == 4999  # not even one line fits
    assert read_tail(tmp_path / "missing") == []


def test_a_log_is_read_on_from_where_it_was(tmp_path, monkeypatch):
    file = tmp_path / "log.txt"
    file.write_text(START + DONE[:20])
    reader = LogReader(file)
    assert reader.read().end == ("", "")
    taken = []
    monkeypatch.setattr(watch.LogState, "take", lambda self, text: taken.append(text))
    with open(file, "a") as stream:
        stream.write(DONE[20:])
    reader.read()
    assert taken == [DONE.rstrip()]
    monkeypatch.undo()
    file.write_text(START)  # another run in the same place
    assert reader.read().end == ("", "")


# --- the command ----------------------------------------------------------------------------------------------------


def test_eighty_columns_hold_the_main_numbers_and_nothing_is_longer():
    usual = Status(
        *("small_from_scratch", "running", 112500, 125000, 10.123, {"cls": 9.0, "ibot": 0.5}),
        *(1234.5, 0.03, 97_320.0, (0.8423, 112500), []),
    )
    heading, row = table([usual], 80)
    assert heading.split()[:5] == ["run", "state", "step", "%", "loss"]
    for shown in ("small_from", "running", "112500/125000", " 90 ", "10.12", "1d03h", "0.842", "1234", "ok"):
        assert shown in row
    assert "ibot 0.5" in table([usual], 200)[1]
    trouble = Status("run", "silent 12m30s", 5, 125000, float("nan"), health=["collapse?", "12 skipped", "x" * 300])
    for width in (20, 40, 80, 200):
        assert all(len(text) <= width for text in table([usual, trouble], width))
    assert "collapse?" in table([usual, trouble], 80)[2]
    assert "\x1b" not in table([Status("a\x1b[2J", "running", health=["\x1b[31mred"])], 80)[1]


def test_the_command_over_a_folder_of_runs_and_folders_without_one(make_run, tmp_path, capsys):
    make_run("a", log=START + DONE, lives=False, n=100)
    make_run("b")
    (tmp_path / "other").mkdir()
    assert main([str(tmp_path)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [text.split()[:2] for text in told] == [["run", "state"], ["a", "done"], ["b", "running"]]
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
        with open(folder / "logs" / "log.txt", "a") as file:
            file.write(DONE)

    monkeypatch.setattr(watch.time, "sleep", end_it)
    assert main([str(folder), "--follow", "--interval", "3"]) == 0
    assert waited == [3.0]
    told = capsys.readouterr().out.splitlines()
    assert [text.split()[1] for text in told] == ["state", "running", "state", "done"]


def test_the_script_answers_at_once_without_torch(make_run):
    code = f"import runpy, sys; sys.argv = ['watch_run.py', {str(make_run())!r}]\n"
    code += f"try:\n    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    code += "except SystemExit as end:\n    sys.exit(end.code or 10 * ('torch' in sys.modules))"
    environment = {**os.environ, "COLUMNS": "80"}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert "10/100" in told.stdout
