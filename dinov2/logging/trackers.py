"""Trackers of a run's numbers besides its JSON lines: TensorBoard if installed, W&B on request."""

import logging
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.distributed import is_main_process
from dinov2.utils.files import atomic_write

logger = logging.getLogger("dinov2")


class Tracker:
    """Tracker of a run's numbers and, if it can show them, images."""

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        raise NotImplementedError

    def log_images(self, images: Mapping[str, np.ndarray], iteration: int) -> None:
        """Show images, uint8 [height, width, 3], by name."""

    def close(self) -> None:
        raise NotImplementedError


class TensorBoard(Tracker):
    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start)

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)

    def log_images(self, images: Mapping[str, np.ndarray], iteration: int) -> None:
        for name, image in images.items():
            self._writer.add_image(f"views/{name}", image, iteration, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases(Tracker):
    def __init__(self, settings: Any, run_folder: Path, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError("train.wandb.enabled is true but wandb is not installed: pip install wandb") from error
        # one id for all parts of a resumed run, and another one for each other run, whatever its name
        id_file = run_folder / "wandb_id.txt"
        if not id_file.is_file():
            with atomic_write(id_file, "w") as file:
                file.write(uuid.uuid4().hex)
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            mode=settings.mode,
            name=run_folder.name,
            id=id_file.read_text(encoding="utf-8"),
            dir=str(run_folder),
            config=config,
            resume="allow",
        )

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        self._run.log(dict(values), step=iteration)

    def close(self) -> None:
        self._run.finish()


def open_trackers(train: Any, run_folder: Path, start: int, config: dict[str, Any]) -> list[Tracker]:
    """Open the trackers of the config's section `train`, on the main process; TensorBoard only if it is installed."""
    trackers: list[Tracker] = []
    if not is_main_process():
        return trackers
    if train.tensorboard:
        try:
            trackers.append(TensorBoard(run_folder / "tensorboard", start))
        except ImportError:
            logger.info("TensorBoard is not installed; training_metrics.json has the same numbers")
    if train.wandb.enabled:
        trackers.append(WeightsAndBiases(train.wandb, run_folder, config))
    return trackers
