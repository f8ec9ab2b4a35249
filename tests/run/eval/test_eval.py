"""Evaluations as jobs: one process, the command's own arguments, its exit code."""

import importlib

import pytest
from submitit.core.utils import DelayedSubmission


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("extract_features", ["--checkpoint", "c.pth", "--data", "cells"]),
        ("knn", ["--features", "f.h5", "--k", "1", "20"]),
        ("linear", ["--features", "f.h5"]),
        ("abmil", ["--features", "f.h5"]),
        ("finetune", ["--checkpoint", "c.pth", "--data", "cells", "--mode", "head"]),
    ],
)
def test_the_job_runs_the_command(slurm, tmp_path, capsys, name, arguments):
    launcher = importlib.import_module(f"dinov2.run.eval.{name}")
    arguments = [*arguments, "--output-dir", str(tmp_path / "out")]
    assert launcher.main(["--partition", "gpu", "--dependency", "afterok:3", *arguments]) == 0
    script = slurm.submitted()
    assert {"#SBATCH --ntasks-per-node=1", "#SBATCH --gpus-per-node=1", "#SBATCH --dependency=afterok:3"} <= set(script)
    task = DelayedSubmission.load(tmp_path / "out" / "submitit" / "7" / "7_submitted.pkl").function
    assert (task.module, task.argv) == (f"dinov2.eval.{name}", arguments)
    assert f"results  {tmp_path / 'out'}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ending:  # what it is to read is not there
        task()
    assert ending.value.code == 2


def test_mistakes_are_found_before_the_job_waits(slurm, capsys, tmp_path):
    knn = importlib.import_module("dinov2.run.eval.knn")
    assert knn.main(["--ngpus", "2", "--features", "f.h5", "--output-dir", str(tmp_path)]) == 2
    assert "--ngpus must be 0 or 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        knn.main(["--features", "f.h5"])
    assert "required: --output-dir" in capsys.readouterr().err
    for name in ("knn", "linear", "abmil"):
        with pytest.raises(SystemExit):
            importlib.import_module(f"dinov2.run.eval.{name}").main(["--output-dir", str(tmp_path)])
        assert "got no cells; give --" in capsys.readouterr().err
    assert slurm.submitted() is None
