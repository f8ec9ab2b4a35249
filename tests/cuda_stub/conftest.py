"""A pretend GPU: PyTorch's CUDA build on a CUDA runtime, driver, cuBLAS and NCCL that only count.

Exact: which exception is raised, which kernel is chosen, shapes and types, and the numbers of launches, products,
copies, waits, collectives and bytes. Missing: results (tensors hold garbage), time on the device, cuDNN.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
TIMEOUT_SECONDS = 300


def obstacle() -> str | None:
    """Return what this machine lacks for the pretend GPU, or None."""
    if sys.platform != "linux" or torch.version.cuda is None:
        return "this torch is not a CUDA build for Linux"
    missing = [tool for tool in ("gcc", "nm") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} missing; the packages gcc and binutils have them"
    site = Path(torch.__file__).parents[1]
    headers = ["nvidia/cuda_runtime/include/cuda_runtime_api.h", "triton/backends/nvidia/include/cuda.h"]
    missing = [header for header in headers if not (site / header).is_file()]
    return f"{' and '.join(missing)} missing in {site}; torch's wheels from PyPI have them" if missing else None


@pytest.fixture(scope="session")
def stub_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the pretend GPU; skip without a compiler or a CUDA build of torch."""
    if reason := obstacle():
        pytest.skip(f"the pretend GPU cannot be built: {reason}")
    folder = tmp_path_factory.mktemp("cuda_stub")
    subprocess.run(["bash", str(HERE / "build.sh"), sys.executable, str(folder)], check=True, timeout=TIMEOUT_SECONDS)
    return folder


@pytest.fixture(scope="session")
def run_on_stub(stub_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return a function that runs a Python file on the pretend GPU and returns what it gave to `stub.report`.

    With `ranks`, torchrun starts so many processes with a device each. The result is the list of their reports, which
    are dicts; their `nccl_log` is the list of a rank's collectives.
    """
    compiled = tmp_path_factory.mktemp("compiled")

    def run(
        script: Path | str,
        *arguments: str,
        capability: str = "9.0",
        devices: int = 1,
        memory_gb: float = 80,
        ranks: int | None = None,
        environment: dict[str, str] | None = None,
    ) -> Any:
        folder = tmp_path_factory.mktemp("report")
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
        command = ["bash", HERE / "run.sh", stub_folder, sys.executable, *launcher, HERE / script, *arguments]
        settings = {
            **{"STUB_CC": capability, "STUB_NDEV": str(max(devices, ranks or 1)), "STUB_MEM_GB": str(memory_gb)},
            **{"STUB_REPORT": str(folder), "STUB_NCCL_LOG": str(folder / "nccl")},
            **{"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
            **{"TRITON_CACHE_DIR": str(compiled), "TORCHINDUCTOR_CACHE_DIR": str(compiled)},
            **(environment or {}),
        }
        done = subprocess.run(
            [str(word) for word in command],
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{script} failed:\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
        reports = [json.loads((folder / str(rank)).read_text()) for rank in range(ranks or 1)]
        if ranks is None:
            return reports[0]
        for rank, report in enumerate(reports):
            log = folder / f"nccl.rank{rank}"
            report["nccl_log"] = log.read_text().splitlines() if log.is_file() else []
        return reports

    return run


@pytest.fixture(scope="session")
def run_commands_on_stub(run_on_stub: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that runs {case: command and arguments} by runs.py, in one process (or one for each rank)."""
    return lambda cases, **settings: run_on_stub("runs.py", json.dumps(cases), **settings)
