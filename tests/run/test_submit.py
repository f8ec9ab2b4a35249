"""What a job does with a run that was interrupted, and what is told of a job."""

import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from dinov2.run import submit
from dinov2.run.submit import EvaluationTask, TrainingTask, wait
from dinov2.utils.command import StoppedError

RUNNING = "JobState=RUNNING Restarts=0 ExitCode=0:0 PreemptTime=None"
PREEMPTED = "JobState=RUNNING Restarts=0 ExitCode=0:0 PreemptTime=2026-01-01T00:00:00"
REQUEUED = "JobState=COMPLETING Restarts=1 ExitCode=0:0 PreemptTime=None"


@pytest.fixture
def training(monkeypatch, slurm):
    """train.py that ends as `training.code` and `training.received` say, in a job of submitit."""
    fake = SimpleNamespace(code=0, received=None, argv=None, config=None, requeued=0)

    def main(argv, signals):
        fake.argv = argv
        fake.config = Path(argv[-1]).read_text() if argv[-2:-1] == ["--config-file"] else None
        signals.received = fake.received
        return fake.code

    def requeue(*_):
        fake.requeued += 1
        raise SystemExit(-1)

    monkeypatch.setattr(submit, "import_module", lambda name: {"dinov2.train.train": SimpleNamespace(main=main)}[name])
    for name, value in {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    before = {number: signal.signal(number, requeue) for number in (signal.SIGUSR2, signal.SIGTERM)}
    slurm.answer(RUNNING)
    yield fake
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_finished_run_returns(training, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("as submitted")
    task = TrainingTask(["--name", "a", "--config-file", "mine.yaml"], config)
    config.write_text("edited")
    task()
    assert training.config == "as submitted"
    assert Path(training.argv[-1]).name == "mine.yaml"  # the run is called after it
    assert training.requeued == 0


def test_a_wrong_setting_fails_the_job(training):
    training.code = 2
    with pytest.raises(SystemExit, match="2"):
        TrainingTask([], None)()


@pytest.mark.parametrize(
    ("received", "job", "requeues"),
    [
        (signal.SIGUSR2, RUNNING, True),  # the time limit is near
        (signal.SIGUSR1, RUNNING, True),  # sent by hand
        (None, RUNNING, True),  # another process had the signal
        (signal.SIGTERM, PREEMPTED, True),  # notice of a preemption
        (signal.SIGTERM, RUNNING, False),  # the user stops it
        (signal.SIGTERM, REQUEUED, False),  # SLURM did it
    ],
)
def test_who_queues_an_interrupted_job_again(training, slurm, received, job, requeues):
    training.code, training.received = 75, received
    slurm.answer(job)
    with pytest.raises(SystemExit) as ending:
        TrainingTask([], None)()
    assert (training.requeued, ending.value.code) == ((1, -1) if requeues else (0, 75))


@pytest.mark.parametrize(("received", "requeues"), [(signal.SIGUSR2, True), (signal.SIGTERM, False)])
def test_an_interrupted_fine_tuning_is_queued_again(training, monkeypatch, received, requeues):
    def main(argv):
        raise StoppedError("stopped after step 3 of 4", received)

    monkeypatch.setattr(submit, "import_module", lambda name: SimpleNamespace(main=main))
    with pytest.raises(SystemExit) as ending:
        EvaluationTask("dinov2.eval.finetune", [])()
    assert (training.requeued, ending.value.code) == ((1, -1) if requeues else (0, 75))


def test_the_other_processes_wait_for_rank_0(training, slurm, monkeypatch):
    naps = []
    monkeypatch.setattr(submit.time, "sleep", naps.append)
    monkeypatch.setenv("SLURM_PROCID", "1")
    training.code, training.received = 75, signal.SIGUSR2
    slurm.answer(RUNNING, RUNNING, REQUEUED)
    with pytest.raises(SystemExit, match="75"):
        TrainingTask([], None)()
    assert naps.count(5) == 2  # subprocess naps too
    assert training.requeued == 0


def test_a_failed_process_does_not_wait_for_ever(training, slurm, monkeypatch):
    monkeypatch.setattr(submit, "_RANK_0_SECONDS", -1)
    monkeypatch.setenv("SLURM_PROCID", "1")
    training.code = 1
    with pytest.raises(SystemExit, match="1"):
        TrainingTask([], None)()


def test_a_restarted_job_resumes_what_it_began_anew(training, monkeypatch):
    task = TrainingTask(["--no-resume", "--name", "a"], None)
    task()
    assert training.argv == ["--no-resume", "--name", "a"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    task()
    assert training.argv == ["--name", "a"]


def test_submitit_queues_the_same_task_again(training):
    task = TrainingTask([], None)
    assert task.checkpoint().function is task


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("JobState=COMPLETED ExitCode=0:0 DerivedExitCode=0:0", 0),
        ("JobState=FAILED ExitCode=143:0 DerivedExitCode=2:0", 2),
        ("JobState=FAILED ExitCode=1:0 DerivedExitCode=0:0", 1),
        ("JobState=CANCELLED ExitCode=0:15 DerivedExitCode=0:0", 143),
        ("JobState=TIMEOUT ExitCode=0:0 DerivedExitCode=0:0 Comment=JobState=COMPLETED", 1),
    ],
)
def test_exit_codes_of_jobs(slurm, end, code):
    slurm.answer(f"{end} Restarts=0 Reason=None NodeList=n1")
    assert wait("7") == code


def test_waiting_gives_up_where_slurm_tells_nothing(slurm, monkeypatch):
    monkeypatch.setattr(submit, "_SILENCE_SECONDS", -1)
    (slurm.folder / "answers").write_text("")
    with pytest.raises(ConnectionError, match="see sacct -j 7"):
        wait("7")


def test_ctrl_c_ends_the_waiting_alone(slurm, monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    slurm.answer(f"{RUNNING} NodeList=n1")
    monkeypatch.setattr(submit, "time", SimpleNamespace(sleep=interrupt, monotonic=lambda: 0.0, strftime=str))
    assert wait("7") == 130
    assert "job 7 goes on; scancel 7 ends it" in capsys.readouterr().out
