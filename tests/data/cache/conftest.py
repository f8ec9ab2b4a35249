"""A small dataset on disk, and builders in processes of their own that can be killed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2.data.datasets.decode import UnreadableImageError

SIZE = 16  # pixels
ROUND = 4  # images between two writes of entries

# Imports once, then forks a builder for each line that it reads: `{"log": ..., "paths": ..., "folder": ...}`
BUILDERS = """
import json, logging, os, signal, sys, time
from pathlib import Path
from dinov2.data.datasets.decode import UnreadableImageError
from dinov2.data import cache

class Images:
    def __init__(self, paths, log, seconds):
        self.paths, self.log, self.seconds = paths, log, seconds
    def __len__(self):
        return len(self.paths)
    def path(self, i):
        return self.paths[i]
    def stamp(self, i):
        status = os.stat(self.paths[i])
        return status.st_size, status.st_mtime_ns
    def read(self, i):
        with open(self.log, "a") as log:
            log.write(f"{os.getpid()} {i}\\n")
        time.sleep(self.seconds)
        return Path(self.paths[i]).read_bytes()

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def build(order):
    logging.basicConfig(filename=f"{order['log']}.{os.getpid()}.log", level=logging.INFO)
    cache.IMAGES_PER_JOB, cache.IMAGES_PER_ROUND, cache.WAIT_SECONDS = 1, order["round"], 0.1
    packed = cache.PackedCache(order["folder"], Images(order["paths"], order["log"], order["seconds"]), order["size"])
    pack, sync = packed._pack, os.fsync
    if order["die_in"] == "fsync":
        os.fsync = die
    elif order["die_in"] == "entries":
        os.fsync = lambda file: (sync(file), die())
    elif order["die_in"] == "release":
        packed._pack = lambda *arguments: (next(pack(*arguments)), die())
    summary = packed.build(n_workers=0)
    Path(order["log"] + f".{os.getpid()}").write_text(json.dumps([summary.n_there, summary.n_packed]))

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        build(json.loads(line))
        os._exit(0)
    print(pid, flush=True)
"""


class Folder:
    """Images of a folder, as a data set has them."""

    def __init__(self, paths) -> None:
        self.paths = [str(path) for path in paths]
        self.n_reads = 0

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, i: int) -> str:
        return self.paths[i]

    def read(self, i: int) -> bytes:
        self.n_reads += 1
        try:
            return Path(self.paths[i]).read_bytes()
        except OSError as error:
            raise UnreadableImageError(self.paths[i], error.strerror) from error

    def stamp(self, i: int) -> tuple[int, int]:
        status = os.stat(self.paths[i])
        return status.st_size, status.st_mtime_ns


class Builder:
    """A process that builds the cache of some images and then ends."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid, self.log = pid, log

    def is_alive(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def says(self, text: str) -> bool:
        """Whether its log has this."""
        log = Path(f"{self.log}.{self.pid}.log")
        return log.exists() and text in log.read_text()

    def end(self) -> list[int]:
        """Wait for its end; how many images were there, and how many it packed."""
        wait_until(lambda: not self.is_alive())
        return json.loads(Path(f"{self.log}.{self.pid}").read_text())


def wait_until(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def _small_rounds(monkeypatch):
    monkeypatch.setattr("dinov2.data.cache.IMAGES_PER_JOB", 1)
    monkeypatch.setattr("dinov2.data.cache.IMAGES_PER_ROUND", ROUND)
    monkeypatch.setattr("dinov2.data.cache.WAIT_SECONDS", 0.1)


@pytest.fixture(scope="session")
def make_image():
    def make(path: Path, seed: int, size: tuple[int, int] = (20, 26)) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(seed)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
        return path

    return make


@pytest.fixture
def folder(tmp_path, make_image):
    """Makes a data set of `n` images."""
    return lambda n=10: Folder(make_image(tmp_path / "images" / f"{i:02d}.png", i) for i in range(n))


@pytest.fixture(scope="module")
def _fork_builder():
    with subprocess.Popen(
        [sys.executable, "-c", BUILDERS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:

        def fork(order: dict) -> int:
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        yield fork
        process.stdin.close()


@pytest.fixture
def start_builder(tmp_path, _fork_builder):
    """Starts a builder; `seconds` is what it takes to read an image, `die_in` where it kills itself."""

    def start(images: Folder, seconds: float = 0.0, die_in: str = "") -> Builder:
        log = tmp_path / "reads.log"
        order = {"paths": images.paths, "log": str(log), "folder": str(tmp_path / "cache")}
        return Builder(
            _fork_builder({**order, "seconds": seconds, "die_in": die_in, "size": SIZE, "round": ROUND}), log
        )

    return start


@pytest.fixture(scope="session")
def until():
    return wait_until
