"""Folders of torch.distributed.checkpoint give tensors, and run nothing."""

import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from dinov2.fsdp.checkpoint import Checkpointer
from dinov2.utils.sharded_checkpoints import TensorReader, read_tensors


class RunsCode:
    """Makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


@pytest.fixture
def folder(tmp_path):
    tensors = {
        "model": {"teacher": {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}},
        "optimizer": {"a": {"step": torch.tensor(3)}},
    }
    checkpoints = Checkpointer(tmp_path / "checkpoints", 1)
    checkpoints.save(7, tensors, {})
    assert checkpoints.wait()
    return checkpoints.path_of(7)


def test_wanted_tensors_come_whole_with_their_types(folder, recwarn):
    tensors = read_tensors(folder, lambda name: name.startswith("model."))
    assert tensors.keys() == {"model.teacher.a", "model.teacher.b"}
    assert torch.equal(tensors["model.teacher.a"], torch.arange(6.0).view(2, 3))
    assert tensors["model.teacher.b"].dtype == torch.bfloat16
    assert read_tensors(folder, lambda name: False) == {}
    assert not recwarn.list


def test_metadata_that_would_run_code_are_refused(folder, tmp_path):
    trace = tmp_path / "trace"
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = RunsCode(trace)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"\.metadata holds a \S*open, and to make one would run code"):
        read_tensors(folder, lambda name: True)
    assert not trace.exists()


@pytest.mark.parametrize(
    "stolen", ["os.system", "torch.load", "torch.distributed.checkpoint.metadata.field", "builtins.eval"]
)
def test_no_other_name_is_looked_up(folder, stolen):
    module, _, name = stolen.rpartition(".")
    (folder / ".metadata").write_bytes(f"c{module}\n{name}\n.".encode())
    with pytest.raises(ValueError, match=f"holds a {stolen}"):
        read_tensors(folder, lambda name: True)


def test_a_value_that_is_no_tensor_is_not_unpickled(tmp_path):
    trace = tmp_path / "trace"
    folder = tmp_path / "made elsewhere"
    dcp.save({"weight": RunsCode(trace)}, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    trace.unlink(missing_ok=True)  # torch copies values when it saves
    with pytest.raises(CheckpointException, match="no tensors there"):
        dcp.load({"weight": torch.zeros(2)}, storage_reader=TensorReader(folder), no_dist=True)
    assert read_tensors(folder, lambda name: True) == {}
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"\x80", b"hello", pickle.dumps([1, 2]), pickle.dumps({"a": 1})[:-3]])
def test_other_metadata_are_named(folder, content):
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match="iteration_0000007"):
        read_tensors(folder, lambda name: True)


def test_missing_and_cut_data_are_named(folder):
    data = folder / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(ValueError, match="iteration_0000007"):
        read_tensors(folder, lambda name: True)
    data.unlink()
    with pytest.raises(ValueError, match="__0_0.distcp"):
        read_tensors(folder, lambda name: True)
