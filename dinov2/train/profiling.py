"""`--profile`: what the host and the device do in some steps of a training, as a trace and as a table."""

import gzip
import logging
import platform
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from dinov2.distributed import is_main_process
from dinov2.utils.files import atomic_write

logger = logging.getLogger("dinov2")

WARM_UP = 3  # steps before the first that is recorded: they choose kernels and compile
TRACE_NAME, TABLE_NAME = "trace.json.gz", "table.txt"
N_OPERATORS = 40
# What StepClock.stage calls the parts of a step
STAGES = ("data", "teacher", "student", "backward", "optimizer", "teacher update")


class StepProfile:
    """Records steps of a loop while it is active; with 0 steps, or on other processes than the main one, nothing.

    Steps that are recorded take longer, and numbers stay the same. Files that cannot be written are warned about: the
    training goes on.

    Args:
        folder: of trace.json.gz (for https://ui.perfetto.dev or chrome://tracing) and table.txt.
        n_steps: how many to record, from the fourth one on.
        device: where the steps are computed.
    """

    def __init__(self, folder: Path, n_steps: int, device: torch.device) -> None:
        self.folder, self.n_steps, self.device = folder, n_steps, device
        self._n_seen = 0
        self._profiler: profile | None = None

    def __enter__(self) -> "StepProfile":
        if self.n_steps and is_main_process():
            activities = [ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            phases = schedule(wait=WARM_UP - 1, warmup=1, active=self.n_steps, repeat=1)
            self._profiler = profile(activities=activities, schedule=phases, acc_events=True)
            self._profiler.start()
            logger.info("profile: records %d steps after %d others", self.n_steps, WARM_UP)
        return self

    def step(self) -> None:
        """A step of the loop is over."""
        if self._profiler is None:
            return
        self._n_seen += 1
        self._profiler.step()
        if self._n_seen == WARM_UP + self.n_steps:
            self._finish()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profiler is not None:
            self._finish()

    def _finish(self) -> None:
        assert self._profiler is not None, "nothing is recorded"
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        n_recorded = self._n_seen - WARM_UP
        if n_recorded < self.n_steps:
            logger.warning(
                "profile: the training ended after %d steps, so %d of %d were recorded",
                *(self._n_seen, max(0, n_recorded), self.n_steps),
            )
        if n_recorded < 1:
            return
        try:
            _write_trace(profiler, self.folder / TRACE_NAME)
            with atomic_write(self.folder / TABLE_NAME, "w") as file:
                file.write(table_of(profiler, n_recorded, self.device))
        except OSError as error:
            logger.warning("profile: %s could not be written: %s", self.folder, error)
            return
        logger.info(
            "profile of %d steps: %s says where the time goes, %s opens at https://ui.perfetto.dev",
            *(n_recorded, self.folder / TABLE_NAME, TRACE_NAME),
        )


def table_of(profiler: profile, n_steps: int, device: torch.device) -> str:
    """Seconds a step of each stage, and the operators that take longest, by the time of the device that computes."""
    events = profiler.key_averages()
    is_cuda = device.type == "cuda"
    stages = {event.key: event for event in events if event.key in STAGES}
    lines = [
        f"{n_steps} steps on {torch.cuda.get_device_name(device) if is_cuda else platform.processor() or 'a CPU'}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}",
        "",
        "stage            host, s a step" + ("   device, s a step" if is_cuda else ""),
    ]
    for name in (name for name in STAGES if name in stages):
        line = f"{name:<16} {stages[name].cpu_time_total / 1e6 / n_steps:14.4f}"
        if is_cuda:
            line += f"   {stages[name].device_time_total / 1e6 / n_steps:16.4f}"
        lines.append(line)
    lines.append("(backward's operators run in a thread of their own, beside the stage that waits for them)")
    by = "self_device_time_total" if is_cuda else "self_cpu_time_total"
    return "\n".join([*lines, "", events.table(sort_by=by, row_limit=N_OPERATORS, max_name_column_width=60)]) + "\n"


def _write_trace(profiler: profile, path: Path) -> None:
    # The profiler writes to a name that it is given; only a whole trace takes the place of the last one
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / "trace.json"
        profiler.export_chrome_trace(str(plain))
        with atomic_write(path) as file, gzip.GzipFile(fileobj=file, mode="wb") as packed, open(plain, "rb") as trace:
            shutil.copyfileobj(trace, packed)
