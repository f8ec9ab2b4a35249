"""What the training launcher hands to SLURM, and what it refuses to."""

import pytest
from submitit.core.utils import DelayedSubmission

from dinov2.run.train.train import main


@pytest.fixture
def launch(slurm, image_list, tmp_path, monkeypatch):
    """Run the launcher from `tmp_path`; returns its exit code."""
    monkeypatch.chdir(tmp_path)
    dataset = f"train.dataset_path=HemaStandardDataset:root={image_list()}:shuffle=1"
    return lambda *arguments: main([*arguments, dataset])


def options(slurm) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in slurm.submitted() if line.startswith("#SBATCH --")]
    return dict(line.partition("=")[::2] for line in lines)


def test_nothing_of_a_cluster_is_preset(launch, slurm):
    assert launch() == 0
    given = options(slurm)
    assert [given[key] for key in ("nodes", "gpus-per-node", "ntasks-per-node", "time")] == ["1", "8", "8", "2800"]
    assert not given.keys() & {"partition", "account", "qos", "constraint", "mem", "cpus-per-task", "exclude", "wckey"}
    assert given.keys() >= {"requeue", "signal"}


def test_each_option_reaches_sbatch(launch, slurm):
    named = {
        **{"partition": "gpu", "qos": "q", "account": "a", "constraint": "c", "cpus-per-task": "5", "mem": "64G"},
        **{"comment": "why", "exclude": "n1", "nodelist": "n2", "gres": "gpu:a100:4", "dependency": "afterok:3"},
    }
    flags = [word for key, value in named.items() for word in (f"--{key}", value)]
    others = [word for option in ("reservation=r", "exclusive", "wckey=k") for word in ("--slurm", option)]
    others += ["--setup", "module load x", "--signal-delay", "33"]
    assert launch("--nodes", "3", "--ngpus", "4", "--timeout", "60", *flags, *others) == 0
    given = options(slurm)
    assert {key: given[key] for key in named} == named
    assert (given["nodes"], given["ntasks-per-node"], given["time"], given["signal"]) == ("3", "4", "60", "USR2@33")
    assert (given["reservation"], given["exclusive"], given["wckey"]) == ("r", "", "k")
    assert "gpus-per-node" not in given
    (command,) = [line for line in slurm.submitted() if line.startswith("srun")]
    assert "--kill-on-bad-exit=1" in command
    assert "--cpus-per-task=5" in command  # srun does not ask sbatch
    assert "module load x" in slurm.submitted()


@pytest.mark.parametrize(
    "flags", [["--ngpus", "2"], ["--gpus", "2"], ["--gpus-per-node", "2"], ["-n", "1", "--ngpus=2"]]
)
def test_upstreams_spellings(launch, slurm, flags):
    assert launch(*flags, "--use-volta32") == 0
    assert (options(slurm)["gpus-per-node"], options(slurm)["constraint"]) == ("2", "volta32gb")


def test_a_tilde_in_the_output_folder_is_the_home_folder(launch, slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert launch("--output-dir=~/runs", "--name", "r") == 0
    assert (tmp_path / "home/runs/submitit").is_dir()
    assert not (tmp_path / "~").exists()


def test_without_gpus_there_are_as_many_processes_as_asked_for(launch, slurm):
    assert launch("--ngpus", "0", "--tasks-per-node", "3") == 0
    assert options(slurm)["ntasks-per-node"] == "3"
    assert "gpus-per-node" not in options(slurm)


def test_the_other_arguments_and_the_configuration_travel(launch, slurm, tmp_path, capsys):
    config = tmp_path / "mine.yaml"
    config.write_text("optim:\n  epochs: 30\n")
    code = launch(
        "--config-file", "mine.yaml", "--nodes", "1", "--output-dir", "out", "train.seed=4", "--name", "first"
    )
    assert code == 0
    config.write_text("another: one\n")
    task = DelayedSubmission.load(tmp_path / "out" / "submitit" / "7" / "7_submitted.pkl").function
    assert task.argv[:7] == ["--config-file", "mine.yaml", "--output-dir", "out", "train.seed=4", "--name", "first"]
    assert task.argv[-2:] == ["--output-dir", str(tmp_path / "out")]
    assert task.config_text == "optim:\n  epochs: 30\n"
    told = capsys.readouterr().out
    for text in (f"results  {tmp_path}/out/first\n", f"{tmp_path}/out/submitit/7/7_0_log.out", "scancel 7"):
        assert text in told


def test_a_run_without_a_name_is_called_after_its_job(launch, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("optim: {}\n")
    launch("--config-file", "mine.yaml", "--ngpus", "1")
    assert f"results  {tmp_path}/runs/mine_7\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.sed=1"], "unknown config key train.sed; did you mean train.seed"),
        (["--config-file", "none.yaml"], "no file at 'none.yaml'"),
        (["train.global_batch_size=15"], "do not spread evenly over 8 processes"),
        (
            ["student.pretrained_weights=none.pth"],
            "student.pretrained_weights=none.pth: checkpoint: no file or folder 'none.pth'",
        ),
        (["evaluation.datasets=[{name:cells,data:none}]"], "evaluation.datasets, cells: labelled cells: 'none'"),
        (["--nodes", "0"], "--nodes must be at least 1, found 0"),
        (["--ngpus", "2", "--tasks-per-node", "2"], "--tasks-per-node is for --ngpus 0"),
        (["--gres", "gpu:a100"], "--gres gpu:a100 is 1 GPUs of a node, but --ngpus 8"),
        (["--gres", "gpu:a100:4,disk:8"], "--gres gpu:a100:4,disk:8 is 4 GPUs of a node, but --ngpus 8"),
        (["--timeout", "1"], "--signal-delay must be between 1 s and the time limit"),
    ],
)
def test_mistakes_are_found_before_the_job_waits(launch, slurm, capsys, arguments, message):
    assert launch(*arguments) == 2
    assert message in capsys.readouterr().err
    assert slurm.submitted() is None


def test_images_must_be_named(slurm, capsys):
    assert main([]) == 2
    assert "no value for train.dataset_path" in capsys.readouterr().err
    assert slurm.submitted() is None


def test_a_machine_without_slurm(launch, slurm, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(slurm.folder))
    (slurm.folder / "sbatch").unlink()
    assert launch() == 2
    assert "no sbatch on this machine" in capsys.readouterr().err


def test_a_refusal_of_slurm(launch, slurm, capsys):
    slurm.refuse("sbatch: error: invalid partition specified: gpu")
    assert launch("--partition", "gpu") == 2
    assert "SLURM refused the job: sbatch: error: invalid partition" in capsys.readouterr().err


def test_waiting_ends_with_the_jobs_exit_code(launch, slurm, capsys):
    slurm.answer(
        "JobState=PENDING Reason=Resources Restarts=0 ExitCode=0:0 NodeList=(null)",
        "JobState=RUNNING Reason=None Restarts=1 ExitCode=0:0 NodeList=n[1-2]",
        "JobState=FAILED Reason=NonZeroExitCode Restarts=1 ExitCode=143:0 DerivedExitCode=2:0 NodeList=n[1-2]",
    )
    assert launch("--wait") == 2
    told = capsys.readouterr().out
    assert "job 7 PENDING (Resources)" in told
    assert "job 7 RUNNING (n[1-2])" in told
