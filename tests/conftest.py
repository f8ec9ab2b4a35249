"""Fixtures that several test files share: recorded upstream numbers, the formulas behind them, real images."""

import gc
import json
import logging
import multiprocessing
import os
import re
import shlex
import zlib
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

GOLDEN = Path(__file__).parent / "golden"


def u01(key: str, n: int) -> np.ndarray:
    """n numbers in [0, 1) that depend on `key` alone (tests/golden/README.md gives the formula)."""
    with np.errstate(over="ignore"):
        z = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z += np.uint64((zlib.crc32(key.encode()) << 32) & 0xFFFFFFFFFFFFFFFF)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) / 2.0**53


def sym(key: str, shape, scale: float, mean: float = 0.0) -> torch.Tensor:
    values = mean + scale * (2 * u01(key, int(np.prod(shape))) - 1)
    return torch.from_numpy(values.astype(np.float32).reshape(shape))


def formula_parameter(prefix: str, name: str, shape) -> torch.Tensor:
    key, last = f"{prefix}/{name}", name.rsplit(".", 1)[-1]
    if last == "gamma":
        return sym(key, shape, 0.25, 0.5)
    if last == "weight_g":
        return sym(key, shape, 0.2, 1.0)
    if last in ("pos_embed", "cls_token", "mask_token", "register_tokens"):
        return sym(key, shape, 0.2)
    if "norm" in name and last == "weight":
        return sym(key, shape, 0.1, 1.0)
    if last == "bias":
        return sym(key, shape, 0.05)
    return sym(key, shape, 1.5 / np.sqrt(np.prod(shape[1:])))


def fill_(module: torch.nn.Module, prefix: str) -> torch.nn.Module:
    """Overwrite every parameter of `module` with the formula's value for its state-dict name."""
    state = module.state_dict()
    for name, value in state.items():
        value.copy_(formula_parameter(prefix, name, tuple(value.shape)))
    return module


def checksum(x: torch.Tensor) -> list[float]:
    x = x.detach().double()
    return [x.sum().item(), x.abs().sum().item(), x.square().sum().item()]


SYSTEM_FOLDERS = ("browser", "cuda_stub", "slurm")
LONG_FILES = (
    *("test_fault_drill.py", "test_many_processes.py", "test_one_device.py", "test_slurm.py", "test_finetuning.py"),
    *("test_evaluation.py", "test_gpu_check.py", "test_readme_commands.py", "test_supervision.py", "test_train.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, mark system tests, and skip tests marked gpu without a CUDA device."""
    items.sort(key=lambda item: item.path.name not in LONG_FILES)
    for item in items:
        if item.path.parent.name in SYSTEM_FOLDERS:
            item.add_marker("system")
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Spare garbage collections the modules: commands that measure memory collect before each step."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _logger_as_before():
    """Commands set up the package's logger; other tests expect the usual one."""
    logger = logging.getLogger("dinov2")
    before = logger.handlers[:], logger.propagate, logger.level
    yield
    logger.handlers[:], logger.propagate, logger.level = before


@pytest.fixture(scope="session")
def forks() -> ForkServerContext:
    """Processes from here are forks of one that has imported torch and the package."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dinov2.train.setup"])
    return context


@pytest.fixture(scope="session")
def formulas() -> SimpleNamespace:
    return SimpleNamespace(u01=u01, sym=sym, fill_=fill_, checksum=checksum, parameter=formula_parameter)


@pytest.fixture(scope="session")
def golden_json() -> dict:
    return json.loads((GOLDEN / "golden.json").read_text())


@pytest.fixture(scope="session")
def golden_arrays() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "golden.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real cell images, which lie beside the project and never in it."""
    folder = Path(os.environ.get("DINOBLOOM_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real cell images are not at {folder} (set DINOBLOOM_TEST_DATA to their folder)")
    return folder


@pytest.fixture(scope="session")
def make_image_list():
    """A folder with `n` small random images and one list that names them; returns the folder."""

    def make(folder: Path, n: int = 8, size: int = 28) -> Path:
        (folder / "images").mkdir(parents=True)
        rng = np.random.default_rng(0)
        names = [f"images/{i:03d}.png" for i in range(n)]
        for name in names:
            Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / name)
        (folder / "all.txt").write_text("\n".join(names) + "\n")
        return folder

    return make


@pytest.fixture
def image_list(tmp_path, make_image_list):
    """The same in a folder of the test's own."""
    return lambda n=8, size=28, folder=tmp_path / "lists": make_image_list(folder, n, size)


@pytest.fixture(scope="session")
def readme_command():
    """Returns the words of the README's one command that has the word `program`."""
    text = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")
    lines = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ").splitlines()

    def find(program: str) -> list[str]:
        (words,) = [words for line in lines if program in (words := shlex.split(line, comments=True))]
        return words

    return find
