"""A real SLURM cluster of two nodes (cluster.sh), and training small enough for it."""

import contextlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
CLUSTER = Path(__file__).with_name("cluster.sh")
PATIENCE_SECONDS = 180  # for whatever a job does; CI may have two slow cores
N_ITERATIONS = 60
UNFINISHED = {"PENDING", "RUNNING", "REQUEUED", "COMPLETING", "RESIZING"}

# Without KoLeo, whose gradient is so steep for neighbours as close as these that rounding grows from step to step
TINY = [
    *runpy.run_path(str(ROOT / "tests" / "train" / "conftest.py"))["TINY"],
    *("dino.koleo_loss_weight=0", "train.OFFICIAL_EPOCH_LENGTH=10", "optim.epochs=6", "train.saveckp_freq=3"),
    *("train.batch_size_per_gpu=8", "train.global_batch_size=8"),
]


class Cluster:
    """Commands, with this cluster as their SLURM."""

    def __init__(self, folder: Path) -> None:
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        self.environment = {
            **outside,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def run(self, *command: str | Path) -> str:
        """Run a command in the repository; returns what it prints on stdout."""
        run = subprocess.run(command, env=self.environment, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, f"{command} ended with {run.returncode}:\n{run.stdout}\n{run.stderr}"
        return run.stdout

    def launch(self, launcher: ModuleType, *arguments: str | Path) -> "Job":
        """Run a launcher of dinov2/run in this process, which has PyTorch loaded already."""
        told = io.StringIO()
        with mock.patch.dict(os.environ, self.environment, clear=True), contextlib.redirect_stdout(told):
            assert launcher.main([*map(str, arguments)]) == 0
        return self.job_of(told.getvalue())

    def job_of(self, told: str) -> "Job":
        """The job that a launcher told of."""
        (number,) = re.findall(r"^job (\d+):", told, re.MULTILINE)
        places = dict(re.findall(r"^  (results|log) +(\S+)", told, re.MULTILINE))
        return Job(self, number, Path(places["results"]), Path(places["log"]))

    def sbatch(self, *arguments: str | Path, results: Path) -> "Job":
        """Run sbatch; `results` and the log have %j for the job's number."""
        log = results.with_name("%j.log")
        number = self.run("sbatch", "--parsable", f"--output={log}", *arguments).strip()
        return Job(self, number, *(Path(str(path).replace("%j", number)) for path in (results, log)))

    def losses_in(self, folder: Path) -> np.ndarray:
        return losses_in(folder)


class Job:
    """A job, and the run in its folder of results."""

    def __init__(self, cluster: Cluster, number: str, results: Path, log: Path) -> None:
        self.cluster, self.number, self.results, self.log = cluster, number, results, log

    def states(self) -> list[str]:
        """The states of its parts in the accounting; a part ends where the job was queued again."""
        columns = ["--duplicates", "--allocations", "--noheader", "--parsable2", "--format=State"]
        return [line.split()[0] for line in self.cluster.run("sacct", *columns, "--jobs", self.number).splitlines()]

    def has_ended(self) -> bool:
        states = self.states()
        return bool(states) and states[-1] not in UNFINISHED

    def wait_until(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            too_late = self.has_ended() and not condition()
            if too_late or time.monotonic() > deadline:
                raise TimeoutError(
                    f"job {self.number} {self.states()}: waited in vain for {what}; its log:\n{self.text()[-3000:]}"
                )
            time.sleep(0.2)

    def wait(self) -> list[str]:
        """Its states once it has ended."""
        self.wait_until(self.has_ended, "the end")
        return self.states()

    def wait_for_iteration(self, n: int) -> None:
        self.wait_until(lambda: len(self.rows()) >= n, f"iteration {n}")

    def text(self) -> str:
        return self.log.read_text() if self.log.is_file() else "(no log)"

    def rows(self) -> list[dict]:
        return rows_in(self.results)

    def losses(self) -> np.ndarray:
        return losses_in(self.results)


def rows_in(folder: Path) -> list[dict]:
    file = folder / "training_metrics.json"
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be only half written


def losses_in(folder: Path) -> np.ndarray:
    """[N_ITERATIONS, 2] loss and gradient norm of each iteration of a run, none of them missing or there twice."""
    rows = rows_in(folder)
    assert [row["iteration"] for row in rows] == list(range(N_ITERATIONS))
    return np.array([[row["total_loss"], row["grad_norm_backbone"]] for row in rows])


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    missing = subprocess.run(["bash", CLUSTER, "missing"], capture_output=True, text=True)
    if missing.returncode != 0:
        pytest.skip(f"no SLURM cluster here: {missing.stdout.strip()}")
    folder = tmp_path_factory.mktemp("slurm")
    try:
        with (folder / "start.log").open("w") as log:  # not a pipe: the daemons would keep it open
            start = subprocess.run(["bash", CLUSTER, "start", folder], stdout=log, stderr=log, timeout=240)
        assert start.returncode == 0, f"{(folder / 'start.log').read_text()}; more in {folder}/log"
        yield Cluster(folder)
    finally:
        subprocess.run(["bash", CLUSTER, "stop", folder], check=True, timeout=120)


@pytest.fixture(scope="session")
def cells(tmp_path_factory) -> Path:
    """Folder with labelled cells (two folders of random images below cells/), which lists/all.txt names too."""
    folder = tmp_path_factory.mktemp("cells")
    rng = np.random.default_rng(0)
    for i in range(14):
        file = folder / "cells" / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(file)
    (folder / "lists").mkdir()
    (folder / "lists" / "all.txt").write_text("\n".join(map(str, sorted(folder.glob("cells/*/*.png")))))
    return folder


@pytest.fixture(scope="session")
def training(cells) -> list[str]:
    """Arguments of train.py: a run of N_ITERATIONS with DinoBloom's recipe, shrunk."""
    config = ["--config-file", str(ROOT / "dinov2" / "configs" / "train" / "custom.yaml")]
    return [*config, f"train.dataset_path=HemaStandardDataset:root={cells / 'lists'}:shuffle=1", *TINY]
