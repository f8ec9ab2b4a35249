"""Runs several train.py commands in one set of processes, for tests: starting processes takes longer than tiny runs.

    python tests/train/run_commands.py <number of processes> commands.json

The processes are forks of one that has imported torch. They do not count FLOP, which takes longer than their steps.

commands.json is a list of {arguments, stop_at (optional), local_world_size (optional), images (optional)}: the run
is asked to stop in step `stop_at`; the processes count as nodes of `local_world_size`; the indices of the images that
each rank takes are written to `images`.<rank>. Exit codes go to commands.json.codes.
"""

import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import torch.multiprocessing

from dinov2 import distributed
from dinov2.train import batches, train
from dinov2.utils.command import StopSignals


class StopIn(StopSignals):
    """As if a signal came in the n-th step."""

    def __init__(self, step: int | None) -> None:
        self.left = step
        super().__init__()

    @property
    def received(self) -> int | None:  # asked once a step
        if self.left is None:
            return None
        self.left -= 1
        return 15 if self.left <= 0 else None

    @received.setter
    def received(self, value: int | None) -> None: ...


class RecordedDataset:
    """A dataset that keeps the indices of the images that were read."""

    def __init__(self, dataset) -> None:
        self.dataset, self.indices = dataset, []

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        self.indices.append(int(index))
        return self.dataset[index]


def recording(make_data_loader, path: Path):
    """The loader (without workers), with a line for the indices of each batch that is taken from it."""

    def make(*, dataset, **settings) -> Iterator:
        recorded = RecordedDataset(dataset)
        for batch in make_data_loader(dataset=recorded, **settings):
            with open(path, "a") as file:
                file.write(json.dumps(recorded.indices) + "\n")
            recorded.indices.clear()
            yield batch

    return make


def run_rank(rank: int, n_processes: int, port: int, path: str) -> None:
    if n_processes > 1:
        os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
        os.environ |= {"WORLD_SIZE": str(n_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    train.count_step_flops = lambda *_, **__: 1
    enable, disable, make_data_loader = distributed.enable, distributed.disable, batches.make_data_loader
    distributed.disable = lambda: None
    codes = []
    for command in json.loads(Path(path).read_text()):
        os.environ["LOCAL_WORLD_SIZE"] = str(command.get("local_world_size", os.environ.get("WORLD_SIZE", 1)))
        if "images" in command:
            record = Path(f"{command['images']}.{os.environ.get('RANK', 0)}")
            batches.make_data_loader = recording(make_data_loader, record)
        codes.append(train.main(command["arguments"], StopIn(command.get("stop_at"))))
        batches.make_data_loader = make_data_loader
        if distributed.is_enabled():
            distributed.enable = lambda *_, **__: None
    if distributed.is_main_process():
        Path(f"{path}.codes").write_text(json.dumps(codes))
    distributed.enable = enable
    disable()


if __name__ == "__main__":
    n_processes = int(sys.argv[1])
    with socket.create_server(("127.0.0.1", 0)) as free:
        arguments = n_processes, free.getsockname()[1], sys.argv[2]
    torch.multiprocessing.start_processes(run_rank, arguments, n_processes, start_method="fork")
