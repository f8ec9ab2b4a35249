"""Run the project's commands on the pretend GPU: runs.py '{"<case>": ["<command>", "<argument>", ...], ...}'.

`{folder}` in an argument is a folder with images in a folder for each class (`cells`) and a tiny network (`tiny.pth`).
Arguments of `train` change a tiny version of DinoBloom's recipe. A case's report has its exit code, the errors in its
log, the waits for the device and the peak memory; for `train` also the counters of each step. Evaluations compute real
values. With `local_world_size=<n>` as an argument the ranks count as nodes of n; with `memory_of_rank_1=<GB>` rank 1
has less memory.
"""

import json
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import dinov2  # noqa: F401  # before torch

# isort: split
import numpy as np
import stub
import torch
from PIL import Image

from dinov2 import distributed
from dinov2.configs import CONFIG_FOLDER
from dinov2.eval import extract_features, finetune, knn, linear
from dinov2.eval.solvers import finetuning
from dinov2.models import architecture, build_backbone
from dinov2.train import train
from dinov2.train.batches import TrainBatches
from dinov2.train.evaluation import TeacherEvaluation
from dinov2.train.optimizer import StepGuard

EVALUATIONS = {"extract_features": extract_features, "knn": knn, "linear": linear}
N_STEPS = 5
TINY = [
    *("student.arch=vit_small", "student.embed_dim=128", "student.depth=2", "student.num_heads=2"),
    *("crops.global_crops_size=56", "crops.local_crops_size=28", "student.pretrained_weights=null"),
    *("dino.head_n_prototypes=4096", "dino.head_hidden_dim=64", "dino.head_bottleneck_dim=64"),
    *("ibot.head_n_prototypes=4096", "ibot.head_hidden_dim=64", "ibot.head_bottleneck_dim=64"),
    *("train.batch_size_per_gpu=8", "train.num_workers=0", "train.log_period=100", "train.tensorboard=false"),
    *(f"train.OFFICIAL_EPOCH_LENGTH={N_STEPS}", "optim.epochs=1", "optim.warmup_epochs=0", "train.views=0"),
    *("teacher.warmup_teacher_temp_epochs=0", "evaluation.eval_period_iterations=0"),
]


def write_inputs(folder: Path, n: int = 16) -> None:
    """Write `cells`, a folder of images for each of two classes, their list all.txt, and tiny.pth."""
    for i in range(n):
        path = folder / "cells" / f"class_{i % 2}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
        with open(folder / "all.txt", "a") as file:
            file.write(f"{path}\n")
    tiny = build_backbone({"arch": "vit_small", "patch_size": 14, "img_size": 56, "depth": 2})
    state = {f"backbone.{name}": value for name, value in tiny.state_dict().items()}
    torch.save({"teacher": state, "architecture": architecture(tiny)}, folder / "tiny.pth")


class Errors(logging.Filter):
    """Keeps the messages of errors; a filter, since commands replace the logger's handlers."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            self.messages.append(record.getMessage() + (traceback.format_exc() if record.exc_info else ""))
        return True


class Steps:
    """Records the counters of each training step."""

    def __init__(self, waits: dict[str, int]) -> None:
        self.waits, self.counts = waits, list[dict[str, Any]]()
        self.object_collectives = 0

    def stream(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Pass batches on; a step ends when the loop asks for the next one."""
        while True:
            self.waits.clear()
            stub.reset()
            self.object_collectives = 0
            yield next(batches)
            self._end()

    def _end(self) -> None:
        kernels = stub.kernels()
        counts = {
            **stub.counters(),
            **stub.collectives(),
            "kernels": sum(kernels.values()),
            "argmax_kernels": sum(n for name, n in kernels.items() if "ArgMax" in name),
            "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
            "object_collectives": self.object_collectives,
            "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        }
        self.counts.append({**counts, "flops": stub.matmul_flops(), "waits": dict(self.waits)})

    def count_objects(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.object_collectives += 1
            return collective(*args, **kwargs)

        return counted


def with_values(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        with stub.RealValues():
            return function(*args)

    return run


def run_train(arguments: list[str], folder: Path, steps: Steps) -> int:
    output = tempfile.mkdtemp(dir=folder) if distributed.get_rank() == 0 else str(folder)
    dataset = f"train.dataset_path=HemaStandardDataset:root={folder}:shuffle=1"
    recipe = str(CONFIG_FOLDER / "train" / "custom.yaml")
    starting_at, dist = TrainBatches.starting_at, torch.distributed
    with (
        mock.patch.object(TrainBatches, "starting_at", lambda *args: steps.stream(starting_at(*args))),
        mock.patch.object(StepGuard, "is_stuck", return_value=False),  # it would count garbage
        mock.patch.object(TeacherEvaluation, "evaluate", with_values(TeacherEvaluation.evaluate)),
        mock.patch.object(dist, "all_gather_object", steps.count_objects(dist.all_gather_object)),
        mock.patch.object(dist, "broadcast_object_list", steps.count_objects(dist.broadcast_object_list)),
    ):
        return train.main(["--config-file", recipe, "--output-dir", output, dataset, *TINY, *arguments])


def run_finetune(arguments: list[str]) -> None:
    # torch.save reads the memory of a device, which has no values here
    with mock.patch.object(finetuning._Training, "save"):
        finetune.main(arguments)


def take_environment(arguments: list[str]) -> list[str]:
    """Set the environment that arguments ask for, and return the other arguments."""
    given = dict(
        word.split("=", 1) for word in arguments if word.startswith(("local_world_size=", "memory_of_rank_1="))
    )
    os.environ["LOCAL_WORLD_SIZE"] = given.get("local_world_size", os.environ.get("WORLD_SIZE", "1"))
    if "memory_of_rank_1" in given and os.environ.get("RANK") == "1":
        os.environ["STUB_MEM_GB"] = given["memory_of_rank_1"]
    return [word for word in arguments if word.split("=")[0] not in given]


def run_case(command: str, arguments: list[str], folder: Path) -> dict[str, Any]:
    arguments = take_environment(arguments)
    errors, logger = Errors(), logging.getLogger("dinov2")
    logger.addFilter(errors)
    torch.cuda.reset_peak_memory_stats()
    with stub.host_waits() as waits:
        steps = Steps(waits)
        commands = {
            "train": lambda arguments: run_train(arguments, folder, steps),
            "finetune": with_values(run_finetune),
            **{name: with_values(module.main) for name, module in EVALUATIONS.items()},
        }
        try:
            code = commands[command](arguments) or 0
        except Exception:  # a case that fails must not hide the others
            code = 1
            errors.messages.append(traceback.format_exc())
    logger.removeFilter(errors)
    return {
        "exit_code": code,
        "errors": errors.messages,
        "steps": steps.counts,
        "waits": dict(waits),
        "peak": torch.cuda.max_memory_allocated(),
        "device": torch.cuda.current_device(),
    }


def main(cases: dict[str, list[str]]) -> None:
    reports, disable = {}, distributed.disable
    with tempfile.TemporaryDirectory() as scratch, mock.patch.object(distributed, "disable"):
        folder = Path(scratch)
        write_inputs(folder)
        for name, (command, *arguments) in cases.items():
            words = [word.replace("{folder}", scratch) for word in arguments]
            reports[name] = run_case(command, words, folder)
            if distributed.is_enabled():  # the next case uses the same processes
                distributed.enable = lambda *_, **__: None
    disable()
    stub.report(reports)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
