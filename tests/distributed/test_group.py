"""What processes do together, with four of them; and that a lone one gets the same answers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dinov2.distributed import all_gather_objects, all_gather_rows, any_rank, average_over_ranks, on_main_process

PROGRAM = """
import json, sys, torch
from dinov2 import distributed
from dinov2.distributed import all_gather_objects, all_gather_rows, any_rank, average_over_ranks, get_rank
from dinov2.distributed import on_main_process

distributed.enable(distributed.read_launch(), torch.device("cpu"), 60)
rank = get_rank()
out = {"ran": []}
out["result"] = on_main_process(lambda: out["ran"].append(rank) or "of rank 0")
try:
    on_main_process(lambda: (_ for _ in ()).throw(PermissionError("cannot write")))
except PermissionError as error:
    out["error"] = str(error)
out["objects"] = all_gather_objects({"rank": rank})
out["rows"] = all_gather_rows(torch.full((2, 1), float(rank))).flatten().tolist()
out["steps"] = []
for step in range(3):
    means = average_over_ranks({"loss": torch.tensor(float(rank))})
    out["steps"].append([means["loss"].item(), any_rank((rank, step) == (2, 1))])
json.dump(out, open(f"{sys.argv[1]}/{rank}.json", "w"))
distributed.disable()
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("group")
    program = folder / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=4", "--rdzv-backend=c10d"]
    done = subprocess.run(
        [*command, "--rdzv-endpoint=localhost:0", str(program), str(folder)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(4)]


def test_the_main_process_acts_and_all_learn_what_came_of_it(answers):
    assert [answer["ran"] for answer in answers] == [[0], [], [], []]
    assert {answer["result"] for answer in answers} == {"of rank 0"}
    assert {answer["error"] for answer in answers} == {"cannot write"}


def test_everybody_has_everything_by_rank(answers):
    for answer in answers:
        assert answer["objects"] == [{"rank": rank} for rank in range(4)]
        assert answer["rows"] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_numbers_are_averaged_and_all_stop_in_the_same_step(answers):
    for answer in answers:
        assert answer["steps"] == [[1.5, False], [1.5, True], [1.5, False]]


def test_alone():
    assert on_main_process(lambda: 3) == 3
    assert all_gather_objects("own") == ["own"]
    rows = torch.ones(2, 3, requires_grad=True)
    assert torch.equal(all_gather_rows(rows), rows)
    assert not all_gather_rows(rows).requires_grad
    loss = torch.tensor(2.0)
    assert average_over_ranks({"loss": loss})["loss"] is loss
    assert any_rank(True)
    assert not any_rank(False)
