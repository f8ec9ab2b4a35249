"""Trackers of a run's numbers, on request: TensorBoard, Weights & Biases and MLflow."""

import logging
import os
import re
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.distributed import is_main_process
from dinov2.utils.files import atomic_write, user_path

logger = logging.getLogger("dinov2")

# MLflow's limits: metrics and parameters of a call, letters of a parameter
MLFLOW_METRICS, MLFLOW_PARAMETERS, MLFLOW_LETTERS = 1000, 100, 500
# unless the user set them
_MLFLOW_ENVIRONMENT = {
    "MLFLOW_ALLOW_FILE_STORE": "true",  # since release 3, folders are refused without it
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # by default a silent server would hold up training for a quarter of an hour
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
}
DROPPED = "%s gets no more numbers of this part of the run (%s); training_metrics.json has them"


class Tracker(ABC):
    """Tracker of a run's numbers and, if it can show them, images."""

    @abstractmethod
    def log(self, values: Mapping[str, float], iteration: int) -> None:
        """Log the numbers of one iteration."""

    def log_rows(self, rows: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Log (iteration, values) of several iterations; a tracker for which fewer calls are faster overrides this."""
        for iteration, values in rows:
            self.log(values, iteration)

    def log_images(self, images: Mapping[str, np.ndarray], iteration: int) -> None:  # noqa: B027
        """Log images {name: uint8 [height, width, 3]}; a tracker that can show images overrides this."""

    @abstractmethod
    def close(self) -> None:
        """Finish this part of the run."""


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
            raise ValueError("train.wandb.enabled is true but wandb is not installed: pip install wandb") from error
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


class MLflow(Tracker):
    """A run of an MLflow server, or of a folder; the same one after a resume.

    ConnectionError: the server does not answer or refuses.
    """

    def __init__(self, settings: Any, run_folder: Path, config: dict[str, Any]) -> None:
        for name, value in _MLFLOW_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            from mlflow import MlflowClient
            from mlflow.entities import Metric, Param
        except ImportError as error:
            raise ValueError(
                "train.mlflow.enabled is true but MLflow is not installed: pip install mlflow-skinny"
            ) from error
        self._metric = Metric
        place = settings.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or str(run_folder / "mlruns")
        is_address = "://" in place or place.startswith("databricks")
        with self._errors_translated(of_settings=True):
            self._client = MlflowClient(place if is_address else user_path(place).absolute().as_uri())
            self._id = self._continue(run_folder / "mlflow_id.txt")
            if not self._id:
                self._id = self._start(settings.experiment, run_folder)
                params = [Param(key, value[:MLFLOW_LETTERS]) for key, value in _flattened(config)]
                for i in range(0, len(params), MLFLOW_PARAMETERS):
                    self._client.log_batch(self._id, params=params[i : i + MLFLOW_PARAMETERS])

    def _continue(self, id_file: Path) -> str:
        """Return the id of an earlier part of the run, which then runs again; empty if there is none at this place."""
        from mlflow.exceptions import MlflowException

        if not id_file.is_file():
            return ""
        run_id = id_file.read_text(encoding="utf-8")
        try:
            self._client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # the latter: deleted
                raise
            return ""
        return run_id

    def _start(self, experiment: str, run_folder: Path) -> str:
        found = self._client.get_experiment_by_name(experiment)
        number = self._client.create_experiment(experiment) if found is None else found.experiment_id
        run_id: str = self._client.create_run(number, run_name=run_folder.name).info.run_id
        with atomic_write(run_folder / "mlflow_id.txt", "w") as file:
            file.write(run_id)
        return run_id

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        self.log_rows([(iteration, values)])

    def log_rows(self, rows: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        now = round(time.time() * 1000)  # milliseconds
        metrics = [
            self._metric(re.sub(r"[^\w.\-/ ]", "_", name), float(value), now, iteration)
            for iteration, values in rows
            for name, value in values.items()
        ]
        with self._errors_translated():
            for i in range(0, len(metrics), MLFLOW_METRICS):
                self._client.log_batch(self._id, metrics=metrics[i : i + MLFLOW_METRICS])

    def close(self) -> None:
        with self._errors_translated():
            self._client.set_terminated(self._id)

    @contextmanager
    def _errors_translated(self, of_settings: bool = False) -> Iterator[None]:
        """Raise ConnectionError for MLflow's own errors; ValueError for an address or name that it does not take."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except (MlflowException, JSONDecodeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if of_settings and getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE":
                raise ValueError(f"train.mlflow: {reason}; correct its tracking_uri or experiment") from error
            raise ConnectionError(f"MLflow: {reason}") from error


def _flattened(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (section.key, value) of all keys of nested mappings."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


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
    if train.mlflow.enabled:
        try:
            trackers.append(MLflow(train.mlflow, run_folder, config))
        except OSError as error:  # a requeued run goes on while the server is down
            logger.error(DROPPED, "MLflow", error)
    return trackers
