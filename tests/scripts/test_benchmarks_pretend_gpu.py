"""The counts of a step on the pretend GPU: which way fits a memory, and the traffic of operations."""

import pytest
import torch


@pytest.fixture
def pretend_gpu(script):
    return script("pretend_gpu")


def test_a_memory_gets_the_first_way_that_leaves_room_for_cuda(pretend_gpu):
    peaks = {"1 False": 39.5, "1 True": 15.5, "2 False": 22.0, "2 True": 9.0, "4 False": 14.0, "4 True": 7.0}
    peaks |= {"8 False": 10.0, "8 True": 6.0}
    counts = {"S": {name: {"peak_gib": peak} for name, peak in peaks.items()}}
    row = pretend_gpu.fit_table(counts).splitlines()[-1]
    cells = [
        "2 micro-batches of 76, checkpointing: 9.0",
        "checkpointing: 15.5",
        "checkpointing: 15.5",
        "as it is: 39.5",
    ]
    assert row == f"| ViT-S, 152 | {' | '.join(cells)} |"


def test_a_memory_that_no_way_fits_says_so(pretend_gpu):
    counts = {"G": {f"{n} {checkpointing}": {"peak_gib": 20.0} for n, checkpointing in pretend_gpu.ways_to_fit("G")}}
    assert pretend_gpu.fit_table(counts).splitlines()[-1].startswith("| ViT-G, 26 | no | as it is: 20.0 |")


def test_traffic_is_of_inputs_and_outputs_on_the_device(pretend_gpu):
    traffic = pretend_gpu.Traffic()
    with traffic:
        torch.ones(4) + 1
    assert not traffic.gib["rest"]  # the CPU's memory is not counted
