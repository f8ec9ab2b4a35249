"""Checkpoints to resume from: written whole or not at all, the newest few kept, checked when read."""

import logging
import pickle
from pathlib import Path
from typing import Any

import torch

from dinov2.utils.files import atomic_write

logger = logging.getLogger("dinov2")

_PREFIX, _SUFFIX = "iteration_", ".pth"


class Checkpointer:
    """Keeps `<folder>/iteration_<n>.pth`, n being the number of iterations done."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def save(self, iteration: int, state: dict[str, Any]) -> Path:
        """Write the state after `iteration` iterations, then remove the oldest beyond `keep`."""
        for torn in self.folder.glob(f".{_PREFIX}*.tmp"):
            torn.unlink()  # a process that was killed while it wrote could not remove it
        path = self.folder / f"{_PREFIX}{iteration:07d}{_SUFFIX}"
        with atomic_write(path) as file:
            torch.save({"iteration": iteration, **state}, file)
        for old in self.paths()[: -self.keep]:
            old.unlink()
        logger.info("checkpoint: %s", path)
        return path

    def paths(self) -> list[Path]:
        """All checkpoints, oldest first."""
        found = [p for p in self.folder.glob(f"{_PREFIX}*{_SUFFIX}") if _number(p) is not None]
        return sorted(found, key=lambda path: _number(path) or 0)

    def load_latest(self) -> dict[str, Any] | None:
        """The newest state that can be read, on the CPU; None if there is no checkpoint.

        Raises:
            ValueError: there are checkpoints and none can be read.
        """
        paths = self.paths()
        for path in reversed(paths):
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
                logger.warning("checkpoint %s cannot be read (%s); trying the one before", path, _first_line(error))
                continue
            if not isinstance(state, dict) or state.get("iteration") != _number(path):
                logger.warning("checkpoint %s does not hold what its name says; trying the one before", path)
                continue
            return state
        if paths:
            raise ValueError(
                f"none of the {len(paths)} checkpoints in {self.folder} can be read; "
                "start under another --name, or remove that folder if nothing in it is needed"
            )
        return None


def _number(path: Path) -> int | None:
    digits = path.name.removeprefix(_PREFIX).removesuffix(_SUFFIX)
    return int(digits) if digits.isdigit() else None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
