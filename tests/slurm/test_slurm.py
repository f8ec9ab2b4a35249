"""The launchers and the sbatch examples on a real cluster, and what clusters do to jobs."""

import json
import re

import numpy as np
import pytest

from dinov2.eval.features import read_features
from dinov2.run.eval import extract_features, knn
from dinov2.run.train import train

TWO_NODES = ["--nodes", "2", "--ngpus", "1"]  # one process each; the cluster counts GPUs that nobody uses
SMALL = ["--gpus-per-node=1", "--ntasks-per-node=1", "--cpus-per-task=1"]  # for sbatch


@pytest.fixture(scope="module")
def unbroken(cluster, training, tmp_path_factory, readme_command):
    """The README's run, with a small network and one GPU of a node, that nothing disturbs."""
    command = readme_command("dinov2/run/train/train.py")
    smaller = ["--ngpus", "1", "--cpus-per-task", "1", "--output-dir", tmp_path_factory.mktemp("unbroken"), *training]
    return cluster.job_of(cluster.run(*command, *smaller, "--wait"))


def test_two_nodes_train_as_one_process_does(cluster, unbroken, training, tmp_path):
    assert unbroken.wait() == ["COMPLETED"]
    cluster.run("python", "dinov2/train/train.py", "--output-dir", tmp_path, "--name", "alone", *training)
    np.testing.assert_allclose(unbroken.losses(), cluster.losses_in(tmp_path / "alone"), rtol=1e-4)


def test_a_requeued_job_continues(cluster, unbroken, training, tmp_path):
    job = cluster.launch(train, *TWO_NODES, "--no-resume", "--output-dir", tmp_path, *training)
    job.wait_for_iteration(20)
    cluster.run("scontrol", "requeue", job.number)
    assert job.wait() == ["REQUEUED", "COMPLETED"]
    assert re.search(r"resuming .* after iteration \d\d", job.text())
    np.testing.assert_allclose(job.losses(), unbroken.losses(), rtol=1e-6)


def test_a_job_at_its_time_limit_queues_itself_again(cluster, unbroken, training, tmp_path):
    job = cluster.launch(train, *TWO_NODES, "--output-dir", tmp_path, *training)
    job.wait_for_iteration(20)
    cluster.run("scancel", "--signal=USR2", job.number)  # as --signal has SLURM do before the time limit
    assert job.wait() == ["REQUEUED", "COMPLETED"]
    assert job.results == tmp_path / f"custom_{job.number}"
    np.testing.assert_allclose(job.losses(), unbroken.losses(), rtol=1e-6)


@pytest.mark.slow
def test_the_time_limit_itself(cluster, training, tmp_path):
    """The limit is a minute, of which SLURM, which looks every half minute, leaves the job less than a half."""
    options = ["--nodes", "2", "--ngpus", "0", "--timeout", "1", "--signal-delay", "10"]
    longer = ["optim.epochs=500", "train.saveckp_freq=1000"]
    job = cluster.launch(train, *options, "--output-dir", tmp_path, *training, *longer)
    job.wait_until(lambda: "REQUEUED" in job.states(), "the signal")
    n_done = len(job.rows())
    assert n_done > 0
    job.wait_for_iteration(n_done + 1)
    assert [row["iteration"] for row in job.rows()][: n_done + 1] == list(range(n_done + 1))
    cluster.run("scancel", job.number)
    assert job.wait()[-1] == "CANCELLED"


@pytest.mark.slow
def test_a_preempted_job_makes_way_and_returns(cluster, unbroken, training, tmp_path):
    """Its partition gives notice (GraceTime); SLURM takes a job that then just ends for a failed one."""
    job = cluster.launch(train, *TWO_NODES, "--partition", "spare", "--output-dir", tmp_path, *training)
    job.wait_for_iteration(20)
    urgent = ["--partition=gpu", "--nodes=2", "--exclusive", f"--output={tmp_path / 'urgent.log'}", "--wrap=sleep 5"]
    cluster.run("sbatch", *urgent)
    assert job.wait() == ["REQUEUED", "COMPLETED"]
    np.testing.assert_allclose(job.losses(), unbroken.losses(), rtol=1e-6)


def test_a_cancelled_job_stays_away(cluster, training, tmp_path):
    job = cluster.launch(train, *TWO_NODES, "--output-dir", tmp_path, *training, "optim.epochs=1000")
    job.wait_for_iteration(1)
    cluster.run("scancel", job.number)
    assert job.wait() == ["CANCELLED"]


def test_evaluations_wait_for_what_they_need(cluster, unbroken, cells, tmp_path):
    extraction = cluster.launch(
        *(extract_features, "--ngpus", "0", "--dependency", f"afterok:{unbroken.number}"),
        *("--checkpoint", unbroken.results, "--data", cells / "cells", "--num-workers", "0", "--output-dir", tmp_path),
    )
    judgement = cluster.launch(
        *(knn, "--ngpus", "0", "--dependency", f"afterok:{extraction.number}"),
        *("--features", tmp_path / "features.h5", "--k", "1", "--output-dir", tmp_path / "knn"),
    )
    assert (extraction.wait(), judgement.wait()) == (["COMPLETED"], ["COMPLETED"])
    assert read_features(tmp_path / "features.h5").features.shape == (14, 32)
    assert "knn_1" in json.loads((tmp_path / "knn" / "results.json").read_text())["results"]["model"]


def test_the_script_for_one_node_queues_itself_again(cluster, unbroken, training, tmp_path):
    job = cluster.sbatch(
        *("--gpus-per-node=2", "--ntasks-per-node=2", "--cpus-per-task=1", "scripts/train_one_node.sbatch"),
        *("--output-dir", tmp_path, *training),
        results=tmp_path / "custom_%j",
    )
    job.wait_for_iteration(20)
    cluster.run("scancel", "--signal=USR1", job.number)
    assert job.wait() == ["REQUEUED", "COMPLETED"]
    np.testing.assert_allclose(job.losses(), unbroken.losses(), rtol=1e-6)


def test_the_script_for_many_nodes(cluster, unbroken, training, tmp_path, readme_command):
    """The README's command, with fewer nodes and the small network."""
    script = "scripts/train_many_nodes.sbatch"
    command = readme_command(script)
    options, arguments = command[1 : command.index(script)], command[command.index(script) :]
    job = cluster.sbatch(
        *(*options, "--nodes=2", *SMALL, *arguments, "--output-dir", tmp_path, "--name", "mine", *training),
        results=tmp_path / "mine",
    )
    assert job.wait() == ["COMPLETED"]
    np.testing.assert_allclose(job.losses(), unbroken.losses(), rtol=1e-6)


def test_a_failing_job_is_failed_and_says_why(cluster, training, tmp_path):
    (tmp_path / "such.png").write_text("no image")
    (tmp_path / "all.txt").write_text("such.png\n")
    dataset = f"train.dataset_path=HemaStandardDataset:root={tmp_path}:shuffle=1"
    job = cluster.launch(train, *TWO_NODES, "--output-dir", tmp_path, *training, dataset)
    assert job.wait() == ["FAILED"]
    assert "such.png" in job.text()
