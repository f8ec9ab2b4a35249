"""The sbatch examples without a cluster: what they start, and when they queue the job again."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "scripts").glob("*.sbatch"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_exit_code_75_queues_the_job_again(slurm, script, code, monkeypatch):
    slurm.program("srun", f'#!/bin/sh\necho $SRUN_CPUS_PER_TASK "$@"\nexit {code}\n')
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    run = subprocess.run(["bash", script, "--name", "two words"], capture_output=True, text=True)
    assert run.returncode == code
    assert run.stdout.startswith("3 --kill-on-bad-exit=0 python -m dinov2.train.train --name two words\n")
    assert slurm.asked() == (["requeue 7"] if code == 75 else [])


def test_the_examples_differ_in_options_alone():
    """In options and in what they say about networks between nodes."""
    one, many = (
        [line for line in path.read_text().splitlines() if not line.startswith("#")]
        for path in (ROOT / "scripts" / "train_one_node.sbatch", ROOT / "scripts" / "train_many_nodes.sbatch")
    )
    assert [line for line in one if line] == [line for line in many if line]


def test_the_script_of_the_test_cluster_parses():
    subprocess.run(["bash", "-n", ROOT / "tests" / "slurm" / "cluster.sh"], check=True)
