"""Read folders of torch.distributed.checkpoint without running code in them.

torch unpickles a folder's `.metadata` and values that are no tensors, and a pickle can call any function. Here the
metadata may contain only descriptions of tensors, other values are errors, and tensors are read with
`weights_only=True`.
"""

import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, LoadPlan, LoadPlanner, Metadata
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType
from torch.futures import Future

from dinov2.utils.files import check_regular_file

METADATA_FILE = ".metadata"

# errors of unpickling bytes that are no pickle, or an incomplete one
_UNREADABLE = (
    *(pickle.UnpicklingError, EOFError, OSError, RuntimeError),
    *(ValueError, AttributeError, LookupError, TypeError),
)

_ALLOWED = {
    "torch.distributed.checkpoint.metadata": "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex "
    "StorageMeta TensorProperties TensorStorageMetadata _MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch": "Size",
    "torch.serialization": "_get_layout",  # looks a layout up by its name
    "collections": "OrderedDict",
    # where the folder was; moved in Python 3.13
    **dict.fromkeys(("pathlib", "pathlib._local"), "PosixPath WindowsPath"),
}


class _DescriptionUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, "").split() or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{METADATA_FILE} holds a {module}.{name}, and to make one would run code")


class TensorReader(FileSystemReader):
    """Reads only tensors; other content is a pickle.UnpicklingError (dcp.load: a CheckpointException)."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(check_regular_file(Path(self.path) / METADATA_FILE), "rb") as file:
            metadata = _DescriptionUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"{METADATA_FILE} holds a {type(metadata).__name__}, not a list of tensors")
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> "Future[None]":
        for place in {self.storage_data[item.storage_index].relative_path for item in plan.items}:
            if Path(place).name != place:
                raise ValueError(f"{METADATA_FILE} names {place[:80]!r}, which is no file of this folder")
            check_regular_file(Path(self.path) / place)
        values = [item.dest_index.fqn for item in plan.items if item.type == LoadItemType.BYTE_IO]
        if values:  # the planner would unpickle these
            raise pickle.UnpicklingError(f"{', '.join(values[:3])}: no tensors there, and to read them may run code")
        return super().read_data(plan, planner)


def read_tensors(folder: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Read the whole tensors whose dotted names are `wanted` to the CPU, however many processes wrote them."""
    try:
        entries = {
            name: entry
            for name, entry in TensorReader(folder).read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and wanted(name)
        }
        needed = sum(math.prod(entry.size) * entry.properties.dtype.itemsize for entry in entries.values())
        stored = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        if needed > stored:
            raise ValueError(f"{METADATA_FILE} lists tensors of {needed} bytes, and the files have {stored}")
        tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
        with warnings.catch_warnings():  # torch warns that one process reads what many may have written
            warnings.filterwarnings("ignore", message="torch.distributed is disabled|TypedStorage is deprecated")
            dcp.load(dict(tensors), storage_reader=TensorReader(folder), no_dist=True)
    except (CheckpointException, *_UNREADABLE) as error:
        raise ValueError(f"{folder}: {first_error_line(error)}") from error
    return tensors


def first_error_line(error: BaseException) -> str:
    """Return an error's first line; of an error of several processes, that of the first process."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return (str(error).splitlines() or [type(error).__name__])[0]
